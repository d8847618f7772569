"""Where the worst tokens are."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..trace import Trace
from .alignment import Alignment
from .token_diff import TokenDiff

_WORST: Final = 8


def worst_tokens(expected: Trace, actual: Trace, rows: Alignment) -> tuple[TokenDiff, ...]:
    """The tokens that are furthest off, NaN and excluded ones first; none where nothing differs."""
    if not rows.tokens:
        return ()
    order = _furthest(expected.logprobs[rows.expected], actual.logprobs[rows.actual])
    places = np.arange(expected.num_tokens)[rows.expected][order]
    others = np.arange(actual.num_tokens)[rows.actual][order]
    columns = (places, others, expected.sequence_of_token[places])
    return tuple(_token_diff(expected, actual, *row) for row in zip(*(column.tolist() for column in columns), strict=True))


def _furthest(expected: Any, actual: Any) -> Any:
    """Which of the logprobs [n] differ most, in order; of equal ones the first."""
    with np.errstate(invalid="ignore"):
        size = np.abs(actual - expected)
    size = np.where(np.isnan(expected), -1, np.where(np.isnan(size), np.inf, size))
    size[(expected == actual)] = 0
    count = min(_WORST, len(size))
    order = np.argpartition(size, len(size) - count)[len(size) - count :]
    order = order[np.lexsort((order, -size[order]))]
    return order[size[order] > 0]


def _token_diff(expected: Trace, actual: Trace, place: int, other: int, sequence: int) -> TokenDiff:
    """The token that stands at `place` of `expected`, in its sequence `sequence`, and at `other` of `actual`."""
    token_id = int(expected.token_ids[place])
    return TokenDiff(
        sequence=sequence,
        group=int(expected.group[sequence]),
        sample=int(expected.sample[sequence]),
        position=place - int(expected.sequence_offsets[sequence]),
        token_id=token_id,
        text=expected.text(token_id),
        expected=float(expected.logprobs[place]),
        actual=float(actual.logprobs[other]),
        expected_rank=int(expected.ranks[place]),
        actual_rank=int(actual.ranks[other]),
    )
