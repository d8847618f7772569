"""OpenRLHF (0.11): the logits are divided by T in float32; the columns of its batch are shifted by one token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ...trace import Trace
from .base import Framework, Pairs, gather_minus_logsumexp, missing
from .batches import Batch

#: is_correction_threshold: tokens whose ratio trainer / rollout is outside this band are left out of the loss.
BAND: Final = (0.5, 5.0)


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """float32, / T, x_t - log sum exp x, as Actor.forward does it; float32 [..., L]."""
    return gather_minus_logsumexp(logits.float() / temperature, token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """OpenRLHF's `log_probs_from_logits`, on a float32 copy of the logits, which it divides in place. Raises EngineError."""
    try:
        from openrlhf.models.utils import log_probs_from_logits
    except Exception as error:
        raise missing("OpenRLHF", "openrlhf.models.utils", error) from error

    def function(logits: Any, token_ids: Any, temperature: float) -> Any:
        import torch

        return log_probs_from_logits(logits.to(torch.float32, copy=True), token_ids, temperature=temperature)

    return function


def metrics(pairs: Pairs) -> dict[str, float]:
    """`vllm_kl` and `is_filter_ratio` of PolicyLoss with is_correction_level="token", over tokens. Its ppo_kl and
    ppo_clip_ratio compare the trainer with itself, and are not included.
    """
    if not len(pairs.rollout):
        return {}
    outside = (pairs.ratio < BAND[0]) | (pairs.ratio > BAND[1])
    return {"vllm_kl": float(np.mean(pairs.rollout - pairs.trainer)), "is_filter_ratio": float(outside.mean())}


def read(experience: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of an Experience, or of a mapping of its fields.

    `sequences`, `attention_mask` [B, S] padded on the right; `action_mask`, `rollout_log_probs` [B, S - 1], whose place t is
    for token t + 1: 0 and 0.0 on the prompt and on what the environment wrote. The completion begins with the first action.
    `action_log_probs` [B, S - 1], the trainer's own, are `trainer_logprobs` of the trace.
    `prompts`, texts, are compared with the ids if a tokenizer is given. Raises UsageError for a batch that is not aligned so.
    """
    source = Batch("openrlhf", experience)
    ids = source.ids("sequences")
    lengths = source.lengths("attention_mask", source.mask("attention_mask", {"that of sequences": ids.shape}), "right")
    shifted = {"one less than sequences, place t for token t + 1": (len(ids), ids.shape[1] - 1)}
    actions = source.mask("action_mask", shifted)
    why = 'OpenRLHF asks its engine for them only if is_correction_level is not "off"'
    values = source.column("rollout_log_probs", shifted, why)
    source.check_logprobs("rollout_log_probs", values, actions)
    trainer = source.of_trainer("action_log_probs", shifted, actions)
    texts = source.get("prompts")
    sequences = []
    for row, length in enumerate(lengths):
        places = np.flatnonzero(actions[row])
        if len(places) and places[-1] + 2 > length:
            raise source.refuse(f"action_mask of row {row} marks token {places[-1] + 1}, attention_mask has {length} tokens")
        first = int(places[0]) + 1 if len(places) else length
        if texts is not None and row < len(texts) and isinstance(texts[row], str):
            source.check_text(f"prompts[{row}]", texts[row], ids[row, :first].tolist(), tokenizer)
        sequences.append(
            {
                "prompt_token_ids": ids[row, :first],
                "token_ids": ids[row, first:length],
                "logprobs": values[row, first - 1 : length - 1],
                "mask": actions[row, first - 1 : length - 1],
                "trainer_logprobs": None if trainer is None else trainer[row, first - 1 : length - 1],
            }
        )
    return source.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels=labels)


OPENRLHF: Final = Framework(
    name="openrlhf",
    title="OpenRLHF",
    package="openrlhf",
    logprobs=logprobs,
    metrics=metrics,
    read=read,
    installed=installed,
    divides="float32",
    # Its band drops single tokens: the nearer edge, in nats, is what an outlier is.
    tolerance={"outlier": math.log(2)},
    profile="openrlhf",
    mistakes=(
        "with is_correction_level=off, the default, the engine is not asked for logprobs: there is nothing to compare",
        "min_tokens=1 masks the end token at the first place in the engine only",
        "top-p reaches the engine only",
        "a token that is missing in the engine's dict gets the logprob 0.0, probability 1, in single-turn rollouts",
        "policy_loss_type=gspo logs no vllm_kl",
    ),
)
