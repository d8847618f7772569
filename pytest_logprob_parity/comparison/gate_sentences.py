"""Sentences of a comparison, each from keys and numbers. Nothing reads them back."""

from __future__ import annotations

import math

from ..grammar import counted
from .gate import OUTLIERS, Gate
from .json_values import number_in_words
from .sides import Names

NOT_SHOWN = "Inconclusive: too little evidence to pass or to fail"

BETWEEN = "it is more than passes, and noise of this dtype may be as large: more prompts do not decide that"


def in_unit(gate: Gate, value: float) -> str:
    """A number of this gate, a limit of it or its value, with its unit; shares in percent."""
    if gate.key == "clip_share":
        return f"{100 * value:.3g} %"
    return f"{value:.3g}" if gate.key in OUTLIERS else number_in_words(value)


def measured(gate: Gate) -> str:
    """The number of a gate with its unit."""
    return f"{in_unit(gate, gate.value)} {gate.unit}".rstrip()


def failed_line(gate: Gate, names: Names) -> str:
    """Why this gate fails."""
    if gate.key in ("outlier_tokens", "outlier_sequences"):
        what = f"{counted(int(gate.value), gate.unit)} {gate.name} nats (more than {int(gate.fail_limit)} fail)"
        if gate.beyond == "fail":
            thing = "a token" if gate.key == "outlier_tokens" else "the RMS of a sequence"
            explained = f"noise explains no more than {number_in_words(gate.unexplained)} here"
            return f"{thing} differs by {number_in_words(gate.worst)} nats, and {explained}"
        return what
    if gate.errors is not None:
        return (
            f"{gate.name} {measured(gate)}; from the reference it is {in_unit(gate, gate.errors.actual)}, {names.expected} "
            f"{in_unit(gate, gate.errors.expected)} (more than {in_unit(gate, gate.errors.fail_limit)} fails)"
        )
    if gate.key == "nucleus_flips":
        return f"{counted(int(gate.value), gate.name)} (more than {int(gate.fail_limit)} fail)"
    return f"{gate.name} {measured(gate)} (more than {in_unit(gate, gate.fail_limit)} fails)"


def unverified_line(gate: Gate, names: Names) -> str:
    """Why this gate neither passes nor fails."""
    if gate.hidden:
        noise = f": noise alone puts {gate.errors.expected:.0%} outside" if gate.errors is not None else ""
        return f"{gate.name} cannot be told from noise in this dtype{noise}"
    if gate.beyond is not None:
        size, explained = number_in_words(gate.worst), number_in_words(gate.unexplained)
        text = f"a difference of {size} nats is more than noise explains here ({explained})"
        return f"{text}, and a tie between experts can do that"
    if gate.key in ("outlier_tokens", "outlier_sequences", "nucleus_flips"):
        what = counted(int(gate.value), gate.name)
        if gate.key in OUTLIERS:
            what = f"{counted(int(gate.value), gate.unit)} {gate.name} nats"
        return f"{what} (limit: {int(gate.limit)}; more than {int(gate.fail_limit)} would fail)"
    if gate.errors is not None and gate.errors.outcome != "pass":
        return (
            f"{gate.name} from the reference is {in_unit(gate, gate.errors.actual)}, {names.expected}'s "
            f"{in_unit(gate, gate.errors.expected)}; its interval reaches {in_unit(gate, gate.errors.high)} (limit: "
            f"{in_unit(gate, gate.errors.limit)})"
        )
    high, limit = in_unit(gate, gate.high), in_unit(gate, gate.limit)
    reaches = f"its interval reaches {high}" if math.isfinite(gate.high) else "too few prompts carry it for an interval"
    return f"{gate.name} is {measured(gate)}; {reaches} (limit: {limit})"
