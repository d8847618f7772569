"""Compare two traces in hand: measure, ask whether they mean the same, whether it is different, and have it decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..golden.noise_floor import NoiseFloor
from ..golden.reference import Reference
from ..suggest import nearest
from ..trace import Trace
from .declared_gap import with_gap
from .evidence import Evidence
from .judge import judge
from .objectives import DEFAULT_OBJECTIVE
from .result import Comparison
from .tolerance import Tolerance, default_tolerance, make_tolerance, with_floor, with_reference
from .vocabulary import LEVELS, Level


def compare(
    *,
    expected: Trace,
    actual: Trace,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    level: Level = "rl",
    objective: str = DEFAULT_OBJECTIVE,
    floor: NoiseFloor | None = None,
    reference: Reference | None = None,
) -> Comparison:
    """Compare two traces over their identical tokens; d = actual - expected.

    `tolerance` changes the defaults for the golden's dtype and the two paths, or declares a gap that is there on purpose
    (`"fp8"`, `"int8"`). `level` says what fails: `bitwise` any bit that differs, `noise` any difference larger than the
    noise floor (which two traces in hand cannot show), `rl` what matters for an update of this `objective` (`token`,
    `sequence`, `truncated`, `unclipped`; see Objective). `floor` is the golden's noise floor, `reference` its reference column.

    Where the two sides mean different things, and the numbers bear that out, nothing is subtracted: the metrics of
    differences are NaN and a finding says so.

    Raises UsageError for a tolerance, level or objective that does not exist, and for a floor or reference of other tokens.
    """
    if not isinstance(expected, Trace) or not isinstance(actual, Trace):
        raise UsageError(f"compare() takes two Traces, not {type(expected).__name__} and {type(actual).__name__}")
    if reference is not None and len(reference.logprobs) != expected.num_tokens:
        raise UsageError(f"the reference has {len(reference.logprobs)} tokens, the expected trace {expected.num_tokens}")
    if floor is not None and floor.logprobs.shape[1] != expected.num_tokens:
        raise UsageError(f"the floor has {floor.logprobs.shape[1]} tokens, the expected trace {expected.num_tokens}")
    base = with_floor(default_tolerance(expected.dtype, (expected.path, actual.path), objective), floor)
    base = with_reference(base, expected.logprobs, reference)
    evidence = Evidence(floor=floor, reference=reference)
    return with_gap(judge(expected, actual, make_tolerance(base, tolerance), check_level(level), evidence), tolerance)


def check_level(level: str) -> Level:
    """`level`, if it is one. Raises UsageError."""
    if level not in LEVELS:
        raise UsageError(f"level={level!r}: known are {', '.join(LEVELS)}{nearest(str(level), LEVELS)}")
    return level
