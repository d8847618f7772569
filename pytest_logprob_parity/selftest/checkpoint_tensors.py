"""The tensors of any checkpoint by their roles: vocabulary, matrices, layers. Shapes tell, not the names of an architecture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.weight_update import read_config
from ..errors import UsageError

#: The first whole number between dots in a tensor's name.
_NUMBER = re.compile(r"^(.*?\.)(\d+)(\..*)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensors:
    """All tensors by name, and which of them have which role.

    `vocabulary` are the names of the matrices with a row for each token id: embedding and LM head. `matrices` are all other
    tensors of two dimensions or more. `layers` are the tensors of each layer, by layer number and by the rest of the name.
    """

    tensors: Mapping[str, Any]
    vocabulary: tuple[str, ...]
    matrices: tuple[str, ...]
    layers: Mapping[int, Mapping[str, str]]

    @classmethod
    def load(cls, folder: Path) -> CheckpointTensors:
        """Read a checkpoint folder. Raises UsageError where it holds no safetensors, or none of floating point."""
        from safetensors.torch import load_file

        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(f"selftest: {folder} holds no safetensors")
        tensors = {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
        config = read_config(folder)
        size = {**config.get("text_config", {}), **config}.get("vocab_size")
        return cls.of(tensors, None if size is None else int(size))

    @classmethod
    def of(cls, tensors: Mapping[str, Any], vocabulary_size: int | None) -> CheckpointTensors:
        """The roles of these tensors. Whole numbers of 8 bits and less are no weights that a fault can be planted in."""
        able = {name: t for name, t in tensors.items() if t.is_floating_point() and t.element_size() > 1}
        vocabulary = tuple(n for n, t in able.items() if t.dim() == 2 and t.shape[0] == vocabulary_size)
        return cls(
            tensors=tensors,
            vocabulary=vocabulary,
            matrices=tuple(n for n, t in able.items() if t.dim() >= 2 and min(t.shape) > 1 and n not in vocabulary),
            layers=_layers_of(able),
        )

    def same_layers(self) -> tuple[int, int] | None:
        """Two layers in the middle of the model whose tensors have the same names and shapes, neighbours if possible."""
        numbers, middle = sorted(self.layers), len(self.layers) / 2
        pairs = [(a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :] if self._shapes(a) == self._shapes(b)]
        return min(pairs, key=lambda pair: (pair[1] - pair[0], abs(sum(pair) / 2 - middle)), default=None)

    def middle_layer(self) -> int | None:
        """The number of the layer in the middle; None for a model without numbered layers."""
        numbers = sorted(self.layers)
        return numbers[len(numbers) // 2] if numbers else None

    def _shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        return {rest: tuple(self.tensors[name].shape) for rest, name in self.layers[layer].items()}


def _layers_of(tensors: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """Tensors by layer: the largest group whose names are equal up to their first whole number, and differ in it."""
    found = [(match, name) for name in tensors if (match := _NUMBER.match(name))]
    counts = Counter(match[1] for match, _ in found)
    if not counts:
        return {}
    (stack, _), *_ = counts.most_common(1)
    layers: dict[int, dict[str, str]] = {}
    for match, name in found:
        if match[1] == stack:
            layers.setdefault(int(match[2]), {})[match[3]] = name
    return layers
