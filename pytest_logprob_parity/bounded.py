"""Read what others wrote, and may have cut, edited or made up: within bounds, and never from what is no regular file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final, NoReturn

from .errors import UsageError

#: Far beyond any number of ours, and its square is finite still.
_LARGEST: Final = 10**100
#: Mappings and lists inside one another; ours are 8 deep.
_DEEPEST: Final = 32


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes.

    Raises UsageError, in one line, for a pipe, a device or a larger file, without waiting and without reading it all;
    FileNotFoundError and other OSErrors; UnicodeDecodeError for what is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8")


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file, as `read_text` reads it."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # no waiting at a pipe
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise UsageError(f"{path}: not a regular file (a folder, a pipe or a device); name a file")
        data = b"" if about.st_size > most else file.read(most + 1)
    if about.st_size > most or len(data) > most:
        raise UsageError(f"{path}: larger than {most / 2**20:g} MiB, which is the largest file that is read here")
    return data


def write_new(path: Path, text: str) -> None:
    """Write a small file where nothing stands, not even a link that leads elsewhere. Raises OSError."""
    if not os.path.lexists(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, and for what no file of ours holds.

    That is: NaN and infinities, numbers beyond 1e100, a key given twice in one mapping, more than 32 levels.
    """
    try:
        value = json.loads(
            text, parse_constant=_no_number, parse_float=_number, parse_int=whole, object_pairs_hook=_without_doubles
        )
    except RecursionError:
        raise _too_deep() from None
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError for JSON of more than 32 levels: what walks it would run out of stack."""
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


def whole(text: str) -> int:
    """A whole number of JSON. Raises ValueError for one beyond 1e100, which no float can hold its square of."""
    return int(text) if len(text) < len(str(_LARGEST)) else _no_number(text)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name:.40} in place of a number")
