"""The limits between an engine and a trainer: those of the coarser of their dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..comparison.objectives import DEFAULT_OBJECTIVE
from ..comparison.tolerance import DTYPES, Tolerance, default_tolerance, make_tolerance

#: Precisions, the finest first; a comparison has the limits of the coarser side.
FINEST_FIRST: Final = ("float64", "float32", "float16", "bfloat16")


def trainer_tolerance(
    rollout_dtype: str,
    trainer_dtype: str,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    objective: str = DEFAULT_OBJECTIVE,
) -> Tolerance:
    """The limits between an engine and a trainer: those of the coarser dtype for decode compared with prefill, changed
    by `tolerance`, or those of the difference in precision that it names.
    """
    known = [dtype for dtype in (rollout_dtype, trainer_dtype) if dtype in DTYPES]
    coarser = max(known, key=FINEST_FIRST.index) if len(known) == 2 else "unknown"
    limits = default_tolerance(coarser, ("decode", "prefill"), objective)
    return make_tolerance(limits, tolerance)


def is_coarser(one: str, other: str) -> bool:
    """Whether dtype `one` is coarser than `other`, or one of them is unknown."""
    known = one in FINEST_FIRST and other in FINEST_FIRST
    return not known or FINEST_FIRST.index(one) > FINEST_FIRST.index(other)
