"""NeMo-RL, the successor of NeMo-Aligner: it divides the logits by the temperature in their own dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ...trace import Trace
from .base import Doubles, Framework, Pairs, gather_minus_logsumexp, missing
from .batches import Batch
from .megatron import flat_rows, group_of_one

#: Its global means add this to the number of tokens.
_EPSILON: Final = 1e-8


def _divided(logits: Any, temperature: float) -> Any:
    return logits / temperature if temperature != 1 else logits


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """/ T in the dtype of the logits, then float32 and x_t - log sum exp x; float32 [..., L]."""
    return gather_minus_logsumexp(_divided(logits, temperature).float(), token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """`from_parallel_logits_to_logprobs` of a checkout of NeMo-RL, in a group of one process; the distribution nemo-rl on
    PyPI is an empty placeholder. Raises EngineError.
    """
    try:
        from nemo_rl.distributed.model_utils import from_parallel_logits_to_logprobs
    except Exception as error:
        raise missing("NeMo-RL", "nemo_rl.distributed.model_utils, of a checkout: PyPI has a placeholder,", error) from error

    def function(logits: Any, token_ids: Any, temperature: float) -> Any:
        import torch

        flat, ids = flat_rows(_divided(logits, temperature), token_ids)
        # It shifts the tokens by one and drops the last place: one more of both, before and after.
        flat, ids = torch.nn.functional.pad(flat, (0, 0, 0, 1)), torch.nn.functional.pad(ids, (1, 0))
        with group_of_one() as group:
            values = from_parallel_logits_to_logprobs(flat, ids, 0, logits.shape[-1], group, inference_only=True)
        return values.reshape(token_ids.shape)

    return function


def metrics(pairs: Pairs) -> dict[str, float]:
    """The metrics of its loss, of generation logprobs (the rollout's) and previous ones (the trainer's): sums over tokens
    divided by n + 1e-8.
    """
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


def read(batch: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of a training batch.

    `input_ids`, `token_mask`, `generation_logprobs` [B, S] padded on the right, place t for token t, 0 on the prompt;
    `sample_mask` [B] (0: not trained on, masked here) and `input_lengths` [B] where they are there. The completion begins
    with the first token of the mask. `prev_logprobs` [B, S], the trainer's own, are `trainer_logprobs`
    of the trace. Raises UsageError for what is not aligned so.
    """
    source = Batch("nemo-rl", batch)
    ids = source.ids("input_ids")
    aligned = {"that of input_ids, place t for token t: its loss cuts the first one off": ids.shape}
    written = source.mask("token_mask", aligned)
    values = source.column("generation_logprobs", aligned)
    source.check_logprobs("generation_logprobs", values, written)
    trainer = source.of_trainer("prev_logprobs", aligned, written)
    per_row = {"one for each row of input_ids": (len(ids),)}
    used = source.mask("sample_mask", per_row) if source.get("sample_mask") is not None else np.ones(len(ids), bool)
    ends = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in written]
    lengths = source.column("input_lengths", per_row).astype(int) if source.get("input_lengths") is not None else ends
    sequences = []
    for row, length in enumerate(map(int, lengths)):
        if ends[row] > length or length > ids.shape[1]:
            raise source.refuse(f"token_mask of row {row} marks token {ends[row] - 1}, input_lengths is {length}: padded left?")
        first = int(np.argmax(written[row])) if written[row].any() else length
        if written[row].any() and first == 0:
            raise source.refuse(f"token_mask of row {row} marks the first token of the row, which cannot have a logprob")
        sequences.append(
            {
                "prompt_token_ids": ids[row, :first],
                "token_ids": ids[row, first:length],
                "logprobs": values[row, first:length],
                "mask": written[row, first:length] & used[row],
                "trainer_logprobs": None if trainer is None else trainer[row, first:length],
            }
        )
    return source.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


NEMO_RL: Final = Framework(
    name="nemo-rl",
    title="NeMo-RL",
    package="",
    logprobs=logprobs,
    metrics=metrics,
    read=read,
    installed=installed,
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
