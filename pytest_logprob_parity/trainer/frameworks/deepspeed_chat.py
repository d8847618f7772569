"""DeepSpeed-Chat: a log-softmax and a gather, without temperature. Its engine reports no logprobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ...errors import EngineError
from ...trace import Trace
from .base import Framework, Pairs, log_softmax_then_gather
from .batches import Batch


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """Log-softmax in the dtype of the logits, then gather [..., L]. The temperature is not looked at."""
    del temperature
    return log_softmax_then_gather(logits, token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """Raises EngineError: there is no package to install."""
    raise EngineError("DeepSpeed-Chat's own function is not available: it is an example in DeepSpeedExamples, on no index")


def metrics(pairs: Pairs) -> dict[str, float]:
    """None: it prints rewards and losses, and no KL, ratio or share of clipped tokens."""
    del pairs
    return {}


def read(experience: Any, *, sampling: Any = None, tokenizer: Any = None, **labels: Any) -> Trace:
    """A trace of what generate_experience returns.

    `prompts` [B, P] padded on the left; `input_ids`, `attention_mask` [B, S]: prompt, answer from P on, padding; `logprobs`
    [B, S - 1], place t for token t + 1: the trainer's own, raw; the trace has these labels. Raises UsageError for a batch that
    is not aligned so.
    """
    source = Batch("deepspeed-chat", experience)
    ids, prompts = source.ids("input_ids"), source.ids("prompts")
    width = prompts.shape[1]
    if len(prompts) != len(ids) or width >= ids.shape[1] or not np.array_equal(prompts, ids[:, :width]):
        raise source.refuse("input_ids do not begin with prompts: rows were dropped, or the prompts belong to another batch")
    attention = source.mask("attention_mask", {"that of input_ids": ids.shape})
    starts = source.lengths("attention_mask of the prompts", attention[:, :width], "left")
    lengths = source.lengths("attention_mask of the answers (is a pad token inside?)", attention[:, width:], "right")
    values = source.column("logprobs", {"one less than input_ids, place t for token t + 1": (len(ids), ids.shape[1] - 1)})
    source.check_logprobs("logprobs", values[:, width - 1 :], attention[:, width:], filled=False)
    sequences = [
        {
            "prompt_token_ids": ids[row, width - start : width],
            "token_ids": ids[row, width : width + length],
            "logprobs": values[row, width - 1 : width - 1 + length],
        }
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True))
    ]
    own = {"engine": "deepspeed-chat", "path": "prefill", "logprobs_mode": "raw_logprobs"}
    return source.trace(sequences, sampling=sampling, tokenizer=tokenizer, labels={**own, **labels})


DEEPSPEED_CHAT: Final = Framework(
    name="deepspeed-chat",
    title="DeepSpeed-Chat",
    package="",
    logprobs=logprobs,
    metrics=metrics,
    read=read,
    installed=installed,
    divides="logits",
    profile="rl",  # it generates by transformers or DeepSpeed's hybrid engine, without logprobs
    mistakes=(
        "the checkpoint's own temperature and top-p sample, and the trainer divides by nothing",
        "--compute_fp32_loss makes the old logprobs of float32 logits and leaves the new ones in float16",
        "the old logprobs are computed in training mode: with dropout, where the model has some",
        "where the pad token is the end token the end of an answer is masked",
        "no metric shows a mismatch: KL is inside the reward, and nothing else is logged",
    ),
)
