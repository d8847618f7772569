"""A checkpoint to try weight updates with: it writes much what the model writes, from other keys and values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError
from .rewrite import rewrite_checkpoint
from .weight_update import shapes_of, tied_heads

_LAYER: Final = re.compile(r".*\blayers\.\d+\.")

#: Noise on every matrix, as a share of its spread: enough for an update to be told from none in bfloat16.
_NOISE: Final = 0.1


def write_probe(model: str | Path, out: str | Path) -> Path:
    """Write a checkpoint of the architecture of `model` to the folder `out`, for `engine.update_weights`; returns it.

    One optimizer step moves so little that in bfloat16 keys and values of old and of new weights are not told apart, and a
    hundred steps later they are. Here the signs of every layer's values and of its attention output are turned around: the
    two cancel, so that the text stays sensible, and values that the old weights computed are wrong by twice their size. A
    little seeded noise on every matrix shows that the update arrived.

    Raises UsageError where the checkpoint is not whole, has a layer without value and output projections by those names, or
    is not of floating point, and where `out` exists.
    """
    source, folder = Path(model), Path(out)
    names = shapes_of(source, "write_probe")
    for layer in sorted({found[0] for name in names if (found := _LAYER.match(name))}):
        for part in ("v_proj", "o_proj"):
            if not any(name.startswith(layer) and f".{part}.weight" in name for name in names):
                raise UsageError(f"write_probe: {layer}* of {source} has no {part} whose sign could be turned")
    if not any(".v_proj." in name for name in names):
        raise UsageError(f"write_probe: {source} has no v_proj whose sign could be turned")
    tied = tied_heads(source)
    embeddings = next((name for name in names if name.endswith("embed_tokens.weight")), "")

    def moved(name: str, tensor: Any) -> Any:
        return _moved(embeddings if name in tied else name, tensor)

    rewrite_checkpoint(source, folder, moved, "write_probe")
    return folder


def _moved(name: str, tensor: Any) -> Any:
    import torch

    if not tensor.is_floating_point():
        raise UsageError(f"write_probe: {name} is {tensor.dtype}: a checkpoint of floating point is needed")
    moved = tensor.float()
    if tensor.ndim == 2:
        seeded = torch.Generator().manual_seed(sum(name.encode()))
        moved = moved + _NOISE * moved.std() * torch.randn(tensor.shape, generator=seeded)
    turned = ".v_proj." in name or name.endswith(".o_proj.weight")
    return (-moved if turned else moved).to(tensor.dtype)
