"""A checkpoint written again with other numbers in its tensors: whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .weight_update import read_config, shapes_of


def rewrite_checkpoint(
    model: Path, out: Path, change: Callable[[str, Any], Any], what: str, dtype: str | None = None
) -> None:  # fmt: skip
    """Write the checkpoint `out`: `model` with every tensor as `change(name, tensor)` gives it. Other files are copied; where
    `change` makes another `dtype` of all of them, config.json says so.

    Raises UsageError, in the name of `what`, where `out` is there already or `model` is not whole.
    """
    from safetensors.torch import load_file, save_file

    if out.exists():
        raise UsageError(f"{what}(out={str(out)!r}): is there already")
    shapes_of(model, what)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
        half = Path(place) / out.name
        shutil.copytree(model, half)
        for file in sorted(half.glob("*.safetensors")):
            tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(str(file)).items()}
            save_file(tensors, str(file), {"format": "pt"})
        if dtype is not None:
            config = read_config(half)
            name = "torch_dtype" if "torch_dtype" in config else "dtype"
            (half / "config.json").write_text(json.dumps({**config, name: dtype}, indent=2) + "\n", "utf-8")
        half.rename(out)
