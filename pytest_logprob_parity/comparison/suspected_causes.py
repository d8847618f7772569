"""From differences between two fingerprints to what could be the cause, in the order in which to rule things out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .findings import LAYERS, Cause, Finding, Layer

#: Part of a fingerprint -> (layer, cause) that it can bring about.
SUSPECTS: Final[Mapping[str, tuple[Layer, Cause]]] = {
    "config.logprobs_mode": ("semantic", "raw_vs_processed"),
    "config.generation_config": ("semantic", "truncation"),
    "config.enable_prefix_caching": ("path", "prefix_cache"),
    "config.async_scheduling": ("path", "async_scheduling"),
    "config.enable_chunked_prefill": ("path", "chunked_prefill"),
    "config.max_num_batched_tokens": ("path", "batch_shape"),
    "config.max_num_seqs": ("path", "batch_shape"),
    "config.concurrency": ("path", "batch_shape"),
    "config.enforce_eager": ("path", "compilation"),
    "config.compilation_mode": ("path", "compilation"),
    "config.cudagraph_mode": ("path", "compilation"),
    "config.attention_backend": ("path", "attention_backend"),
    "config.block_size": ("path", "attention_backend"),
    "config.kv_cache_dtype": ("path", "kv_cache_dtype"),
    "config.tensor_parallel_size": ("path", "parallelism"),
    "config.pipeline_parallel_size": ("path", "parallelism"),
    "config.data_parallel_size": ("path", "parallelism"),
    "config.enable_expert_parallel": ("path", "expert_routing"),
    "config.speculative_decoding": ("path", "speculative_decoding"),
    "config.model_runner": ("path", "engine_build"),
    "engine.kind": ("path", "engine_build"),
    "engine.version": ("path", "engine_build"),
    "libraries.torch": ("path", "engine_build"),
    "libraries.transformers": ("path", "engine_build"),
    "hardware.device": ("path", "engine_build"),
    "hardware.capability": ("path", "engine_build"),
    "hardware.threads": ("path", "batch_shape"),
    "config.head_dtype": ("head", "head_precision"),
    "dtype": ("weights", "weight_dtype"),
    "config.quantization": ("weights", "quantization"),
    "config.hf_overrides": ("weights", "weights_differ"),
    "adapter": ("weights", "adapter"),
    "config.enable_lora": ("weights", "adapter"),
    "model": ("weights", "weights_differ"),
    "name": ("weights", "weights_differ"),
    "end_tokens": ("sampling", "seed_stream"),
    "config.seed": ("sampling", "seed_stream"),
}


#: What a setting can bring about that stands in no table: it is a suspect, and no cause is named for it alone.
_UNLISTED: Final[tuple[Layer, Cause]] = ("path", "engine_build")

#: What tells how an engine computes from its weights.
_TELLS: Final = "`logprob-parity diagnose` compares with the checkpoint in transformers"


def adapter_finding(differences: Sequence[tuple[str, Any, Any]]) -> Finding | None:
    """`adapter` where golden and engine have adapters of other content, or one of them has none; both by name."""
    for name, expected, actual in differences:
        if name == "adapter":
            text = f"{expected or 'no adapter'} in the golden, {actual or 'no adapter'} in this run"
            return Finding(layer="weights", cause="adapter", evidence=text)
    return None


def suspects(
    differences: Sequence[tuple[str, Any, Any]], engine: Mapping[str, Any] | None = None, *, updated: bool = False
) -> list[Finding]:  # fmt: skip
    """What the settings that differ can bring about, or, where none does, what fingerprints cannot see: how the engine
    computes, and its weights; of an engine with the fingerprint `engine`, whose weights were `updated`, its adapter and what
    its cache holds of the weights before.
    """
    if found := suspect_settings(differences):
        return found
    unsaid = ", ".join(name for name, _, _ in differences)
    match = (
        "the fingerprints match"
        if not differences
        else f"one side does not report its {unsaid}; otherwise the fingerprints match"
    )
    cached = updated and (engine or {}).get("config", {}).get("enable_prefix_caching")
    candidates: tuple[Cause, ...] = (
        "engine_build", "attention_backend", *(("adapter",) if (engine or {}).get("adapter") else ()),
        "weights_differ", "stale_weights", *(("stale_kv_cache",) if cached else ()),
    )  # fmt: skip
    text = f"{match}; they do not cover the values of the weights, so either the computation or the weights differ; {_TELLS}"
    return [Finding(layer="path", cause=None, evidence=text, candidates=candidates)]


def suspect_settings(differences: Sequence[tuple[str, Any, Any]], *, name: bool = True) -> list[Finding]:
    """One finding for each layer under suspicion; a cause is named only where it is the only one of all layers, and, with
    `name` False, not even there.

    A setting that stands in no table is a suspect all the same. Another adapter is one by itself: its content is known, and it
    is other weights whatever else differs. Empty where no setting differs.
    """
    if adapter := adapter_finding(differences):
        others = [d for d in differences if d[0] in SUSPECTS and SUSPECTS[d[0]][1] != "adapter"]
        return [adapter, *(suspect_settings(others, name=name) if others else [])]
    another_version = any(name == "engine.version" for name, _, _ in differences)
    found: dict[Layer, dict[Cause, list[str]]] = {}
    for whole, expected, actual in differences:
        setting = "config.hf_overrides" if whole.startswith("config.hf_overrides.") else whole
        # One of the two versions does not say, or the server does not; an override that is not there is none, and so is the
        # quantization of a golden beside a run that has one.
        unsaid = setting.startswith(("config.", "hardware.", "libraries.")) and (expected is None or actual is None)
        is_none = setting == "config.hf_overrides" or (setting == "config.quantization" and actual is not None)
        if setting in SUSPECTS and (not unsaid or is_none):
            layer, cause = SUSPECTS[setting]
        elif setting not in SUSPECTS and setting.startswith(("config.", "engine.")) and not (unsaid and another_version):
            layer, cause = _UNLISTED
        else:
            continue
        found.setdefault(layer, {}).setdefault(cause, []).append(f"{whole} {expected!r} -> {actual!r}")
    listed = any(setting in SUSPECTS or setting.startswith("config.hf_overrides.") for setting, _, _ in differences)
    alone = name and sum(len(causes) for causes in found.values()) == 1 and listed
    findings = []
    for layer in LAYERS:
        if layer in found:
            causes = tuple(found[layer])
            evidence = "; ".join(text for texts in found[layer].values() for text in texts)
            if alone:
                findings.append(Finding(layer=layer, cause=causes[0], evidence=f"{evidence}; nothing else differs"))
            else:
                findings.append(Finding(layer=layer, cause=None, evidence=evidence, candidates=causes))
    return findings
