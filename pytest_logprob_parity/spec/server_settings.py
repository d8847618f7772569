"""The settings of engines behind a server: its address, and how to send requests to it. Light: markers use it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from ..errors import UsageError

#: The engine kinds: vLLM behind a server, SGLang behind one, and both.
SERVER: Final = "vllm-server"
SGLANG: Final = "sglang"
SERVERS: Final = (SERVER, SGLANG)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How to reach a server: the settings of an EngineSpec that do not describe its engine.

    `url` is the server's address, without `/v1`. `concurrency` is the number of requests under way at a time. `timeout` is
    how long an answer may take, in seconds. `retries` is how often a request is sent again after a temporary error.
    `served_model` is the model's name on the server, where it differs from the spec's.
    """

    url: str
    concurrency: int = 128
    timeout: float = 600.0
    retries: int = 4
    served_model: str | None = None


#: The names of these settings.
SERVER_SETTINGS: Final = ("url", "concurrency", "timeout", "retries", "served_model")


def check_url(text: Any, source: str) -> str:
    """A server's address without a slash or `/v1` at its end. Raises UsageError, with a message that begins with `source`."""
    example = "give one such as http://127.0.0.1:8000"
    if not isinstance(text, str):
        raise UsageError(f"{source}: {text!r} is no address of a server; {example}")
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError as error:
        raise UsageError(f"{source}: {text!r} is no address of a server ({error}); {example}") from None
    if parts.username or parts.password:
        raise UsageError(f"{source}: a user or a password in an address would be printed; VLLM_API_KEY holds the key")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or " " in text:
        raise UsageError(f"{source}: {text!r} is no address of a server; {example}")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


def server_settings(settings: Mapping[str, Any], kind: str = SERVER) -> ServerSettings:
    """The server settings among the settings of a spec. Raises UsageError for one that is missing or out of range."""
    given = {name: settings[name] for name in SERVER_SETTINGS if name in settings}
    if "url" not in given:
        option = ", or the option --parity-server=http://HOST:PORT" if kind == SERVER else ""
        raise UsageError(f"engine={kind!r} needs url='http://HOST:PORT'{option}")
    made = ServerSettings(**{**given, "url": check_url(given["url"], "url")})
    for name, least, kinds in (("concurrency", 1, int), ("retries", 0, int), ("timeout", 0.001, (int, float))):
        value = getattr(made, name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            what = "a number of seconds above 0" if name == "timeout" else f"a whole number, {least} or more"
            raise UsageError(f"{name}={value!r}: must be {what}")
    if made.served_model is not None and not isinstance(made.served_model, str):
        raise UsageError(f"served_model={made.served_model!r}: must be a string")
    return made
