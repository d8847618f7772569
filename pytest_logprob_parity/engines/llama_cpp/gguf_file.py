"""GGUF files: written from a checkpoint into a cache, and a user's own one held against the checkpoint that it is to be of."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...atomic import PART
from ...checkpoint.digests import digest_of
from ...checkpoint.plain_tensors import shards_of
from ...errors import EngineError, IncomparableError, UsageError
from .layout import Layout

#: Increase it when files are written otherwise: those of earlier versions are then not used.
_VERSION: Final = 1
#: A dtype of a spec -> the type of its matrices in GGUF; vectors are float32 in all of them.
TYPES: Final[Mapping[str, str]] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
#: What `quantization=` writes.
QUANTIZED: Final[Mapping[str, str]] = {"q8_0": "Q8_0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A GGUF file and what its matrices are: `dtype` where they are floats, `quantization` where they are not, else ""."""

    path: Path
    dtype: str
    quantization: str


def import_gguf() -> Any:
    """The `gguf` package. Raises EngineError naming what to install."""
    try:
        import gguf
    except ImportError as error:
        raise EngineError(
            f"the package gguf, which writes and reads GGUF files, cannot be imported ({error}); install "
            "pytest-logprob-parity[llama-cpp]"
        ) from None
    return gguf


def cache_folder() -> Path:
    """Where written files are kept: LOGPROB_PARITY_GGUF, or the user's cache folder."""
    named = os.environ.get("LOGPROB_PARITY_GGUF")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "logprob-parity" / "gguf"


def written_for(model: Path, layout: Layout, dtype: str, quantization: str) -> GgufFile:
    """The GGUF file of a model folder, which is written where the cache does not have it. Raises UsageError, EngineError.

    A file of the cache belongs to the shards by their paths, sizes and times: two checkpoints of a run have equal shapes.
    Earlier files of the same folder are removed.
    """
    gguf = import_gguf()
    kind = QUANTIZED[quantization] if quantization else TYPES[dtype]
    place = digest_of(str(model.resolve()))[:8]
    stats = [(str(shard.resolve()), shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards_of(model)]
    content = digest_of([_VERSION, stats, sorted(layout.metadata.items())])
    folder = cache_folder()
    family = f"{model.name}-{kind}-{place}"
    path = folder / f"{family}-{content}.gguf"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(gguf, path, layout, kind, model.name)
        except OSError as error:
            raise EngineError(f"the GGUF file of {model} was not written: {error.strerror or error} ({folder})") from None
        for old in folder.glob(f"{family}-*.gguf"):
            if old != path:
                old.unlink(missing_ok=True)
    return GgufFile(path=path, dtype=dtype, quantization=quantization)


def _write(gguf: Any, path: Path, layout: Layout, kind: str, name: str) -> None:
    """Write a file whole or not at all, one tensor in memory at a time."""
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(part, layout.architecture)
        writer.add_string("general.name", name)
        for key, value in layout.metadata.items():
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
            add(key, value)
        encoded = {target: _type_of(gguf, kind, target, tensor.shape) for target, (tensor, _) in layout.tensors.items()}
        for target, (tensor, _) in layout.tensors.items():
            size = _bytes(gguf, tensor.shape, encoded[target])
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, encoded[target])
            is_float = encoded[target].name in ("F32", "F16")
            kept = tensor.shape if is_float else shape
            dtype = np.dtype({"F32": np.float32, "F16": np.float16}.get(encoded[target].name, np.uint8))
            writer.add_tensor_info(target, kept, dtype, size, raw_dtype=encoded[target])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, (tensor, reorder) in layout.tensors.items():
            values = tensor.read()
            writer.write_tensor_data(gguf.quants.quantize(values if reorder is None else reorder(values), encoded[target]))
        writer.close()
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _type_of(gguf: Any, kind: str, name: str, shape: tuple[int, ...]) -> Any:
    """The type of one tensor: vectors are float32; a matrix whose rows are no whole number of blocks is float16."""
    types = gguf.GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    wanted = types[kind]
    return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else types.F16


def _bytes(gguf: Any, shape: tuple[int, ...], kind: Any) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // int(block) * int(size)


def own_file(named: str, model: Path, layout: Layout) -> GgufFile:
    """A user's own GGUF file, where it is of this model by architecture, names and shapes of tensors.

    Raises UsageError where it is no GGUF file, IncomparableError, in one line, where it is another model's.
    """
    path = next((p for p in (Path(named), model / named) if p.is_file()), None)
    if path is None:
        raise UsageError(f"gguf={named!r}: there is no such file (looked in {Path.cwd()} and in {model})")
    gguf = import_gguf()
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(reader.get_field("general.architecture").contents())
        shapes = {t.name: tuple(int(n) for n in reversed(t.shape.tolist())) for t in reader.tensors}
        kinds = Counter(t.tensor_type.name for t in reader.tensors if len(t.shape) > 1)
    except Exception as error:  # it reads whatever bytes there are
        raise UsageError(f"gguf={named!r}: {path} is no GGUF file that can be read ({type(error).__name__}: {error})") from None
    if difference := _difference(architecture, shapes, layout):
        raise IncomparableError(f"gguf={named!r} is not of {model}: {difference}; convert that model, or leave gguf out")
    kind = kinds.most_common(1)[0][0]
    floats = {value: name for name, value in TYPES.items()}
    return GgufFile(path=path, dtype=floats.get(kind, ""), quantization="" if kind in floats else kind.lower())


def _difference(architecture: str, shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> str:
    """How a file differs from the layout of a checkpoint, the plainest difference first; "" where it does not."""
    if architecture != layout.architecture:
        return f"its architecture is {architecture}, the model's is {layout.architecture}"
    expected = {name: tensor.shape for name, (tensor, _) in layout.tensors.items()}
    words = shapes.get("token_embd.weight", (0,))[0]
    if words != layout.vocabulary:
        return f"its vocabulary has {words:,} tokens, the model's has {layout.vocabulary:,}"
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            return f"its tensor {name} has the shape {list(shapes[name])}, the model's has {list(shape)}"
    if missing := sorted(set(expected) - set(shapes)):
        return f"it has no tensor {missing[0]} ({len(missing)} of {len(expected)} are missing)"
    if more := sorted(set(shapes) - set(expected) - {"rope_freqs.weight", "output.weight"}):
        return f"it has a tensor {more[0]} that the model does not have"
    return ""
