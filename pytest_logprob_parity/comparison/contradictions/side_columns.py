"""What one side says of the aligned tokens: chosen logprob, rank and top-k, and what the top-k says of the chosen token."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...trace import Trace
from ..sides import Side

Bools = npt.NDArray[np.bool_]
Doubles = npt.NDArray[np.float64]
Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: cached_property needs a dict
class Columns:
    """One side's record of n aligned tokens, which stand at `rows` [n] of its trace; `name` is what sentences call it.

    `ids` int [n, K], -1 where a place is not used, and `top` float32 [n, K] (nats; -inf there).
    """

    trace: Trace
    side: Side
    rows: Longs
    name: str

    @functools.cached_property
    def chosen(self) -> Doubles:
        """The chosen logprobs [n]."""
        return self.trace.logprobs[self.rows].astype(np.float64)

    @functools.cached_property
    def ranks(self) -> Any:
        """The ranks [n] from 1; 0 where there is none."""
        return self.trace.ranks[self.rows]

    @functools.cached_property
    def ids(self) -> Any:
        """The token ids of the top-k [n, K]."""
        return self.trace.top_token_ids[self.rows]

    @functools.cached_property
    def used(self) -> Bools:
        """Which places [n, K] of the top-k are used."""
        return np.asarray(self.ids >= 0)

    @functools.cached_property
    def top(self) -> Any:
        """The logprobs of the top-k [n, K]."""
        return np.where(self.used, self.trace.top_logprobs[self.rows], np.float32(-np.inf))

    @functools.cached_property
    def _mine(self) -> Bools:
        return np.asarray(self.used & (self.ids == self.trace.token_ids[self.rows][:, None]))

    @functools.cached_property
    def has(self) -> Bools:
        """Positions [n] that have a top-k."""
        return np.asarray(self.used.any(axis=1))

    @functools.cached_property
    def listed(self) -> Bools:
        """Positions [n] whose top-k lists the chosen token."""
        return np.asarray(self._mine.any(axis=1))

    @functools.cached_property
    def own(self) -> Doubles:
        """What the top-k says of the chosen token [n]; NaN where it does not list it."""
        values = np.where(self._mine, self.top, np.float32(-np.inf)).max(axis=1, initial=-np.inf)
        return np.where(self.listed, values, np.nan).astype(np.float64)

    @functools.cached_property
    def largest(self) -> Doubles:
        """The largest logprob [n] of the top-k; -inf without one."""
        return np.asarray(np.fmax.reduce(self.top, axis=1, initial=-np.inf), np.float64)

    @functools.cached_property
    def last(self) -> Doubles:
        """The smallest logprob [n] that the top-k lists; inf without one."""
        return np.asarray(np.where(self.used, self.top, np.float32(np.inf)).min(axis=1, initial=np.inf), np.float64)

    @functools.cached_property
    def first_of_turn(self) -> Bools:
        """Tokens [n] that begin what one request wrote."""
        mask, starts = self.trace.mask, np.zeros(self.trace.num_tokens, bool)
        starts[1:] = mask[1:] & ~mask[:-1]
        offsets = self.trace.sequence_offsets
        begin = offsets[:-1][offsets[:-1] < offsets[1:]]
        starts[begin] = mask[begin]
        return starts[self.rows]

    @functools.cached_property
    def sequences(self) -> Longs:
        """The sequence number [n] of each token."""
        return self.trace.sequence_of_token[self.rows]


def rounding(values: Doubles) -> Doubles:
    """How far (nats) a number may be from another that should be the same: it may have been rounded on the way."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.maximum(0.02, 1e-3 * np.where(np.isfinite(values), np.abs(values), 0.0)))


def largest_noise(*traces: Trace) -> float:
    """A difference (nats) of one logprob that is noise at most, by the coarsest dtype of these traces."""
    return 0.02 if all(trace.dtype in ("float32", "float64") for trace in traces) else 0.5


def where(columns: Columns, flagged: Bools) -> str:
    """Where the flagged tokens stand, in words: the first of each sequence, one place, or in how many sequences."""
    count, first = int(np.count_nonzero(flagged)), columns.first_of_turn
    of = int(np.count_nonzero(first))
    if count > 1 and np.all(first[flagged]) and count >= 0.9 * of:
        return f"the first token of {count} of {of} turns"
    sequences = columns.sequences[flagged]
    if count == 1:
        position = int(columns.rows[flagged][0] - columns.trace.sequence_offsets[sequences[0]])
        return f"sequence {sequences[0]}, position {position}"
    return f"in {len(np.unique(sequences))} of {len(np.unique(columns.sequences))} sequences"
