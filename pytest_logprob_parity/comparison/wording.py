"""Sentences of a comparison, each from keys and numbers. Nothing reads them back."""

from __future__ import annotations

import math

from .intervals import CONFIDENCE, POWER
from .result import Gate, Shown

NOT_SHOWN = "Inconclusive: too little evidence to pass or to fail"


def number(value: float) -> str:
    """A number as people read it: three digits, `no bound` for infinity."""
    return f"{value:.3g}" if math.isfinite(value) else "no bound"


def measured(gate: Gate) -> str:
    """The number of a gate with its unit."""
    return f"{number(gate.value)} {gate.unit}".rstrip()


def failed_line(gate: Gate) -> str:
    """Why this gate fails."""
    if gate.key in ("outlier_tokens", "outlier_sequences"):
        what = f"{int(gate.value)} {gate.unit} {gate.name} nats (limit: {int(gate.limit)})"
        if gate.beyond == "fail":
            thing = "a token" if gate.key == "outlier_tokens" else "the RMS of a sequence"
            explained = f"no noise of this model explains more than {number(gate.unexplained)}"
            return f"{thing} differs by {number(gate.worst)} nats, and {explained}"
        return what
    if gate.errors is not None:
        return (
            f"{gate.name} {measured(gate)}; from the reference it is {number(gate.errors.actual)}, the golden "
            f"{number(gate.errors.golden)} (limit: {number(gate.errors.limit)})"
        )
    return f"{gate.name} {measured(gate)} (limit: {number(gate.limit)})"


def unverified_line(gate: Gate) -> str:
    """Why this gate neither passes nor fails."""
    if gate.hidden:
        noise = f": noise alone puts {gate.errors.golden:.0%} outside" if gate.errors is not None else ""
        return f"{gate.name} cannot be told from noise in this dtype{noise}"
    if gate.beyond is not None:
        return (
            f"a difference of {number(gate.worst)} nats is more than the golden's own noise shows "
            f"({number(gate.unexplained)}), and a tie between experts can do that"
        )
    if gate.key in ("outlier_tokens", "outlier_sequences", "nucleus_flips"):
        what = f"{int(gate.value)} {gate.unit} {gate.name}" + (" nats" if math.isfinite(gate.threshold) else "")
        return f"{what} (limit: {int(gate.limit)}; more than {int(gate.fail_limit)} would fail)"
    if gate.errors is not None and gate.errors.outcome != "pass":
        return (
            f"{gate.name} from the reference is {number(gate.errors.actual)}, the golden's {number(gate.errors.golden)}; on "
            f"other prompts it may be {number(gate.errors.high)} (limit: {number(gate.errors.limit)})"
        )
    return f"{gate.name} is {measured(gate)}, and may be {number(gate.high)} on other prompts (limit: {number(gate.limit)})"


def shown_lines(shown: Shown) -> tuple[str, ...]:
    """What a comparison says of other prompts, and what would not have passed."""
    if shown.prompts == 1:
        return ("shown: all sequences are of one prompt, and speak for that prompt alone",)
    off = f"off by an RMS above {number(shown.threshold)} nats"
    sequences = shown.sequences_allowed + 1
    caught = f"{shown.tokens_allowed + 1} sequences with an outlier token, or "
    caught += "1 sequence" if sequences == 1 else f"{sequences} sequences"
    if shown.reach < 1:
        caught += f", {off}; {POWER:.0%} sure where a fault does that to {shown.reach:.1%} of the prompts"
    return (
        f"shown ({CONFIDENCE:.0%} sure, {shown.prompts} prompts): at most {shown.share:.1%} of prompts like these have a "
        f"sequence {off} (its largest token left out); of these, {shown.bad_prompts} do",
        f"would not have passed: {caught}",
    )
