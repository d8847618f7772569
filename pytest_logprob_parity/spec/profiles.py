"""Profiles: named sets of pinned engine arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

#: Pinned engine arguments by profile name. `rl` pins what a trainer assumes of a rollout's logprobs; `serving` pins nothing:
#: vLLM's own defaults, as they resolve. A profile with the name of a training framework pins what that framework asks of
#: vLLM, and where it asks for nothing what its recipe relies on (see docs/reference/frameworks.md).
PROFILES: Final[Mapping[str, Mapping[str, Any]]] = {
    "rl": {
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "enforce_eager": True,
    },
    "serving": {},
    "trl": {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": True, "max_num_batched_tokens": 4096},
    "verl": {
        "logprobs_mode": "processed_logprobs",
        "dtype": "bfloat16",
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 8192,
    },
    "openrlhf": {"logprobs_mode": "processed_logprobs", "dtype": "bfloat16", "enable_prefix_caching": False},
    "nemo-rl": {"logprobs_mode": "processed_logprobs", "dtype": "bfloat16", "enable_prefix_caching": True},
    "pipelinerl": {
        "logprobs_mode": "processed_logprobs",
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "hf_overrides": {"head_dtype": "float32"},  # its own quantization method does this, under a name of its own
    },
    # Its first run on V1, which learned worse than V0. Async scheduling was left to V1, which turns it on; a CPU cannot.
    "pipelinerl-v1-first": {
        "logprobs_mode": "raw_logprobs",
        "dtype": "bfloat16",
        "enable_prefix_caching": True,
        "generation_config": "vllm",
    },
    "own": {},  # an engine that somebody else built
}

#: What every profile that pins something also pins on CPUs: a prompt prefilled in chunks kills the CPU build when requests
#: carry seeds.
RL_ON_CPU: Final[Mapping[str, Any]] = {"enable_chunked_prefill": False}


def profile_pins(profile: str, *, cpu: bool) -> dict[str, Any]:
    """The engine arguments that a profile pins, on CPUs or elsewhere."""
    pins = PROFILES[profile]
    return {**pins, **RL_ON_CPU} if cpu and pins else dict(pins)
