"""Faults of the weights, for any architecture: they are found by the tensors' shapes and roles."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from .engine_under_test import NotPossibleError
from .fault import Fault

if TYPE_CHECKING:
    from ..check.ask import Answers
    from .checkpoint_tensors import CheckpointTensors
    from .engine_under_test import EngineUnderTest

_Change = Callable[["CheckpointTensors"], Mapping[str, Any]]

#: What float8 e4m3 holds at most.
_LARGEST_FP8: Final = 448.0


def matrix_faults() -> list[Fault]:
    """The faults of all matrices but embedding and LM head: a running engine takes them."""
    noise = [_fault("noise on all matrices", f"{size:g} of their std", partial(noised_matrices, relative=size))
             for size in (0.1, 0.01, 0.001)]  # fmt: skip
    stale = [_fault("one layer misses a weight update", f"an update of {size:g} of its std", partial(_stale, relative=size))
             for size in (0.3, 0.03)]  # fmt: skip
    return [
        *noise,
        _fault("matrices rounded to fp8 and back", "e4m3, a scale for each row", _rounded),
        *stale,
        _fault("two layers exchanged", "neighbours in the middle", _exchanged),
        _fault("one half of one matrix wrong", "rows off by one", _half_wrong),
    ]


def vocabulary_faults() -> list[Fault]:
    """The faults of embedding and LM head: where these are one matrix, an engine on a CPU has to start with them."""
    return [
        _fault("noise on embedding and LM head", "0.3 of their std", _vocabulary_noised),
        _fault("a shard of embedding and LM head", "a quarter of the ids, off by one", _shard_wrong),
    ]


def _fault(name: str, size: str, change: _Change) -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        with under_test.with_weights(change(under_test.checkpoint)) as answers:
            yield answers

    return Fault(name=name, size=size, kind="weights", plant=plant, recomputes=True)


def noised_matrices(checkpoint: CheckpointTensors, relative: float) -> Mapping[str, Any]:
    """The checkpoint's matrices with noise of `relative` times their standard deviation; embedding and LM head as they are."""
    return _noised(checkpoint, checkpoint.matrices, relative)


def _noised(checkpoint: CheckpointTensors, names: tuple[str, ...], relative: float) -> dict[str, Any]:
    import torch

    _check_any(names, "its checkpoint has no matrix of floating point")
    draws = torch.Generator().manual_seed(0)
    return {
        name: (x.float() + relative * x.float().std() * torch.randn(x.shape, generator=draws)).to(x.dtype)
        for name in names
        for x in [checkpoint.tensors[name]]
    }


def _vocabulary_noised(checkpoint: CheckpointTensors) -> Mapping[str, Any]:
    return _noised(checkpoint, _vocabulary(checkpoint), 0.3)


def _rounded(checkpoint: CheckpointTensors) -> Mapping[str, Any]:
    import torch

    names = checkpoint.matrices
    _check_any(names, "its checkpoint has no matrix of floating point")
    rounded = {}
    for name in names:
        x = checkpoint.tensors[name]
        scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST_FP8
        rounded[name] = ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)
    return rounded


def _stale(checkpoint: CheckpointTensors, relative: float) -> Mapping[str, Any]:
    """The middle layer has the weights from before an update, which is drawn at random."""
    layer = checkpoint.middle_layer()
    if layer is None:
        raise NotPossibleError("its tensors' names have no layer numbers")
    own = set(checkpoint.layers[layer].values())
    return _noised(checkpoint, tuple(name for name in checkpoint.matrices if name in own), relative)


def _exchanged(checkpoint: CheckpointTensors) -> Mapping[str, Any]:
    pair = checkpoint.same_layers()
    if pair is None:
        raise NotPossibleError("no two of its layers have tensors of the same shapes")
    first, second = (checkpoint.layers[number] for number in pair)
    return {
        name: checkpoint.tensors[other[rest]].clone()
        for own, other in ((first, second), (second, first))
        for rest, name in own.items()
    }


def _half_wrong(checkpoint: CheckpointTensors) -> Mapping[str, Any]:
    """The largest matrix of the middle layer has the rows of its first half off by one, as a wrong shard has."""
    layer = checkpoint.middle_layer()
    own = set() if layer is None else set(checkpoint.layers[layer].values())
    names = tuple(name for name in checkpoint.matrices if name in own or layer is None)
    _check_any(names, "its checkpoint has no matrix of floating point")
    name = max(names, key=lambda n: checkpoint.tensors[n].numel())
    return {name: _rows_off_by_one(checkpoint.tensors[name], slice(0, len(checkpoint.tensors[name]) // 2))}


def _shard_wrong(checkpoint: CheckpointTensors) -> Mapping[str, Any]:
    changed = {}
    for name in _vocabulary(checkpoint):
        size = len(checkpoint.tensors[name])
        changed[name] = _rows_off_by_one(checkpoint.tensors[name], slice(0, size // 4))
    return changed


def _rows_off_by_one(matrix: Any, rows: slice) -> Any:
    changed = matrix.clone()
    changed[rows] = matrix[rows].roll(1, 0)
    return changed


def _vocabulary(checkpoint: CheckpointTensors) -> tuple[str, ...]:
    _check_any(checkpoint.vocabulary, "no matrix of its checkpoint has vocab_size rows")
    return checkpoint.vocabulary


def _check_any(names: tuple[str, ...], reason: str) -> None:
    if not names:
        raise NotPossibleError(reason)
