"""Penalties: they move tokens that were seen before, and no others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .positions import Doubles, Positions
from .scale import ENOUGH, FINEST, fit_scale

_SURE: Final = 5.0
#: A penalty has to explain this share of what is off between seen and other tokens of one position; less, where it comes
#: out as the one that was recorded.
_REMOVED, _REMOVED_BY_RECORD = 0.8, 0.5
_ENOUGH_BY_RECORD: Final = 10


@dataclass(frozen=True)
class Penalty:
    """A penalty that one side has and the other has not; `on_golden` says which.

    `name` is a field of Sampling, `value` and its standard `error` are in that field's units. `alike` names a penalty that
    the evidence does not tell from it.
    """

    name: str
    value: float
    error: float
    on_golden: bool
    positions: int
    alike: str = ""


def find_penalty(positions: Positions, scale: float, temperature: float) -> Penalty | None:
    """The penalty that explains what is off the line now = `scale` x golden + a constant for each position, if one does.

    `temperature` is what this run's logits were divided by. Presence and frequency penalties count before it, and the line
    has brought the golden's to it: on either side, what is off is the penalty over this temperature.
    """
    off = positions.off_line(scale)
    return _repetition(positions, off, scale) or _additive(positions, off, temperature)


def _repetition(positions: Positions, off: Doubles, scale: float) -> Penalty | None:
    """Seen tokens lie on a line of their own, 1/r as steep where their logits are positive, r times where negative.

    Two seen tokens of one position are needed, for the normaliser is not known.
    """
    seen = positions.common & positions.seen
    line = fit_scale(positions.expected, positions.actual, seen)
    unseen = fit_scale(positions.expected, positions.actual, positions.common & ~positions.seen)
    if unseen.positions >= ENOUGH:
        scale = unseen.slope
    steeper = line.slope / scale if scale else math.nan
    error = math.hypot(line.error, unseen.error if unseen.positions >= ENOUGH else 0.0) / abs(scale or 1)
    if not line.positions or not line.uniform or not abs(steeper - 1) > max(FINEST, _SURE * error):
        return None
    value = max(steeper, 1 / steeper)
    recorded = abs(value - positions.golden.sampling.repetition_penalty) <= max(0.02 * value, 2 * error)
    if line.positions < (_ENOUGH_BY_RECORD if recorded else ENOUGH):
        return None
    removed = _REMOVED_BY_RECORD if recorded else _REMOVED
    if _left(positions, seen, line.slope) > (1 - removed) * _left(positions, seen, scale):
        return None
    others = positions.common & ~positions.seen
    both = seen.any(axis=1) & others.any(axis=1)
    lower = float(np.median(_mean(off, seen)[both] - _mean(off, others)[both])) if both.sum() >= ENOUGH else 0.0
    on_golden = lower > 0 if lower else steeper > 1
    return Penalty("repetition_penalty", value, error * value, on_golden, line.positions)


def _additive(positions: Positions, off: Doubles, temperature: float) -> Penalty | None:
    """Presence: a constant for every token written before. Frequency: so much for each time. The prompt does not count."""
    common = positions.common
    written = positions.counts > 0
    both = (common & written).any(axis=1) & (common & ~written).any(axis=1)
    rows = np.flatnonzero(both)
    if len(rows) < ENOUGH:
        return None
    used = common[rows]
    y = _centred(off[rows], used)
    once, often = _centred(written[rows].astype(float), used), _centred(positions.counts[rows].astype(float), used)
    fits = {name: _line(x, y) for name, x in (("presence_penalty", once), ("frequency_penalty", often))}
    name = min(fits, key=lambda n: fits[n][2])
    slope, error, left = fits[name]
    total = float((y**2).sum())
    if not total or left > (1 - _REMOVED) * total or abs(slope) <= _SURE * error:
        return None
    on_golden = slope > 0  # a penalty lowers what it meets: where it is higher now, the golden had it
    other = next(n for n in fits if n != name)
    alike = other if fits[other][2] <= 1.05 * left + 1e-12 else ""
    if positions.golden.sampling.repetition_penalty != 1:
        alike = "repetition_penalty"  # nearly the same for all that it moves, and too few pairs to see the difference
    return Penalty(name, abs(slope) * temperature, error * temperature, on_golden, len(rows), alike)


def _line(x: Doubles, y: Doubles) -> tuple[float, float, float]:
    """Slope of y on x through 0, its error clustered by position, and the squares that are left."""
    xx = float((x * x).sum())
    if not xx:
        return 0.0, math.inf, float((y * y).sum())
    slope = float((x * y).sum()) / xx
    rest = y - slope * x
    error = float(np.sqrt(((x * rest).sum(axis=1) ** 2).sum())) / xx
    return slope, error, float((rest * rest).sum())


def _left(positions: Positions, used: Any, slope: float) -> float:
    """Squares off a line of this slope, over positions with two tokens in use or more."""
    rows = used.sum(axis=1) >= 2
    rest = _centred(positions.off_line(slope)[rows], used[rows])
    return float(np.minimum((rest**2).sum(axis=1), 25.0).sum())


def _mean(values: Doubles, used: Any) -> Doubles:
    counts = used.sum(axis=1)
    return np.asarray(np.where(used, values, 0.0).sum(axis=1) / np.maximum(counts, 1))


def _centred(values: Doubles, used: Any) -> Doubles:
    filled = np.where(used, values, 0.0)
    return np.asarray(np.where(used, filled - _mean(filled, used)[:, None], 0.0))
