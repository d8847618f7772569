"""Examine two aligned records for contradictions, and say whether their top-k was judged."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from ...trace import Trace
from ..alignment import Alignment
from ..result import Cause, Finding, Names, Note
from . import between, within
from .columns import Columns, Longs
from .contradiction import Contradiction, Key, Record, Side

#: Elements of a top-k that are looked at; of larger comparisons, sequences at even distances, and all tokens that are far off.
_MOST: Final = 200_000
_FAR: Final = 0.25
_NAMES: Final = Names()
#: What is on the actual side so many times as often as on the expected one is new there.
_LIKE: Final = 2
#: The share of chosen logprobs that agree, beside which a top-k and ranks can be held against each other.
_AGREE: Final = 0.9
_ORDER: Final[tuple[Key, ...]] = (
    "probability_one", "tokens_shifted", "no_logprob", "top_k_shifted", "no_distribution", "above_zero", "mass_above_one",
    "chosen_and_top_k", "above_the_largest", "rank_and_top_k", "top_k_differs", "ranks_differ",
)  # fmt: skip


def contradictions(expected: Trace, actual: Trace, rows: Alignment, names: Names = _NAMES) -> list[Finding]:
    """The contradictions within each side's record and between the two, each with its side and count; those that fail first."""
    return list(examine(expected, actual, rows, names).contradictions)


def examine(expected: Trace, actual: Trace, rows: Alignment, names: Names = _NAMES) -> Record:
    """Hold chosen logprobs, ranks and top-k of the aligned tokens against each other.

    Clean engines never contradict themselves: vLLM and transformers gave none in a million tokens. So each contradiction that
    is on the actual side, and not on the expected one in like number, is `new`.
    """
    if not rows.tokens:
        return Record(tuple(between.shifted_tokens(expected, actual, rows, names)))
    kept = _looked_at(expected, actual, rows)
    golden = Columns(expected, "expected", np.arange(expected.num_tokens)[rows.expected][kept], names.expected)
    now = Columns(actual, "actual", np.arange(actual.num_tokens)[rows.actual][kept], names.actual)
    found = [*between.shifted_tokens(expected, actual, rows, names)]
    found += [c for c in (between.no_logprob(golden, now),) if c is not None]
    same_meaning = expected.distribution() == actual.distribution()
    of_golden, of_now = list(within.checks(golden, now)), list(within.checks(now, golden))
    if same_meaning and not between.chosen_shifted(golden, now):
        found += [c for c in (between.probability_one(golden, now),) if c is not None]
        found += _between(golden, now, of_golden, of_now)
    shifted = {c.side for c in found if c.key == "top_k_shifted"}
    for side, mine, theirs in ((golden, of_golden, of_now), (now, of_now, of_golden)):
        if side.side not in shifted:
            found += _within(side, mine, theirs)
    if any(c.key in ("no_distribution", "chosen_and_top_k") for c in found):  # that is why they differ
        found = [c for c in found if c.key != "top_k_differs"]
    found.sort(key=lambda c: (not c.new, _ORDER.index(c.key)))
    return Record(tuple(found))


def _within(side: Columns, mine: list[within.Check], theirs: list[within.Check]) -> list[Contradiction]:
    others = {check.key: check.count for check in theirs if check.certain}
    found = []
    for check in mine:
        if check.count and check.certain:
            new = check.decides and side.side == "actual" and check.count > _LIKE * others.get(check.key, 0)
            text = within.told(check, side)
            candidates: tuple[Cause, ...] = ("engine_build", "parallelism")
            found.append(
                Contradiction(
                    "path", None, text, candidates, key=check.key, side=side.side, count=check.count, of=check.of, new=new
                )
            )
    return found


def _between(
    golden: Columns, now: Columns, of_golden: list[within.Check], of_now: list[within.Check]
) -> list[Contradiction]:  # fmt: skip
    counts = [sum(c.count for c in checks if c.key == "chosen_and_top_k") for checks in (of_golden, of_now)]
    wrong: Side = "expected" if counts[0] > counts[1] else "actual"
    agreed = between.agree(golden, now)
    agree = bool(np.mean(agreed) >= _AGREE)
    found = [between.shifted_top_k(golden, now, wrong), between.other_ranks(golden, now, agreed) if agree else None]
    if found[0] is None and agree:
        found.append(between.other_top_k(golden, now, agreed))
    told = [c for c in found if c is not None]
    return [c if c.side == "actual" else dataclasses.replace(c, new=False) for c in told]


def _looked_at(expected: Trace, actual: Trace, rows: Alignment) -> slice | Longs:
    """Which of the aligned tokens are looked at: all, or whole sequences and every token that is excluded or far off."""
    most = _MOST // max(expected.top_k, actual.top_k, 1)
    if rows.tokens <= most:
        return slice(None)
    sequences = expected.num_sequences
    some = np.zeros(sequences, bool)
    some[np.linspace(0, sequences - 1, max(sequences * most // rows.tokens, 1)).astype(np.int64)] = True
    e, a = expected.logprobs[rows.expected], actual.logprobs[rows.actual]
    with np.errstate(invalid="ignore"):
        far = np.flatnonzero((np.abs(a - e) > _FAR) | (np.isfinite(a) != np.isfinite(e)))[:most]
    inside = np.flatnonzero(some[expected.sequence_of_token][rows.expected])
    return np.union1d(inside, far)


def topk_judged(expected: Trace, actual: Trace) -> Note:
    """Whether the top-k was judged, as a note: over the common width where the two sides differ in it."""
    here, there = _width(expected), _width(actual)
    if here and there:
        wider = f" (the golden's has {here}, this run's {there})" if here != there else ""
        return Note("top_k_judged", f"top-{min(here, there)} judged on both sides{wider}")
    missing = "neither side has one" if not here and not there else f"{'this run' if here else 'the golden'} has none"
    return Note("top_k_judged", f"top-k not judged: {missing}")


def _width(trace: Trace) -> int:
    """How many places of the top-k are used at all."""
    ids = trace.top_token_ids
    if not len(ids) or (ids[0] >= 0).all():
        return trace.top_k
    return int((ids >= 0).any(axis=0).sum())
