"""The frameworks of this field, by name. Each has a file of its own, which is imported when it is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any, Final

from ...errors import UsageError
from ...suggest import nearest

if TYPE_CHECKING:
    from ...comparison.result import Comparison
    from .base import Framework

#: Name -> the file that it is described in, as a constant: TRL, NEMO_RL.
_HOMES: Final = {
    "trl": "trl", "verl": "verl", "openrlhf": "openrlhf", "nemo-aligner": "nemo", "nemo-rl": "nemo",
    "pipelinerl": "pipelinerl", "deepspeed-chat": "deepspeed_chat",
}  # fmt: skip
FRAMEWORKS: Final = tuple(_HOMES)


def framework(name: str) -> Framework:
    """What this project knows of a framework. Raises UsageError for one that it does not know."""
    if name not in _HOMES:
        raise UsageError(f"no framework {name!r}{nearest(str(name), FRAMEWORKS)}; known are {', '.join(FRAMEWORKS)}")
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
    described: Framework = getattr(module, name.upper().replace("-", "_"))
    return described


def with_metrics(comparison: Comparison, name: str, config: Any = None) -> Comparison:
    """A comparison with what framework `name` would log of it, as its `config` says: expected as the rollout, actual as the
    trainer.
    """
    return dataclasses.replace(comparison, logged=framework(name).log(comparison.expected, comparison.actual, config))
