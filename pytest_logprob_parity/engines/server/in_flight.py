"""Requests that are streamed from a server, with a weight update between two of the engine's steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...checkpoint.weight_update import WeightUpdate
from ...errors import EngineError, UsageError
from ...spec.server_settings import ServerSettings
from .answer import shown
from .client import Client
from .events import Streamed, follow
from .weight_api import WeightApi

#: A paused engine writes nothing: what it wrote before that has come once nothing comes for so long, in seconds.
_QUIET_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """What became of requests: their answers, how many tokens of each had come before the update, and the labels that the
    server gives its weights before and after it (`asked` is the one that it was to have after it).
    """

    streams: Sequence[Streamed]
    before: list[int]
    labels: tuple[str, str]
    asked: str

    def claimed(self, number: int) -> npt.NDArray[np.int32] | None:
        """Which weights wrote each token of a request by the server's own spans: 0 the old ones, 1 the new ones, -1 others.

        None where it tells none. Raises EngineError for spans that are none.
        """
        spans, tokens = self.streams[number].spans, self.streams[number].written
        if spans is None:
            return None
        claimed = np.full(tokens, -1, np.int32)
        for place, span in enumerate(spans if isinstance(spans, list) else [spans]):
            label, start, end = (span.get(n) for n in ("version", "start", "end")) if isinstance(span, Mapping) else [None] * 3
            if type(start) is not int or type(end) is not int or not 0 <= start <= end <= tokens or not isinstance(label, str):
                raise EngineError(
                    f"the server's answer is no completion as vLLM writes them: weight_versions[{place}] is {shown(span)}, "
                    f"expected a version with start and end, from 0 to {tokens}"
                )
            known = {self.labels[0]: 0, self.asked: 1}
            claimed[start:end] = known.get(label, -1)
        return claimed


async def take(api: WeightApi, update: WeightUpdate) -> str:
    """One update while nothing of ours runs: the label of the new weights. Raises as WeightApi's methods."""
    folder = checked(update)
    await api.open(streams=False)
    await api.check(folder)
    async with _paused(api, update):
        return await api.load(folder)


def checked(update: WeightUpdate) -> Path:
    """The folder of an update that can be asked of a server. Raises UsageError for any other update."""
    if update.mode == "v0":
        raise UsageError(
            "mode='v0': over a server an update is between a pause and a resume, without which nobody can say at which token "
            "it came; take 'keep'"
        )
    if not isinstance(update.weights, Path):
        raise UsageError("weight updates over a server take a checkpoint folder that the server can read, not tensors")
    return update.weights


async def run_through(
    client: Client, api: WeightApi, posts: Sequence[tuple[str, Any]], largest: int, update: WeightUpdate,
    settings: ServerSettings,
) -> Through:  # fmt: skip
    """Stream all requests, with the update once one of them has `update.at_token` tokens.

    The server takes steps until the pause reaches it: where each request is then, is counted while the engine is paused.
    """
    folder = checked(update)
    await api.open(streams=True)
    await api.check(folder)
    old = await api.label()
    streams = [Streamed() for _ in posts]
    moved, places = asyncio.Event(), asyncio.Semaphore(settings.concurrency)

    async def run(stream: Streamed, path: str, body: Any) -> None:
        async with places:
            await follow(client, path, body, settings.timeout, largest, moved.set, stream)

    tasks = [asyncio.ensure_future(run(s, path, body)) for s, (path, body) in zip(streams, posts, strict=True)]
    try:
        while max(s.written for s in streams) < update.at_token and not all(s.is_over for s in streams):
            moved.clear()
            await moved.wait()
            _raise_first(tasks)
        async with _paused(api, update):
            asked = await api.load(folder)
            new = await api.label()
            before = await _counted(streams)
            _raise_first(tasks)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Through(streams=streams, before=before, labels=(old, new), asked=asked)


@contextlib.asynccontextmanager
async def _paused(api: WeightApi, update: WeightUpdate) -> Any:
    """The engine between two steps; it goes on afterwards, whatever happened."""
    try:
        await api.pause(update)
        yield
    except BaseException:
        with contextlib.suppress(EngineError, UsageError):  # of the first trouble alone is told
            await api.resume()
        raise
    await api.resume()


async def _counted(streams: Sequence[Streamed]) -> list[int]:
    """How many tokens each request has: what was on the way has come once nothing comes any more."""
    while True:
        counts = [stream.written for stream in streams]
        await asyncio.sleep(_QUIET_SECONDS)
        if counts == [stream.written for stream in streams]:
            return counts


def _raise_first(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
