"""Batches of veRL's two trainers: a DataProto padded on both sides, jagged rows, and jagged rows that were padded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

from ...spec import Sampling
from ...trace import Trace
from .batches import Array, Batch

_NO_LOGPROBS: Final = (
    "veRL has them with actor_rollout_ref.rollout.calculate_log_probs=True; without it veRL logs no metric of them, and "
    "does not warn"
)
#: The names of the trainer's entropies in its older trainer and in `use_v1`.
_ENTROPIES: Final = ("entropys", "entropy")
#: The default padding of veRL's `to_padded_tensor()`.
_PADDING: Final = 0


def read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of a DataProto, of a TensorDict of `trainer.use_v1`, or of a mapping of its keys.

    `prompts` [B, P] padded on the left, `responses` [B, R] padded on the right, `attention_mask` [B, P + R], `response_mask`
    (0: a tool wrote the token) and `rollout_log_probs` [B, R]. `old_log_probs` [B, R], the trainer's own, are
    `trainer_logprobs` of the trace, `entropys` or `entropy` its `trainer_entropies`. Rows of `use_v1` are jagged, or padded on
    the right without an attention_mask: with 0, or the padding token of `tokenizer`. `labels` are those of
    Trace.from_sequences. Raises UsageError for a batch that is not aligned so, and for a response_mask that rejection sampling
    has overwritten.
    """
    source = Batch("verl", batch)
    if source.is_jagged("responses"):
        sequences = _jagged(source)
    elif source.get("attention_mask") is None:
        prompts = _without_padding(source, tokenizer)
        sequences = [{"prompt_token_ids": prompts[row], **columns} for row, columns in _padded_rows(source)]
    else:
        sequences = _padded(source)
    return source.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


def in_hand(data: Any, *, sampling: Sampling, dtype: str) -> Trace:
    """The two columns of a batch, as a trace. Where it lacks prompts, or their mask, rows with one `uid` have one prompt."""
    source = Batch("verl", data)
    if source.get("prompts") is not None and source.get("attention_mask") is not None:
        return read(data, sampling=sampling, dtype=dtype)
    uids = (getattr(data, "non_tensor_batch", None) or {}).get("uid")
    names = list(range(len(source.ids("responses")))) if uids is None else [str(uid) for uid in uids]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    sequences = [{"prompt_token_ids": [numbers[names[row]]], **columns} for row, columns in _padded_rows(source)]
    return source.trace(sequences, sampling=sampling, tokenizer=None, labels={"dtype": dtype})


def _columns(source: Batch, shape: tuple[int, ...]) -> dict[str, Array]:
    """`mask` and `logprobs` of the responses [B, R], and the trainer's logprobs and entropies if there are any."""
    aligned = {"one for each of responses, none shifted away": shape}
    written = source.mask("response_mask", aligned)
    values = source.column("rollout_log_probs", aligned, _NO_LOGPROBS)
    source.check_logprobs("rollout_log_probs", values, written)
    columns = {"mask": written, "logprobs": values}
    if (trainer := source.of_trainer("old_log_probs", aligned, written)) is not None:
        columns["trainer_logprobs"] = trainer
    for name in _ENTROPIES:
        if source.get(name) is not None:
            columns["trainer_entropies"] = source.column(name, aligned)
    return columns


def _padded(source: Batch) -> list[Mapping[str, Any]]:
    """Prompts padded on the left, responses on the right, and an attention_mask over both."""
    prompts, responses = source.ids("prompts"), source.ids("responses")
    width = prompts.shape[1]
    if len(prompts) != len(responses):
        raise source.refuse(f"{len(prompts)} rows of prompts, {len(responses)} of responses")
    attention = source.mask("attention_mask", {"prompts and responses": (len(prompts), width + responses.shape[1])})
    starts = source.lengths("attention_mask of the prompts", attention[:, :width], "left")
    lengths = source.lengths("attention_mask of the responses", attention[:, width:], "right")
    columns = _columns(source, responses.shape)
    if (columns["mask"] & ~attention[:, width:]).any():
        raise source.refuse("response_mask is 1 where attention_mask is 0: it belongs to other responses")
    return [
        {
            "prompt_token_ids": prompts[row, width - start :],
            "token_ids": responses[row, :length],
            **{name: column[row, :length] for name, column in columns.items()},
        }
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]


def _padded_rows(source: Batch) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of responses without an attention_mask, each up to the last token of its response_mask; rows without such a token
    are left out.
    """
    responses = source.ids("responses")
    columns = _columns(source, responses.shape)
    for row, written in enumerate(columns["mask"]):
        if written.any():
            stop = int(np.flatnonzero(written)[-1]) + 1
            yield row, {"token_ids": responses[row, :stop], **{name: c[row, :stop] for name, c in columns.items()}}


def _without_padding(source: Batch, tokenizer: Any) -> list[Array]:
    """Prompts [B, P] without the padding on their right."""
    prompts = source.ids("prompts")
    known = {_PADDING, getattr(tokenizer, "pad_token_id", None)}
    ends = {int(token) for token in prompts[:, -1]} if prompts.shape[1] else set()
    rows = [row[: len(row) - _run(row)] if int(row[-1]) in known and len(ends) > 1 else row for row in prompts]
    for index, row in enumerate(rows):
        if not len(row):
            raise source.refuse(f"prompts of row {index} have only padding")
        if len(ends) > 1 and len(row) == prompts.shape[1] and _run(row) > 1 and int(row[-1]) not in known:
            raise source.refuse(
                f"prompts of row {index} end with {_run(row)} times token {int(row[-1])}, others do not, and there is no "
                "attention_mask: if this is padding, give the tokenizer, or the batch from before the padding"
            )
    return rows


def _run(row: Array) -> int:
    """How many times a row repeats its last token at its end."""
    other = np.flatnonzero(row != row[-1])
    return len(row) - (int(other[-1]) + 1 if len(other) else 0)


def _jagged(source: Batch) -> list[Mapping[str, Any]]:
    """Rows without padding, as `use_v1` trains on them."""
    columns = {
        "prompt_token_ids": source.rows("prompts"),
        "token_ids": source.rows("responses"),
        "mask": [row.astype(bool) for row in source.rows("response_mask")],
        "logprobs": source.rows("rollout_log_probs", _NO_LOGPROBS),
    }
    names = {"mask": "response_mask", "logprobs": "rollout_log_probs"}
    for name, theirs in (("trainer_logprobs", "old_log_probs"), *(("trainer_entropies", theirs) for theirs in _ENTROPIES)):
        if source.get(theirs) is not None:
            columns[name], names[name] = source.rows(theirs), theirs
    for name, theirs in names.items():
        for row, (values, tokens, mask) in enumerate(zip(columns[name], columns["token_ids"], columns["mask"], strict=True)):
            if len(values) != len(tokens):
                raise source.refuse(f"{theirs} of row {row} has {len(values)} entries, responses have {len(tokens)}")
            if name.endswith("logprobs"):
                source.check_row(f"{theirs} of row {row}", values, mask)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
