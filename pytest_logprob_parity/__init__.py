"""Golden-trace regression tests for the logprobs that RL trainers take from inference engines.

Names are handed on when they are asked for, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .assertions import assert_logprobs_close, assert_tokens_equal
    from .check import check_golden
    from .comparison.result import Comparison, Finding, MismatchError
    from .comparison.tolerance import Tolerance
    from .comparison.verdict import compare
    from .errors import EngineError, GoldenError, IncomparableError, ParityError, UsageError
    from .golden import Golden
    from .pool import Engine, Pool, open_engine
    from .spec import EngineSpec, Sampling
    from .trace import Trace

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Engine",
    "EngineError",
    "EngineSpec",
    "Finding",
    "Golden",
    "GoldenError",
    "IncomparableError",
    "MismatchError",
    "ParityError",
    "Pool",
    "Sampling",
    "Tolerance",
    "Trace",
    "UsageError",
    "assert_logprobs_close",
    "assert_tokens_equal",
    "check_golden",
    "compare",
    "open_engine",
]

if not TYPE_CHECKING:  # seen by type checkers these would hide every misspelt name
    _HOMES = {
        "assertions": ("assert_logprobs_close", "assert_tokens_equal"),
        "check": ("check_golden",),
        "comparison.result": ("Comparison", "Finding", "MismatchError"),
        "comparison.tolerance": ("Tolerance",),
        "comparison.verdict": ("compare",),
        "errors": ("EngineError", "GoldenError", "IncomparableError", "ParityError", "UsageError"),
        "golden": ("Golden",),
        "pool": ("Engine", "Pool", "open_engine"),
        "spec": ("EngineSpec", "Sampling"),
        "trace": ("Trace",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str):
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted([*globals(), *__all__])
