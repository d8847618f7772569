"""Axes of charts: where a value lies on an axis, which ticks the axis has, and the label of each tick.

The numbers come from a file that others may have edited: each is finite, and no range is too narrow or too wide to be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

#: The step between two ticks is one of these times a power of ten: a label then says exactly where its tick is.
_STEPS: Final = (1, 2, 5)
#: A log axis has a linear part from 0 to its threshold: as long as this many powers of ten, and as this share of all others.
_LINEAR_PART: Final = 0.6
_LINEAR_SHARE: Final = 0.1
#: Numbers between these are written out, others as 1e6 or 5e-4.
_SMALL, _LARGE = 1e-3, 1e6
#: Widths of characters in units of the font size, about the greatest in the fonts that the page asks for (DejaVu Sans).
_CHARACTER, _WIDE, _NARROW = 0.64, 1.0, 0.38
_WIDE_ONES: Final = frozenset("mMwW%")
_NARROW_ONES: Final = frozenset("ijlfrt.,'|()[] ")
#: A step below this, or below this share of the axis's greatest number, is lost in the rounding of floating-point numbers.
_SMALLEST: Final = 1e-290
_NARROWEST: Final = 1e-13
#: Rounding errors of a logarithm or a quotient are smaller than this.
_ROUNDING: Final = 1e-9


class Tick(NamedTuple):
    """A tick of an axis: its place, from 0 to 1, and its label."""

    place: float
    label: str


class Scale(Protocol):
    """How values become places on an axis."""

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1; a value beyond the axis lies at its end."""

    def ticks(self, most: int) -> list[Tick]:
        """At least two ticks and at most `most`, in order."""


@dataclass(frozen=True, slots=True)
class LinearScale:
    """An axis from `low` to `high`, which is greater. With `whole` the ticks are whole numbers."""

    low: float
    high: float
    whole: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1; a value beyond the axis lies at its end."""
        half = self.high / 2 - self.low / 2  # the whole difference of two huge numbers would be infinite
        return min(max((value / 2 - self.low / 2) / half, 0.0), 1.0) if half > 0 else 0.0

    def ticks(self, most: int) -> list[Tick]:
        """At least two ticks and at most `most`, in order: nice numbers, or the ends where the range holds too few of them."""
        values = nice_ticks(self.low, self.high, most, whole=self.whole)
        if len(values) < 2:
            return self.ends()
        return [Tick(self.place(value), label) for value, label in zip(values, _even_labels(values), strict=True)]

    def ends(self) -> list[Tick]:
        """A tick at each end, whose labels have as few digits as tell them apart, but three."""
        pairs = [(f"{self.low:.{digits}g}", f"{self.high:.{digits}g}") for digits in range(3, 18)]
        labels = next((pair for pair in pairs if float(pair[0]) < float(pair[1])), pairs[0])
        return [Tick(self.place(float(label)), label.replace("-", "−", 1)) for label in labels]


@dataclass(frozen=True, slots=True)
class LogScale:
    """An axis from 0 to `high` for values that may be 0: linear up to `threshold`, which is above 0, and logarithmic beyond."""

    threshold: float
    high: float

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1; a value beyond the axis lies at its end."""
        decades = max(math.log10(self.high / self.threshold), 0.0)
        linear = max(_LINEAR_PART, _LINEAR_SHARE * decades)
        if value <= self.threshold:
            return max(value / self.threshold, 0.0) * linear / (linear + decades)
        return min((linear + math.log10(value / self.threshold)) / (linear + decades), 1.0)

    def ticks(self, most: int) -> list[Tick]:
        """At least two ticks and at most `most`, in order: 0 and powers of ten, and 2 and 5 times these where there is room."""
        first = math.ceil(math.log10(self.threshold) - _ROUNDING)
        last = max(math.floor(math.log10(self.high) + _ROUNDING), first)
        values = [value for value in _multiples(_STEPS, range(first, last + 1)) if value <= self.high]
        if len(values) >= most:
            values = _multiples((1,), range(first, last + 1, -(-(last - first + 1) // (most - 1))))
        return [Tick(self.place(value), number_text(value, value)) for value in (0.0, *values)]


def _multiples(factors: Sequence[int], exponents: Iterable[int]) -> list[float]:
    return [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]


def log_scale(values: Iterable[float], threshold: float) -> LogScale:
    """The log axis on which all values fit, and some room above them.

    Its linear part ends at `threshold`, or at the next power of ten below it.
    """
    power = 10.0 ** math.floor(math.log10(threshold) + _ROUNDING)
    return LogScale(power, max([*values, power]) * 1.6)


def nice_ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """The multiples of the smallest nice step from `low` to `high` that are at most `most`; none of a range too narrow for it.

    A nice step is 1, 2 or 5 times a power of ten; with `whole` it is 1 or more.
    """
    least = high / most - low / most
    step = _nice_step(max(least, 1.0) if whole else least)
    while math.isfinite(step) and step > max(_NARROWEST * max(abs(low), abs(high)), _SMALLEST):
        first, last = math.ceil(low / step - _ROUNDING), math.floor(high / step + _ROUNDING)
        if last - first < most:
            return [float(f"{number * step:.15g}") for number in range(first, last + 1)]  # 0.3, not 0.30000000000000004
        step = _nice_step(step * 1.5)
    return []


def _nice_step(least: float) -> float:
    """The smallest nice step that is `least` or greater; infinite where no number can be."""
    if not 0 < least < 1e300:
        return math.inf
    exponent = math.floor(math.log10(least) + _ROUNDING)
    steps = _multiples(_STEPS, (exponent, exponent + 1))
    return next(step for step in steps if step >= least * (1 - _ROUNDING))


def _even_labels(values: Sequence[float]) -> list[str]:
    """Labels of evenly spaced numbers in one notation, exact to their step."""
    step, largest = values[1] - values[0], max(map(abs, values))
    plain = _SMALL <= largest < _LARGE
    return [number_text(value, step, plain=plain) for value in values]


def number_text(value: float, step: float, *, plain: bool | None = None) -> str:
    """A number to the digit of `step`: 0.25, 1,000, 1e6, −5e-7. Exact for a multiple of a nice step.

    `plain` says whether it is written out; by its size, without.
    """
    size = abs(value)
    if size == 0:
        return "0"
    exponent, last = (math.floor(math.log10(number) + _ROUNDING) for number in (size, step))
    if _SMALL <= size < _LARGE if plain is None else plain:
        text = f"{size:,.{max(-last, 0)}f}"
    else:
        mantissa, _, power = f"{size:.{max(exponent - last, 0)}e}".partition("e")
        text = f"{mantissa}e{int(power)}"
    return ("−" if value < 0 else "") + text


def text_width(text: str, font_size: float) -> float:
    """About the greatest width of a short text."""
    widths = (_WIDE if letter in _WIDE_ONES else _NARROW if letter in _NARROW_ONES else _CHARACTER for letter in text)
    return sum(widths) * font_size


def fitting_ticks(scale: Scale, length: float, most: int, size: Callable[[str], float], gap: float) -> list[Tick]:
    """The ticks of an axis of a length: at most `most`, and as many as leave a gap between each two labels.

    `size` says how much of the length a label takes.
    """
    for count in range(most, 2, -1):
        ticks = scale.ticks(count)
        if labels_fit(ticks, length, size, gap):
            return ticks
    return scale.ticks(2)


def labels_fit(ticks: Sequence[Tick], length: float, size: Callable[[str], float], gap: float) -> bool:
    """Whether the labels, each in the middle of its tick, leave a gap between each two."""
    ends = [(tick.place * length - size(tick.label) / 2, tick.place * length + size(tick.label) / 2) for tick in ticks]
    return all(right[0] - left[1] >= gap for left, right in pairwise(ends))
