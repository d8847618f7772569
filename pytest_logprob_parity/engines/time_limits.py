"""How long an engine may take to start and to answer. Light: ini keys use it."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..errors import EngineError, UsageError

START_SECONDS: Final = 1800.0
CALL_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """The limits of a start and of a call, in seconds; 0: none. A start that loads a large model takes minutes."""

    start: float = START_SECONDS
    call: float = CALL_SECONDS

    @classmethod
    def of(cls, start: Any, call: Any, prefix: str = "") -> TimeLimits:
        """The limits from numbers or their texts. Raises UsageError, which names `start_timeout` or `call_timeout`."""
        return cls(_seconds(start, f"{prefix}start_timeout"), _seconds(call, f"{prefix}call_timeout"))


def _seconds(value: Any, name: str) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UsageError(f"{name}: {value!r} must be a number of seconds, or 0 for no limit")
    return min(seconds, threading.TIMEOUT_MAX)


def no_answer(engine: object, what: str, seconds: float, kind: Literal["start", "call"], told: str) -> EngineError:
    """The error of an engine that did not answer in time: `told` is what is known of it and what became of it."""
    more = f"ini parity_{kind}_timeout (without pytest: {kind}_timeout=) allows more, 0 sets no limit"
    return EngineError(f"{engine}: no answer to {what} within {seconds:g} s; {told}; {more}")
