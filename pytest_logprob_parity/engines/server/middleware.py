"""Runs in vLLM's server: wraps the sampler before the first request, and answers what the started engine really uses.

For `vllm serve --middleware`, beside `--worker-extension-cls`; `logprob-parity serve` gives both.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ... import machine
from ...checkpoint import digests
from ...errors import EngineError, UsageError
from ...json_shape import COUNT, OptionalKey, Shape, check_shape
from ...reasons import reason_of
from ...spec import PROFILES
from ...spec.engine_arguments import is_secret, vllm_engine_arguments
from ..readback import check_readback, json_value
from ..vllm.config import BY_NATURE, SHOWN, settings_of, vocabulary_of, why_not_forced
from .client import KEY_VARIABLE
from .guard import GoneError, Keys, RefusedError, check_request, path_of, read_body
from .readback import EXTENSION, KEPT_ROUTE, ROUTE

#: What `logprob-parity serve` pinned, as JSON: the server ends at its start where a pin was not taken.
ASKED_VARIABLE: Final = "LOGPROB_PARITY_ASKED"
#: The largest body of a question about the configuration, in bytes.
_LARGEST: Final = 1_000_000
#: The shape of such a body, and what its error says to do.
_QUESTION: Final = {"asked": dict, "name": OptionalKey(str)}
_EXAMPLE: Final = 'send JSON such as {"asked": {"seed": 0}}'
_NUMBERS: Final = {"numbers": [COUNT]}
_NUMBERS_EXAMPLE: Final = 'send JSON such as {"numbers": [17]}'
#: A longer value of the configuration, in characters of JSON, is told as a text of the second length.
_LONGEST_VALUE: Final = 20_000
_CUT: Final = 200


class ParityMiddleware:
    """ASGI middleware of one server. `problems` are what kept servers of this process from starting."""

    problems: Final[list[str]] = []

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = asyncio.Lock()
        self._server: StartedServer | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, or the server's own start and end."""
        if scope["type"] == "lifespan":
            try:
                await (await self._started(scope["app"].state)).tell(
                    json.loads(os.environ.get(ASKED_VARIABLE, "{}")), strict=True
                )
            except Exception as error:
                self.problems.append(str(error) if isinstance(error, EngineError) else reason_of(error))
                await receive()
                await send({"type": "lifespan.startup.failed", "message": self.problems[-1]})
                return
        elif scope["type"] == "http":
            server = await self._started(scope["app"].state)
            with contextlib.suppress(GoneError):
                await self._request(server, scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _request(self, server: StartedServer, scope: Any, receive: Any, send: Any) -> None:
        """Answer what is asked of us, and hand on what the engine can take."""
        try:
            if (path := path_of(scope)) in (ROUTE, KEPT_ROUTE):
                if not server.keys.allow(scope):
                    raise RefusedError(401, "Unauthorized")
                answer = _tell if path == ROUTE else _tell_kept
                await _send(send, 200, await answer(server, scope, receive))
                return
            receive = await check_request(scope, receive, server.keys, server.vocabulary, server.longest)
        except RefusedError as error:
            about = {"message": str(error), "type": "BadRequestError", "param": None, "code": error.status}
            await _send(send, error.status, {"error": str(error) if error.status == 401 else about})  # as vLLM has both
            return
        await self._app(scope, receive, send)

    async def _started(self, state: Any) -> StartedServer:
        async with self._lock:
            if self._server is None:
                self._server = await StartedServer.look_at(state)
            return self._server


async def _send(send: Any, status: int, content: Any) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _tell(server: StartedServer, scope: Any, receive: Any) -> dict[str, Any]:
    """What the route answers to a request that may ask it. Raises RefusedError, GoneError."""
    if scope["method"] == "GET":
        return await server.tell({})
    if scope["method"] != "POST":
        raise RefusedError(405, f"{scope['method']} is not supported; GET, or POST what is asked for")
    question = await _question(scope, receive, _QUESTION, _EXAMPLE)
    for setting in question["asked"]:
        if setting not in tellable():
            why = "is secret" if is_secret(setting) else "is no engine argument of this server's vLLM"
            raise RefusedError(400, f"{setting[:80]!r} {why}: it is told to nobody")
    return await server.tell(question["asked"], name=question.get("name", "")[:200])


async def _tell_kept(server: StartedServer, scope: Any, receive: Any) -> dict[str, Any]:
    """What truncation kept of requests, by their numbers. Raises RefusedError, GoneError."""
    if scope["method"] != "POST":
        raise RefusedError(405, f"{scope['method']} is not supported; POST the numbers")
    question = await _question(scope, receive, _NUMBERS, _NUMBERS_EXAMPLE)
    return {"kept": await server.kept(question["numbers"])}


async def _question(scope: Any, receive: Any, shape: Shape, example: str) -> Any:
    """The JSON that was sent, where it has this shape. Raises RefusedError, GoneError."""
    try:
        question = json.loads(await read_body(receive, scope, _LARGEST))
        check_shape(question, shape, "the body", advice=example)
    except (ValueError, RecursionError):
        raise RefusedError(400, f"the body is not JSON; {example}") from None
    except UsageError as error:
        raise RefusedError(400, str(error)) from None
    return question


def tellable() -> frozenset[str]:
    """The settings that the route tells: engine arguments, which a spec can pin, but for those whose values are secret."""
    pinned = {name for pins in PROFILES.values() for name in pins}
    known = {*vllm_engine_arguments(), *SHOWN, *BY_NATURE, *pinned}
    return frozenset(name for name in known if not is_secret(name) and not name.startswith("_"))


def _told_value(value: Any) -> Any:
    """A value of the configuration as JSON that any reader takes; else as text, cut short."""
    try:
        plain = json_value(value)
    except RecursionError:
        return type(value).__name__
    try:
        text = json.dumps(plain, allow_nan=False)
    except ValueError:  # NaN and infinities
        return str(plain)[:_CUT]
    return plain if len(text) <= _LONGEST_VALUE else text[:_CUT]


class StartedServer:
    """What is known of a started server, once."""

    def __init__(
        self, client: Any, forcing: str, head: str | None, hardware: Mapping[str, Any], about: Mapping[str, Any], keys: Keys
    ) -> None:
        config = client.vllm_config
        self.keys = keys
        self.vocabulary = vocabulary_of(config)
        self.longest: int | None = getattr(config.model_config, "max_model_len", None)
        self._client = client
        self._keeps = forcing == "sampler"
        self._forcing = forcing
        self._head = head
        self._hardware = hardware
        self._about = about

    @classmethod
    async def look_at(cls, state: Any) -> StartedServer:
        """Wrap the sampler of a server whose engine runs, where that is how to force its tokens, and look at its workers."""
        client, config = state.engine_client, state.engine_client.vllm_config
        extended = getattr(config.parallel_config, "worker_extension_cls", "") == EXTENSION
        head, hardware = None, {}
        forcing = why_not_forced(config, settings_of(client, config, {}, None))
        if extended:
            head = await _on_worker(client, "logprob_parity_head")
            hardware = await _on_worker(client, "logprob_parity_hardware")
            forcing = forcing or await _on_worker(client, "logprob_parity_install")
        forcing = forcing or f"the server was started without --worker-extension-cls {EXTENSION}"
        names = getattr(state.args, "served_model_name", None) or [config.model_config.model]
        given = getattr(state.args, "api_key", None) or os.environ.get(KEY_VARIABLE) or []
        keys = Keys([given] if isinstance(given, str) else given)
        return cls(client, forcing, head, hardware, {"served": str(names[0]), "model": _model(config.model_config)}, keys)

    async def kept(self, numbers: list[int]) -> dict[str, Any]:
        """What truncation kept of the requests of these numbers; see `kept_sets.take`."""
        if not self._keeps or not numbers:
            return {}
        taken: dict[str, Any] = await _on_worker(self._client, "logprob_parity_kept", numbers)
        return taken

    async def tell(self, asked: Mapping[str, Any], *, name: str = "", strict: bool = False) -> dict[str, Any]:
        """What the route answers; `refused` says which pin among `asked` the engine did not take, if any, and calls it `name`.

        Raises EngineError instead where that is `strict`.
        """
        import vllm
        from vllm.platforms import current_platform

        from ..._version import __version__

        config = self._client.vllm_config
        asked = {name: value for name, value in asked.items() if not is_secret(name)}
        values = settings_of(self._client, config, asked, self._head)
        refused = ""
        unverified: tuple[str, ...] = ()
        try:
            unverified = check_readback(asked, values, name or f"vllm {vllm.__version__}")
        except EngineError as error:
            if strict:
                raise
            refused = str(error)
        return {
            "logprob_parity": __version__,
            "version": str(vllm.__version__),
            "cpu": bool(current_platform.is_cpu()),
            **self._about,
            "vocabulary": self.vocabulary,
            "values": {k: _told_value(v) for k, v in values.items() if k in SHOWN or k in asked},
            "forcing": self._forcing,
            "hardware": self._hardware,
            "libraries": machine.libraries(),
            "unverified": list(unverified),
            "refused": refused,
        }


async def _on_worker(client: Any, method: str, *args: Any) -> Any:
    return (await (client.collective_rpc(method, args=args) if args else client.collective_rpc(method)))[0]


def _model(config: Any) -> dict[str, Any]:
    """The digests of the model that is served; {} and the reason where its folder cannot be read."""
    try:
        model, tokenizer = (digests.find_model(str(name), Path.cwd()) for name in (config.model, config.tokenizer))
        return {"name": str(config.model), "digests": dict(digests.model_digests(model, tokenizer)), "problem": ""}
    except (UsageError, OSError, ValueError) as error:
        return {"name": str(config.model), "digests": {}, "problem": str(error)}
