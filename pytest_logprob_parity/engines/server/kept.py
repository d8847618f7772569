"""Asks a server what truncation kept: by our own route, or by `/collective_rpc` of vLLM's development mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...errors import EngineError
from .answer import shown
from .client import Client
from .readback import KEPT_ROUTE

_RPC: Final = "/collective_rpc"
#: The largest answer, in bytes: one has about 8 MiB, or one whole request.
_LARGEST: Final = 2**30


def kept_route(client: Client) -> str:
    """The route by which a server tells what truncation kept; "" where it has none."""
    return next((route for route in (KEPT_ROUTE, _RPC) if _asked(client, route, []) is not None), "")


def ask_kept(client: Client, route: str, numbers: list[int]) -> Mapping[str, Any]:
    """What the server's worker kept under these numbers, packed as `kept_sets.take` does it; {} where it no longer tells.

    Raises EngineError.
    """
    return _asked(client, route, numbers) or {}


def _asked(client: Client, route: str, numbers: list[int]) -> Mapping[str, Any] | None:
    own = route == KEPT_ROUTE
    body: dict[str, Any] = {"numbers": numbers} if own else {"method": "logprob_parity_kept", "args": [numbers]}
    answer = client.ask("POST", route, body, largest=_LARGEST)
    if answer.status != 200 or not isinstance(answer.content, Mapping):
        return None
    kept = answer.content.get("kept") if own else answer.content.get("results")
    if not own:
        kept = kept[0] if isinstance(kept, list) and kept else None
    if kept is not None and not isinstance(kept, Mapping):
        raise EngineError(f"the server at {client.url} answers {route} with {shown(kept)}, expected kept tokens by number")
    return kept
