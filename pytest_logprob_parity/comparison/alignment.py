"""Which tokens of two traces may be compared: equal prompts, equal tokens up to there, unmasked on both sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..trace import Trace

#: Rows of a column: all of them, or those that an array names.
Rows = Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """`expected` and `actual` select the same tokens, one by one, from the columns of the two traces.

    `wanted` counts the tokens that should have been compared: all that `expected` does not mask.
    """

    expected: Rows
    actual: Rows
    tokens: int
    wanted: int
    missing_sequences: int
    diverged_sequences: int


def align(expected: Trace, actual: Trace) -> Alignment:
    """Pair the tokens of two traces that stand in the same context."""
    if _same_tokens(expected, actual):
        mask = expected.mask & actual.mask
        count = int(np.count_nonzero(mask))
        rows = slice(None) if count == len(mask) else np.flatnonzero(mask)
        return Alignment(
            expected=rows,
            actual=rows,
            tokens=count,
            wanted=int(np.count_nonzero(expected.mask)),
            missing_sequences=0,
            diverged_sequences=0,
        )
    partners = partners_of(expected, actual)
    left, right, wanted, missing, diverged = [], [], 0, 0, 0
    for sequence in range(expected.num_sequences):
        start, stop = expected.bounds(sequence)
        mask = expected.mask[start:stop]
        wanted += int(np.count_nonzero(mask))
        partner = partners[sequence]
        if partner is None:
            missing += 1
            continue
        other_start, other_stop = actual.bounds(partner)
        common = min(stop - start, other_stop - other_start)
        differs = np.flatnonzero(
            expected.token_ids[start : start + common] != actual.token_ids[other_start : other_start + common]
        )
        diverged += len(differs) > 0 or stop - start != other_stop - other_start
        common = int(differs[0]) if len(differs) else common
        kept = np.flatnonzero(mask[:common] & actual.mask[other_start : other_start + common])
        left.append(start + kept)
        right.append(other_start + kept)
    rows_left = np.concatenate(left) if left else np.empty(0, np.int64)
    rows_right = np.concatenate(right) if right else np.empty(0, np.int64)
    return Alignment(
        expected=rows_left,
        actual=rows_right,
        tokens=len(rows_left),
        wanted=wanted,
        missing_sequences=missing,
        diverged_sequences=diverged,
    )


def _same_tokens(expected: Trace, actual: Trace) -> bool:
    return all(
        a is b or np.array_equal(a, b)
        for name in ("sequence_offsets", "token_ids", "prompt_offsets", "prompt_token_ids", "group")
        for a, b in [(getattr(expected, name), getattr(actual, name))]
    )


def partners_of(expected: Trace, actual: Trace) -> list[int | None]:
    """For each sequence of `expected` the one of `actual` with the same prompt: with the same tokens where there is one, for
    rollouts are collected in any order; else the one with the same number within the prompt, then the next one.
    """
    waiting: dict[Any, list[int]] = defaultdict(list)
    for sequence in range(actual.num_sequences):
        waiting[tuple(actual.prompt(sequence))].append(sequence)
    partners: list[int | None] = [None] * expected.num_sequences
    taken: set[int] = set()

    def pair(same: Callable[[int, int], bool]) -> None:
        for sequence in range(expected.num_sequences):
            if partners[sequence] is None:
                candidates = (c for c in waiting[tuple(expected.prompt(sequence))] if c not in taken and same(sequence, c))
                partners[sequence] = next(candidates, None)
                taken.update({partners[sequence]} - {None})  # type: ignore[arg-type]

    for same in (
        lambda one, other: expected.completion(one) == actual.completion(other),
        lambda one, other: int(expected.sample[one]) == int(actual.sample[other]),
        lambda one, other: True,
    ):
        pair(same)
    return partners
