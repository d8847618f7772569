"""What a golden was recorded from: digests of model, tokenizer and chat template, hardware, library versions."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..bounded import check_depth, read_text
from ..errors import UsageError

if TYPE_CHECKING:
    from .setup import Setup

#: Parts of config.json that say how a checkpoint was written, not what it computes.
_VOLATILE: Final = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype"})
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
#: What config.json calls the number of experts, by architecture.
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: Environment variables that choose kernels, and so move bits.
_KERNELS: Final = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "VLLM_ATTENTION_BACKEND", "VLLM_BATCH_INVARIANT",
    "VLLM_FLASH_ATTN_VERSION", "VLLM_USE_DEEP_GEMM", "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_USE_V1",
    "VLLM_USE_V2_MODEL_RUNNER", "VLLM_CPU_SGL_KERNEL", "VLLM_CPU_MOE_PREPACK",
)  # fmt: skip
_LIBRARIES: Final = ("torch", "transformers", "tokenizers", "numpy")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def find_model(model: str, root: Path) -> Path:
    """The folder of a model: below `root`, below the current folder, or in the local hub cache. Nothing is fetched.

    Raises UsageError where there is none, or where it lacks config.json.
    """
    for folder in (root / model, Path(model)):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise UsageError(f"model {model!r}: {folder} has no config.json, so it is no model folder")
            return folder.absolute()
    cached = None
    if model.count("/") <= 1 and not model.startswith((".", "~", "/")):
        try:
            from huggingface_hub import try_to_load_from_cache
        except ImportError:
            pass
        else:
            try:
                cached = try_to_load_from_cache(model, "config.json")
            except ValueError:
                cached = None
    if isinstance(cached, str):
        return Path(cached).parent
    raise UsageError(f"model {model!r}: no such folder (looked in {root}), and not in the local hub cache")


def find_tokenizer(folder: Path) -> Path:
    """`folder`, if it holds a tokenizer. Raises UsageError, naming the files looked for."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UsageError(f"{folder} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}")
    return folder


#: Bytes of a JSON file of a model folder, at most: the index of a large model has a few MB.
_MOST_JSON: Final = 64 * 2**20


@functools.lru_cache(maxsize=32)
def model_digests(model: Path, tokenizer: Path) -> Mapping[str, str]:
    """Digests of what a model folder holds: `model`, `tokenizer`, `chat_template`, and `end_tokens`.

    The model's is cheap: config.json, the index and the headers of the shards (names, shapes and dtypes of all
    tensors), not the weights. In a hub cache the files are links named by their content: those names count too.
    """
    parts: dict[str, Any] = {}
    config = _table(model / "config.json")
    parts["config.json"] = {k: v for k, v in config.items() if k not in _VOLATILE}
    for file in sorted(model.glob("*.safetensors*")):
        if file.is_symlink():
            parts[file.name] = file.resolve().name
        elif file.suffix == ".json":
            parts[file.name] = _table(file)
        elif not file.is_file():
            raise UsageError(f"{file}: no regular file, so this is no model folder")
        else:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                parts[file.name] = hashlib.sha256(stream.read(min(length, 100_000_000))).hexdigest()
    experts = _experts(config)
    files = [tokenizer / n for n in (*_TOKENIZER_FILES, "merges.txt", "added_tokens.json") if (tokenizer / n).is_file()]
    return {
        "model": digest_of(parts),
        "tokenizer": digest_of({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}),
        "chat_template": digest_of(_chat_template(tokenizer)),
        "end_tokens": canonical_json(_end_tokens(model, config)),
        **({"experts": str(experts)} if experts > 1 else {}),
    }


def _table(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises UsageError, in one line, for anything else."""
    try:
        found = json.loads(read_text(file, _MOST_JSON))
        check_depth(found)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: cannot be read as JSON: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file}: holds {type(found).__name__}, a JSON object is expected")
    return found


def _experts(config: Mapping[str, Any]) -> int:
    """How many experts a layer of this config.json routes tokens to; 0 where none."""
    text = config.get("text_config")
    found = (c.get(name) for c in (config, text if isinstance(text, Mapping) else {}) for name in _EXPERTS)
    return max((int(n) for n in found if isinstance(n, int)), default=0)


def _end_tokens(model: Path, config: Mapping[str, Any]) -> Any:
    """The ids that end a completion; engines take them from generation_config.json, whatever else they take from it."""
    file = model / "generation_config.json"
    generation = _table(file) if file.is_file() else {}
    return generation.get("eos_token_id", config.get("eos_token_id"))


def _chat_template(tokenizer: Path) -> Any:
    file = tokenizer / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    config = tokenizer / "tokenizer_config.json"
    return json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def libraries() -> dict[str, str]:
    """Versions of the libraries that numbers depend on."""
    versions = {name: installed_version(name) for name in _LIBRARIES}
    return {name: version for name, version in versions.items() if version}


def hardware() -> dict[str, Any]:
    """What computes: the GPU where torch sees one, else the CPU with its number of threads."""
    import torch

    kernels = {name: os.environ[name] for name in _KERNELS if os.environ.get(name)}
    told: dict[str, Any] = {"kernels": kernels} if kernels else {}
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


#: How the dotted names of overridden fields of config.json begin.
_OVERRIDE: Final = "config.hf_overrides."


def differences(golden: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two fingerprints differ: (dotted name, the golden's value, the value now), None for an absent one."""
    flat_golden, flat_now = _flat(golden), _flat(now)
    for flat in (flat_golden, flat_now):
        if isinstance(flat.get("name"), str):
            flat["name"] = re.sub(r"^(\.{1,2}/)+", "", flat["name"])  # one folder, named from where the caller stood
    if adapter_digest(flat_golden.get("adapter")) == adapter_digest(flat_now.get("adapter")):
        flat_now["adapter"] = flat_golden.get("adapter")  # the same content in a folder of another name
    golden_name, name = (str(flat.get("name", "")) for flat in (flat_golden, flat_now))
    if flat_golden.get("model") == flat_now.get("model") and Path(golden_name).name == Path(name).name:
        flat_now["name"] = flat_golden.get("name")  # one model, named from another folder
    for one, other in ((flat_golden, flat_now), (flat_now, flat_golden)):
        for key in set(one) - set(other):
            if key.startswith(_OVERRIDE) and one[key] is None:  # null is a value of config.json, and not its absence
                other[key] = "not overridden"
    names = sorted(set(flat_golden) | set(flat_now))
    return [(n, flat_golden.get(n), flat_now.get(n)) for n in names if flat_golden.get(n) != flat_now.get(n)]


def adapter_digest(recorded: Any) -> str:
    """The digest in what fingerprints have of an adapter, `FOLDER (DIGEST)`; "" where there is none."""
    return str(recorded or "").rpartition(" (")[2].removesuffix(")")


def setup_class(golden: Mapping[str, Any], apart: Sequence[tuple[str, Any, Any]]) -> Setup:
    """How a golden's fingerprint compares, once it belongs to the engine's model and prompts.

    `same`: engine, version, configuration, hardware and libraries are the golden's, bits are expected back. `compatible`:
    something of these is another. `unknown`: there is nothing to compare.

    Another adapter is `compatible` too, unlike another model: adapters are what changes from step to step, and whether the
    logprobs follow is what a check is asked. Limits and bounds are those of any other setting; its name goes with the verdict.
    """
    return "unknown" if not golden else "compatible" if apart else "same"


def keeps_schedule(now: Mapping[str, Any]) -> bool:
    """Whether an engine of this fingerprint runs the same requests in the same batches every time.

    Requests that arrive at a server several at a time meet in others.
    """
    return int(now.get("config", {}).get("concurrency") or 1) == 1


def moves_the_stream(name: str, golden: Any = None, now: Any = None) -> bool:
    """Whether another value of this part of a fingerprint may draw other random numbers from the same seeds.

    A server draws as the engine in it does.
    """
    if name == "engine.kind" and {golden, now} == {"vllm", "vllm-server"}:
        return False
    return not name.startswith("config.") or name in {"config.seed", "config.model_runner", "config.tensor_parallel_size"}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat
