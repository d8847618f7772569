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
    from .trainer.chain import assert_trainer_chain, trainer_chain
    from .trainer.parity import assert_trainer_parity
    from .trainer.scoring import Scorer, scorer
    from .trainer.transformers_scorer import TransformersScorer
    from .weights.adapter import merge_adapter
    from .weights.cold import assert_updated_equals_cold
    from .weights.probe import write_probe
    from .weights.semantics import assert_weight_update

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
    "Scorer",
    "Tolerance",
    "Trace",
    "TransformersScorer",
    "UsageError",
    "assert_logprobs_close",
    "assert_tokens_equal",
    "assert_trainer_chain",
    "assert_trainer_parity",
    "assert_updated_equals_cold",
    "assert_weight_update",
    "check_golden",
    "compare",
    "merge_adapter",
    "open_engine",
    "scorer",
    "trainer_chain",
    "write_probe",
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
        "trainer.chain": ("assert_trainer_chain", "trainer_chain"),
        "trainer.parity": ("assert_trainer_parity",),
        "trainer.scoring": ("Scorer", "scorer"),
        "trainer.transformers_scorer": ("TransformersScorer",),
        "weights.adapter": ("merge_adapter",),
        "weights.probe": ("write_probe",),
        "weights.cold": ("assert_updated_equals_cold",),
        "weights.semantics": ("assert_weight_update",),
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
