"""The file format of traces and goldens: safetensors with one metadata key, and in it a digest of the whole content."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..atomic import replace_all
from ..bounded import open_without_waiting, parse_json
from ..errors import GoldenError
from ..safetensors_header import header_json, read_head, tensors_begin

if TYPE_CHECKING:
    import numpy.typing as npt

#: 1: traces and goldens; 2: goldens with a noise floor. Older ones are read.
SCHEMA: Final = 2
_KEY: Final = "logprob_parity"
_NO_DIGEST: Final = "0" * 64
#: The dtypes of columns: safetensors' name -> numpy's.
_DTYPES: Final = {"BOOL": "?", "U8": "u1", "I16": "<i2", "F16": "<f2", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_METADATA: Final = "__metadata__"
#: Bytes of a header, at most. The largest headers hold the texts of a vocabulary: a few MB.
_MOST_HEADER: Final = 32 * 2**20
#: Bytes of a file, at most: 10 million tokens with top-20 are 1.7 GB.
MOST_BYTES: Final = 2**31
_LARGEST: Final = 2**53
_MOST_AXES: Final = 8
_LFS_POINTER: Final = b"version https://git-lfs"


def damaged(path: Path, why: str) -> GoldenError:
    """The error for a file that cannot be trusted, in one line."""
    error = GoldenError(f"damaged: {why:.400}. Restore it (git checkout), or record it again with --update-golden", path)
    error.replaceable = True
    return error


def write(path: Path, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write columns and metadata (JSON values) to `path`: whole or not at all, with the permissions of any new file.

    Equal content gives equal bytes. Raises OSError where the file cannot be written; an old file then stays.
    """
    replace_all({path: packed(columns, metadata)})


def packed(columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> bytearray:
    """The bytes of a file with these columns and metadata (JSON values), and with its digest."""
    import numpy as np
    from safetensors.numpy import save

    text = json.dumps({**metadata, "schema": SCHEMA, "digest": _NO_DIGEST}, sort_keys=True, separators=(",", ":"))
    # save() wants native, contiguous arrays; it sorts by dtype and name, so the order given here does not matter.
    data = bytearray(save({n: np.ascontiguousarray(c) for n, c in columns.items()}, {_KEY: text}))
    place = _digest_place(data)
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    return data


def read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Columns and metadata of a file whose digest holds. Raises GoldenError: see `read_bytes`, `parse`."""
    return parse(read_bytes(path), path)


def parse(data: bytes, path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Columns (views into `data`) and metadata of a file's bytes, whose digest holds; `path` is for messages.

    Raises GoldenError, in one line, for a file that is cut short, changed, a Git LFS pointer, of a newer schema, not written
    by this package, or that safetensors itself would refuse.
    """
    header, metadata = _header(path, data)
    place = _digest_place(data)
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[place + 64 :])
    if digest.hexdigest() != metadata["digest"]:
        raise damaged(path, "its content does not match the digest inside")
    try:
        return _views(header, data), metadata
    except ValueError as error:
        raise damaged(path, f"its header does not fit its content ({error})") from None


def _views(header: Mapping[str, Any], data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The columns as read-only views into the file's bytes; safetensors' own loader copies each, which costs time.

    Raises ValueError for a header that does not fit: the columns must follow one another without gaps, and fill the file.
    """
    import numpy as np

    begin = tensors_begin(data)
    columns, spans = {}, []
    for name, entry in header.items():
        if name == _METADATA:
            continue
        shown = f"{name!r:.60}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{shown} is no column")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise ValueError(f"{shown} is of dtype {entry['dtype']!r:.20}")
        shape, offsets = _whole_numbers(entry["shape"]), _whole_numbers(entry["data_offsets"])
        if shape is None or offsets is None or len(offsets) != 2 or len(shape) > _MOST_AXES:
            raise ValueError(f"{shown} has no shape or no place")
        dtype, count = np.dtype(_DTYPES[entry["dtype"]]), math.prod(shape)
        start, stop = offsets
        if stop - start != dtype.itemsize * count or stop > len(data) - begin:
            raise ValueError(f"{shown} has {stop - start:,} bytes of {len(data) - begin:,}, its shape asks for others")
        spans.append((start, stop))
        column = np.frombuffer(data, dtype, count, begin + start) if count else np.empty(0, dtype)
        columns[name] = column.reshape(shape)
    place = 0
    for start, stop in sorted(spans):
        if start != place:
            raise ValueError("its columns overlap, or there are bytes between them")
        place = stop
    if place != len(data) - begin:
        raise ValueError(f"{len(data) - begin - place:,} bytes are behind its columns")
    return columns


def _whole_numbers(value: Any) -> list[int] | None:
    """A list of whole numbers from 0 to 2^53; None for anything else."""
    fits = isinstance(value, list) and all(type(number) is int and 0 <= number <= _LARGEST for number in value)
    return value if fits else None


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, from the head of the file; the digest is not verified. Raises GoldenError."""
    return _header(path, read_bytes(path, head_only=True))[1]


def read_bytes(path: Path, *, head_only: bool = False) -> bytes:
    """A file's bytes, or those of its header: of a regular file of at most 2 GiB. Raises GoldenError, in one line."""
    try:
        # reading a FIFO would wait, and a device has no end: only a regular file is read
        with open(path, "rb", opener=open_without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise GoldenError("no regular file stands there (a pipe, a device): move it away", path)
            if about.st_size > MOST_BYTES:
                raise GoldenError(f"{about.st_size / 2**30:.1f} GiB: no golden or trace is larger than 2 GiB", path)
            head = read_head(file, _MOST_HEADER)
            if head_only:
                return head
            _check_size(path, head, about.st_size)  # a file that is mostly a hole is not read
            file.seek(0)
            return file.read(about.st_size)
    except FileNotFoundError:
        raise GoldenError("there is no such file", path) from None
    except IsADirectoryError:
        raise GoldenError("a directory stands where the golden should be; move it away", path) from None
    except (OSError, ValueError) as error:  # ValueError: a path with NUL in it
        raise GoldenError(f"cannot be read: {getattr(error, 'strerror', None) or error}", path) from None


def _check_size(path: Path, head: bytes, size: int) -> None:
    """Raise GoldenError for a file whose header asks for another size."""
    header, _ = _header(path, head)
    stops = [_whole_numbers(entry.get("data_offsets")) for entry in header.values() if isinstance(entry, dict)]
    if size - len(head) != max((offsets[-1] for offsets in stops if offsets), default=0):
        raise damaged(path, f"its header does not fit its content ({size:,} bytes)")


def _header(path: Path, data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header of safetensors, and this package's metadata in it. Raises GoldenError for anything else."""
    if data.startswith(_LFS_POINTER):
        raise GoldenError("a Git LFS pointer, not the file itself; run `git lfs pull`", path)
    if len(data) < 8 or tensors_begin(data) > min(len(data), 8 + _MOST_HEADER):
        raise damaged(path, f"cut short, or no safetensors file ({len(data):,} bytes)")
    try:
        header = parse_json(header_json(data).decode("utf-8"))
        texts = header[_METADATA]
        if data[8:9] != b"{" or not all(isinstance(text, str) for text in texts.values()):
            raise TypeError
        metadata = parse_json(texts[_KEY], finite=False)  # limits may be infinite
        schema = metadata["schema"]
        if type(schema) is not int or schema < 1:
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(path, "it has no readable logprob-parity header") from None
    if schema > SCHEMA:
        raise GoldenError(
            f"written in schema {schema!s:.20}, this version of pytest-logprob-parity reads up to {SCHEMA}; upgrade it", path
        )
    if not isinstance(metadata.get("digest"), str) or len(metadata["digest"]) != 64:
        raise damaged(path, "it has no digest")
    return header, metadata


def _digest_place(data: bytes | bytearray) -> int:
    """Where the 64 digits of the digest stand: behind its key in the header, in which quotes are escaped."""
    key, end = rb"\"digest\":\"", tensors_begin(data)
    place = data.find(key, 8, end)
    return place + len(key) if place >= 0 else end
