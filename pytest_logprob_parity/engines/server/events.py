"""Completions while they are written: server-sent events of vLLM's generate route, put together to one answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from ...errors import EngineError
from .answer import answer_of, shown
from .client import Client

_DATA: Final = b"data:"
_DONE: Final = b"[DONE]"
#: What a streamed answer takes at most beside its tokens: a frame of JSON around each of them.
_FRAMES: Final = 16


class Streamed:
    """One completion as far as it has come: its tokens, and what the last event said of the whole.

    `written` is how many tokens have come, `is_over` whether no more will.
    """

    def __init__(self) -> None:
        self.ids: list[Any] = []
        self.is_over = False
        self._content: list[Any] = []
        self._last: dict[str, Any] = {}

    @property
    def written(self) -> int:
        """How many tokens have come."""
        return len(self.ids)

    @property
    def answer(self) -> dict[str, Any]:
        """What the route would have answered at once."""
        choice = {**self._last, "index": 0, "token_ids": self.ids, "logprobs": {"content": self._content}}
        return {"choices": [choice]}

    @property
    def spans(self) -> Any:
        """vLLM's `weight_versions` spans, as they came; None where there are none."""
        return self._last.get("weight_versions")

    def add(self, event: Any, url: str) -> None:
        """Take one event in. Raises EngineError for one that is an error, or none of this route."""
        if isinstance(event, Mapping) and event.get("error"):
            raise EngineError(f"the server at {url} failed in the middle of an answer: {shown(event['error'])}")
        choices = event.get("choices") if isinstance(event, Mapping) else None
        if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
            raise EngineError(f"the server at {url} streams something that is no part of a completion: {shown(event)}")
        for choice in choices:
            ids, logprobs = choice.get("token_ids") or [], choice.get("logprobs")
            content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
            if not isinstance(ids, list) or not isinstance(content or [], list):
                raise EngineError(f"the server at {url} streams something that is no part of a completion: {shown(choice)}")
            self.ids += ids
            self._content += content or []
            self._last |= {k: v for k, v in choice.items() if k in ("finish_reason", "weight_versions") and v is not None}


async def follow(
    client: Client, path: str, body: Mapping[str, Any], timeout: float, largest: int, arrived: Callable[[], None],
    into: Streamed,
) -> None:  # fmt: skip
    """Post a request whose answer is streamed `into` a completion; `arrived` is called after each event.

    `largest` bounds the answer without its frames, in bytes. Raises EngineError and UsageError as Client.success.
    """
    try:
        async with client.opened(path, {**body, "stream": True}, timeout) as response:
            if response.status_code != 200:
                client.success(answer_of(response.status_code, await response.aread()), path)
            async for data in _events(response, client.url, path, _FRAMES * largest):
                try:
                    event = json.loads(data)
                except (ValueError, RecursionError):
                    raise EngineError(
                        f"the server at {client.url} streams what is no JSON at {path}: {shown(data[:80])}"
                    ) from None
                into.add(event, client.url)
                arrived()
    finally:
        into.is_over = True
        arrived()


async def _events(response: Any, url: str, path: str, largest: int) -> AsyncIterator[bytes]:
    """The data of each event up to the last one. Raises EngineError for an answer that is too large, or ends before that."""
    buffer, size = b"", 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > largest:
            raise EngineError(f"the server at {url} answers {path} with more than {largest:,} bytes: that is no answer")
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            data = line.strip().removeprefix(_DATA).strip()
            if data == _DONE:
                return
            if data:
                yield data
    raise EngineError(f"the server at {url} ended its answer to {path} in the middle")
