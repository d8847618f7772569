"""Examine two aligned records for contradictions, and say whether their top-k was judged."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from ...notes import Note
from ...trace import Trace
from ..alignment import Alignment
from ..findings import Cause
from ..sides import Names, Side
from . import between_sides, within_side
from .contradiction import Contradiction, Key, Record
from .side_columns import Columns, Longs

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


def examine(expected: Trace, actual: Trace, rows: Alignment, names: Names = _NAMES) -> Record:
    """Hold chosen logprobs, ranks and top-k of the aligned tokens against each other.

    Clean engines never contradict themselves: vLLM and transformers gave none in a million tokens. So each contradiction that
    is on the actual side, and not on the expected one in like number, is `new`.
    """
    if not rows.tokens:
        return Record(tuple(between_sides.shifted_tokens(expected, actual, rows, names)))
    kept = _looked_at(expected, actual, rows)
    expected_columns = Columns(
        trace=expected, side="expected", rows=np.arange(expected.num_tokens)[rows.expected][kept], name=names.expected
    )
    actual_columns = Columns(
        trace=actual, side="actual", rows=np.arange(actual.num_tokens)[rows.actual][kept], name=names.actual
    )
    found = [*between_sides.shifted_tokens(expected, actual, rows, names)]
    found += [c for c in (between_sides.no_logprob(expected_columns, actual_columns),) if c is not None]
    same_meaning = expected.distribution() == actual.distribution()
    of_expected, of_actual = (
        list(within_side.checks(expected_columns, actual_columns)),
        list(within_side.checks(actual_columns, expected_columns)),
    )
    if same_meaning and not between_sides.chosen_shifted(expected_columns, actual_columns):
        found += [c for c in (between_sides.probability_one(expected_columns, actual_columns),) if c is not None]
        found += _between(expected_columns, actual_columns, of_expected, of_actual)
    shifted = {c.side for c in found if c.key == "top_k_shifted"}
    for side, mine, theirs in ((expected_columns, of_expected, of_actual), (actual_columns, of_actual, of_expected)):
        if side.side not in shifted:
            found += _within(side, mine, theirs)
    if any(c.key in ("no_distribution", "chosen_and_top_k") for c in found):  # that is why they differ
        found = [c for c in found if c.key != "top_k_differs"]
    found.sort(key=lambda c: (not c.new, _ORDER.index(c.key)))
    return Record(tuple(found))


def _within(side: Columns, mine: list[within_side.Check], theirs: list[within_side.Check]) -> list[Contradiction]:
    others = {check.key: check.count for check in theirs if check.certain}
    found = []
    for check in mine:
        if check.count and check.certain:
            new = check.decides and side.side == "actual" and check.count > _LIKE * others.get(check.key, 0)
            text = within_side.in_words(check, side)
            candidates: tuple[Cause, ...] = ("engine_build", "parallelism")
            found.append(
                Contradiction(
                    layer="path",
                    cause=None,
                    evidence=text,
                    candidates=candidates,
                    key=check.key,
                    side=side.side,
                    count=check.count,
                    of=check.of,
                    new=new,
                )
            )
    return found


def _between(
    expected_columns: Columns, actual_columns: Columns, of_expected: list[within_side.Check], of_actual: list[within_side.Check]
) -> list[Contradiction]:  # fmt: skip
    counts = [sum(c.count for c in checks if c.key == "chosen_and_top_k") for checks in (of_expected, of_actual)]
    wrong: Side = "expected" if counts[0] > counts[1] else "actual"
    agreed = between_sides.agree(expected_columns, actual_columns)
    agree = bool(np.mean(agreed) >= _AGREE)
    found = [
        between_sides.shifted_top_k(expected_columns, actual_columns, wrong),
        between_sides.other_ranks(expected_columns, actual_columns, agreed) if agree else None,
    ]
    if found[0] is None and agree:
        found.append(between_sides.other_top_k(expected_columns, actual_columns, agreed))
    known = [c for c in found if c is not None]
    return [c if c.side == "actual" else dataclasses.replace(c, new=False) for c in known]


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


def topk_judged(expected: Trace, actual: Trace, names: Names = _NAMES) -> Note:
    """Whether the top-k was judged, as a note: over the common width where the two sides differ in it."""
    expected_width, actual_width = _width(expected), _width(actual)
    if expected_width and actual_width:
        wider = (
            f" ({names.expected} has a top-{expected_width}, {names.actual} a top-{actual_width})"
            if expected_width != actual_width
            else ""
        )
        return Note("top_k_judged", f"top-{min(expected_width, actual_width)} judged on both sides{wider}")
    lacking = names.actual if expected_width else names.expected
    missing = f"{lacking} has none" if expected_width or actual_width else "neither side has one"
    return Note("top_k_judged", f"top-k not judged: {missing}")


def _width(trace: Trace) -> int:
    """How many places of the top-k are used at all."""
    ids = trace.top_token_ids
    if not len(ids) or (ids[0] >= 0).all():
        return trace.top_k
    return int((ids >= 0).any(axis=0).sum())
