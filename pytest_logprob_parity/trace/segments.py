"""Segments: the runs of unmasked tokens of a trace, each written by one request of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .columns import BoolArray, LongArray, rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens that one request of an engine wrote: `token_ids[start:stop]` of sequence `sequence`.

    A sequence has one segment, or, where masked tokens of the environment stand between, one for each turn.
    """

    sequence: int
    turn: int
    start: int
    stop: int


def segments_of(mask: BoolArray, sequence_offsets: LongArray) -> Iterator[Segment]:
    """The runs of unmasked tokens, sequence by sequence, from the mask [N] and the offsets [S + 1] of the sequences."""
    starts, stops = (np.zeros(len(mask) + 1, bool) for _ in range(2))
    starts[sequence_offsets] = stops[sequence_offsets] = True
    starts[1:-1] |= ~mask[:-1]
    stops[1:-1] |= ~mask[1:]
    first, last = np.flatnonzero(starts[:-1] & mask), np.flatnonzero(stops[1:] & mask) + 1
    sequences = rows_of(sequence_offsets)[first]
    turns = np.arange(len(first)) - np.searchsorted(sequences, sequences)
    for sequence, turn, start, stop in zip(*(x.tolist() for x in (sequences, turns, first, last)), strict=True):
        yield Segment(sequence=sequence, turn=turn, start=start, stop=stop)
