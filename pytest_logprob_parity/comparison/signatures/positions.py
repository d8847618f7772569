"""What both sides say of the same tokens at the same position: the table that signatures are read from."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...trace import Trace
from ..alignment import Alignment
from ..sides import Names, Side

Doubles = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: More positions than this make no fit better; of longer comparisons, sequences are taken at even distances.
MOST: Final = 20_000
#: So many are enough to see whether there is anything to look for, where no size says so.
GLANCE: Final = 4_000
_NAMES: Final = Names()
#: Elements of the table, [positions, tokens]: a top-k of the whole vocabulary is looked at in fewer positions.
_LARGEST: Final = 4_000_000
#: Noise is what most positions have: the others may have another reason to be far.
_NEAREST: Final = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: cached_property needs a dict
class Positions:
    """n positions, m tokens each: the chosen one, then the golden's top-k without it.

    `ids` int64 [n, m], -1 where there is no token. `expected` and `actual` float64 [n, m]: logprobs in nats, -inf where
    truncation excluded the token, NaN where a side does not say. `expected_rows` and `actual_rows` [n] are the tokens' places
    in the two traces, `sequences` [n] their sequences; `names` are what sentences call the two sides.
    """

    expected_trace: Trace
    actual_trace: Trace
    expected_rows: npt.NDArray[np.int64]
    actual_rows: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    expected: Doubles
    actual: Doubles
    names: Names = _NAMES

    @functools.cached_property
    def common(self) -> Bools:
        """Tokens [n, m] that both sides give a finite logprob."""
        return np.asarray(np.isfinite(self.expected) & np.isfinite(self.actual))

    def off_line(self, slope: float) -> Doubles:
        """What is left [n, m] of actual - slope x expected; NaN where a side has no finite number."""
        expected, actual = (np.where(self.common, side, np.nan) for side in (self.expected, self.actual))
        return np.asarray(actual - slope * expected)

    def noise(self, slope: float) -> float:
        """What `slope` leaves of the differences between tokens of one position (nats, RMS without the furthest tenth)."""
        two = self.of(self.common.sum(axis=1) >= 2)
        if not len(two.expected_rows):
            return 0.0
        off = two.off_line(slope)
        spread = np.nanmean((off - np.nanmean(off, axis=1, keepdims=True)) ** 2, axis=1)
        return float(np.sqrt(np.mean(np.sort(spread)[: max(int(_NEAREST * len(spread)), 1)])))

    @functools.cached_property
    def _seen(self) -> tuple[Bools, npt.NDArray[np.int64]]:
        seen, counts = np.zeros(self.ids.shape, bool), np.zeros(self.ids.shape, np.int64)
        for start, stop, history in _written(self.expected_trace, set(self.sequences.tolist())):
            inside = np.flatnonzero((self.expected_rows >= start) & (self.expected_rows < stop))
            ids = self.ids[inside]
            # Each token of the run as one number, ordered by its id, then by its place: how many of an id stand before a place.
            length, written = stop - start, self.expected_trace.token_ids[start:stop].astype(np.int64)
            order = np.sort(written * length + np.arange(length))
            before = np.searchsorted(order, ids * length + (self.expected_rows[inside] - start)[:, None])
            counts[inside] = np.where(ids >= 0, before - np.searchsorted(order, ids * length), 0)
            seen[inside] = (counts[inside] > 0) | (np.isin(ids, history) & (ids >= 0))
        return seen, counts

    @property
    def seen(self) -> Bools:
        """Tokens [n, m] that stand in the prompt or before the position: what a repetition penalty moves."""
        return self._seen[0]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How often [n, m] each token was written before: what presence and frequency penalties go by."""
        return self._seen[1]

    def of(self, chosen: Any) -> Positions:
        """These positions only (a mask or an index over n)."""
        return Positions(
            expected_trace=self.expected_trace,
            actual_trace=self.actual_trace,
            expected_rows=self.expected_rows[chosen],
            actual_rows=self.actual_rows[chosen],
            sequences=self.sequences[chosen],
            ids=self.ids[chosen],
            expected=self.expected[chosen],
            actual=self.actual[chosen],
            names=self.names,
        )

    def side(self, side: Side) -> tuple[Trace, npt.NDArray[np.int64], str]:
        """One side: its trace, the tokens' places [n] in it, and what sentences call it."""
        if side == "expected":
            return self.expected_trace, self.expected_rows, self.names.expected
        return self.actual_trace, self.actual_rows, self.names.actual


def positions_of(
    expected: Trace, actual: Trace, rows: Alignment, sequences: Any = None, names: Names = _NAMES, most: int = MOST
) -> Positions:  # fmt: skip
    """The table over the aligned tokens, of `sequences` alone where they are given, thinned out to `most`."""
    places, others = np.arange(expected.num_tokens)[rows.expected], np.arange(actual.num_tokens)[rows.actual]
    owner = expected.sequence_of_token[rows.expected]
    if sequences is not None:
        taken = np.isin(owner, sequences)
        places, others, owner = places[taken], others[taken], owner[taken]
    most = min(most, max(_LARGEST // (1 + max(expected.top_k, actual.top_k)), 1))
    if len(places) > most:
        owners = np.flatnonzero(np.bincount(owner))
        kept = np.zeros(expected.num_sequences, bool)
        kept[owners[np.linspace(0, len(owners) - 1, max(int(len(owners) * most / len(places)), 1)).astype(np.int64)]] = True
        taken = kept[owner]
        places, others, owner = places[taken][:most], others[taken][:most], owner[taken][:most]
    chosen = expected.token_ids[places].astype(np.int64)[:, None]
    top = expected.top_token_ids[places].astype(np.int64)
    top = np.where(top == chosen, -1, top)
    ids = np.concatenate([chosen, top], axis=1)
    of_expected = np.concatenate([expected.logprobs[places][:, None], expected.top_logprobs[places]], axis=1).astype(np.float64)
    of_expected[ids < 0] = np.nan
    of_actual = _look_up(ids, actual.top_token_ids[others].astype(np.int64), actual.top_logprobs[others].astype(np.float64))
    of_actual[:, 0] = actual.logprobs[others]
    return Positions(
        expected_trace=expected,
        actual_trace=actual,
        expected_rows=places,
        actual_rows=others,
        sequences=owner,
        ids=ids,
        expected=of_expected,
        actual=of_actual,
        names=names,
    )


def _look_up(ids: npt.NDArray[np.int64], listed: npt.NDArray[np.int64], values: Doubles) -> Doubles:
    """What `values` [n, k] say of `ids` [n, m] at each position, by the ids that are `listed` [n, k]; NaN where none does.

    Position and id make one number, so that all positions are searched at once; of an id that stands twice, the last one.
    """
    if not listed.size:
        return np.full(ids.shape, np.nan)
    span = int(max(ids.max(initial=0), listed.max(initial=0))) + 2
    rows = np.arange(len(ids))[:, None] * span + 1  # an id of -1, an empty place, is 0 of its position
    keys = (rows + listed).ravel()
    order = np.argsort(keys, kind="stable")
    wanted = rows + ids
    place = np.searchsorted(keys[order], wanted, side="right") - 1
    found = (place >= 0) & (ids >= 0)
    found &= keys[order][np.maximum(place, 0)] == wanted
    return np.asarray(np.where(found, values.ravel()[order][np.maximum(place, 0)], np.nan))


def _written(trace: Trace, sequences: set[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Each run of tokens that one request wrote, and what stood before it."""
    for segment in trace.segments():
        if segment.sequence in sequences:
            start, _ = trace.bounds(segment.sequence)
            yield (
                segment.start,
                segment.stop,
                [*trace.prompt(segment.sequence), *trace.token_ids[start : segment.start].tolist()],
            )
