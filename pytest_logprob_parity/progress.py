"""One line that says what is being done, on a terminal and nowhere else: it goes when that is done.

Work says what it is (`doing`, `each`) wherever it is done; whoever has a terminal shows it (`shown_on`). In CI, in pipes and
with --json nothing is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Final, TextIO, TypeVar

from .visible_text import visible_line

_T = TypeVar("_T")
#: Takes the line away on which the cursor stands.
ERASE: Final = "\r\x1b[K"


class _Line:
    """The line: work within work is shown as `outer: inner`, with the time since this line is there."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._began = time.monotonic()
        self._work: list[str] = []
        self._there = False

    def push(self, text: str) -> None:
        self._work.append(text)
        self._show()

    def pop(self) -> None:
        self._work.pop()
        self._show()

    def clear(self) -> None:
        if self._there:
            self._write(ERASE)
            self._there = False

    def _show(self) -> None:
        if not self._work:
            self.clear()
            return
        text = visible_line(f"{': '.join(self._work)} ({time.monotonic() - self._began:.0f} s)")
        columns = shutil.get_terminal_size().columns
        self._write(ERASE + (text if len(text) < columns else f"{text[: columns - 4]}..."))
        self._there = True


_LINE: Final[ContextVar[_Line | None]] = ContextVar("progress", default=None)


def is_wanted(stream: TextIO) -> bool:
    """Whether somebody watches: the stream is a terminal that can erase, and this is no CI job."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


@contextlib.contextmanager
def shown_on(write: Callable[[str], None] | None) -> Iterator[None]:
    """Show what is being done by `write`, which takes text with control characters; None shows nothing."""
    token = _LINE.set(None if write is None else _Line(write))
    try:
        yield
    finally:
        clear()
        _LINE.reset(token)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Say `what` is being done, until it is."""
    line = _LINE.get()
    if line is None:
        yield
        return
    line.push(what)
    try:
        yield
    finally:
        line.pop()


def each(what: str, items: Iterable[_T], total: int) -> Iterator[_T]:
    """The items, saying `what 2 of 5` while the second is waited for and worked on."""
    waiting = iter(items)
    for number in range(total):
        with doing(f"{what} {number + 1} of {total}"):
            try:
                item = next(waiting)
            except StopIteration:
                return
            yield item
    yield from waiting


def clear() -> None:
    """Take the line away, so that others can write; the next work shows it again."""
    line = _LINE.get()
    if line is not None:
        line.clear()
