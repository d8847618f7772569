"""Specs of engines that somebody else built and keeps: a `vllm.LLM`, an `AsyncLLM`, or a server's address."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..spec import EngineSpec
from ..spec.server_settings import SERVER, SERVER_SETTINGS, check_url

if TYPE_CHECKING:
    from .server.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLLM:
    """What a caller's LLM says of itself: its spec, its folders as it names them, and whether it is an AsyncLLM."""

    spec: EngineSpec
    model: str
    tokenizer: str
    is_async: bool


def own_llm(llm: Any) -> OwnLLM:
    """What a caller's `LLM` or `AsyncLLM` says of itself. Raises UsageError for anything else."""
    from .readback import json_value
    from .vllm.own_engine import is_async

    if inspect.iscoroutine(llm):
        llm.close()
        raise UsageError(
            "parity_engine_factory gave a coroutine: make it an async fixture, or build the AsyncLLM without await "
            "(AsyncLLM.from_engine_args is no coroutine)"
        )
    if not hasattr(llm, "llm_engine") and not is_async(llm):
        given = f"{type(llm).__module__}.{type(llm).__qualname__}"
        raise UsageError(f"parity_engine_factory must give a vllm.LLM, an AsyncLLM or a server's address, not {given}")
    model = getattr(llm, "llm_engine", llm).vllm_config.model_config
    spec = EngineSpec(str(model.model), dtype=str(json_value(model.dtype)), profile="own")
    return OwnLLM(spec=spec, model=str(model.model), tokenizer=str(model.tokenizer), is_async=is_async(llm))


def own_server(url: str, asked: EngineSpec | None, client: Callable[[str], Client]) -> EngineSpec:
    """The spec of a running server. `asked` is the spec of the test, which names its model; else the server says it.

    Raises UsageError for what is no address.
    """
    from .server.readback import served_root

    url = check_url(url, "parity_engine_factory")
    settings: dict[str, Any] = {k: v for k, v in asked.settings.items() if k in SERVER_SETTINGS} if asked else {}
    model = asked.model if asked else served_root(client(url))
    tokenizer = asked.tokenizer if asked else None
    return EngineSpec(model, engine=SERVER, tokenizer=tokenizer, profile="own", **{**settings, "url": url})
