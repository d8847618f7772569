"""NeMo-Aligner (0.7), which never divides by the temperature, and NeMo-RL, which takes its place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from ...trace import Trace
from .base import Doubles, Framework, Pairs, gather_minus_logsumexp, missing
from .batches import Batch

#: ratio_eps of NeMo-Aligner's PPO.
CLIP: Final = 0.2
#: What NeMo-RL's global means add to the number of tokens.
_EPSILON: Final = 1e-8


# -- NeMo-Aligner -----------------------------------------------------------------------------------------------------


def aligner_logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """(x_t - max x) - log sum exp(x - max x) in the dtype of the logits, the sum in float32: `higher_stability`, as its
    actors ask for. The temperature is not looked at: NeMo-Aligner gives it to the engine alone.
    """
    del temperature
    shifted = logits - logits.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1).float().log().to(logits.dtype)
    return shifted.gather(-1, token_ids[..., None])[..., 0] - total


def aligner_installed() -> Callable[[Any, Any, float], Any]:
    """NeMo-Aligner's `from_parallel_logits_to_logprobs` in a group of one process. Raises EngineError."""
    try:
        from megatron.core import parallel_state
        from nemo_aligner.utils.distributed import from_parallel_logits_to_logprobs
    except Exception as error:
        raise missing("NeMo-Aligner", "nemo_aligner.utils.distributed", error) from error

    def function(logits: Any, token_ids: Any, temperature: float) -> Any:
        del temperature
        flat, ids = _rows(logits, token_ids)
        with _one_process():
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


def aligner_metrics(pairs: Pairs) -> dict[str, float]:
    """Its PPO's ratios over tokens, with the rollout's logprobs for the previous ones. It takes its own for these, so that
    by itself it logs 1 at every first step, whatever the engine did.
    """
    if not len(pairs.rollout):
        return {}
    return {"ppo_ratio": float(pairs.ratio.mean()), "ppo_ratio_clamped": float(pairs.ratio.clip(1 - CLIP, 1 + CLIP).mean())}


def aligner_read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of a PPO rollout batch.

    `response_tokens` [B, S], prompt and response, padded on the right; `prompt_lengths`, `response_lengths` [B], the second
    with the prompt; `logprobs` [B, S - 1], place t for token t + 1. They are the trainer's own, raw: the trace is labelled
    so, and is what an engine's replay of the same tokens is to be held against. Raises UsageError for what is not so.
    """
    given = Batch("nemo-aligner", batch)
    ids = given.ids("response_tokens")
    per_row = {"one for each row of response_tokens": (len(ids),)}
    starts, stops = given.column("prompt_lengths", per_row), given.column("response_lengths", per_row)
    values = given.column("logprobs", {"one less than response_tokens, place t for token t + 1": (len(ids), ids.shape[1] - 1)})
    bad = np.flatnonzero((starts < 1) | (stops < starts) | (stops > ids.shape[1]))
    if len(bad):
        row = int(bad[0])
        raise given.refuse(
            f"row {row} has prompt_lengths {int(starts[row])} and response_lengths {int(stops[row])} of {ids.shape[1]} tokens: "
            "response_lengths counts the prompt too"
        )
    places = np.arange(1, ids.shape[1])
    written = (places >= starts[:, None]) & (places < stops[:, None])
    given.check_logprobs("logprobs", values, written, filled=False)
    sequences = [
        {
            "prompt_token_ids": ids[row, :start],
            "token_ids": ids[row, start:stop],
            "logprobs": values[row, start - 1 : stop - 1],
        }
        for row, (start, stop) in enumerate(zip(starts.astype(int).tolist(), stops.astype(int).tolist(), strict=True))
    ]
    own = {"engine": "nemo-aligner", "path": "prefill", "logprobs_mode": "raw_logprobs"}
    return given.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels={**own, **labels})


NEMO_ALIGNER: Final = Framework(
    name="nemo-aligner",
    title="NeMo-Aligner",
    package="nemo-aligner",
    logprobs=aligner_logprobs,
    metrics=aligner_metrics,
    read=aligner_read,
    installed=aligner_installed,
    divides="logits",
    profile="rl",  # its engine is TensorRT-LLM, and asked for no logprobs
    mistakes=(
        "the temperature reaches the engine only: at T other than 1 the trainer's policy is not the one that sampled",
        "the engine's logprobs are never used: prev_logprobs are the trainer's own, so no metric can show a mismatch",
        "without higher_stability it takes the logarithm of a softmax: -inf from a logit gap of about 104 on",
        "top-k and top-p reach the engine only",
    ),
)


# -- NeMo-RL ----------------------------------------------------------------------------------------------------------


def rl_logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """/ T in the dtype of the logits, then float32 and x_t - log sum exp x; float32 [..., L]."""
    return gather_minus_logsumexp(_divided(logits, temperature).float(), token_ids)


def rl_installed() -> Callable[[Any, Any, float], Any]:
    """`from_parallel_logits_to_logprobs` of a checkout of NeMo-RL, in a group of one process; the distribution nemo-rl on
    PyPI is an empty placeholder. Raises EngineError.
    """
    try:
        from nemo_rl.distributed.model_utils import from_parallel_logits_to_logprobs
    except Exception as error:
        raise missing("NeMo-RL", "nemo_rl.distributed.model_utils, of a checkout: PyPI has a placeholder,", error) from error

    def function(logits: Any, token_ids: Any, temperature: float) -> Any:
        import torch

        flat, ids = _rows(_divided(logits, temperature), token_ids)
        # It shifts the tokens by one and drops the last place: one more of both, before and after.
        flat, ids = torch.nn.functional.pad(flat, (0, 0, 0, 1)), torch.nn.functional.pad(ids, (1, 0))
        with _one_process() as group:
            values = from_parallel_logits_to_logprobs(flat, ids, 0, logits.shape[-1], group, inference_only=True)
        return values.reshape(token_ids.shape)

    return function


def rl_metrics(pairs: Pairs) -> dict[str, float]:
    """What its loss logs of generation (g) and previous (p, the trainer's) logprobs: sums over tokens by n + 1e-8."""
    d = pairs.d
    middle = np.logaddexp(pairs.trainer, pairs.rollout) - math.log(2)

    def tokens(values: Doubles) -> float:
        return float(values.sum() / (len(d) + _EPSILON))

    def k3(x: Doubles) -> Doubles:
        return np.asarray(np.exp(x) - x - 1)

    return {
        "token_mult_prob_error": tokens(np.exp(np.abs(d))),
        "gen_kl_error": tokens(k3(d)),
        "policy_kl_error": tokens(k3(-d)),
        "js_divergence_error": tokens((k3(pairs.trainer - middle) + k3(pairs.rollout - middle)) / 2),
        "sampling_importance_ratio": tokens(pairs.ratio),
        "approx_entropy": -tokens(pairs.ratio * pairs.trainer),
    }


def rl_read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of a training batch.

    `input_ids`, `token_mask`, `generation_logprobs` [B, S] padded on the right, place t for token t, 0 on the prompt;
    `sample_mask` [B] (0: not trained on, masked here) and `input_lengths` [B] where they are there. The completion begins
    with the first token of the mask. `prev_logprobs` [B, S], the trainer's own, are `trainer_logprobs`
    of the trace. Raises UsageError for what is not aligned so.
    """
    given = Batch("nemo-rl", batch)
    ids = given.ids("input_ids")
    aligned = {"that of input_ids, place t for token t: its loss cuts the first one off": ids.shape}
    written = given.mask("token_mask", aligned)
    values = given.column("generation_logprobs", aligned)
    given.check_logprobs("generation_logprobs", values, written)
    trainer = given.of_trainer("prev_logprobs", aligned, written)
    per_row = {"one for each row of input_ids": (len(ids),)}
    used = given.mask("sample_mask", per_row) if given.get("sample_mask") is not None else np.ones(len(ids), bool)
    ends = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in written]
    lengths = given.column("input_lengths", per_row).astype(int) if given.get("input_lengths") is not None else ends
    sequences = []
    for row, length in enumerate(map(int, lengths)):
        if ends[row] > length or length > ids.shape[1]:
            raise given.refuse(f"token_mask of row {row} marks token {ends[row] - 1}, input_lengths is {length}: padded left?")
        first = int(np.argmax(written[row])) if written[row].any() else length
        if written[row].any() and first == 0:
            raise given.refuse(f"token_mask of row {row} marks the first token of all, which nothing was given to predict")
        sequences.append(
            {
                "prompt_token_ids": ids[row, :first],
                "token_ids": ids[row, first:length],
                "logprobs": values[row, first:length],
                "mask": written[row, first:length] & used[row],
                "trainer_logprobs": None if trainer is None else trainer[row, first:length],
            }
        )
    return given.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


NEMO_RL: Final = Framework(
    name="nemo-rl",
    title="NeMo-RL",
    package="",
    logprobs=rl_logprobs,
    metrics=rl_metrics,
    read=rl_read,
    installed=rl_installed,
    divides="logits",
    thresholds={"token_mult_prob_error": (1.0 - 1e-6, 1.05), "gen_kl_error": (0.0, 0.002)},
    # E exp|d| <= 1.05 bounds |mean d| by log 1.05 (Jensen); k3 is d^2 / 2 for small d, so 0.002 is an RMS of 0.063.
    tolerance={"mean_diff": math.log(1.05), "rms_diff": math.sqrt(2 * 0.002)},
    profile="nemo-rl",
    mistakes=(
        "without logprobs_mode in its YAML the engine reports raw logprobs while the trainer divides by T",
        "in-flight updates reset the prefix cache while requests run, which does nothing, and report success",
        "a logprob that the engine did not give stays 0.0, probability 1",
        "a sequence-level sampling_importance_ratio is multiplied over the batch: right for a micro-batch of 1 only",
    ),
)


# -- both -------------------------------------------------------------------------------------------------------------


def _divided(logits: Any, temperature: float) -> Any:
    return logits / temperature if temperature != 1 else logits


def _rows(logits: Any, token_ids: Any) -> tuple[Any, Any]:
    """Logits [B, L, V] and ids [B, L] of either with any axes in front, copied: these functions write into them."""
    return logits.reshape(-1, *logits.shape[-2:]).clone(), token_ids.reshape(-1, token_ids.shape[-1]).clone()


@contextlib.contextmanager
def _one_process() -> Iterator[Any]:
    """A torch process group of this process alone: the one that is there, or one for a while."""
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if own:
            dist.destroy_process_group()
