"""Read files that others may have cut, edited or made up: up to a size limit, and only from a regular file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final, NoReturn

from .errors import UsageError

#: Far beyond any number in a file of this package; its square is still finite.
_LARGEST: Final = 10**100
#: Levels of mappings and lists inside one another; the files of this package have 8.
_DEEPEST: Final = 32


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes.

    Raises UsageError, in one line, for a pipe, a device or a larger file, without waiting and without reading it all;
    FileNotFoundError and other OSErrors; UnicodeDecodeError for what is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file, as `read_text` reads it."""
    with open(path, "rb", opener=open_without_waiting) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise UsageError(f"{path}: not a regular file (a folder, a pipe or a device); name a file")
        data = b"" if about.st_size > most else file.read(most + 1)
    if about.st_size > most or len(data) > most:
        raise UsageError(f"{path}: larger than {most / 2**20:g} MiB, which is the largest file that is read here")
    return data


def open_without_waiting(path: str | Path, flags: int) -> int:
    """Open a file, as an `opener` of `open`, without waiting for a process at the other end of a pipe. Raises OSError."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def parse_json(text: str, *, finite: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError for a text that is not JSON, or that no file of this package holds.

    Refused are NaN, infinities and numbers beyond 1e100 (whole numbers alone where `finite` is false), a key that stands
    twice in one mapping, and more than 32 levels.
    """
    constant, number = (_no_number, _number) if finite else (None, None)
    try:
        value = json.loads(
            text, parse_constant=constant, parse_float=number, parse_int=_whole, object_pairs_hook=_without_doubles
        )
    except RecursionError:
        raise _too_deep() from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError for JSON of more than 32 levels: code that walks it would run out of stack."""
    level = [value]
    for _ in range(_DEEPEST + 1):
        inside = [outer.values() if isinstance(outer, dict) else outer for outer in level if isinstance(outer, (dict, list))]
        level = [item for outer in inside for item in outer]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"more than {_DEEPEST} lists and mappings inside one another")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {double!r:.40} stands twice in one mapping")
    return found


def _number(text: str) -> float:
    number = float(text)
    return number if abs(number) <= _LARGEST else _no_number(text)


def _whole(text: str) -> int:
    """A whole number of JSON. Raises ValueError for one beyond 1e100: its square would fit no float."""
    return int(text) if len(text) < len(str(_LARGEST)) else _no_number(text)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name:.40} in place of a number")
