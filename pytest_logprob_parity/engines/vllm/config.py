"""What a started vLLM says of itself, under engine-argument names: the same reading in process and behind a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...spec.engine_arguments import vllm_engine_arguments

#: What a report and a fingerprint show of a configuration, whether it was asked for or not.
SHOWN: Final = (
    "logprobs_mode", "enable_prefix_caching", "async_scheduling", "enable_chunked_prefill", "generation_config",
    "enforce_eager", "dtype", "seed", "kv_cache_dtype", "head_dtype", "quantization", "max_model_len", "max_num_seqs",
    "max_num_batched_tokens", "block_size", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "enable_expert_parallel", "attention_backend", "compilation_mode", "cudagraph_mode", "speculative_decoding",
    "enable_lora", "max_logprobs", "model_runner",
)  # fmt: skip

#: Why an engine that speculates is not forced, and what checks it instead.
SPECULATES: Final = "speculative decoding draws its tokens past the sampler (assert_speculation_parity checks such an engine)"

#: Arguments that profiles pin and that early versions do not have: they do one thing, by nature.
BY_NATURE: Final = ("logprobs_mode", "async_scheduling")


def settings_of(engine: Any, config: Any, asked: Mapping[str, Any], head: str | None) -> dict[str, Any]:
    """All of SHOWN that a started engine tells, and what was asked for among it.

    `engine` is vLLM's engine or engine client, `config` its VllmConfig, `head` its head's precision as the worker has it.
    """
    return _by_nature(engine, config, asked) | read_config(config, asked, head)


def read_config(config: Any, asked: Mapping[str, Any], head: str | None = None) -> dict[str, Any]:
    """The started engine's configuration under engine-argument names, those asked for among them; `head` is its head's
    precision as the worker has it, which counts more than what the configuration says.
    """
    model, cache, scheduler = config.model_config, config.cache_config, config.scheduler_config
    chunked = getattr(scheduler, "enable_chunked_prefill", None)
    compilation = getattr(config, "compilation_config", None)
    values: dict[str, Any] = {
        "dtype": model.dtype,
        "kv_cache_dtype": cache.cache_dtype,
        "enable_chunked_prefill": getattr(scheduler, "chunked_prefill_enabled", None) if chunked is None else chunked,
        "enable_lora": getattr(config, "lora_config", None) is not None,
        "speculative_decoding": getattr(getattr(config, "speculative_config", None), "method", None),
        "attention_backend": getattr(getattr(config, "attention_config", None), "backend", None),
        "compilation_mode": getattr(compilation, "mode", getattr(compilation, "level", None)),
        "cudagraph_mode": getattr(compilation, "cudagraph_mode", None),
    }
    parts = [model, cache, scheduler, config.parallel_config, getattr(config, "load_config", None), compilation]
    parts += [getattr(config, "lora_config", None), getattr(config, "attention_config", None), config]
    for name in (*SHOWN, *asked):
        if name not in values:
            for part in parts:
                if part is not None and hasattr(part, name):
                    values[name] = getattr(part, name)
                    break
    if head is not None:
        values["head_dtype"] = head
    if "logprobs_mode" in values:  # an enum in some versions, whose members are written in capitals
        values["logprobs_mode"] = getattr(values["logprobs_mode"], "value", values["logprobs_mode"])
    if isinstance(overrides := asked.get("hf_overrides"), dict):
        values["hf_overrides"] = {
            k: values[k] if k == "head_dtype" and k in values else _field(model.hf_config, str(k)) for k in overrides
        }
    return values


def _field(config: Any, name: str) -> Any:
    """A value of a checkpoint's configuration; None for what is none, as its methods and what is private."""
    value = None if name.startswith("_") else getattr(config, name, None)
    return None if callable(value) else value


def vocabulary_of(config: Any) -> int | None:
    """How many token ids the sampler of a started engine can take: the width of its logits. None where it does not tell."""
    size = getattr(config.model_config, "get_vocab_size", lambda: None)()
    return None if size is None else int(size)


def before_its_time(asked: Mapping[str, Any]) -> set[str]:
    """Pinned defaults that this vLLM is too old to have as arguments."""
    known = vllm_engine_arguments()
    return {name for name in BY_NATURE if name in asked and known and name not in known}


def why_not_forced(config: Any, values: Mapping[str, Any]) -> str | None:
    """How a started engine forces tokens or why it cannot, as far as its configuration says; None: wrap its sampler."""
    if values.get("speculative_decoding") is not None:
        return SPECULATES
    if getattr(config.model_config, "enable_trace_replay", False):
        return "native"
    if values.get("model_runner") == "v2":
        return "Model Runner V2 was started without enable_trace_replay=True"
    return None


def _by_nature(engine: Any, config: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a started engine does because of what it is: the V0 engine reports processed logprobs, a V1 before the argument
    existed raw ones.
    """
    first = type(engine).__module__.startswith("vllm.engine.")
    nature = {
        "logprobs_mode": "processed_logprobs" if first else "raw_logprobs",
        "async_scheduling": False,
    }
    runner = "v0" if first else "v2" if getattr(config, "use_v2_model_runner", False) else "v1"
    return {"model_runner": runner} | {name: nature[name] for name in before_its_time(asked or nature)}
