"""What a check can say of an engine that cannot be forced along the golden's tokens: a prefill of them, or nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..comparison.difference import Difference
from ..comparison.result import Comparison
from ..notes import Note
from ..spec.server_settings import SERVER
from ..trace import ReplayPath, Trace

if TYPE_CHECKING:
    from ..engines.engine import Engine

_DECODES: Final[tuple[ReplayPath, ...]] = ("decode", "window")


def why_unforced(engine: Engine, replay: Sequence[ReplayPath]) -> str:
    """Why a server cannot decode along given tokens, where that is asked of it; else ""."""
    config = engine.config
    asked = any(path in _DECODES for path in replay)
    return config.unforced if asked and config.engine == SERVER else ""


def without_decode(replay: Sequence[ReplayPath]) -> tuple[ReplayPath, ...]:
    """The paths that are left: a prefill in the place of decode."""
    left: list[ReplayPath] = ["prefill" if path in _DECODES else path for path in replay]
    return tuple(dict.fromkeys(left))


def as_unforced(comparison: Comparison, golden: Trace, reason: str) -> Comparison:
    """A comparison with a prefill that was to be with a decode: `unverified` where the golden's logprobs are not raw."""
    note = Note("prefill_for_decode", f"not decoded, scored by a prefill: {reason}")
    if golden.is_raw:
        return dataclasses.replace(comparison, notes=(note, *comparison.notes))
    return dataclasses.replace(
        comparison,
        verdict="unverified",
        headline=(
            f"The server cannot be forced along the golden's tokens, and what is left, a prefill, gives raw logprobs: the "
            f"golden's are {golden.distribution()}"
        ),
        findings=(),
        gates=(),
        shown=None,
        difference=Difference(different=None, reason="raw logprobs say nothing of processed ones"),
        notes=(Note("to_verify", f"to verify: {reason}"), *comparison.notes),
    )
