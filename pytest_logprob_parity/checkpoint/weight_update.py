"""What a weight update is, and whether its weights fit the engine that is to take them. Data and files; no engine."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError
from ..json_shape import OptionalKey, check_shape
from ..suggest import nearest

#: What becomes of requests that run: they go on with the new weights, are waited for, or end where they are. `v0` is what
#: vLLM's V0 engine did: stop at a step boundary, load, go on, invalidate nothing.
MODES: Final = ("keep", "wait", "abort", "v0")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """New weights, and when and how an engine takes them.

    `weights` is a checkpoint folder, or tensors by their checkpoint names. `mode` says what becomes of running requests (one
    of MODES), `clear_cache` whether keys and values that the old weights computed are thrown away, those of running requests
    among them. It arrives as soon as a request has written `at_token` tokens.

    Raises UsageError for a mode that does not exist, and for `v0` with a cleared cache.
    """

    weights: Path | Mapping[str, Any]
    mode: str = "keep"
    clear_cache: bool = False
    at_token: int = 0

    def __getstate__(self) -> dict[str, Any]:
        """For another process: tensors as the bytes of a safetensors file."""
        state = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.weights, Path):
            return state
        from safetensors.torch import save

        tensors, seen = {}, set()
        for name, tensor in self.weights.items():  # two names of one tensor are two in the file
            memory = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.contiguous().clone() if memory in seen else tensor.contiguous()
            seen.add(memory)
        return {**state, "weights": save(tensors)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["weights"], bytes):
            from safetensors.torch import load

            state = {**state, "weights": load(state["weights"])}
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"mode={self.mode!r}: known are {', '.join(MODES)}{nearest(str(self.mode), MODES)}")
        if self.mode == "v0" and self.clear_cache:
            raise UsageError("mode='v0' with clear_cache=True: the V0 engine invalidated nothing")
        if isinstance(self.at_token, bool) or not isinstance(self.at_token, int) or self.at_token < 0:
            raise UsageError(f"at_token={self.at_token!r}: the number of tokens that a request has written by then")


def shapes_of(weights: Path | Mapping[str, Any], what: str = "weight update") -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a checkpoint folder, from the headers of its files, or of a mapping of tensors.

    Raises UsageError, in one line that begins with `what`, for a folder that holds no safetensors, lacks a file of its index,
    or holds one that is cut short.
    """
    return {name: shape for name, (shape, _) in _headers(weights, what).items()}


def check_fits(update: WeightUpdate, model: Path) -> None:
    """Raise UsageError, naming the first tensor, where an update's tensors are not those of the checkpoint in `model`.

    Output heads that are tied to the embeddings may be there or not. A mapping may leave tensors out: they stay as they are.
    """
    have, come = _headers(model, "model"), _headers(update.weights, "weight update")
    what = str(update.weights) if isinstance(update.weights, Path) else "the mapping of tensors"
    if isinstance(update.weights, Path):
        _check_same_model_type(update.weights, model)
    if not come:
        raise UsageError(f"weight update: {what} holds no tensors")
    tied = tied_heads(model)
    for name, (shape, floating) in come.items():
        if name not in have and name not in tied:
            raise UsageError(
                f"weight update: {what} has a tensor {name!r} that {model.name} does not have{nearest(name, have)}: another "
                "architecture; the engine keeps the weights it has"
            )
        if name in have and have[name][0] != shape:
            raise UsageError(
                f"weight update: {name!r} is {list(shape)} in {what} and {list(have[name][0])} in {model.name}: another "
                "architecture; the engine keeps the weights it has"
            )
        if name in have and have[name][1] and not floating:
            raise UsageError(
                f"weight update: {name!r} is of whole numbers in {what}, and of floating point in {model.name}: quantized; the "
                "engine keeps the weights it has"
            )
    _check_whole(come, have, what)
    missing = sorted(set(have) - set(come) - tied)
    if missing and isinstance(update.weights, Path):
        raise UsageError(
            f"weight update: {what} lacks {len(missing)} of {len(have)} tensors, {missing[0]!r} first; the engine keeps the "
            "weights it has"
        )


#: Tensors that engines hold as one parameter: a part alone is loaded as other numbers, and stays broken.
_FUSED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def _check_whole(come: Collection[str], have: Collection[str], what: str) -> None:
    """Raise UsageError, naming the kinds, where a part of a fused parameter comes and another part of it does not."""
    lacks: dict[str, str] = {}
    for name in come:
        for parts in _FUSED:
            own = next((part for part in parts if f".{part}." in name), None)
            if own is None:
                continue
            for part in parts:
                other = name.replace(f".{own}.", f".{part}.")
                if other in have and other not in come:
                    lacks[other] = own
    if lacks:
        kinds = sorted({next(part for parts in _FUSED for part in parts if f".{part}." in name) for name in lacks})
        first = min(lacks)
        raise UsageError(
            f"weight update: {what} brings {lacks[first]}, lacks {', '.join(kinds)} ({len(lacks)} tensors, {first!r} first): "
            "engines hold them as one parameter, and a part of it alone gives other numbers; bring all; the engine keeps the "
            "weights it has"
        )


def check_finite(update: WeightUpdate) -> None:
    """Raise UsageError, naming the first tensor, where weights hold NaN or infinities. Reads all of them, one tensor at a
    time, where they are.
    """
    what = str(update.weights) if isinstance(update.weights, Path) else "the mapping of tensors"
    for name, tensor in tensors_of(update.weights):
        broken = _not_finite(tensor)
        if broken:
            raise UsageError(
                f"weight update: {name!r} in {what} holds {broken:,} NaN or infinities; the engine keeps the weights it has"
            )


def tensors_of(weights: Path | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The tensors of a checkpoint folder by name, one at a time, or those of a mapping. Raises as `shapes_of`."""
    from safetensors import safe_open

    if isinstance(weights, Mapping):
        yield from weights.items()
        return
    for file in _files(weights, "weight update"):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                yield name, tensors.get_tensor(name)


def _not_finite(tensor: Any) -> int:
    """How many numbers of a tensor are NaN or infinite; whole numbers never are."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch does not order what has 8 bits
    if bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _files(folder: Path, what: str) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{what}: there is no folder {folder}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            content = json.loads(index.read_text("utf-8"))
        except ValueError:
            raise UsageError(f"{what}: {index} is no index: half-written, or damaged") from None
        check_shape(content, {"weight_map": {str: str}}, f"{what}: {index}", advice="half-written, or damaged")
        files = [folder / name for name in sorted(set(content["weight_map"].values()))]
        for file in files:
            if not file.is_file():
                raise UsageError(f"{what}: {folder} lacks {file.name}, which its index names: half-written")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{what}: {folder} holds no safetensors")
    return files


def _headers(weights: Path | Mapping[str, Any], what: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Shape of every tensor, and whether it is of floating point; raises as shapes_of."""
    headers: dict[str, tuple[tuple[int, ...], bool]] = {}
    if not isinstance(weights, Mapping):
        for file in _files(weights, what):
            headers |= _headers_in(file, what)
        return headers
    for name, tensor in weights.items():
        if not isinstance(name, str) or not hasattr(tensor, "is_floating_point"):
            raise UsageError(f"{what}: {name!r} is {type(tensor).__name__}: torch tensors by checkpoint names are needed")
        headers[name] = (tuple(int(n) for n in tensor.shape), bool(tensor.is_floating_point()))
    return headers


def _headers_in(file: Path, what: str) -> dict[str, tuple[tuple[int, ...], bool]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "numpy") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            return {name: (tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF"))) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{what}: {file} cannot be read ({error}): half-written, or damaged") from None


def tied_heads(model: Path) -> set[str]:
    """Tensors that a checkpoint may leave out: an output head that is the embeddings. Raises as read_config."""
    config = read_config(model)
    config = config.get("text_config", config)
    return {"lm_head.weight"} if config.get("tie_word_embeddings", False) else set()


def read_config(model: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint. Raises UsageError, in one line, where it is missing, half-written or damaged."""
    file = model / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{model} has no config.json: half-written, or no checkpoint") from None
    except ValueError:
        raise UsageError(f"{file} is no JSON object: half-written, or damaged") from None
    check_shape(config, {"text_config": OptionalKey(dict)}, file, advice="half-written, or damaged")
    return config


def _check_same_model_type(weights: Path, model: Path) -> None:
    """Raise UsageError where a checkpoint that comes with a config is one of another architecture by its own account."""
    if not (weights / "config.json").is_file():
        return  # trainers also write tensors alone
    comes, has = (read_config(folder).get("model_type") for folder in (weights, model))
    if comes != has:
        raise UsageError(
            f"weight update: {weights} is {comes!r} by its config.json, {model.name} is {has!r}: another architecture; the "
            "engine keeps the weights it has"
        )
