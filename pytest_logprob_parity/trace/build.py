"""The columns of a trace from what a caller has: mappings, one for each sequence, or arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .columns import (
    NO_SEED,
    OPTIONAL,
    IntArray,
    column_of,
    empty_top_k,
    finish_code,
    offsets_of,
    sample_numbers,
    top_k_columns,
)
from .kept import kept_of_sequence
from .routing import EXPERTS, completion_rows

_REQUIRED_KEYS: Final = ("prompt_token_ids", "token_ids", "logprobs")
#: Keys of a sequence with one entry for each token, beside `token_ids`.
_TOKEN_KEYS: Final = ("logprobs", "top_logprobs", "ranks", "mask", *OPTIONAL)
#: Columns that are made of two keys together.
_KEPT: Final = ("kept_counts", "kept_token_ids")
_KEYS: Final = frozenset(
    {*_REQUIRED_KEYS, *_TOKEN_KEYS, *_KEPT, "finish_reason", "group", "sample", "episode", "turn", "seed"}
)  # fmt: skip


# -- from sequences ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Completion:
    """One checked sequence: its prompt, its columns with one entry for each token, and its top-k, most likely first."""

    sequence: Mapping[str, Any]
    prompt: tuple[int, ...]
    columns: Mapping[str, npt.NDArray[Any]]
    top: Sequence[Sequence[tuple[int, float]]]


def columns_of_sequences(sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns of rollouts in hand, as `Trace.from_arrays` takes them; see `Trace.from_sequences` for the keys.

    Raises UsageError naming the sequence and the key that does not fit.
    """
    if not sequences:
        raise _misfit("no sequences")
    completions = [_read(f"sequence {index}", sequence) for index, sequence in enumerate(sequences)]
    for name in (*OPTIONAL, "kept_token_ids"):
        if 0 < sum(name in completion.columns for completion in completions) < len(completions):
            raise _misfit(f"some sequences have {name} and some have not")
    _check_one_shape(completions)
    columns = ("token_ids", "logprobs", "ranks", "mask", *OPTIONAL, *_KEPT)
    names = [name for name in columns if name in completions[0].columns]
    top_ids, top_logprobs = top_k_columns([row for completion in completions for row in completion.top])
    return {
        **{name: np.concatenate([completion.columns[name] for completion in completions]) for name in names},
        "sequence_offsets": offsets_of([completion.columns["token_ids"] for completion in completions]),
        "top_token_ids": top_ids,
        "top_logprobs": top_logprobs,
        **_per_sequence(completions),
    }


def _check_one_shape(completions: Sequence[_Completion]) -> None:
    """Raise UsageError for sequences whose routings have other layers, or other numbers of experts."""
    shapes = [completion.columns[EXPERTS].shape[1:] for completion in completions if EXPERTS in completion.columns]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            this, first = (", ".join(map(str, ("tokens", *sizes))) for sizes in (shape, shapes[0]))
            raise _misfit(
                f"sequence {index}: routed_experts is [{this}], that of sequence 0 [{first}]: one model has one shape"
            )


def _per_sequence(completions: Sequence[_Completion]) -> dict[str, Any]:
    """The columns with one entry for each sequence, and the prompts: sequences with equal prompts form a group."""
    numbers: dict[Any, int] = {}
    prompts: list[IntArray] = []
    groups: list[int] = []
    for completion in completions:
        key: Any = completion.prompt
        if "group" in completion.sequence:
            key = (completion.sequence["group"], completion.prompt)
        if key not in numbers:
            numbers[key] = len(prompts)
            prompts.append(np.asarray(completion.prompt, np.int32))
        groups.append(numbers[key])
    samples = sample_numbers(np.asarray(groups)).tolist()
    sequences = [completion.sequence for completion in completions]
    return {
        "prompt_token_ids": np.concatenate(prompts),
        "prompt_offsets": offsets_of(prompts),
        "group": groups,
        "sample": [s.get("sample", number) for s, number in zip(sequences, samples, strict=True)],
        "episode": [s.get("episode", index) for index, s in enumerate(sequences)],
        "turn": [s.get("turn", 0) for s in sequences],
        "seeds": [NO_SEED if s.get("seed") is None else s["seed"] for s in sequences],
        "finish_reasons": [finish_code(s.get("finish_reason")) for s in sequences],
    }


def _read(where: str, sequence: Mapping[str, Any]) -> _Completion:
    """A sequence, checked. Raises UsageError, naming the sequence (`where`) and the key that does not fit."""
    _check_keys(where, sequence)
    length = len(sequence["token_ids"])
    mask, ranks, tops = sequence.get("mask"), sequence.get("ranks"), sequence.get("top_logprobs")
    values = {
        "token_ids": sequence["token_ids"],
        "logprobs": [np.nan if value is None else value for value in sequence["logprobs"]],
        "mask": np.ones(length, bool) if mask is None else mask,
        "ranks": np.zeros(length, np.int32) if ranks is None else ranks,
    }
    try:
        prompt = tuple(column_of("prompt_token_ids", sequence["prompt_token_ids"]).tolist())
        columns = {name: column_of(name, column) for name, column in values.items()} | kept_of_sequence(sequence, length)
    except UsageError as error:
        raise _misfit(f"{where}: {error}") from None
    columns |= {name: np.asarray(sequence[name]) for name in OPTIONAL if sequence.get(name) is not None}
    if EXPERTS in columns:
        columns[EXPERTS] = _experts(where, columns[EXPERTS], len(prompt), columns["mask"])
    try:
        top: list[list[tuple[int, float]]] = [[]] * length if tops is None else [_top(position) for position in tops]
    except (TypeError, ValueError, AttributeError):
        raise _misfit(f"{where}: top_logprobs has one {{token id: logprob}} for each token, or None") from None
    return _Completion(sequence=sequence, prompt=prompt, columns=columns, top=top)


def _experts(where: str, rows: npt.NDArray[Any], prompt: int, mask: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """The routing of a sequence's tokens, -1 where the environment wrote them; see `completion_rows`."""
    length = len(mask)
    try:
        if mask.all() or rows.ndim != 3 or len(rows) not in (length, prompt + length - 1):
            return completion_rows(rows, prompt, length)
        written = completion_rows(rows[len(rows) - length :][mask], 0, int(mask.sum()))
    except UsageError as error:
        raise _misfit(f"{where}: {error}") from None
    experts = np.full((length, *written.shape[1:]), -1, np.int16)
    experts[mask] = written
    return experts


def _check_keys(where: str, sequence: Any) -> None:
    """Raise UsageError for a sequence that is no mapping, or whose keys are unknown, missing, or of another length."""
    if not isinstance(sequence, Mapping):
        raise _misfit(f"{where} is no mapping but {type(sequence).__name__}")
    unknown = sorted(set(sequence) - _KEYS)
    if unknown:
        raise _misfit(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    for name in _REQUIRED_KEYS:
        if sequence.get(name) is None:
            raise _misfit(f"{where} lacks {name}")
    for name in ("token_ids", *_TOKEN_KEYS, *_KEPT):
        if sequence.get(name) is not None and not hasattr(sequence[name], "__len__"):
            raise _misfit(f"{where}: {name} has one entry for each token, so it is not {sequence[name]!r:.40}")
    length = len(sequence["token_ids"])
    for name in (*_TOKEN_KEYS, "kept_token_ids" if sequence.get("kept_counts") is None else "kept_counts"):
        column = sequence.get(name)
        if column is not None and name != EXPERTS and len(column) != length:
            raise _misfit(f"{where} has {length} token_ids but {len(column)} {name}")


def _top(position: Any) -> list[tuple[int, float]]:
    """One position's top logprobs, most likely first; vLLM's Logprob objects count as numbers."""
    logprobs = {int(token): float(getattr(value, "logprob", value)) for token, value in (position or {}).items()}
    return sorted(logprobs.items(), key=lambda item: -item[1])


def _misfit(reason: str) -> UsageError:
    """The error for sequences that do not fit."""
    return UsageError(reason, "Trace.from_sequences")


# -- from arrays ------------------------------------------------------------------------------------------------------


def complete_columns(columns: Mapping[str, Any]) -> dict[str, npt.NDArray[Any] | None]:
    """All columns of a trace from those that a caller has, in their dtypes; a column that is None or missing gets its default.

    `prompt_token_ids`, `prompt_offsets`, `token_ids`, `sequence_offsets` and `logprobs` have no default. Arrays of the right
    dtype are not copied. Raises UsageError for values that do not fit their column.
    """
    offsets = np.asarray(columns["sequence_offsets"], np.int64)
    tokens, sequences = len(np.asarray(columns["token_ids"])), len(offsets) - 1
    group = columns.get("group")
    groups = np.arange(sequences) if group is None else np.asarray(group)
    top_ids, top_logprobs = empty_top_k(tokens)
    defaults: dict[str, Any] = {
        "ranks": np.zeros(tokens, np.int32),
        "mask": np.ones(tokens, bool),
        "top_token_ids": top_ids,
        "top_logprobs": top_logprobs,
        "finish_reasons": np.zeros(sequences, np.uint8),
        "group": groups,
        "sample": sample_numbers(groups),
        "episode": np.arange(sequences),
        "turn": np.zeros(sequences, np.int32),
        "seeds": np.full(sequences, NO_SEED),
        **dict.fromkeys(OPTIONAL),
    }
    complete = {**columns, "sequence_offsets": offsets}
    complete |= {name: default for name, default in defaults.items() if complete.get(name) is None}
    optional = (*OPTIONAL, *_KEPT)
    return {name: None if column is None and name in optional else column_of(name, column) for name, column in complete.items()}
