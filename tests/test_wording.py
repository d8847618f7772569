"""The grammar of messages: a number stands before what it counts, and one thing is no plural."""

import re

import numpy as np
import pytest
from made_up import make_trace, moved, reference_of

from pytest_logprob_parity import Golden, compare
from pytest_logprob_parity.comparison.message import failure_message
from pytest_logprob_parity.golden import describe

#: One of several things, and a number behind its unit.
WRONG = (
    re.compile(
        r"(?<![\d,.] )(?<![\d.,-])\b1 (?:\w+ )?(?:tokens|sequences|prompts|positions|logprobs|checks|goldens|flips|repeats)\b"
    ),
    re.compile(r"\b(?:flips|tokens|sequences) \d+ (?:tokens|sequences)\b"),
)
TRACE = make_trace(50, 40)


def changed(count, by):
    """The trace with `count` tokens off, each in a sequence of its own."""
    where = np.arange(count) * 40
    logprobs = TRACE.logprobs.copy()
    logprobs[where] = by if not np.isfinite(by) else logprobs[where] + by
    return TRACE.with_(logprobs=logprobs)


@pytest.mark.parametrize("count", [1, 2, 20])
@pytest.mark.parametrize("by", [-0.9, -8.0, -np.inf, np.nan], ids=str)
@pytest.mark.parametrize("level", ["rl", "noise", "bitwise"])
def test_what_a_failure_says(count, by, level):
    comparison = compare(expected=TRACE, actual=changed(count, by), level=level)
    text = failure_message(comparison, golden="g", about=describe(Golden(trace=TRACE)), differences=[], accept="")
    assert not [found[0] for wrong in WRONG for found in wrong.finditer(text)], text


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 1), (1, 40), (2, 1), (50, 40)])
def test_what_a_small_golden_says(sequences, tokens):
    trace = make_trace(sequences, tokens)
    golden = Golden(trace=trace, reference=reference_of(trace, np.full(trace.num_tokens, 0.001)))
    for actual in (trace, moved(trace, 0.2)):
        comparison = compare(expected=trace, actual=actual, reference=golden.reference)
        text = "\n".join(
            [
                failure_message(comparison, golden="g", about=describe(golden), differences=[], accept=""),
                comparison.headline, *comparison.shows, *map(str, comparison.notes),
            ]
        )  # fmt: skip
        assert not [found[0] for wrong in WRONG for found in wrong.finditer(text)], text


def test_the_check_can_fail():
    for text in ("1 tokens", "1 distinct sequences", "nucleus flips 1 tokens"):
        assert any(wrong.search(text) for wrong in WRONG)
    for text in ("1 of 50 sequences", "21 tokens", "1 token", "0.1 tokens", "1 of 2 logprobs is NaN"):
        assert not any(wrong.search(text) for wrong in WRONG)
