"""TRL (1.16): GRPOTrainer, whose logprobs come out of a head fused with the log-softmax, in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ...trace import Trace
from .base import Framework, Pairs, gather_minus_logsumexp, log_softmax_then_gather, missing
from .reading import Batch

#: GRPOConfig.vllm_importance_sampling_clip_max: a sequence with a larger ratio gets the ratio 0 (`sequence_mask`).
CAP: Final = 3.0


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """What GRPOTrainer makes of its head's output: float32, then times 1 / T, then x_t - log sum exp x; float32 [..., L]."""
    return gather_minus_logsumexp(logits.float() * (1 / temperature), token_ids)


def fused_head(hidden: Any, weight: Any, token_ids: Any, temperature: float) -> Any:
    """The same from hidden states [N, H] and head weights [V, H], multiplied in their dtype: float32 [N]."""
    return logprobs(hidden @ weight.T, token_ids, temperature)


def selective(logits: Any, token_ids: Any, temperature: float) -> Any:
    """What `selective_log_softmax` computes, as TRL's other trainers use it: / T in the dtype of the logits, and in float32
    and float64 x_t - log sum exp x, else a log-softmax in that dtype. [..., L], in that dtype.
    """
    logits = logits / temperature if temperature != 1 else logits
    exact = str(logits.dtype) in ("torch.float32", "torch.float64")
    return (gather_minus_logsumexp if exact else log_softmax_then_gather)(logits, token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """TRL's `selective_log_softmax`, on the float32 that GRPOTrainer's fused head makes of its logits. Raises EngineError."""
    try:
        from trl.trainer.utils import selective_log_softmax
    except Exception as error:
        raise missing("TRL", "trl.trainer.utils", error) from error
    return lambda logits, token_ids, temperature: selective_log_softmax(logits.float(), token_ids, temperature)


def installed_fused_head() -> Callable[[Any, Any, Any, float], Any]:
    """The kernel of GRPOTrainer itself, with the signature of `fused_head`. Raises EngineError."""
    try:
        from trl.kernels import ChunkedLogProbFunction
    except Exception as error:
        raise missing("TRL", "trl.kernels", error) from error

    def function(hidden: Any, weight: Any, token_ids: Any, temperature: float) -> Any:
        return ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, temperature, 4096)[0]

    return function


def metrics(pairs: Pairs) -> dict[str, float]:
    """GRPOTrainer's `sampling/*` of one process, with its default `sequence_mask`: the ratio of a sequence is exp of the sum
    of its d, 0 beyond the cap; a sequence without a token has the ratio 1.
    """
    apart = np.abs(pairs.d)
    ratio = np.exp(np.minimum(pairs.padded(pairs.by_sequence(pairs.d)), 300.0))
    ratio = np.where(ratio > CAP, 0.0, ratio)
    some = len(ratio) > 0
    return {
        "sampling/sampling_logp_difference/mean": float(apart.mean()) if len(apart) else 0.0,
        "sampling/sampling_logp_difference/max": float(apart.max(initial=0.0)),
        "sampling/importance_sampling_ratio/min": float(ratio.min()) if some else 0.0,
        "sampling/importance_sampling_ratio/mean": float(ratio.mean()) if some else 0.0,
        "sampling/importance_sampling_ratio/max": float(ratio.max()) if some else 0.0,
    }


def read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of what `_generate_and_score_completions` returns.

    `prompt_ids`, `prompt_mask` [B, P] padded on the left, `completion_ids`, `completion_mask` and `sampling_per_token_logps`
    [B, C] padded on the right, `tool_mask` [B, C] where tools were called (0: a tool wrote the token). `labels` are those of
    Trace.from_sequences (`dtype`, `engine_version`). Raises UsageError for what is not aligned so.
    """
    given = Batch("trl", batch)
    prompts, completions = given.ids("prompt_ids"), given.ids("completion_ids")
    starts = given.lengths("prompt_mask", given.mask("prompt_mask", {"that of prompt_ids": prompts.shape}), "left")
    aligned = {"one for each of completion_ids, none shifted away": completions.shape}
    present = given.mask("completion_mask", aligned)
    lengths = given.lengths("completion_mask", present, "right")
    written = present & (given.mask("tool_mask", aligned) if given.get("tool_mask") is not None else True)
    why = "TRL has them with use_vllm and vllm_importance_sampling_correction"
    values = given.column("sampling_per_token_logps", aligned, why)
    given.check_logprobs("sampling_per_token_logps", values, written)
    if len(prompts) != len(completions):
        raise given.refuse(f"{len(prompts)} rows of prompt_ids, {len(completions)} of completion_ids")
    sequences = [
        {
            "prompt_token_ids": prompts[row, prompts.shape[1] - start :],
            "token_ids": completions[row, :length],
            "logprobs": values[row, :length],
            "mask": written[row, :length],
        }
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    return given.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


TRL: Final = Framework(
    name="trl",
    title="TRL",
    package="trl",
    logprobs=logprobs,
    metrics=metrics,
    read=read,
    installed=installed,
    divides="float32",
    # No thresholds: its cap of 3 on a sequence's ratio drops sequences, and alarms nobody.
    profile="trl",
    mistakes=(
        "top-p, top-k, min-p and penalties reach the engine only: the trainer divides by T and by nothing else",
        "the logprob of the first of a position's ranked list is taken: with logprobs > 0 that is the likeliest token's",
        "cast_lm_head_to_fp32 makes the trainer's head float32 and leaves the engine's as it is",
        "the engine's dtype is auto while the trainer runs float32 weights under bfloat16 autocast",
        "importance_sampling_ratio is logged after the cap has set large ratios to 0, and NaN logprobs count as ratio 1",
    ),
)
