"""The training frameworks, by name. Each has a file of its own, which is imported when the framework is asked for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from ...comparison.precision_gaps import GAPS
from ...errors import UsageError
from ...registry import Registry
from ...suggest import nearest

if TYPE_CHECKING:
    from ...comparison.result import Comparison
    from .base import Framework


def _is_a_framework(thing: Any) -> bool:
    from .base import Framework

    return isinstance(thing, Framework)


#: Framework by name. Other distributions add to it by entry points of this group (docs/reference/frameworks.md).
FRAMEWORKS: Final[Registry[Framework]] = Registry("framework", "logprob_parity.frameworks", fits=_is_a_framework)


def framework(name: str) -> Framework:
    """What is known of the framework of this name. Raises UsageError for a name that nobody registers."""
    try:
        return FRAMEWORKS[name]
    except KeyError:
        known = ", ".join(FRAMEWORKS)
        raise UsageError(f"no framework {name!r}{nearest(str(name), FRAMEWORKS)}; known are {known}") from None


def limits_of(tolerance: Any) -> Any:
    """The thresholds of the framework that `tolerance` names; anything else as it is. Raises UsageError."""
    named = isinstance(tolerance, str) and tolerance not in GAPS
    return framework(tolerance).tolerance if named else tolerance


def with_metrics(comparison: Comparison, name: str, config: Any = None) -> Comparison:
    """The comparison with what framework `name` would log of it under its configuration `config`: the expected side is the
    rollout, the actual side the trainer.
    """
    return dataclasses.replace(comparison, logged=framework(name).log(comparison.expected, comparison.actual, config))
