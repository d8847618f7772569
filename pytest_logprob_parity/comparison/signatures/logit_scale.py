"""How differences between logprobs of one position scale from the expected to the actual side: a temperature, or its like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .positions import Doubles

#: Fewer usable positions than this prove no slope.
ENOUGH: Final = 50
#: No slope closer to 1 than this is claimed: bfloat16 tells no finer.
FINEST: Final = 0.005
_SURE: Final = 4.0
_TRIM: Final = 4.0
#: A line whose slopes for near and far tokens differ by more than this is none: something bends the logits.
_BENT: Final = 0.02
#: People choose temperatures that are multiples of this; one that far from such a one (relative) is none.
_ROUND, _NEARLY = 0.05, 0.004
#: Squared correlation below which the two sides have no line in common.
_ONE_LINE: Final = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """actual = `slope` x expected + a constant for each position, over `positions` of them.

    `error` is the slope's standard error, clustered by position; `removed` the share (0 to 1) of the mismatch between
    tokens of one position that the slope removes; `uniform` says that it is one line, for near and far tokens alike.
    """

    slope: float
    error: float
    positions: int
    removed: float
    uniform: bool = True

    @property
    def claimed(self) -> bool:
        """Whether this is a slope at all: enough positions, away from 1, and at least half of the mismatch goes with it."""
        apart = abs(self.slope - 1) > max(FINEST, _SURE * self.error)
        return self.positions >= ENOUGH and apart and self.removed >= 0.5 and self.uniform

    def is_(self, slope: float) -> bool:
        """Whether the slope is this one, within what can be told."""
        return abs(self.slope - slope) <= max(FINEST * slope, _SURE * self.error)


NO_SCALE: Final = Scale(slope=1.0, error=math.inf, positions=0, removed=0.0)


def fit_scale(expected: Doubles, actual: Doubles, used: Any, classes: Any = None) -> Scale:
    """One slope for all positions by Deming regression with equal errors on both sides.

    `expected`, `actual` float64 [n, m], `used` bool [n, m]. Least squares would take noise of the expected side for a slope
    below 1 (errors in variables). Each position has a constant of its own, for normalisers and truncation; with `classes` int
    [n, m] each class of a position has one. Positions that are far off the line are left out of it.
    """
    if classes is not None:
        used = np.concatenate([used & (classes == c) for c in np.unique(classes[used])] or [used[:0]])
        repeat = len(used) // max(len(expected), 1)
        expected, actual = np.tile(expected, (repeat, 1)), np.tile(actual, (repeat, 1))
    counts = used.sum(axis=1)
    rows = counts >= 2
    if np.count_nonzero(rows) < 3:
        return NO_SCALE
    used, counts = used[rows], counts[rows]
    x, y = _centred(expected[rows], used, counts), _centred(actual[rows], used, counts)
    kept = (x**2).sum(axis=1) > 1e-6
    slope = _median_slope(x[kept], y[kept]) if kept.any() else 1.0
    for _ in range(3):
        off = np.sqrt(((y - slope * x) ** 2).sum(axis=1) / (counts - 1))
        near = off <= _TRIM * 1.4826 * np.median(off[kept]) + 1e-6 if kept.any() else kept
        slope = _deming(x[near], y[near])
        if not math.isfinite(slope):
            return NO_SCALE
    if np.count_nonzero(near) < len(near) / 2:
        return NO_SCALE
    x, y = x[near], y[near]
    far = (x**2).sum(axis=1) > np.median((x**2).sum(axis=1))
    halves = [(_deming(x[half], y[half]), _error(x[half], y[half], slope)) for half in (far, ~far)]
    apart = abs(halves[0][0] - halves[1][0])
    before, after = float(((y - x) ** 2).sum()), float(((y - slope * x) ** 2).sum())
    together = float((x * y).sum()) ** 2 / (float((x**2).sum()) * float((y**2).sum()))
    uniform = together >= _ONE_LINE and not apart > max(_BENT * slope, _SURE * math.hypot(halves[0][1], halves[1][1]))
    return Scale(
        slope=slope, error=_error(x, y, slope), positions=len(x), removed=1 - after / before if before else 0.0, uniform=uniform
    )


def may_be_chosen(temperature: float, error: float = 0.0) -> bool:
    """Whether this is a temperature that people choose, or a scale, within its standard error: multiples of 0.05."""
    off = abs(temperature / _ROUND - round(temperature / _ROUND)) * _ROUND
    return off <= max(_NEARLY * temperature, _SURE * error)


def is_a_temperature(temperature: float, in_place_of: float) -> bool:
    """Whether one temperature in place of another is what people do, and the scale of the logits that gives the same is none
    that models have: 2 in place of 1 is half the logits, too.
    """
    scale = in_place_of / temperature
    eighths = abs(8 * scale - round(8 * scale)) <= 8 * _NEARLY * scale
    return may_be_chosen(temperature) and not may_be_chosen(scale) and not eighths


def _error(x: Doubles, y: Doubles, slope: float) -> float:
    """The slope's standard error, clustered by position."""
    pull, squares = (x * (y - slope * x)).sum(axis=1), float((x**2).sum())
    return float(np.sqrt((pull**2).sum())) / squares if squares else math.inf


def _centred(values: Doubles, used: Any, counts: Any) -> Doubles:
    """Values less their position's mean; 0 where they are not used."""
    filled = np.where(used, values, 0.0)
    return np.where(used, filled - (filled.sum(axis=1) / counts)[:, None], 0.0)


def _median_slope(x: Doubles, y: Doubles) -> float:
    """The median of the positions' slopes, weighted by how much each says."""
    weights = (x**2).sum(axis=1)
    slopes = (x * y).sum(axis=1) / weights
    order = np.argsort(slopes)
    return float(slopes[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)])


def _deming(x: Doubles, y: Doubles) -> float:
    xx, yy, xy = float((x * x).sum()), float((y * y).sum()), float((x * y).sum())
    if xy == 0:
        return math.nan
    return (yy - xx + math.sqrt((yy - xx) ** 2 + 4 * xy**2)) / (2 * xy)
