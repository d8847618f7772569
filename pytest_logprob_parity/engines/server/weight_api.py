"""vLLM's weight API over HTTP: what a server has of it, and one update through it.

Its routes are there in vLLM's development mode alone, and change the engine for everybody: each request is sent once.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlencode

from ...checkpoint.weight_update import WeightUpdate
from ...errors import EngineError, UsageError
from ..vllm.checkpoint_transfer import FOLDER
from .answer import Answer, shown
from .client import Client
from .wire import GENERATE

PAUSE: Final = "/pause"
RESUME: Final = "/resume"
START: Final = "/start_weight_update"
UPDATE: Final = "/update_weights"
FINISH: Final = "/finish_weight_update"
INFO: Final = "/weight_info"
CHECKER: Final = "/weight_checker"
WORKERS: Final = "/collective_rpc"
#: Sets the label without an update: for servers whose weights are loaded by their workers' own reload.
LABEL: Final = "/update_weight_version"
_NEEDED: Final = (PAUSE, RESUME, START, UPDATE, FINISH, INFO, WORKERS)
#: What vLLM calls the weights that it was started with.
AS_STARTED: Final = "default"


class WeightApi:
    """The weight API of one server. `start` is the command that starts a server which has it, `timeout` is how long loading
    a checkpoint may take, in seconds. Its methods are work for `Client.drive`.
    """

    def __init__(self, client: Client, start: str, timeout: float) -> None:
        self._client = client
        self._start = start
        self._timeout = timeout
        self._by_transfer: bool | None = None
        self._known: dict[str, bool] = {}

    async def open(self, *, streams: bool) -> None:
        """Look at what the server has, each route once. `streams`: requests are to run meanwhile.

        Raises UsageError, in one line, for a server that lacks a part of the API.
        """
        if streams:
            await self._check_streams()
        needed = (*_NEEDED, *((GENERATE,) if streams else ()))
        absent = [path for path in needed if not await self._has(path)]
        if absent:
            there = [path for path in _NEEDED if path not in absent]
            what = f"lacks {', '.join(absent)} of vLLM's weight API" if there else "has nothing of vLLM's weight API"
            what += f" (it has {', '.join(there)})" if there else ""
            raise UsageError(
                f"the server at {self._client.url} {what}: it takes no weight updates; start it with `{self._start}`, or vLLM "
                "0.32 or later under VLLM_SERVER_DEV_MODE=1, on an address of this machine alone"
            )
        if self._by_transfer is not None:
            return
        answer = await self._on_workers("logprob_parity_open_transfer")
        if answer != "" and not await self._has(LABEL):
            why = answer or f"it has no {LABEL}, and no worker extension of this plugin"
            raise UsageError(
                f"the server at {self._client.url} cannot load a checkpoint folder: {why}; start it with `{self._start}`"
            )
        self._by_transfer = answer == ""

    async def label(self) -> str:
        """What the server calls its weights. Raises EngineError."""
        content = self._client.success(await self._client.send("GET", INFO), INFO)
        label = content.get("weight_version") if isinstance(content, Mapping) else None
        if not isinstance(label, str):
            raise EngineError(f"the server at {self._client.url} answers {INFO} without a weight_version: {shown(content)}")
        return label

    async def check(self, folder: Path) -> None:
        """Raise UsageError where the server cannot see a checkpoint folder, or it does not fit; nothing is loaded."""
        answer = await self._on_workers("logprob_parity_why_refused", str(folder))
        if answer:
            raise UsageError(f"the server at {self._client.url} takes no such weights: {answer}")

    async def pause(self, update: WeightUpdate) -> None:
        """Stop the engine between two steps, as the update's mode says."""
        query = urlencode({"mode": update.mode, "clear_cache": str(update.clear_cache).lower()})
        self._client.success(await self._ask("POST", f"{PAUSE}?{query}"), PAUSE)

    async def resume(self) -> None:
        """Let the engine go on."""
        self._client.success(await self._ask("POST", RESUME), RESUME)

    async def load(self, folder: Path) -> str:
        """Load a checkpoint folder under a label of its own, which is returned.

        Raises EngineError where that fails: nobody knows what the engine has then.
        """
        label = f"{folder.name}@{secrets.token_hex(4)}"
        steps: list[tuple[str, Any]] = [
            (START, None), (UPDATE, {"update_info": {FOLDER: str(folder)}}), (FINISH, {"weight_version": label}),
        ]  # fmt: skip
        if not self._by_transfer:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            steps = [(WORKERS, reload), (LABEL, {"new_version": label})]
        for path, body in steps:
            try:
                answer = await self._ask("POST", path, body)
                if path == START and answer.status >= 500:  # perhaps somebody has begun an update, and left
                    await self._ask("POST", FINISH)
                    answer = await self._ask("POST", path, body)
                self._client.success(answer, path)
            except (EngineError, UsageError) as error:
                if self._by_transfer:
                    with contextlib.suppress(EngineError):  # requests that run would end an engine that is in the middle of it
                        await self._ask("POST", FINISH)
                raise EngineError(
                    f"{error}; loading {folder} ended there: the engine may hold parts of both checkpoints, or end at the next "
                    "request; start it anew"
                ) from None
        return label

    async def checksums(self) -> dict[str, str]:
        """vLLM's own checksum of each parameter; {} of a server that has none."""
        answer = await self._ask("POST", CHECKER, {"action": "checksum"})
        if answer.status in (404, 405):
            return {}
        content = self._client.success(answer, CHECKER)
        sums = content.get("checksums") if isinstance(content, Mapping) else None
        if not isinstance(sums, Mapping):
            raise EngineError(f"the server at {self._client.url} answers {CHECKER} without checksums: {shown(content)}")
        return {str(name): str(digest) for name, digest in sums.items()}

    async def _check_streams(self) -> None:
        """Raise UsageError where the generate route is there and closed, as it is from vLLM 0.32 on."""
        if await self._has(GENERATE):
            answer = await self._client.send("POST", GENERATE, {})  # vLLM refuses it as incomplete
            if answer.status == 403:
                raise UsageError(
                    f"the server at {self._client.url} has closed {GENERATE} ({answer.reason()}), by which requests are "
                    f"followed through an update; start it with `{self._start}`"
                )

    async def _has(self, path: str) -> bool:
        """Whether the server has a route: one that takes POST alone answers a GET with 405."""
        if path not in self._known:
            self._known[path] = (await self._ask("GET", path)).status != 404
        return self._known[path]

    async def _ask(self, method: str, path: str, body: Any = None) -> Answer:
        """One request. Raises EngineError where the server wants another key, in which case nothing is known of the route."""
        answer = await self._client.send(method, path, body, timeout=self._timeout)
        if answer.status in (401, 403):
            self._client.success(answer, path)
        return answer

    async def _on_workers(self, method: str, *arguments: str) -> str | None:
        """What our extension answers on the first worker that has something to say; None of a server without it."""
        answer = await self._ask("POST", WORKERS, {"method": method, "args": list(arguments)})
        results = answer.content.get("results") if answer.status == 200 and isinstance(answer.content, Mapping) else None
        if not isinstance(results, list) or not results:
            return None
        return next((str(result) for result in results if result), "")
