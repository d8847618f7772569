"""TRL (1.16): GRPOTrainer. Its LM head is fused with the log-softmax and gives logprobs in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ...comparison.objectives import DEFAULT_OBJECTIVE
from ...comparison.result import Comparison
from ...errors import UsageError
from ...spec import Sampling
from ...trace import Trace
from .base import Framework, Pairs, field_of, gather_minus_logsumexp, has_field, missing
from .batches import Batch, as_array
from .callback import Watching

#: GRPOConfig.vllm_importance_sampling_clip_max: in its default mode, `sequence_mask`, larger ratios of sequences become 0.
CAP: Final = 3.0
MODES: Final = ("sequence_mask", "sequence_truncate", "token_mask", "token_truncate")


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """The logits to float32, times 1 / T, then x_t - log sum exp x, as GRPOTrainer does it; float32 [..., L]."""
    return gather_minus_logsumexp(logits.float() * (1 / temperature), token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """TRL's `selective_log_softmax`, on the float32 that GRPOTrainer's fused head makes of its logits. Raises EngineError."""
    try:
        from trl.trainer.utils import selective_log_softmax
    except Exception as error:
        raise missing("TRL", "trl.trainer.utils", error) from error
    return lambda logits, token_ids, temperature: selective_log_softmax(logits.float(), token_ids, temperature)


def configured(config: Any) -> dict[str, Any]:
    """Arguments of `metrics` from a GRPOConfig."""
    names = {name: f"vllm_importance_sampling_{name}" for name in ("mode", "clip_max", "clip_min")}
    if lacks := [theirs for theirs in names.values() if not has_field(config, theirs)]:
        raise UsageError(f"trl: this configuration has no {', '.join(lacks)}: give a GRPOConfig of TRL 1.16")
    return {name: field_of(config, theirs) for name, theirs in names.items()}


def metrics(
    pairs: Pairs, *, mode: str = "sequence_mask", clip_max: float | None = CAP, clip_min: float | None = None
) -> dict[str, float]:
    """GRPOTrainer's `sampling/*` of one process. The ratio of a token is exp(d), that of a sequence exp of the sum of its d.
    Outside of `clip_min` and `clip_max` it is clipped (`truncate`) or 0 (`mask`). A sequence without a token has the ratio 1.
    `entropy`, a mean over tokens, is included if the trainer's entropies are known.

    Raises UsageError for an unknown mode.
    """
    if mode not in MODES:
        raise UsageError(f"trl: mode={mode!r}: known are {', '.join(MODES)}")
    apart = np.abs(pairs.d)
    d = pairs.padded(pairs.by_sequence(pairs.d)) if mode.startswith("sequence") else pairs.d
    ratio = np.exp(np.minimum(d, 300.0))
    least, most = (-np.inf if clip_min is None else clip_min), (np.inf if clip_max is None else clip_max)
    ratio = np.clip(ratio, least, most) if mode.endswith("truncate") else np.where((ratio < least) | (ratio > most), 0.0, ratio)
    some = len(ratio) > 0
    return {
        "sampling/sampling_logp_difference/mean": float(apart.mean()) if len(apart) else 0.0,
        "sampling/sampling_logp_difference/max": float(apart.max(initial=0.0)),
        "sampling/importance_sampling_ratio/min": float(ratio.min()) if some else 0.0,
        "sampling/importance_sampling_ratio/mean": float(ratio.mean()) if some else 0.0,
        "sampling/importance_sampling_ratio/max": float(ratio.max()) if some else 0.0,
        **({} if pairs.entropies is None or not some else {"entropy": float(pairs.entropies.mean())}),
    }


def read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of what `_generate_and_score_completions` returns.

    `prompt_ids`, `prompt_mask` [B, P] padded on the left, `completion_ids`, `completion_mask` and `sampling_per_token_logps`
    [B, C] padded on the right, `tool_mask` [B, C] where tools were called (0: a tool wrote the token). `old_per_token_logps`
    [B, C], the trainer's own, are `trainer_logprobs` of the trace. Rows whose completion_mask is 0 everywhere
    (mask_truncated_completions) are left out: they are not trained on, and their lengths are unknown. A list is read as the
    rows of AsyncGRPO: `input_ids` of prompt and completion, `completion_mask` (1: trained on) and `old_log_probs`, the
    engine's, all [L]; `model_version` becomes the weight version. `labels` are those of Trace.from_sequences (`dtype`,
    `engine_version`). Raises UsageError for a batch that is not aligned so.
    """
    if isinstance(batch, (list, tuple)):
        return _read_rows(batch, sampling=sampling, tokenizer=tokenizer, labels=labels)
    source = Batch("trl", batch)
    prompts, completions = source.ids("prompt_ids"), source.ids("completion_ids")
    starts = source.lengths("prompt_mask", source.mask("prompt_mask", {"that of prompt_ids": prompts.shape}), "left")
    aligned = {"one for each of completion_ids, none shifted away": completions.shape}
    present = source.mask("completion_mask", aligned)
    lengths = source.lengths("completion_mask", present, "right")
    written = present & (source.mask("tool_mask", aligned) if source.get("tool_mask") is not None else True)
    why = "TRL has them with use_vllm and vllm_importance_sampling_correction"
    values = source.column("sampling_per_token_logps", aligned, why)
    if len(prompts) != len(completions):
        raise source.refuse(f"{len(prompts)} rows of prompt_ids, {len(completions)} of completion_ids")
    rows = [row for row, length in enumerate(lengths) if length]
    if not rows:
        raise source.refuse(
            "completion_mask is 0 everywhere: mask_truncated_completions hides all of them, because all were truncated"
        )
    names = [f"sampling_per_token_logps of row {row}" for row in rows]
    source.check_logprobs("sampling_per_token_logps", values[rows], written[rows], rows=names)
    trainer = source.of_trainer("old_per_token_logps", aligned, written)
    sequences = [
        {
            "prompt_token_ids": prompts[row, prompts.shape[1] - start :],
            "token_ids": completions[row, :length],
            "logprobs": values[row, :length],
            "mask": written[row, :length],
            "trainer_logprobs": None if trainer is None else trainer[row, :length],
        }
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
        if length
    ]
    return source.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


#: The columns of AsyncGRPO's rows.
_ROW: Final = ("input_ids", "completion_mask", "old_log_probs")


def _read_rows(rows: Sequence[Any], *, sampling: Any, tokenizer: Any, labels: Any) -> Trace:
    """A trace of AsyncGRPO's rows. Tokens of an environment, or of the prompt of another turn, are masked."""
    whole = Batch("trl", {})
    sequences: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        source, name = Batch("trl", row), f"row {index}"
        ids, mask, values = columns = [as_array(source.get(column)) for column in _ROW]
        for column, array in zip(_ROW, columns, strict=True):
            if array is None or array.ndim != 1:
                raise whole.refuse(f"{name} has no {column} [tokens]: rows of AsyncGRPO have {', '.join(_ROW)}")
        assert ids is not None
        assert mask is not None
        assert values is not None
        if not len(ids) == len(mask) == len(values):
            raise whole.refuse(f"{name} has {len(ids)} input_ids, {len(mask)} of completion_mask, {len(values)} old_log_probs")
        trained = np.flatnonzero(mask)
        if not len(trained):
            continue
        if not trained[0]:
            raise whole.refuse(f"{name} has no prompt: its first token cannot have a logprob")
        first, stop = int(trained[0]), int(trained[-1]) + 1
        written = mask[first:stop].astype(bool)
        whole.check_row(f"old_log_probs of {name}", values[first:stop], written)
        sequence = {
            "prompt_token_ids": ids[:first],
            "token_ids": ids[first:stop],
            "logprobs": values[first:stop],
            "mask": written,
        }
        version = source.get("model_version")
        if version is not None:
            sequence["weight_versions"] = np.full(stop - first, int(version))
        sequences.append(sequence)
    if not sequences:
        raise whole.refuse("no row has a token with completion_mask 1: no token is trained on")
    return whole.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


def sampling_of(arguments: Any) -> Sampling:
    """The sampling of a GRPOConfig."""
    settings = {
        name: getattr(arguments, name, None) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    settings["max_tokens"] = getattr(arguments, "max_completion_length", None)
    return Sampling(**{name: value for name, value in settings.items() if value is not None})


def watch(
    trainer: Any, *, every: int = 50, dtype: str = "unknown", objective: str = DEFAULT_OBJECTIVE, tolerance: Any = None
) -> list[Comparison]:
    """Make a GRPOTrainer check its own batches: the first that it trains on, then every `every`-th. Returns the list to which
    each comparison is added.

    Its rollouts are compared with its `old_per_token_logps`: this needs no model. The sampling and the dtype of the trainer are
    read from its arguments; `dtype` is that of the engine. A failed check raises MismatchError out of `trainer.train()`. An
    unverified one is a warning, and the next batch is checked. Raises UsageError where a batch has no such column, and for a
    `trainer` that is not a GRPOTrainer.
    """
    watching = Watching("trl", every)
    if not hasattr(trainer, "_generate_and_score_completions"):
        raise UsageError(f"trl: watch() takes a GRPOTrainer of TRL 1.16, not {type(trainer).__name__}")
    owners = (("model", trainer), ("args", trainer), ("temperature", getattr(trainer, "args", None)),
              ("bf16", getattr(trainer, "args", None)))  # fmt: skip
    if lacks := [name for name, owner in owners if not hasattr(owner, name)]:
        raise UsageError(
            f"trl: this {type(trainer).__name__} has no {', '.join(lacks)}: watch() reads model, args, args.temperature and "
            "args.bf16, as a GRPOTrainer of TRL 1.16 has them"
        )
    make = trainer._generate_and_score_completions

    def checked(inputs: Any) -> Any:
        batch = make(inputs)
        if not trainer.model.training or not watching.due():
            return batch
        mask = Batch("trl", batch).get("completion_mask")
        if mask is not None and not mask.any():
            watching.leave_out("every completion of this batch is masked")
        else:
            own = "bfloat16" if trainer.args.bf16 else str(trainer.model.dtype).removeprefix("torch.")
            rollouts = read(batch, sampling=sampling_of(trainer.args), dtype=dtype)
            watching.check(rollouts, tolerance=tolerance, objective=objective, trainer_dtype=own, config=trainer.args)
        return batch

    trainer._generate_and_score_completions = checked
    return watching.done


TRL: Final = Framework(
    name="trl",
    title="TRL",
    package="trl",
    logprobs=logprobs,
    metrics=metrics,
    configured=configured,
    watches=watch,
    read=read,
    installed=installed,
    divides="float32",
    # No thresholds: its cap of 3 on a sequence's ratio drops sequences, and alarms nobody.
    profile="trl",
    mistakes=(
        "top-p, top-k, min-p and penalties reach the engine only: the trainer divides by T and by nothing else",
        "the logprob of the first of a position's ranked list is taken: with logprobs > 0 that is the most likely token's",
        "cast_lm_head_to_fp32 makes the trainer's LM head float32 and leaves the engine's as it is",
        "the engine's dtype is auto while the trainer runs float32 weights under bfloat16 autocast",
        "importance_sampling_ratio is logged after the cap has set large ratios to 0, and NaN logprobs count as ratio 1",
    ),
)
