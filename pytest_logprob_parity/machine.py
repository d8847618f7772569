"""What this machine computes with: its GPU or CPU, and the versions of the libraries that numbers depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Final

#: Environment variables that choose kernels, and so move bits.
_KERNELS: Final = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "VLLM_ATTENTION_BACKEND", "VLLM_BATCH_INVARIANT",
    "VLLM_FLASH_ATTN_VERSION", "VLLM_USE_DEEP_GEMM", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_V1",
    "VLLM_USE_V2_MODEL_RUNNER", "VLLM_CPU_SGL_KERNEL", "VLLM_CPU_MOE_PREPACK",
)  # fmt: skip
_LIBRARIES: Final = ("torch", "transformers", "tokenizers", "numpy")


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def libraries(*names: str) -> dict[str, str]:
    """Versions of the libraries that numbers depend on: of these, or of those that torch computes with."""
    versions = {name: installed_version(name) for name in names or _LIBRARIES}
    return {name: version for name, version in versions.items() if version}


def hardware() -> dict[str, Any]:
    """What computes: the GPU where torch sees one, else the CPU, with torch's number of threads where there is torch."""
    kernels = {name: os.environ[name] for name in _KERNELS if os.environ.get(name)}
    told: dict[str, Any] = {"kernels": kernels} if kernels else {}
    try:
        import torch
    except ImportError:
        return {"device": _cpu_name(), **told}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": torch.cuda.get_device_name(0),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "count": torch.cuda.device_count(),
            **told,
        }
    return {
        "device": _cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **told,
    }


def default_threads() -> int:
    """How many threads an engine without torch computes with: OMP_NUM_THREADS, or one for each core."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else os.cpu_count() or 1


def cpu(threads: int) -> dict[str, Any]:
    """The CPU, for an engine that computes there with so many threads and without torch."""
    return {"device": _cpu_name(), "threads": threads}


def _cpu_name() -> str:
    """Name, family and model: clouds call many processors by one name, and they do not compute alike."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']}, family {facts.get('cpu family')} model {facts.get('model')}"
