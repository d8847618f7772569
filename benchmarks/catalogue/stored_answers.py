"""Keeps the answers of the engine and of the reference: in memory, and on disk where a folder is given.

With a folder, a second run judges the same runs anew: after a change of the rules that takes seconds, not hours.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pytest_logprob_parity.atomic import write_whole
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.trace import Trace

from .reference import Reading

T = TypeVar("T")


class Store:
    """Results by key. `about` says what all of them depend on: model, sizes. Keys are tuples of texts and numbers.

    The code of the faults is no part of a key: a folder is for one version of the catalogue.
    """

    def __init__(self, folder: Path | None, *about: object) -> None:
        self._folder = folder
        self._about = about
        self._known: dict[str, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def trace(self, key: tuple[object, ...], make: Callable[[], Trace]) -> Trace:
        """The trace of this key, made where it is not known."""
        return self._get("trace", key, make, Trace.load, lambda trace, path: trace.save(path))

    def golden(self, key: tuple[object, ...], make: Callable[[], Golden]) -> Golden:
        """The golden of this key, made where it is not known."""
        return self._get("golden", key, make, Golden.load, lambda golden, path: golden.save(path))

    def value(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """The JSON value of this key, made where it is not known; always as JSON gives it back."""

        def read(path: Path) -> T:
            value: T = json.loads(path.read_text("utf-8"))
            return value

        def plain() -> T:
            value: T = json.loads(json.dumps(make()))
            return value

        return self._get("value", key, plain, read, lambda value, path: write_whole(path, json.dumps(value).encode()))

    def reading(self, key: tuple[object, ...], trace: Trace, make: Callable[[], Reading]) -> Reading:
        """The reference's reading of the tokens of `trace` under this key, made where it is not known."""

        def read(path: Path) -> Reading:
            with path.open("rb") as file:
                columns = dict(np.load(file, allow_pickle=False))
            said, depth = columns.pop("said"), columns.pop("depth")
            return Reading(logprobs=said, depth=depth, trace=trace.with_(logprobs=said.astype(np.float32), **columns))

        def write(reading: Reading, path: Path) -> None:
            np.savez(
                file := io.BytesIO(), said=reading.logprobs, depth=reading.depth, top_logprobs=reading.trace.top_logprobs,
                top_token_ids=reading.trace.top_token_ids,
            )  # fmt: skip
            write_whole(path, file.getvalue())

        return self._get("reading", key, make, read, write)

    def _get(
        self, kind: str, key: tuple[object, ...], make: Callable[[], T], read: Callable[[Path], T],
        write: Callable[[T, Path], object],
    ) -> T:  # fmt: skip
        name = f"{kind}-{hashlib.sha256(repr((self._about, key)).encode()).hexdigest()[:24]}"
        if name not in self._known:
            path = None if self._folder is None else self._folder / name
            if path is not None and path.is_file():
                self._known[name] = read(path)
            else:
                self._known[name] = make()
                if path is not None:
                    write(self._known[name], path)  # whole or not at all
        value: T = self._known[name]
        return value
