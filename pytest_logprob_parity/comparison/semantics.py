"""Do both columns mean the same? What the labels claim, and what the numbers bear out."""

from __future__ import annotations

import numpy as np

from ..trace import Trace
from .alignment import Alignment
from .metrics import top_gap_ratio
from .result import Finding


def different_meaning(expected: Trace, actual: Trace) -> str | None:
    """The cause's name where the labels of the two sides say that their numbers mean different things."""
    if expected.distribution() == actual.distribution():
        return None
    if expected.logprobs_mode != actual.logprobs_mode:
        return "raw_vs_processed"
    one, other = expected.sampling, actual.sampling
    if one.temperature != other.temperature:
        return "temperature"
    return "truncation" if (one.top_p, one.top_k, one.min_p) != (other.top_p, other.top_k, other.min_p) else "penalties"


def bears_out(expected: Trace, actual: Trace, rows: Alignment) -> bool:
    """Whether the top-k show that the two sides are apart by the temperatures that their labels name, however small."""
    scale = _applied_temperature(actual) / _applied_temperature(expected)
    ratio, spread, positions = top_gap_ratio(expected, actual, rows)
    return bool(positions and abs(scale - 1) > 4 * spread / np.sqrt(positions) and abs(ratio - scale) < abs(scale - 1) / 4)


def semantic_finding(cause: str, expected: Trace, actual: Trace, rows: Alignment) -> Finding:
    """The finding for labels that differ, with what the top-k say of it."""
    evidence = f"{expected.distribution()} against {actual.distribution()}"
    ratio, spread, positions = top_gap_ratio(expected, actual, rows)
    if positions and np.isfinite(ratio):
        evidence += (
            f"; the gap between the two likeliest tokens is {ratio:.3f} +- {spread:.3f} times as wide in the golden"
            f" ({positions} positions)"
        )
    return Finding("semantic", cause, evidence)


def hidden_temperature(expected: Trace, actual: Trace, rows: Alignment) -> Finding | None:
    """Equal labels whose numbers are apart by the recorded temperature: one side is raw, whatever it is called."""
    temperature = expected.sampling.temperature
    if expected.sampling.greedy or abs(temperature - 1) < 0.02:
        return None
    ratio, spread, positions = top_gap_ratio(expected, actual, rows)
    for scale, text in (
        (1 / temperature, "applied to the golden and not to this run"),
        (temperature, "applied to this run and not to the golden"),
    ):
        if abs(ratio / scale - 1) < 0.02 and spread < 0.05 * scale:
            return Finding(
                "semantic", "raw_vs_processed", f"temperature {temperature:g} was {text} ({positions} positions agree)"
            )
    return None


def _applied_temperature(trace: Trace) -> float:
    """What the logits of a trace's logprobs were divided by, as its labels say."""
    applies = trace.logprobs_mode == "processed_logprobs" and not trace.sampling.greedy
    return trace.sampling.temperature if applies else 1.0
