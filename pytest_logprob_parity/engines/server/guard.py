"""What a request must be before a server's engine sees it: a key that is right, a body within bounds, token ids that exist.

An error inside of the engine ends it for everybody, so whoever may send a request must not be able to cause one. ASGI alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from ..vllm.forced_decode import FORCED

#: The largest body that is read to look for token ids, in bytes: room for pictures and recordings as vLLM takes them.
LARGEST_REQUEST: Final = 64 * 2**20
#: Keys that force tokens, wherever they stand in a body: our own, and that of vLLM's trace replay.
_FORCING: Final = (FORCED, "trace_decode_token_ids")
#: A body without any of these has none of those keys: JSON can write a letter as `\u005f`, and be in UTF-16.
_SIGNS: Final = (*(key.encode() for key in _FORCING), b"\\u", b"\0")
#: For so many seconds a body that is too large is read on, and thrown away: who is still sending cannot read the answer.
_DRAIN_SECONDS: Final = 5.0
#: Guarded by vLLM's own key check in every version: without the key such a request gets no further than that.
_GUARDED: Final = "/v1"

#: Routes of vLLM's development mode. They change the engine, or tell what it has in memory, and vLLM asks for no key there.
DEVELOPMENT: Final = frozenset({
    "/abort_requests", "/collective_rpc", "/finish_weight_update", "/get_world_size", "/init_weight_transfer_engine",
    "/is_paused", "/is_sleeping", "/pause", "/release_kv_cache_memory", "/reset_encoder_cache", "/reset_mm_cache",
    "/reset_prefix_cache", "/resume", "/server_info", "/shutdown_weight_transfer_engine", "/sleep",
    "/start_draft_weight_update", "/start_weight_update", "/update_weight_version", "/update_weights", "/wake_up",
    "/weight_checker", "/weight_info",
})  # fmt: skip

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class RefusedError(Exception):
    """A request that is not handed on; `status` is what it is answered with, its text the reason in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class GoneError(Exception):
    """The client has left before it said all."""


class Keys:
    """The keys that a server takes, as vLLM reads them: of `--api-key`, else of VLLM_API_KEY; without any, all may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys if key]

    @property
    def are_set(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self._digests)

    def allow(self, scope: Mapping[str, Any]) -> bool:
        """Whether a request has one of them. Takes as long for a wrong key as for a right one."""
        if not self._digests:
            return True
        values = (value for name, value in scope["headers"] if name.lower() == b"authorization")
        scheme, _, given = next(values, b"").decode("latin-1").partition(" ")
        digest, allowed = hashlib.sha256(given.encode()).digest(), False
        for known in self._digests:
            allowed |= hmac.compare_digest(digest, known)
        return allowed and scheme.lower() == "bearer"


def path_of(scope: Mapping[str, Any]) -> str:
    """The path of a request within its server, which may be behind a `--root-path`."""
    path, root = str(scope["path"]), str(scope.get("root_path") or "").rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_development(scope: Mapping[str, Any], keys: Keys) -> None:
    """Raise RefusedError where a request may not use the routes of vLLM's development mode: without the key, from another
    machine where there is no key, and from a web page.
    """
    if path_of(scope).rstrip("/") not in DEVELOPMENT:
        return
    if not keys.allow(scope):
        raise RefusedError(401, "Unauthorized")
    if any(name.lower() == b"origin" for name, _ in scope["headers"]):
        raise RefusedError(403, "web pages may not ask routes that change the engine (the request has an Origin)")
    peer = (scope.get("client") or ("",))[0]
    if not keys.are_set and peer and not is_loopback(peer):
        raise RefusedError(403, "without a key, only this machine may ask routes that change the engine; start with --api-key")


async def read_body(receive: Receive, scope: Mapping[str, Any], largest: int) -> bytes:
    """The body of a request. Raises RefusedError (413) for more than `largest` bytes, GoneError where the client has left."""
    announced = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
    too_large = announced.isdigit() and (len(announced) > 18 or int(announced) > largest)
    body, more = bytearray(), True
    while more and not too_large:
        message = await receive()
        if message["type"] != "http.request":
            raise GoneError
        body += message.get("body", b"")
        more = bool(message.get("more_body"))
        too_large = len(body) > largest
    if too_large:
        body.clear()
        await _drain(receive)
        raise RefusedError(413, f"the body is larger than {largest:,} bytes")
    return bytes(body)


async def _drain(receive: Receive) -> None:
    async def read_on() -> None:
        while (message := await receive())["type"] == "http.request" and message.get("more_body"):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read_on(), _DRAIN_SECONDS)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes after it: a client that leaves."""
    given = False

    async def again() -> Mapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def check_request(
    scope: Mapping[str, Any], receive: Receive, keys: Keys, vocabulary: int | None, longest: int | None
) -> Receive:
    """The `receive` to hand on with a request that may go to the engine: `vocabulary` ids, `longest` tokens in a sequence.

    Raises RefusedError for forced tokens that the engine cannot take and for a body that is too large, GoneError.
    """
    guarded = str(scope["path"]).removeprefix(str(scope.get("root_path") or "")).startswith(_GUARDED)  # as vLLM's check has it
    if scope["method"] != "POST" or (guarded and not keys.allow(scope)):
        return receive
    kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"").lower()
    is_form = b"form" in kind
    if kind and b"json" not in kind and not is_form:
        return receive  # no route of vLLM reads parameters out of anything else
    body = await read_body(receive, scope, LARGEST_REQUEST)
    if is_form:
        if any(key.encode() in body.replace(b"%5f", b"_").replace(b"%5F", b"_") for key in _FORCING):
            raise RefusedError(400, "forced tokens are taken in JSON bodies alone")
    elif any(sign in body for sign in _SIGNS):
        _check_forced(body, vocabulary, longest)
    return replayed(body, receive)


def _check_forced(body: bytes, vocabulary: int | None, longest: int | None) -> None:
    try:
        content = json.loads(body)
    except ValueError:
        return  # vLLM says what is wrong with it
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None
    forcing = list(_forcing(content))
    for where, ids in forcing:
        if reason := why_no_ids(ids, vocabulary, longest):
            raise RefusedError(400, f"{where}{reason}")
    for name in ("prompt", "token_ids"):
        prompt = content.get(name) if forcing and isinstance(content, dict) else None
        if not isinstance(prompt, list) or any(isinstance(item, str) for item in prompt):
            continue  # a text, whose ids are vLLM's own
        several = bool(prompt) and isinstance(prompt[0], list)
        for place, ids in enumerate(prompt if several else [prompt]):
            if reason := why_no_ids(ids, vocabulary, longest):
                raise RefusedError(400, f"{name}[{place}]{reason}" if several else f"{name}{reason}")


def _forcing(content: Any) -> Iterator[tuple[str, Any]]:
    """What stands under a key that forces tokens, with the key."""
    rest = [content]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            yield from ((key, value[key]) for key in _FORCING if value.get(key) is not None)
            rest += value.values()
        elif isinstance(value, list):
            rest += [item for item in value if isinstance(item, (dict, list))]


def why_no_ids(ids: Any, vocabulary: int | None, longest: int | None) -> str | None:
    """Why a JSON value is no list of token ids of an engine, in words that go behind its name; None where it is one."""
    known = "whole numbers, 0 and above" if vocabulary is None else f"whole numbers from 0 to {vocabulary - 1}"
    if not isinstance(ids, list):
        return f" is {_brief(ids)}, no list of token ids ({known})"
    if longest is not None and len(ids) > longest:
        return f" has {len(ids):,} token ids; max_model_len is {longest:,}"
    top = 2**31 if vocabulary is None else vocabulary
    for position, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < top:
            return f"[{position}] is {_brief(token)}: token ids of this engine are {known}"
    return None


def _brief(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{(value[:60] if isinstance(value, str) else value)!r:.60}"
