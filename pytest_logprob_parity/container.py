"""The file below traces and goldens: safetensors with one metadata key, a digest of its content, written atomically."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .errors import GoldenError

if TYPE_CHECKING:
    import numpy.typing as npt

#: 1: traces and goldens; 2: goldens with a noise floor. Older ones are read.
SCHEMA: Final = 2
_KEY: Final = "logprob_parity"
_NO_DIGEST: Final = "0" * 64
#: safetensors' names of the dtypes that our columns have.
_DTYPES: Final = {"BOOL": "?", "U8": "u1", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
_MAX_HEADER: Final = 100_000_000
_LFS_POINTER: Final = b"version https://git-lfs"


def damaged(path: Path, why: str) -> GoldenError:
    """The one line for a file that cannot be trusted."""
    error = GoldenError(f"damaged: {why}. Restore it (git checkout), or record it again with --update-golden", path)
    error.replaceable = True
    return error


def write(path: Path, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write columns and metadata (JSON values) to `path`: whole or not at all, with the permissions of any new file.

    Equal content gives equal bytes. Raises OSError where the file cannot be written; an old file then stays.
    """
    import numpy as np
    from safetensors.numpy import save

    text = json.dumps({**metadata, "schema": SCHEMA, "digest": _NO_DIGEST}, sort_keys=True, separators=(",", ":"))
    # save() wants native, contiguous arrays; it sorts by dtype and name, so the order given here does not matter.
    data = bytearray(save({n: np.ascontiguousarray(c) for n, c in columns.items()}, {_KEY: text}))
    place = _digest_place(data)
    data[place : place + 64] = hashlib.sha256(data).hexdigest().encode()
    replace_all({path: data})


def read(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Columns and metadata of a file whose digest holds.

    Raises GoldenError, in one line, for a file that is missing, no file, unreadable, cut short, changed, a Git LFS
    pointer, of a newer schema, or not one of ours.
    """
    data = _read_bytes(path)
    metadata = _metadata(path, data)
    place = _digest_place(data)
    digest = hashlib.sha256(memoryview(data)[:place])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[place + 64 :])
    if digest.hexdigest() != metadata["digest"]:
        raise damaged(path, "its content does not match the digest inside")
    try:
        return _views(data), metadata
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its header does not fit its content ({error})") from None


def _views(data: bytes) -> dict[str, npt.NDArray[Any]]:
    """The columns as views into the file's bytes (read-only): safetensors' own loader copies each, which costs as much
    as reading the file. Raises KeyError, TypeError or ValueError for a header that does not fit.
    """
    import numpy as np

    length = int.from_bytes(data[:8], "little")
    columns = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), [int(n) for n in entry["shape"]]
        if stop - start != dtype.itemsize * math.prod(shape):
            raise ValueError(f"{name} has {stop - start} bytes")
        column = np.frombuffer(data, dtype, math.prod(shape), 8 + length + start) if stop > start else np.empty(0, dtype)
        columns[name] = column.reshape(shape)
    return columns


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, from the head of the file; the digest is not verified. Raises GoldenError."""
    return _metadata(path, _read_bytes(path, head_only=True))


def _read_bytes(path: Path, *, head_only: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            if not head_only:
                return file.read()
            head = file.read(8)
            return head + file.read(min(int.from_bytes(head, "little"), _MAX_HEADER))
    except FileNotFoundError:
        raise GoldenError("there is no such file", path) from None
    except IsADirectoryError:
        raise GoldenError("a directory stands where the golden should be; move it away", path) from None
    except OSError as error:
        raise GoldenError(f"cannot be read: {error.strerror}", path) from None


def _metadata(path: Path, data: bytes) -> dict[str, Any]:
    if data.startswith(_LFS_POINTER):
        raise GoldenError("a Git LFS pointer, not the file itself; run `git lfs pull`", path)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, _MAX_HEADER):
        raise damaged(path, f"cut short, or no safetensors file ({len(data):,} bytes)")
    try:
        metadata = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        schema = metadata["schema"]
        newer = schema > SCHEMA
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, "it has no readable logprob-parity header") from None
    if newer:
        raise GoldenError(
            f"written in schema {schema}, this version of pytest-logprob-parity reads up to {SCHEMA}; upgrade it", path
        )
    if not isinstance(metadata.get("digest"), str) or len(metadata["digest"]) != 64:
        raise damaged(path, "it has no digest")
    return dict(metadata)


def _digest_place(data: bytes | bytearray) -> int:
    """Where the 64 digits of the digest stand: behind its key in the header (quotes are escaped in there)."""
    length = int.from_bytes(data[:8], "little")
    key = rb"\"digest\":\""
    place = data.find(key, 8, 8 + length)
    return place + len(key) if place >= 0 else 8 + length


def replace_all(files: Mapping[Path, bytes | bytearray]) -> None:
    """Write several files: each whole or not at all, and none of them before all are on the disk.

    Raises OSError where one cannot be written; old files then stay.
    """
    umask = os.umask(0)
    os.umask(umask)
    staged: dict[Path, str] = {}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, staged[path] = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(staged[path], 0o666 & ~umask)  # mkstemp makes files that only their owner may read
        for path, name in staged.items():
            os.replace(name, path)
    except BaseException:
        for name in staged.values():
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise
