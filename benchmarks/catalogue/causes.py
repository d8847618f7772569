"""What a diagnosis of each fault may name: the first cause is the truth, the others mean the same under another name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .fault import Case

# What the engine computes otherwise than the checkpoint says is its build; a request that saw other context has another cache,
# or another batch.
_BUILD: Final = ("engine_build", "attention_backend")
_CONTEXT: Final = ("prefix_cache", "batch_shape", "chunked_prefill", "stale_kv_cache", "engine_build")
_EXPERTS: Final = ("expert_routing", *_BUILD)

CAUSES: Final[Mapping[str, tuple[str, ...]]] = {
    "temperature": ("temperature",),
    "temperature applied twice": ("temperature", "raw_vs_processed"),
    "top-p another": ("truncation",),
    "top-k another": ("truncation",),
    "penalty left out": ("penalties", "raw_vs_processed"),
    "presence penalty slipped in": ("penalties",),
    "frequency penalty slipped in": ("penalties",),
    "min-p slipped in": ("truncation",),
    "top-k slipped in": ("truncation",),
    "padding leaks in": _CONTEXT,
    "prompt cut off": _CONTEXT,
    "raw for processed, unlabelled": ("raw_vs_processed", "temperature"),
    "raw for processed": ("raw_vs_processed",),
    "positions shifted by one": ("shifted_positions",),
    "another token's logprob (dict order)": ("wrong_token",),
    "log2 in place of ln": ("wrong_values",),
    "a neighbour's logprobs": ("wrong_token",),
    "the sequence's mean for every token": ("wrong_values",),
    "rounded logprobs": ("wrong_values",),
    "rounded to decimals": ("wrong_values",),
    "clipped logprobs": ("wrong_values",),
    "log(p + epsilon)": ("wrong_values",),
    "NaN": ("engine_build",),
    "top-p not renormalised": ("truncation",),
    "top-k not renormalised": ("truncation",),
    "vocabulary padding in the normaliser": ("wrong_values", "engine_build"),
    "logits rounded (head precision)": ("head_precision",),
    "logits soft-capped": _BUILD,
    "logit bias on a tenth of the vocabulary": _BUILD,
    "head in float32": ("head_precision",),
    "attention scale": _BUILD,
    "norm epsilon": _BUILD,
    "rope base": _BUILD,
    "rope scaling": _BUILD,
    "all positions moved": _BUILD,
    "activation": _BUILD,
    "keys and values in few bits": ("kv_cache_dtype", *_BUILD),
    "a stale KV block": ("stale_kv_cache", *_BUILD),
    "a stale KV block, few requests": _CONTEXT,
    "KV cache in 8 bits": ("kv_cache_dtype",),
    "sliding window": _BUILD,
    "tokens corrupted": ("wrong_values",),
    "sequences wrong": ("wrong_values",),
    "one token wild": ("wrong_values",),
    "a replica of another step": ("weights_differ",),
    "another seed stream": ("seed_stream",),
    "greedy for sampled": ("seed_stream",),
    "stops elsewhere": ("seed_stream",),
    "KV cache wrong after a position": ("stale_kv_cache", *_BUILD, *_CONTEXT),
    "positions stop at a limit": (*_BUILD, *_CONTEXT),
    "a stale KV block, one sequence": _CONTEXT,
    "a stale KV block, one prompt": _CONTEXT,
    "raw in one prompt": ("raw_vs_processed", "temperature", *_CONTEXT),
    "first token of each completion": ("raw_vs_processed", "temperature", "wrong_values", *_CONTEXT),
    "last token of each completion": ("raw_vs_processed", "temperature", "wrong_values", *_CONTEXT),
    "0.1 % of tokens": ("raw_vs_processed", "temperature", "wrong_values", *_CONTEXT),
    "1 % of tokens": ("raw_vs_processed", "temperature", "wrong_values", *_CONTEXT),
    "one token off": ("engine_build", *_CONTEXT),
    "tokens off, signs balanced": ("engine_build", *_CONTEXT),
    "logits of one range of ids": ("head_precision", *_BUILD),
    "another expert for some tokens": _EXPERTS,
    "one expert fewer": _EXPERTS,
    "one expert fewer after a position": (*_EXPERTS, *_CONTEXT),
    "experts' shares scaled": _EXPERTS,
}


def causes_of(fault: Case) -> tuple[str, ...]:
    """What a diagnosis of this fault may name; faults planted in the weights are of another checkpoint."""
    return CAUSES.get(fault.name, ("weights_differ",))
