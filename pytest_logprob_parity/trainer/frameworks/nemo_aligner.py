"""NeMo-Aligner (0.7): its trainer does not divide by the temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ...trace import Trace
from .base import Framework, Pairs, missing
from .batches import Batch
from .megatron import flat_rows, group_of_one

#: ratio_eps of its PPO.
CLIP: Final = 0.2


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """(x_t - max x) - log sum exp(x - max x) in the dtype of the logits, the sum in float32: `higher_stability`, as its
    actors ask for. The temperature is not looked at: NeMo-Aligner gives it to the engine alone.
    """
    del temperature
    shifted = logits - logits.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1).float().log().to(logits.dtype)
    return shifted.gather(-1, token_ids[..., None])[..., 0] - total


def installed() -> Callable[[Any, Any, float], Any]:
    """NeMo-Aligner's `from_parallel_logits_to_logprobs` in a group of one process. Raises EngineError."""
    try:
        from megatron.core import parallel_state
        from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
    except Exception as error:
        raise missing("NeMo-Aligner", "nemo_aligner.utils.distributed", error) from error

    def function(logits: Any, token_ids: Any, temperature: float) -> Any:
        del temperature
        flat, ids = flat_rows(logits, token_ids)
        with group_of_one():
            own = not parallel_state.model_parallel_is_initialized()
            if own:
                parallel_state.initialize_model_parallel()
            try:
                values = from_parallel_logits_to_logprobs(
                    flat, ids, inference_only=True, higher_stability=True, ignore_last=False
                )
            finally:
                if own:
                    parallel_state.destroy_model_parallel()
        return values.reshape(token_ids.shape)

    return function


def metrics(pairs: Pairs) -> dict[str, float]:
    """The ratios of its PPO over tokens, with the rollout's logprobs as the previous ones. NeMo-Aligner itself uses the
    trainer's logprobs for both, and so logs 1 at every first step, whatever the engine did.
    """
    if not len(pairs.rollout):
        return {}
    return {"ppo_ratio": float(pairs.ratio.mean()), "ppo_ratio_clamped": float(pairs.ratio.clip(1 - CLIP, 1 + CLIP).mean())}


def read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of a PPO rollout batch.

    `response_tokens` [B, S], prompt and response, padded on the right; `prompt_lengths`, `response_lengths` [B], the second
    with the prompt; `logprobs` [B, S - 1], place t for token t + 1. They are the trainer's own, raw: the trace has these
    labels. Compare it with an engine's replay of the same tokens. Raises UsageError for a batch that is not aligned so.
    """
    source = Batch("nemo-aligner", batch)
    ids = source.ids("response_tokens")
    per_row = {"one for each row of response_tokens": (len(ids),)}
    starts, stops = source.column("prompt_lengths", per_row), source.column("response_lengths", per_row)
    values = source.column("logprobs", {"one less than response_tokens, place t for token t + 1": (len(ids), ids.shape[1] - 1)})
    bad = np.flatnonzero((starts < 1) | (stops < starts) | (stops > ids.shape[1]))
    if len(bad):
        row = int(bad[0])
        raise source.refuse(
            f"row {row} has prompt_lengths {int(starts[row])} and response_lengths {int(stops[row])} of {ids.shape[1]} tokens: "
            "response_lengths counts the prompt too"
        )
    places = np.arange(1, ids.shape[1])
    written = (places >= starts[:, None]) & (places < stops[:, None])
    source.check_logprobs("logprobs", values, written, filled=False)
    sequences = [
        {
            "prompt_token_ids": ids[row, :start],
            "token_ids": ids[row, start:stop],
            "logprobs": values[row, start - 1 : stop - 1],
        }
        for row, (start, stop) in enumerate(zip(starts.astype(int).tolist(), stops.astype(int).tolist(), strict=True))
    ]
    own = {"engine": "nemo-aligner", "path": "prefill", "logprobs_mode": "raw_logprobs"}
    return source.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels={**own, **labels})


NEMO_ALIGNER: Final = Framework(
    name="nemo-aligner",
    title="NeMo-Aligner",
    package="nemo-aligner",
    logprobs=logprobs,
    metrics=metrics,
    read=read,
    installed=installed,
    divides="logits",
    profile="rl",  # its engine is TensorRT-LLM, and asked for no logprobs
    mistakes=(
        "the temperature reaches the engine only: at T other than 1 the trainer's policy is not the one that sampled",
        "the engine's logprobs are never used: prev_logprobs are the trainer's own, so no metric can show a mismatch",
        "without higher_stability it takes the logarithm of a softmax: -inf from a logit gap of about 104 on",
        "top-k and top-p reach the engine only",
    ),
)
