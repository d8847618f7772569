"""The file of a history: a line of JSON for each run, appended whole or not at all, whoever else appends at the same time."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ...atomic import write_whole
from ...bounded import parse_json, read_bytes
from ...errors import UsageError
from ...json_shape import check_shape
from ..finite_json import to_text
from ..results_file import LARGEST
from .run_record import FORMAT, RUN_RECORD, SCHEMA

try:
    import fcntl
except ImportError:  # Windows: one write to the end of a file is all there is
    fcntl = None  # type: ignore[assignment]

#: Bytes of a file. Where a run would make it larger, the older half goes: of 100 checks a run, 350 runs are kept or more.
MOST: Final = 32 * 2**20
_HEAD: Final = f'{{"format":"{FORMAT}",'.encode()


def check_place(path: Path) -> None:
    """Raise UsageError where a history cannot be, before a run has spent its time: a folder, a pipe, somebody's file."""
    try:
        about = path.stat()
    except FileNotFoundError:
        above = next(folder for folder in path.parents if folder.exists())
        if not above.is_dir():
            raise UsageError(f"parity_history: {above} is no folder; name another file") from None
        return
    except OSError as error:
        raise UsageError(f"parity_history: {path}: {error.strerror or error}; name another file") from None
    if not stat.S_ISREG(about.st_mode):
        raise UsageError(f"parity_history: {path} is not a regular file; name another one")
    try:
        with path.open("rb") as file:
            _check_head(path, file.read(len(_HEAD)))
    except OSError as error:
        raise UsageError(f"parity_history: {path} cannot be read: {error.strerror}") from None


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a run. Runs at the same time wait for each other; a last line that a crash has cut is left as a line of its own.

    Raises UsageError where the file is somebody's or the run too large, OSError where nothing can be written; the file then
    stays as it was.
    """
    data = to_text(line).encode("ascii") + b"\n"
    if len(data) > MOST // 2:
        raise UsageError(f"a run of {len(line['checks'])} checks is too large for {path} ({len(data) / 2**20:.0f} MiB)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as handle:
        size = os.fstat(handle).st_size
        _check_head(path, os.pread(handle, len(_HEAD), 0))
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        if size + len(data) > MOST:
            write_whole(path, _newest(os.pread(handle, size, 0), MOST // 2) + data.lstrip(b"\n"))
        elif os.write(handle, data) < len(data):  # one write; a full disk takes part of it
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open to append to; nobody else puts another one into its place meanwhile."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks: one write is all there is
                    fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle), path.stat()):
                yield handle
                return
        finally:
            os.close(handle)


def _newest(data: bytes, most: int) -> bytes:
    """The last lines of `data` that are `most` bytes together at most."""
    start = len(data) - most
    return data if start <= 0 else data[data.index(b"\n", start) + 1 :]


def _check_head(path: Path, head: bytes) -> None:
    if head != _HEAD[: len(head)]:
        raise UsageError(f"{path} exists, and is no history of pytest-logprob-parity: name another file")


def is_history(path: Path) -> bool:
    """Whether a file begins as a history does."""
    try:
        return read_bytes(path, LARGEST)[: len(_HEAD)] == _HEAD
    except (OSError, UsageError):
        return False


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs of a history, and a line about each that was cut short and is left out.

    Raises UsageError, in one line, for what is no history, for a newer schema and for a line that nobody here wrote.
    """
    try:
        data = read_bytes(path, LARGEST)
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; ini parity_history = FILE has each run append to it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    _check_head(path, data[: len(_HEAD)])
    lines, skipped = [], []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            line = parse_json(raw.decode("ascii"))
        except ValueError:
            skipped.append(f"{path}: line {number} is cut short, or no JSON: skipped")
            continue
        if not isinstance(line, dict) or line.get("format") != FORMAT:
            raise UsageError(f"{path}: line {number} is no run of a history of pytest-logprob-parity")
        if line.get("schema") != SCHEMA:
            told = f"schema {line.get('schema')!r:.20}, this version of pytest-logprob-parity reads {SCHEMA}"
            raise UsageError(f"{path}: line {number} has {told}; upgrade it")
        check_shape(line, RUN_RECORD, f"{path}: line {number}", advice="delete the line, or name another file")
        lines.append(line)
    return lines, skipped
