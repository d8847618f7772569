"""What each training framework asks of vLLM, as profiles: the settings that it pins, and where it pins nothing those that its
recipe rests on (docs/reference/frameworks.md). Data alone: an EngineSpec reads it without importing the framework's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

TRL: Final[Mapping[str, Any]] = {
    "logprobs_mode": "processed_logprobs",
    "enable_prefix_caching": True,
    "max_num_batched_tokens": 4096,
}
VERL: Final[Mapping[str, Any]] = {
    "logprobs_mode": "processed_logprobs",
    "dtype": "bfloat16",
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 8192,
}
OPENRLHF: Final[Mapping[str, Any]] = {
    "logprobs_mode": "processed_logprobs",
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
}
NEMO_RL: Final[Mapping[str, Any]] = {
    "logprobs_mode": "processed_logprobs",
    "dtype": "bfloat16",
    "enable_prefix_caching": True,
}
PIPELINERL: Final[Mapping[str, Any]] = {
    "logprobs_mode": "processed_logprobs",
    "dtype": "bfloat16",
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "generation_config": "vllm",
    "hf_overrides": {"head_dtype": "float32"},  # its own quantization method does this, under a name of its own
}
#: Its first run on V1, which learned worse than V0. Async scheduling was left to V1, which turns it on; a CPU cannot.
PIPELINERL_V1_FIRST: Final[Mapping[str, Any]] = {
    "logprobs_mode": "raw_logprobs",
    "dtype": "bfloat16",
    "enable_prefix_caching": True,
    "generation_config": "vllm",
}
