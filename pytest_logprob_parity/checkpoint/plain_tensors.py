"""The tensors of a checkpoint in numpy, without torch: names and shapes from the headers, values one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..bounded import read_text
from ..errors import UsageError
from ..safetensors_header import header_json, read_head, tensors_begin

#: Bytes of a shard's header, and of the index, at most.
_MOST: Final = 100_000_000
#: A dtype of safetensors -> numpy's, for values that numpy has; bfloat16 is the upper half of a float32.
_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTensor:
    """One tensor of a shard: where its bytes are, and what they are."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> npt.NDArray[np.float32]:
        """Its values [shape] in float32. Raises UsageError for a dtype that is no plain float, and a shard that is cut."""
        if self.dtype not in _DTYPES:
            raise UsageError(f"{self.shard}: its dtype {self.dtype} is none of {', '.join(_DTYPES)}: dequantize the checkpoint")
        count = int(np.prod(self.shape, dtype=np.int64))
        with self.shard.open("rb") as file:
            file.seek(self.start)
            raw = np.fromfile(file, _DTYPES[self.dtype], count)
        if len(raw) != count:
            raise UsageError(f"{self.shard}: ends within a tensor: the file is not whole")
        if self.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32).reshape(self.shape)


def tensors_of(folder: Path) -> Mapping[str, PlainTensor]:
    """The tensors of a model folder by their checkpoint names. Raises UsageError where the folder has none to read."""
    found: dict[str, PlainTensor] = {}
    for shard in shards_of(folder):
        try:
            with shard.open("rb") as file:
                head = read_head(file, _MOST)
            header: dict[str, Any] = json.loads(header_json(head))
            for name, about in header.items():
                if name != "__metadata__":
                    found[name] = PlainTensor(
                        shard=shard,
                        dtype=str(about["dtype"]),
                        shape=tuple(int(n) for n in about["shape"]),
                        start=tensors_begin(head) + int(about["data_offsets"][0]),
                    )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{shard}: no safetensors file that can be read ({type(error).__name__}: {error})") from None
    return found


def shards_of(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights: those of its index, or `model.safetensors`. Raises UsageError."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(read_text(index, _MOST))["weight_map"].values())) if index.is_file() else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{index}: no index of shards ({type(error).__name__}: {error})") from None
    shards = [folder / str(name) for name in names or ("model.safetensors",)]
    for shard in shards:
        if not shard.is_file():
            raise UsageError(f"{folder}: there is no {shard.name}; the weights must be safetensors files")
    return shards
