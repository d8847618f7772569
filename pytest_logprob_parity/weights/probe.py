"""A checkpoint to try weight updates with: it writes much what the model writes, from other keys and values."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError

#: Noise on every matrix, as a share of its spread: enough for an update to be told from none in bfloat16.
_NOISE: Final = 0.1


def write_probe(model: str | Path, out: str | Path) -> Path:
    """Write a checkpoint of the architecture of `model` to the folder `out`, for `engine.update_weights`; returns it.

    One optimizer step moves so little that in bfloat16 keys and values of old and of new weights are not told apart, and a
    hundred steps later they are. Here the signs of every layer's values and of its attention output are turned around: the
    two cancel, so that the text stays sensible, and values that the old weights computed are wrong by twice their size. A
    little seeded noise on every matrix shows that the update arrived.

    Raises UsageError where the checkpoint has no value and output projections by those names, or `out` exists.
    """
    from safetensors.torch import load_file, save_file

    source, folder = Path(model), Path(out)
    files = sorted(source.glob("*.safetensors"))
    if folder.exists():
        raise UsageError(f"write_probe: {folder} exists; give a folder that does not")
    if not files:
        raise UsageError(f"write_probe: {source} holds no safetensors")
    shards = {file.name: load_file(str(file)) for file in files}
    names = [name for tensors in shards.values() for name in tensors]
    if not any(".v_proj." in n for n in names) or not any(".o_proj." in n for n in names):
        raise UsageError(f"write_probe: {source} has no v_proj and o_proj, whose signs could cancel: another architecture")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for file, tensors in shards.items():
        save_file({n: _moved(n, t) for n, t in tensors.items()}, str(folder / file), metadata={"format": "pt"})
    return folder


def _moved(name: str, tensor: Any) -> Any:
    import torch

    moved = tensor.float()
    if tensor.ndim == 2:
        seeded = torch.Generator().manual_seed(sum(name.encode()))
        moved = moved + _NOISE * moved.std() * torch.randn(tensor.shape, generator=seeded)
    turned = ".v_proj." in name or name.endswith(".o_proj.weight")
    return (-moved if turned else moved).to(tensor.dtype)
