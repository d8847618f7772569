"""The names of engine kinds. What they are is imported when an engine starts: this is light, markers use it."""

from __future__ import annotations

from typing import Any, Final

from ..registry import Registry
from .server_settings import SERVER

#: Engine kinds by name, each an `EngineKind` (engines/kinds.py). A running server is connected to, not started: it has no entry
#: of its own. Other distributions add kinds by entry points of this group.
ENGINE_KINDS: Final[Registry[Any]] = Registry(
    "engine kind", "logprob_parity.engines", fits=lambda thing: callable(getattr(thing, "start", None)), at_hand={SERVER: None}
)
