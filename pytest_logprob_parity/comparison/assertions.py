"""Assertion helpers for two traces in hand; both sides are keywords, for a swap would flip every sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ParityError
from ..golden.reference import Reference
from ..trace import Trace
from .compare import compare
from .message import failure_message
from .objectives import DEFAULT_OBJECTIVE
from .result import Comparison, MismatchError
from .tally import TALLY
from .tolerance import Tolerance


def assert_logprobs_close(
    *,
    actual: Trace,
    expected: Trace,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    objective: str = DEFAULT_OBJECTIVE,
    reference: Reference | None = None,
) -> Comparison:
    """Assert that the logprobs of identical tokens agree within the tolerance; returns the comparison.

    `objective` and `reference` are those of `compare`. Raises MismatchError with the worst tokens and all limits.
    """
    __tracebackhide__ = True
    comparison = compare(expected=expected, actual=actual, tolerance=tolerance, objective=objective, reference=reference)
    if not comparison.passed:
        message = failure_message(
            comparison,
            golden=f"expected: {expected.engine} {expected.engine_version}, {expected.dtype}, {expected.distribution()}",
            about=[],
            differences=_label_differences(expected, actual),
            accept="widen tolerance=, or make `actual` the expected side",
        )
        raise MismatchError(message, comparison)
    return comparison


def assert_tokens_equal(*, actual: Trace, expected: Trace) -> None:
    """Assert that both traces have the same prompts and tokens. Raises ParityError naming the first that differs."""
    __tracebackhide__ = True
    TALLY.made += 1
    if actual.num_sequences != expected.num_sequences:
        raise ParityError(f"the actual trace has {actual.num_sequences} sequences, the expected one {expected.num_sequences}")
    for sequence in range(expected.num_sequences):
        if actual.prompt(sequence) != expected.prompt(sequence):
            raise ParityError(f"sequence {sequence} has another prompt in the actual trace than in the expected one")
        actual_ids, expected_ids = np.array(actual.completion(sequence)), np.array(expected.completion(sequence))
        common = min(len(actual_ids), len(expected_ids))
        differs = np.flatnonzero(actual_ids[:common] != expected_ids[:common])
        if len(differs) or len(actual_ids) != len(expected_ids):
            place = int(differs[0]) if len(differs) else common
            text = [
                repr(t.text(int(ids[place]))) if place < len(ids) else "the end"
                for t, ids in ((expected, expected_ids), (actual, actual_ids))
            ]
            raise ParityError(f"sequence {sequence} differs at position {place}: expected {text[0]}, actual {text[1]}")


def _label_differences(expected: Trace, actual: Trace) -> list[tuple[str, Any, Any]]:
    names = ("engine", "engine_version", "dtype", "logprobs_mode", "path")
    return [(n, getattr(expected, n), getattr(actual, n)) for n in names if getattr(expected, n) != getattr(actual, n)]
