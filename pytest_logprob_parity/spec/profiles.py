"""Profiles: named sets of pinned engine arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..registry import Registry

_AT_HAND: Final[Mapping[str, Mapping[str, Any]]] = {
    "rl": {
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "enforce_eager": True,
    },
    "serving": {},
    "own": {},  # an engine that somebody else built
}
#: Pinned engine arguments by profile name. `rl` pins what a trainer assumes of a rollout's logprobs; `serving` pins nothing:
#: vLLM's own defaults, as they resolve. Each training framework registers a profile of its name, and other distributions add
#: theirs by entry points of this group.
PROFILES: Final[Registry[Mapping[str, Any]]] = Registry(
    "profile", "logprob_parity.profiles", fits=lambda thing: isinstance(thing, Mapping), at_hand=_AT_HAND
)

#: What every profile that pins something also pins on CPUs: a prompt prefilled in chunks kills the CPU build when requests
#: carry seeds.
RL_ON_CPU: Final[Mapping[str, Any]] = {"enable_chunked_prefill": False}


def profile_pins(profile: str, *, cpu: bool) -> dict[str, Any]:
    """The engine arguments that a profile pins, on CPUs or elsewhere."""
    pins = PROFILES[profile]
    return {**pins, **RL_ON_CPU} if cpu and pins else dict(pins)
