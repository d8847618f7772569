"""Golden-trace regression tests for the logprobs that RL trainers take from inference engines.

Names are handed on when they are asked for, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .check.check import check_golden
    from .check.speculation import assert_speculation_parity
    from .checkpoint.adapter import merge_adapter
    from .checkpoint.probe import write_probe
    from .comparison.assertions import assert_logprobs_close, assert_tokens_equal
    from .comparison.compare import compare
    from .comparison.result import Comparison, Finding, MismatchError
    from .comparison.tolerance import Tolerance
    from .engines.engine import Engine
    from .engines.pool import Pool, open_engine
    from .errors import EngineError, GoldenError, IncomparableError, ParityError, UsageError
    from .golden import Golden
    from .spec import EngineSpec, Sampling
    from .trace import Trace
    from .trainer.chain import assert_trainer_chain, trainer_chain
    from .trainer.parity import assert_trainer_parity
    from .trainer.retokenisation import retokenisation
    from .trainer.scorer import Scorer, scorer
    from .trainer.transformers_scorer import TransformersScorer
    from .weight_updates.check import assert_weight_update
    from .weight_updates.cold_engine import assert_updated_equals_cold

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
    "assert_speculation_parity",
    "assert_tokens_equal",
    "assert_trainer_chain",
    "assert_trainer_parity",
    "assert_updated_equals_cold",
    "assert_weight_update",
    "check_golden",
    "compare",
    "merge_adapter",
    "open_engine",
    "retokenisation",
    "scorer",
    "trainer_chain",
    "write_probe",
]

if not TYPE_CHECKING:  # seen by type checkers these would hide every misspelt name
    _HOMES = {
        "comparison.assertions": ("assert_logprobs_close", "assert_tokens_equal"),
        "check.check": ("check_golden",),
        "check.speculation": ("assert_speculation_parity",),
        "comparison.result": ("Comparison", "Finding", "MismatchError"),
        "comparison.tolerance": ("Tolerance",),
        "comparison.compare": ("compare",),
        "errors": ("EngineError", "GoldenError", "IncomparableError", "ParityError", "UsageError"),
        "golden": ("Golden",),
        "engines.engine": ("Engine",),
        "engines.pool": ("Pool", "open_engine"),
        "spec": ("EngineSpec", "Sampling"),
        "trace": ("Trace",),
        "trainer.chain": ("assert_trainer_chain", "trainer_chain"),
        "trainer.parity": ("assert_trainer_parity",),
        "trainer.retokenisation": ("retokenisation",),
        "trainer.scorer": ("Scorer", "scorer"),
        "trainer.transformers_scorer": ("TransformersScorer",),
        "checkpoint.adapter": ("merge_adapter",),
        "checkpoint.probe": ("write_probe",),
        "weight_updates.cold_engine": ("assert_updated_equals_cold",),
        "weight_updates.check": ("assert_weight_update",),
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
