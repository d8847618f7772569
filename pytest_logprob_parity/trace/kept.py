"""Kept sets: the tokens that top-p, top-k or min-p kept at each token, as columns; read from a caller, checked, compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .columns import IntArray, LongArray, column_of

#: Constants of splitmix64, a mixer whose outputs for different inputs are as good as independent.
_STEP, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHOWN: Final = 8


def kept_of_sequence(sequence: Mapping[str, Any], length: int) -> dict[str, IntArray]:
    """The columns `kept_counts` and `kept_token_ids` of a caller's sequence of `length` tokens; {} where it has none.

    `kept_token_ids` has one list of ids for each token, None or [] where nothing is known; or it is flat, with how many ids
    each token has in `kept_counts`. Raises UsageError, without the sequence's name.
    """
    ids, counts = sequence.get("kept_token_ids"), sequence.get("kept_counts")
    if ids is None:
        if counts is not None:
            raise UsageError("kept_counts without kept_token_ids")
        return {}
    if counts is None:
        rows = [() if row is None else row for row in ids]
        if any(np.ndim(row) != 1 for row in rows):
            raise UsageError("kept_token_ids has one list of token ids for each token, or None")
        counts = [len(row) for row in rows]
        ids = np.concatenate([np.asarray(row) for row in rows if len(row)] or [np.empty(0, np.int32)])
    counts, ids = column_of("kept_counts", counts), column_of("kept_token_ids", ids)
    if len(counts) != length:
        raise UsageError(f"{length} token_ids but {len(counts)} kept_counts")
    if (total := int(counts.sum(dtype=np.int64))) != len(ids) or counts.min(initial=0) < 0:
        raise UsageError(f"kept_counts add up to {total:,}, kept_token_ids has {len(ids):,} ids")
    return {"kept_counts": counts, "kept_token_ids": ids}


def checked_kept(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a trace, with the ids of each kept set in rising order.

    Raises UsageError for a kept set that names a token twice, and for one without the token that was taken, unless that token
    has a logprob of -inf: then truncation excluded it.
    """
    counts, ids = columns.get("kept_counts"), columns.get("kept_token_ids")
    tokens = columns["token_ids"]
    if counts is None or ids is None or counts.shape != tokens.shape or counts.ndim != 1 or ids.ndim != 1:
        return columns  # what does not fit is refused with the other columns
    if counts.min(initial=0) < 0 or int(counts.sum(dtype=np.int64)) != len(ids):
        return columns
    rows = np.repeat(np.arange(len(counts)), counts)
    same = rows[1:] == rows[:-1]
    if np.any(same & (ids[1:] <= ids[:-1])):
        ids = ids[np.lexsort((ids, rows))]
        if len(twice := np.flatnonzero(same & (ids[1:] == ids[:-1]))):
            row = int(rows[twice[0]])
            raise UsageError(f"{_place(columns, row)}: the kept set names token {ids[twice[0]]} twice")
    taken = np.bincount(rows[ids == tokens[rows]], minlength=len(counts))
    lacks = (counts > 0) & (taken == 0) & columns["mask"] & ~np.isneginf(columns["logprobs"])
    if lacks.any():
        row = int(np.argmax(lacks))
        start = int(counts[:row].sum(dtype=np.int64))
        shown = ", ".join(map(str, ids[start : start + min(int(counts[row]), _SHOWN)].tolist()))
        more = ", ..." if counts[row] > _SHOWN else ""
        raise UsageError(
            f"{_place(columns, row)}: the kept set ({shown}{more}) lacks the token that was taken, {tokens[row]}: kept sets of "
            "other tokens, or of another step"
        )
    return {**columns, "kept_token_ids": ids}


def _place(columns: Mapping[str, Any], row: int) -> str:
    sequence = int(np.searchsorted(columns["sequence_offsets"], row, side="right")) - 1
    return f"sequence {sequence}, token {row - int(columns['sequence_offsets'][sequence])}"


def kept_offsets(counts: IntArray) -> LongArray:
    """Where the kept set of each token begins among `kept_token_ids`, and where the last one ends: int64 [N + 1]."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def kept_hashes(counts: Any, ids: Any) -> npt.NDArray[np.uint64]:
    """A number for each token's kept set, [N]: equal sets have equal ones, different sets different ones (but for chance, 1
    in 2^64).
    """
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _STEP
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)])
    offsets = kept_offsets(counts)
    hashes: npt.NDArray[np.uint64] = sums[offsets[1:]] - sums[offsets[:-1]]
    return hashes
