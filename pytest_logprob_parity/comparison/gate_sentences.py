"""Sentences of a comparison, each from keys and numbers. Nothing reads them back."""

from __future__ import annotations

import math

from ..grammar import counted
from .gate import OUTLIERS, Gate
from .json_values import number_in_words
from .sides import Names

NOT_SHOWN = "Inconclusive: too little evidence to pass or to fail"

BETWEEN = "the value is above the limit, but noise of this dtype can be as large: more prompts do not decide that"


def in_unit(gate: Gate, value: float) -> str:
    """A number of this gate, a limit of it or its value, with its unit; shares in percent."""
    if gate.key == "clip_share":
        return f"{100 * value:.3g} %"
    return f"{value:.3g}" if gate.key in OUTLIERS else number_in_words(value)


def measured(gate: Gate) -> str:
    """The number of a gate with its unit."""
    return f"{in_unit(gate, gate.value)} {gate.unit}".rstrip()


def _outliers(gate: Gate) -> str:
    """How many sequences are outliers, or have an outlier token."""
    have = "has" if int(gate.value) == 1 else "have"
    what = "a token that differs by more than" if gate.key == "outlier_tokens" else "an RMS difference above"
    return f"{counted(int(gate.value), gate.unit)} {have} {what} {gate.threshold:.2g} nats"


def failed_line(gate: Gate, names: Names) -> str:
    """Why this gate fails."""
    if gate.key in ("outlier_tokens", "outlier_sequences"):
        what = f"{_outliers(gate)} (more than {int(gate.fail_limit)} fail)"
        if gate.beyond == "fail":
            thing = "a token differs by" if gate.key == "outlier_tokens" else "a sequence has an RMS difference of"
            explained = f"noise explains at most {number_in_words(gate.unexplained)} nats here"
            return f"{thing} {number_in_words(gate.worst)} nats; {explained}"
        return what
    if gate.errors is not None:
        return (
            f"{gate.name} {measured(gate)}; from the reference it is {in_unit(gate, gate.errors.actual)} in {names.actual} "
            f"and {in_unit(gate, gate.errors.expected)} in {names.expected} (more than "
            f"{in_unit(gate, gate.errors.fail_limit)} fails)"
        )
    if gate.key == "nucleus_flips":
        return f"{counted(int(gate.value), gate.name)} (more than {int(gate.fail_limit)} fail)"
    return f"{gate.name} {measured(gate)} (more than {in_unit(gate, gate.fail_limit)} fails)"


def unverified_line(gate: Gate, names: Names) -> str:
    """Why this gate neither passes nor fails."""
    if gate.hidden:
        noise = f": noise alone puts {gate.errors.expected:.0%} of the ratios outside" if gate.errors is not None else ""
        return f"{gate.name} cannot be distinguished from noise in this dtype{noise}"
    if gate.beyond is not None:
        size, explained = number_in_words(gate.worst), number_in_words(gate.unexplained)
        text = f"a difference of {size} nats is larger than noise explains here ({explained} nats)"
        return f"{text}, but a tie between experts can cause it"
    if gate.key in ("outlier_tokens", "outlier_sequences", "nucleus_flips"):
        what = counted(int(gate.value), gate.name)
        if gate.key in OUTLIERS:
            what = _outliers(gate)
        return f"{what} (limit: {int(gate.limit)}; more than {int(gate.fail_limit)} would fail)"
    if gate.errors is not None and gate.errors.outcome != "pass":
        return (
            f"{gate.name} from the reference is {in_unit(gate, gate.errors.actual)} in {names.actual} and "
            f"{in_unit(gate, gate.errors.expected)} in {names.expected}; its confidence interval reaches "
            f"{in_unit(gate, gate.errors.high)} (limit: {in_unit(gate, gate.errors.limit)})"
        )
    high, limit = in_unit(gate, gate.high), in_unit(gate, gate.limit)
    reaches = (
        f"its confidence interval reaches {high}" if math.isfinite(gate.high) else "too few prompts for a confidence interval"
    )
    return f"{gate.name} is {measured(gate)}; {reaches} (limit: {limit})"
