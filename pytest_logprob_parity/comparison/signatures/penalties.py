"""Penalties: they move tokens that were seen before, and no others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from .logit_scale import ENOUGH, FINEST, fit_scale
from .positions import Doubles, Positions

_SURE: Final = 5.0
#: A penalty has to explain this share of what is off between seen and other tokens of one position; less, where it comes
#: out as the one that was recorded.
_REMOVED, _REMOVED_BY_RECORD = 0.8, 0.5
_ENOUGH_BY_RECORD: Final = 10
#: A penalty that is off by no more than this share of the recorded one is the recorded one.
_AS_RECORDED: Final = 0.05
#: Tokens that were written so often and more count as equally often written.
_OFTEN: Final = 8
#: The nearest of the positions, as a share: a penalty moves tokens all over, not in a few places.
_MOST: Final = 0.9
#: Seen tokens are so many times as far from the line as others where a repetition penalty moved them; where only they are.
_MOVED, _ONLY = 2.0, 5.0
#: Two presence or frequency penalties are no further apart: engines take -2 to 2.
_WIDEST: Final = 4.0
#: A penalty moves all of a kind, of the prompt or written: the one in the middle by more than this share of their RMS.
_ALL_OF_THEM: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalty:
    """A penalty that differs between the sides, with its standard `error`, in the units of the field of Sampling `name`.

    `change` is the expected side's over the actual side's for repetition, the difference of both for the others. `alike` names
    a penalty that the evidence does not tell from it.
    """

    name: str
    change: float
    error: float
    positions: int
    alike: str = ""

    @property
    def neutral(self) -> float:
        """The value that leaves logits as they are."""
        return 1.0 if self.name == "repetition_penalty" else 0.0

    @property
    def possible(self) -> bool:
        """Whether engines take such a penalty: presence and frequency penalties are from -2 to 2."""
        return bool(self.neutral) or abs(self.change) <= _WIDEST + _SURE * self.error

    def actual(self, expected: float) -> float:
        """The actual side's value, where the expected side's is this."""
        return expected / self.change if self.neutral else expected - self.change


def find_penalties(positions: Positions, scale: float, temperature: float) -> list[Penalty]:
    """The penalties that explain what is off the line actual = `scale` x expected + a constant for each position, if any do.

    `temperature` is what this run's logits were divided by. Presence and frequency penalties count before it, and the line
    has brought the golden's to it: on either side, what is off is the penalty over this temperature.
    """
    off = positions.off_line(scale)
    # Tokens that were written equally often: what presence and frequency penalties move alike.
    alike = np.minimum(positions.counts, _OFTEN)
    found = _repetition(positions, off, scale, np.zeros_like(alike))
    alone = [] if found is None else [found[0]]
    if found is None:
        found = _repetition(positions, off, scale, alike)
    if found is None:
        return _additive(positions, off, positions.common, temperature) or []
    rest = _beside(positions, found[1], scale, temperature)
    if alone and rest and (apart := _repetition(positions, off, scale, alike)):  # they had bent the line
        found, rest = apart, _beside(positions, apart[1], scale, temperature)
    return alone if rest is None else [found[0], *rest]


def _beside(positions: Positions, slope: float, scale: float, temperature: float) -> list[Penalty] | None:
    """Presence and frequency penalties beside a repetition penalty that gave seen tokens this slope."""
    return _additive(positions, positions.off_line(slope), positions.common & positions.seen, temperature, slope / scale)


def moves_only_seen(positions: Positions, scale: float) -> bool:
    """Whether tokens that stood before are off the line, and the others are not."""
    off = positions.off_line(scale)
    seen, others = positions.common & positions.seen, positions.common & ~positions.seen
    both = seen.any(axis=1) & (others.sum(axis=1) >= 2)
    if np.count_nonzero(both) < ENOUGH or _apart(off[both], seen[both], others[both]) <= _ONLY:
        return False
    moved = np.abs(off - _mean(off, others)[:, None])
    least = _ALL_OF_THEM * math.sqrt(float(np.mean(moved[both][seen[both]] ** 2)))
    written = positions.counts > 0
    kinds = (moved[both][(seen & kind)[both]] for kind in (written, ~written))  # a penalty may count one kind alone
    return any(len(kind) >= ENOUGH and float(np.median(kind)) > least for kind in kinds)


def _apart(off: Doubles, seen: Any, others: Any) -> float:
    """How many times as far from the line seen tokens are as the others (as `FINEST` at least), which give each position its
    constant.
    """
    constant = _mean(off, others)[:, None]
    furthest = np.where(seen, np.abs(off - constant), 0).max(axis=1)
    most = furthest <= np.quantile(furthest, _MOST)
    far, near = (float(np.mean((off - constant)[of] ** 2)) for of in (seen & most[:, None], others))
    return math.sqrt(far) / max(math.sqrt(near), FINEST)


def _repetition(positions: Positions, off: Doubles, scale: float, classes: Any) -> tuple[Penalty, float] | None:
    """Seen tokens lie on a line of their own, 1/r as steep where their logits are positive, r times where negative; with the
    slope of that line.

    Two seen tokens of one position and class are needed, for the normaliser is not known.
    """
    seen = positions.common & positions.seen
    line = fit_scale(positions.expected, positions.actual, seen, classes)
    unseen = fit_scale(positions.expected, positions.actual, positions.common & ~positions.seen)
    if unseen.positions >= ENOUGH:
        scale = unseen.slope
    steeper = line.slope / scale if scale else math.nan
    error = math.hypot(line.error, unseen.error if unseen.positions >= ENOUGH else 0.0) / abs(scale or 1)
    if not line.positions or not line.uniform or not abs(steeper - 1) > max(FINEST, _SURE * error):
        return None
    value = max(steeper, 1 / steeper)
    expected_value = positions.expected_trace.sampling.repetition_penalty
    recorded = expected_value != 1 and abs(value - max(expected_value, 1 / expected_value)) <= max(0.02 * value, 2 * error)
    if line.positions < (_ENOUGH_BY_RECORD if recorded else ENOUGH):
        return None
    alike = [seen & (classes == c) for c in np.unique(classes[seen])]
    left = [sum(_left(positions, tokens, slope) for tokens in alike) for slope in (line.slope, scale)]
    if left[0] > (1 - (_REMOVED_BY_RECORD if recorded else _REMOVED)) * left[1]:
        return None
    others = positions.common & ~positions.seen
    both = seen.any(axis=1) & others.any(axis=1)
    lower = 0.0
    if both.sum() >= ENOUGH:
        lower = float(np.median(_mean(off, seen)[both] - _mean(off, others)[both]))
        both &= others.sum(axis=1) >= 2
        if both.sum() >= ENOUGH and _apart(off[both], seen[both], others[both]) < _MOVED:
            return None  # no penalty moves the others
    on_expected = lower > 0 if lower else steeper > 1
    change = value if on_expected else 1 / value
    return Penalty(name="repetition_penalty", change=change, error=error * change, positions=line.positions), line.slope


def _additive(positions: Positions, off: Doubles, used: Any, temperature: float, steeper: float = 1.0) -> list[Penalty] | None:
    """Presence: a constant for every token written before. Frequency: so much for each time. The prompt does not count.
    None where they explain nothing, an empty list where those that were recorded do, on both sides.

    Both are fitted together, and each alone where together they are not told apart. `steeper` is what a repetition penalty
    has done to the slope of the tokens in use; it counts before these.
    """
    written = positions.counts > 0
    rows = np.flatnonzero((used & written).any(axis=1) & (used & ~written).any(axis=1))
    if len(rows) < ENOUGH:
        return None
    used = used[rows]
    y = _centred(off[rows], used)
    columns = {
        "presence_penalty": _centred(written[rows].astype(float), used),
        "frequency_penalty": _centred(positions.counts[rows].astype(float), used),
    }
    total = float((y**2).sum())
    together, *single = [_plane(of, y) for of in (columns, *({name: x} for name, x in columns.items()))]
    best = min(single, key=lambda fit: fit.left)
    fit = together if all(together.sure(name) for name in columns) else best
    if not total or fit.left > (1 - _REMOVED) * total or not all(fit.sure(name) for name in fit.slopes):
        return None
    alike = ""
    if fit is best:
        alike = next((n for s in single if s is not best and s.left <= 1.05 * best.left + 1e-12 for n in s.slopes), "")
    if steeper == 1 and positions.expected_trace.sampling.repetition_penalty != 1:
        alike = "repetition_penalty"  # nearly the same for all that it moves, and too few pairs to see the difference
    found = []
    for name, slope in fit.slopes.items():  # a penalty lowers what it meets: where it is higher now, the golden had it
        unit = temperature / steeper if slope > 0 else temperature
        change, error = slope * unit, fit.errors[name] * unit
        expected_value = getattr(positions.expected_trace.sampling, name)
        if (
            steeper != 1 and expected_value
        ):  # the line has made the golden's so many times as large: what this run has is left of it
            change, error = expected_value - (steeper * expected_value - slope * temperature), fit.errors[name] * temperature
            if abs(change) <= max(_AS_RECORDED * abs(expected_value), _SURE * error):
                continue
        found.append(Penalty(name=name, change=change, error=error, positions=len(rows), alike=alike))
    return found


@dataclass(frozen=True, slots=True)
class _Plane:
    """Slopes of y on some columns through 0, their errors clustered by position, and the squares that are left."""

    slopes: dict[str, float]
    errors: dict[str, float]
    left: float

    def sure(self, name: str) -> bool:
        return abs(self.slopes[name]) > max(FINEST, _SURE * self.errors[name])


def _plane(columns: dict[str, Doubles], y: Doubles) -> _Plane:
    x = np.stack(list(columns.values()))
    squares = np.einsum("anm,bnm->ab", x, x)
    inverse = np.linalg.pinv(squares)
    slopes = inverse @ np.einsum("anm,nm->a", x, y)
    rest = y - np.einsum("a,anm->nm", slopes, x)
    pull = np.einsum("anm,nm->an", x, rest)
    errors = np.sqrt(np.diag(inverse @ (pull @ pull.T) @ inverse))
    if np.linalg.matrix_rank(squares) < len(columns):
        errors = np.full(len(columns), math.inf)  # one column is as good as another
    return _Plane(
        dict(zip(columns, slopes.tolist(), strict=True)),
        dict(zip(columns, errors.tolist(), strict=True)),
        float((rest**2).sum()),
    )


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
