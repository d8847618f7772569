"""In which precision the head gave its logits: a half-precision head leaves them on a grid."""

from __future__ import annotations

import numpy as np

from ...lm_head_precision import ENOUGH, grid_of
from ..findings import Finding
from ..sides import Side
from .positions import Positions


def lm_head_finding(positions: Positions) -> Finding | None:
    """`head_precision` where the two sides' logits lie on different grids, or one side's on none, in engines of one dtype."""
    if positions.expected_trace.dtype != positions.actual_trace.dtype:
        return None
    expected, actual = logit_step(positions, "expected"), logit_step(positions, "actual")
    if expected is None or actual is None or 0 < expected < 4 * actual < 16 * expected or expected == actual:
        return None  # grids as near as these come of logits of another size
    if not _within(positions, 2 * max(expected, actual)):
        return None  # rounding moves no logit by more than a step: something else did
    names = positions.names
    text = f"{names.expected}'s logits {_words(expected)}, those of {names.actual} {_words(actual)}"
    return Finding(
        layer="head", cause="head_precision", evidence=text, values={"expected_step": expected, "actual_step": actual}
    )


def _within(positions: Positions, most: float) -> bool:
    """Whether the gaps between tokens, in logits, differ between the sides by no more than this at most positions."""
    scale = [trace.applied_temperature for trace in (positions.expected_trace, positions.actual_trace)]
    two = positions.of(positions.common.sum(axis=1) >= 2)
    apart = np.where(two.common, two.actual, np.nan) * scale[1] - np.where(two.common, two.expected, np.nan) * scale[0]
    if not len(apart):
        return False
    return bool(np.median(np.nanmax(apart, axis=1) - np.nanmin(apart, axis=1)) <= most)


def logit_step(positions: Positions, side: Side) -> float | None:
    """The grid that one side's likeliest logits lie on: its step, 0 for none, or None where that cannot be told.

    From differences between the two likeliest tokens of a position, times the temperature: the normaliser is not in them.
    Penalties would move them off the grid.
    """
    trace, rows, _ = positions.side(side)
    if trace.top_k < 2 or trace.sampling.penalizes:
        return None
    top = trace.top_logprobs[rows, :2].astype(np.float64)
    usable = np.isfinite(top).all(axis=1)
    if np.count_nonzero(usable) < ENOUGH:
        return None
    return grid_of((top[usable, 0] - top[usable, 1]) * trace.applied_temperature)


def _words(step: float) -> str:
    if not step:
        return "lie on no grid, as an LM head in float32 gives them"
    return f"lie on a grid of {f'1/{round(1 / step)}' if step < 1 else f'{step:g}'}, as an LM head in fewer bits gives them"
