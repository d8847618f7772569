"""LoRA adapters in PEFT's layout: what a folder holds, whether it fits a model, its digest, merging it. No engine."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import UsageError
from ..json_shape import Fits, OptionalKey, OrNull, check_shape
from ..safetensors_header import header_json, tensors_begin
from ..spec import DTYPES
from ..suggest import nearest
from .digests import digest_of
from .rewrite import rewrite_checkpoint
from .weight_update import shapes_of

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

_TENSOR: Final = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_POSITIVE: Final = Fits(
    "a finite number above 0", lambda value: type(value) in (int, float) and 0 < value <= sys.float_info.max
)
#: The shape of what says by how much an adapter changes each module.
_SHAPE: Final = {
    "r": Fits("a whole number above 0", lambda value: _POSITIVE.test(value) and value == int(value)),
    "lora_alpha": _POSITIVE,
    "rank_pattern": OptionalKey(OrNull({str: _POSITIVE})),
    "alpha_pattern": OptionalKey(OrNull({str: _POSITIVE})),
}
#: What changes more than W + scale B A, and the values under which it does not.
_PLAIN: Final[Mapping[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",), "fan_in_fan_out": (False,), "trainable_token_indices": (None, []),
    "bias": ("none",), "use_dora": (False,), "lora_bias": (False,), "use_qalora": (False,),
    "modules_to_save": (None, []), "layer_replication": (None, []), "alora_invocation_tokens": (None, []),
}  # fmt: skip
#: Floating-point formats of safetensors: the unsigned integer of their width, and the bits whose being set means no number.
_EXPONENTS: Final[Mapping[str, tuple[str, int]]] = {
    "F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F64": ("<u8", 0x7FF0000000000000),
}  # fmt: skip
#: Ways to initialise that change the weights beneath, so that the adapter alone is not what was trained.
_MOVES_THE_BASE: Final = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter as its folder held it when it was read: `modules` are the linear layers that it changes, each with the
    factor (alpha/r, or alpha/sqrt(r) under rank stabilisation) that B A [out, in] is multiplied by.

    `rank` is the largest of its ranks, `digest` that of its content: tensors and factors, not the file's layout nor what
    else its config says. `is_zero`: every B is zero, as before the first step.
    """

    folder: Path
    modules: Mapping[str, float]
    rank: int
    digest: str
    is_zero: bool

    def __str__(self) -> str:
        return f"{self.folder.name} ({self.digest})"

    def deltas(self, factor: float = 1.0) -> Iterator[tuple[str, Any]]:
        """Name of each weight and what is added to it: factor x scale x B A, float32 [out, in]."""
        from safetensors import safe_open

        with safe_open(str(self.folder / WEIGHTS), "pt") as file:
            names = {_module_and_side(name): name for name in file.keys()}  # noqa: SIM118
            for module, scale in self.modules.items():
                a, b = (file.get_tensor(names[module, side]).float() for side in "AB")
                yield f"{module}.weight", factor * scale * (b @ a)

    def check_unchanged(self) -> None:
        """Raise UsageError where the folder has other content by now than what was read, and so loaded."""
        if (self.folder / CONFIG).is_file() and (now := read_adapter(self.folder)).digest != self.digest:
            raise UsageError(
                f"adapter {self.folder}: its files ({now.digest}) are no longer those that the engine loaded ({self.digest}), "
                "which it goes on with; engine.update_weights(folder) loads the new ones"
            )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a checkpoint."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: Path, model: Path | None = None) -> Adapter:
    """The adapter in a folder, checked against the checkpoint in `model`.

    Raises UsageError, in one line, for what is missing, half-written or no plain LoRA, and for modules, ranks or shapes that
    are not the model's.
    """
    config, file = _config(folder), folder / WEIGHTS
    if not file.is_file():
        raise UsageError(f"adapter {folder}: has no {WEIGHTS}")
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes_of(folder, "adapter").items():
        module, side = _module_and_side(name)
        if not side:
            raise UsageError(f"adapter {folder}: {name!r} is no lora_A or lora_B of a linear layer, and would be left out")
        shapes.setdefault(module, {})[side] = shape
    if not shapes:
        raise UsageError(f"adapter {folder}: holds no tensors")
    modules = {}
    for module, sides in shapes.items():
        rank, modules[module] = _rank_and_scale(config, module)
        _check_shapes(folder, module, sides, rank)
    if model is not None:
        _check_fits(folder, config, shapes, model)
    tensors, is_zero = _content(file)
    digest = digest_of({"tensors": tensors, "scales": dict(sorted(modules.items()))})
    return Adapter(folder=folder, modules=modules, rank=max(s["A"][0] for s in shapes.values()), digest=digest, is_zero=is_zero)


def apply_adapter(model: Any, adapter: Adapter, factor: float = 1.0) -> None:
    """Merge an adapter into a loaded transformers model: W + factor x scale x B A, in float32 at least, rounded once.

    Raises UsageError for a module that the loaded model does not have.
    """
    import torch

    with torch.no_grad():
        for name, delta in adapter.deltas(factor):
            try:
                weight = model.get_parameter(name)
            except AttributeError:
                raise UsageError(f"adapter {adapter.folder}: {type(model).__name__} has no {name!r} to merge it into") from None
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight.copy_(weight.to(exact) + delta.to(weight.device, exact))


def merge_adapter(model: str | Path, adapter: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """Write the checkpoint `out`: that of `model` with `adapter` merged into it, as trainers do that sync merged weights.

    The merged weights are rounded to `dtype` (by default what each tensor of the checkpoint is in): in bfloat16 this moves
    logprobs by about as much as the checkpoint's own rounding did. Returns `out`.

    Raises UsageError for an adapter that does not fit, a dtype that is none, and where `out` is there already.
    """
    import torch

    known = [name for name in DTYPES if name != "auto"]
    if dtype is not None and dtype not in known:
        raise UsageError(f"merge_adapter(dtype={dtype!r}): known are {', '.join(known)}{nearest(str(dtype), known)}")
    model, out = Path(model), Path(out)
    deltas = dict(read_adapter(Path(adapter), model).deltas())

    def merged(name: str, tensor: Any) -> Any:
        changed = tensor.float() + deltas[name] if name in deltas else tensor
        return changed.to(tensor.dtype if dtype is None else getattr(torch, dtype))

    rewrite_checkpoint(model, out, merged, "merge_adapter", dtype)
    return out


def _config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise UsageError(f"adapter {folder}: there is no such folder")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"adapter {folder}: has no {CONFIG}, so it is no folder as PEFT writes it") from None
    except ValueError:
        raise UsageError(f"adapter {folder}: {CONFIG} is no JSON object: half-written, or damaged") from None
    check_shape(config, _SHAPE, f"adapter {folder}: {CONFIG}")
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in config.get(pattern) or {}:
            _check_pattern(folder, pattern, key)
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise UsageError(f"adapter {folder}: {name}={config[name]!r} is not supported: a plain LoRA has {plain[0]!r}")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_MOVES_THE_BASE):
        raise UsageError(f"adapter {folder}: init_lora_weights={initial!r} changed the weights beneath; convert it with PEFT")
    return config


def _check_pattern(folder: Path, name: str, key: str) -> None:
    """Raise UsageError for a key of a rank_pattern or alpha_pattern that is no regular expression."""
    try:
        re.compile(key)
    except re.error as error:
        raise UsageError(
            f"adapter {folder}: {CONFIG}: {name} has the key {key!r:.80}, expected a regular expression of module names "
            f"({error})"
        ) from None


def _rank_and_scale(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and factor of a module: the patterns match the end of its name from a dot on, the first one wins."""

    def of(pattern: str, default: Any) -> Any:
        found = (v for key, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", module))
        return next(found, default)

    rank, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
    return int(rank), float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _module_and_side(name: str) -> tuple[str, str]:
    found = _TENSOR.match(name)
    return ("", "") if found is None else (found["module"], found["side"])


def _check_shapes(folder: Path, module: str, sides: Mapping[str, tuple[int, ...]], rank: int) -> None:
    for side in "AB":
        if side not in sides:
            raise UsageError(f"adapter {folder}: {module} lacks its lora_{side}: half-written")
    for side, axis in (("A", 0), ("B", 1)):
        if len(sides[side]) != 2 or sides[side][axis] != rank:
            raise UsageError(
                f"adapter {folder}: lora_{side} of {module} is {list(sides[side])}, and {CONFIG} says rank {rank}: they do not "
                "belong together"
            )


def _check_fits(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, tuple[int, ...]]], model: Path
) -> None:  # fmt: skip
    have = shapes_of(model, "model")
    known = [name.removesuffix(".weight") for name, shape in have.items() if len(shape) == 2]
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in known):
            raise UsageError(
                f"adapter {folder}: target module {target!r} is none of {model.name}"
                f"{nearest(str(target), {name.rpartition('.')[2] for name in known})}"
            )
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{module}".endswith(f".{target}") for module in shapes):
            raise UsageError(
                f"adapter {folder}: {CONFIG} names target module {target!r}, and no tensor is of one: half-written"
            )
    for module, sides in shapes.items():
        weight, change = have.get(f"{module}.weight"), (sides["B"][0], sides["A"][1])
        if weight is None:
            raise UsageError(
                f"adapter {folder}: changes {module!r}, which {model.name} does not have{nearest(module, known)}: an engine "
                "would serve it without"
            )
        if weight != change:
            raise UsageError(
                f"adapter {folder}: B A of {module} is {list(change)}, the weight in {model.name} {list(weight)}: it belongs "
                "to another model"
            )


def _content(file: Path) -> tuple[dict[str, Any], bool]:
    """Dtype, shape and SHA-256 of every tensor, and whether every B is zero: read off the bytes, without torch."""
    data = memoryview(file.read_bytes())
    start, header = tensors_begin(data), json.loads(header_json(data))
    tensors, is_zero = {}, True
    for name in sorted(header.keys() - {"__metadata__"}):
        first, last = header[name]["data_offsets"]
        values = data[start + first : start + last]
        _check_finite(file, name, header[name]["dtype"], values)
        tensors["-".join(_module_and_side(name))] = [
            header[name]["dtype"], header[name]["shape"], hashlib.sha256(values).hexdigest()
        ]  # fmt: skip
        is_zero = is_zero and (_module_and_side(name)[1] == "A" or _all_zero(values, header[name]["shape"]))
    return tensors, is_zero


def _check_finite(file: Path, name: str, dtype: str, values: memoryview) -> None:
    """Raise UsageError for a tensor that is not of floating point, or that holds NaN or infinities."""
    if dtype not in _EXPONENTS:
        raise UsageError(f"adapter {file.parent}: {name} is {dtype}: one of {', '.join(_EXPONENTS)} is needed")
    kind, exponent = _EXPONENTS[dtype]
    broken = int(np.count_nonzero(np.frombuffer(values, kind) & exponent == exponent))
    if broken:
        raise UsageError(f"adapter {file.parent}: {name} holds {broken:,} NaN or infinities")


def _all_zero(values: memoryview, shape: Sequence[int]) -> bool:
    """Whether every number is 0 or -0, whatever its format: the sign is the highest bit of its last byte."""
    rows = np.frombuffer(values, np.uint8).reshape(math.prod(shape), -1)
    return not (rows[:, :-1].any() or (rows[:, -1] & 0x7F).any())
