"""The columns of a trace: their table, their dtypes, how they are checked, and helpers that make them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .routing import check_routing

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

#: What the first axis of a column counts.
Axis: TypeAlias = Literal["prompt tokens", "groups + 1", "tokens", "sequences + 1", "sequences", "kept tokens"]


class Column(NamedTuple):
    """A column of the file format: its dtype, what its first axis counts, and whether every trace has it."""

    dtype: str
    axis: Axis
    required: bool


#: The columns by name: the file format, and the order of reading.
COLUMNS: Final[Mapping[str, Column]] = {
    "prompt_token_ids": Column("int32", "prompt tokens", True),
    "prompt_offsets": Column("int64", "groups + 1", True),
    "token_ids": Column("int32", "tokens", True),
    "sequence_offsets": Column("int64", "sequences + 1", True),
    "logprobs": Column("float32", "tokens", True),
    "ranks": Column("int32", "tokens", True),
    "mask": Column("bool", "tokens", True),
    "top_token_ids": Column("int32", "tokens", True),
    "top_logprobs": Column("float32", "tokens", True),
    "finish_reasons": Column("uint8", "sequences", True),
    "group": Column("int32", "sequences", True),
    "sample": Column("int32", "sequences", True),
    "episode": Column("int32", "sequences", True),
    "turn": Column("int32", "sequences", True),
    "seeds": Column("int64", "sequences", True),
    "untruncated_logprobs": Column("float32", "tokens", False),
    "kept_counts": Column("int32", "tokens", False),
    "kept_token_ids": Column("int32", "kept tokens", False),
    "routed_experts": Column("int16", "tokens", False),
    "router_margins": Column("float16", "tokens", False),
    "router_inputs": Column("float16", "tokens", False),
    "weight_versions": Column("int32", "tokens", False),
    "trainer_logprobs": Column("float32", "tokens", False),
    "trainer_entropies": Column("float32", "tokens", False),
}
#: Columns that not every trace has, with one entry for each token; kept sets have two columns that go together.
OPTIONAL: Final = (
    "untruncated_logprobs", "routed_experts", "router_margins", "router_inputs", "weight_versions", "trainer_logprobs",
    "trainer_entropies",
)  # fmt: skip

#: Why a sequence ended, as coded in the column `finish_reasons`.
FinishReason: TypeAlias = Literal["unknown", "stop", "length", "abort"]
FINISH_REASONS: Final[tuple[FinishReason, ...]] = get_args(FinishReason)

#: What OpenAI-compatible servers write for a logprob of -inf, for which JSON has no word (vLLM: `max(logprob, -9999.0)`).
MINUS_INFINITY: Final = -9999.0
#: Columns of logprobs, in which the number above is read as -inf.
_LOGPROBS: Final = ("logprobs", "top_logprobs", "untruncated_logprobs", "trainer_logprobs")

#: How many axes a column has, where it has more than one.
_AXES: Final = {"top_token_ids": 2, "top_logprobs": 2, "routed_experts": 3, "router_margins": 2, "router_inputs": 2}

#: Columns of token ids, and the smallest id that is allowed there: -1 is a place of the top-k that is not used.
_LEAST_IDS: Final = {"prompt_token_ids": 0, "token_ids": 0, "top_token_ids": -1, "kept_token_ids": 0}

#: In the column `seeds`: the seed of the sequence is not known, so it cannot be sampled again.
NO_SEED: Final = -1


# -- checking ---------------------------------------------------------------------------------------------------------


def checked_columns(columns: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The columns of a trace that are not None, with -9999.0 in logprobs replaced by -inf.

    Raises UsageError for columns that do not fit COLUMNS or do not fit together.
    """
    tokens, sequences = len(columns["token_ids"]), len(columns["sequence_offsets"]) - 1
    groups, prompt_tokens = len(columns["prompt_offsets"]) - 1, len(columns["prompt_token_ids"])
    counts = columns.get("kept_counts")
    if (counts is None) != (columns.get("kept_token_ids") is None):
        raise UsageError("Trace columns kept_counts and kept_token_ids go together: one of them is missing")
    if counts is not None and np.min(counts, initial=0) < 0:
        raise UsageError(f"Trace column kept_counts must hold 0 or more, not {np.min(counts)}")
    lengths: Mapping[Axis, int] = {
        "prompt tokens": prompt_tokens,
        "groups + 1": groups + 1,
        "tokens": tokens,
        "sequences + 1": sequences + 1,
        "sequences": sequences,
        "kept tokens": 0 if counts is None else int(np.sum(counts, dtype=np.int64)),
    }
    checked = {
        name: _checked(name, columns[name], lengths[column.axis])
        for name, column in COLUMNS.items()
        if column.required or columns[name] is not None
    }
    if checked["top_token_ids"].shape != checked["top_logprobs"].shape:
        raise UsageError("Trace columns top_token_ids and top_logprobs must have one shape, [tokens, k]")
    check_routing(checked)
    for name, last in (("prompt_offsets", prompt_tokens), ("sequence_offsets", tokens)):
        offsets = checked[name]
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != last or np.any(np.diff(offsets) < 0):
            raise UsageError(f"Trace column {name} must rise from 0 to {last}")
    if sequences and checked["finish_reasons"].max() >= len(FINISH_REASONS):
        raise UsageError(f"Trace column finish_reasons must hold 0 to {len(FINISH_REASONS) - 1}")
    if sequences and (checked["group"].min() < 0 or checked["group"].max() >= groups):
        raise UsageError(f"Trace column group points outside its {groups} prompts")
    return checked


def _checked(name: str, column: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """One column, with -9999.0 in logprobs replaced by -inf. Raises UsageError for another shape, dtype or for wrong ids."""
    dtype, axis, _ = COLUMNS[name]
    if column.ndim != _AXES.get(name, 1):
        raise UsageError(f"Trace column {name} has the shape {column.shape}")
    if len(column) != length:
        raise UsageError(f"Trace column {name} has {len(column)} rows, {axis} are {length}")
    if column.dtype != np.dtype(dtype):
        raise UsageError(f"Trace column {name} is {column.dtype}, expected {dtype}")
    least = _LEAST_IDS.get(name)
    if least is not None and column.size and column.min() < least:
        place = int(np.argmax((column if column.ndim == 1 else column.min(axis=1)) < least))
        raise UsageError(
            f"Trace column {name}, row {place}: token id {column.min()} is no token: a label or a filler among the ids"
            f"; ids are {least} and above"
        )
    if name in _LOGPROBS and (excluded := column == MINUS_INFINITY).any():
        return np.where(excluded, np.float32(-np.inf), column)
    return column


# -- making -----------------------------------------------------------------------------------------------------------


def column_of(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Values in the column's dtype. Raises UsageError where they do not fit it, or would have to be rounded."""
    dtype = np.dtype(COLUMNS[name].dtype)
    try:
        given = np.asarray(values)
        with np.errstate(over="ignore"):  # beyond float32 is -inf
            column = np.asarray(given, dtype)
        exact = dtype.kind == "f" or not given.size or (given.dtype.kind in "iufb" and bool(np.all(column == given)))
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"Trace column {name} is not {dtype}: {error}") from None
    if not exact:
        raise UsageError(f"Trace column {name} is not {dtype}: its values are {given.dtype} and do not fit")
    return column


def offsets_of(rows: Iterable[Sequence[Any] | npt.NDArray[Any]]) -> LongArray:
    """Where each row begins in the concatenation of all, and where the last one ends: int64 [rows + 1]."""
    return np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)


def rows_of(offsets: npt.NDArray[Any]) -> LongArray:
    """The number of the row that each entry of a concatenation belongs to, from `offsets_of` its rows: int64 [entries]."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))


def empty_top_k(tokens: int, k: int = 0) -> tuple[IntArray, FloatArray]:
    """`top_token_ids` and `top_logprobs` [tokens, k] in which no place is used: ids of -1, logprobs of -inf."""
    return np.full((tokens, k), -1, np.int32), np.full((tokens, k), -np.inf, np.float32)


def top_k_columns(rows: Sequence[Sequence[tuple[int, float]]], k: int | None = None) -> tuple[IntArray, FloatArray]:
    """`top_token_ids` and `top_logprobs` [rows, k] from one row of (token id, logprob) for each token, most likely first.

    `k` is at least the length of the longest row, and that by default.
    """
    ids, logprobs = empty_top_k(len(rows), max(map(len, rows), default=0) if k is None else k)
    for i, row in enumerate(rows):
        if row:
            ids[i, : len(row)] = [token for token, _ in row]
            logprobs[i, : len(row)] = [logprob for _, logprob in row]
    return ids, logprobs


def finish_code(reason: object) -> int:
    """The code of a finish reason in the column `finish_reasons`; that of `unknown` for a reason that is not in it."""
    return FINISH_REASONS.index(reason) if reason in FINISH_REASONS else 0


def sample_numbers(groups: npt.NDArray[Any]) -> IntArray:
    """The number of each sequence within its group, in order: int32 [S]."""
    order = np.argsort(groups, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(groups[order])) + 1]) if len(groups) else np.empty(0, int)
    lengths = np.diff(np.concatenate([starts, [len(groups)]]))
    numbers = np.empty(len(groups), np.int32)
    numbers[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return numbers
