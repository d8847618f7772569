"""Marks of a chart as SVG paths: lines, bars, areas, dots and cells on two axes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from .chart_scales import Scale, Tick, fitting_ticks, text_width

#: The size of a chart and of its text, in the SVG's own unit: about a pixel where three charts stand side by side.
WIDTH: Final = 340
HEIGHT: Final = 214
FONT: Final = 10
#: Between an axis and its ticks' labels, and between two of these: beside each other, and one above the other.
_TICK, _BESIDE, _ABOVE_ANOTHER = 5, 8, 2
#: Ticks of an axis, at most.
_X_TICKS, _Y_TICKS = 8, 6
#: Where the axes end: above is the legend, below are the labels of the x axis, on the right is half a tick's label.
TOP: Final = 22
BOTTOM: Final = HEIGHT - 34
RIGHT: Final = WIDTH - 14
#: Room for the label of the y axis.
_LEFT: Final = 16
#: Half the size of a cross.
_CROSS: Final = 2.2

#: A number, or None where it is unknown: nothing is drawn for it.
Number: TypeAlias = float | None


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it is."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Axes:
    """The two axes of a chart; the y axis is at `left`, as far in as its labels need."""

    x: Scale
    y: Scale
    left: float

    @classmethod
    def of(cls, x: Scale, y: Scale) -> Axes:
        """The axes with these scales."""
        widest = max(text_width(tick.label, FONT) for tick in _ticks_above_another(y))
        return cls(x, y, round(_LEFT + widest + _TICK, 1))

    @property
    def middle(self) -> tuple[float, float]:
        """The middle of the x axis and that of the y axis."""
        return round((self.left + RIGHT) / 2, 1), (TOP + BOTTOM) / 2

    def x_ticks(self) -> list[Text]:
        """The labels below the x axis, each the middle of its text."""
        width = RIGHT - self.left
        ticks = fitting_ticks(self.x, width, _X_TICKS, lambda label: text_width(label, FONT), _BESIDE)
        return [Text(round(self.left + tick.place * width, 1), BOTTOM + _TICK + FONT, tick.label) for tick in ticks]

    def y_ticks(self) -> list[Text]:
        """The labels beside the y axis, each the end of its text; `y` is the height of the tick."""
        ticks = _ticks_above_another(self.y)
        return [Text(self.left - _TICK, round(BOTTOM - tick.place * (BOTTOM - TOP), 1), tick.label) for tick in ticks]

    def at_x(self, value: float) -> str:
        """Where a value of the x axis lies."""
        return _text(self.left + self.x.place(value) * (RIGHT - self.left))

    def at_y(self, value: float) -> str:
        """Where a value of the y axis lies."""
        return _text(BOTTOM - self.y.place(value) * (BOTTOM - TOP))

    def at(self, x: float, y: float) -> str:
        """Where a point lies."""
        return f"{self.at_x(x)} {self.at_y(y)}"

    def frame(self) -> str:
        """The two axes themselves."""
        return f"M{_text(self.left)} {TOP}V{BOTTOM}H{RIGHT}"

    def grid(self) -> str:
        """A line at each tick of the y axis."""
        return "".join(f"M{_text(self.left)} {_text(tick.y)}H{RIGHT}" for tick in self.y_ticks())

    def line(self, xs: Sequence[float], ys: Sequence[Number]) -> str:
        """A line through the points, broken where a value is unknown."""
        return "".join(
            "M" + "L".join(self.at(x, y) for x, y in run) + ("h0" if len(run) == 1 else "") for run in _known(xs, ys)
        )

    def between(self, xs: Sequence[float], lows: Sequence[Number], highs: Sequence[Number]) -> str:
        """The area between two lines."""
        path = ""
        for run in _known(range(len(xs)), [None if None in pair else 0.0 for pair in zip(lows, highs, strict=True)]):
            places = [int(place) for place, _ in run]
            outline = [*((xs[i], highs[i]) for i in places), *((xs[i], lows[i]) for i in reversed(places))]
            path += "M" + "L".join(self.at(x, y) for x, y in outline if y is not None) + "z"
        return path

    def dots(self, xs: Sequence[float], ys: Sequence[Number]) -> str:
        """A dot for each point: a line of no length, whose round ends are seen."""
        return "".join(f"M{self.at(x, y)}h0" for run in _known(xs, ys) for x, y in run)

    def crosses(self, points: Iterable[Sequence[float]]) -> str:
        """A cross for each point."""
        return "".join(f"M{self.at(x, y)}{CROSS}" for x, y in points)

    def squares(self, xs: Sequence[float], ys: Sequence[Number]) -> str:
        """A small square for each point."""
        return "".join(f"M{self.at(x, y)}{SQUARE}" for run in _known(xs, ys) for x, y in run)

    def stairs(self, edges: Sequence[float], counts: Sequence[Number]) -> str:
        """The outline of a histogram's bars."""
        path, last = f"M{self.at(edges[0], 0)}", self.at_y(0)
        for count, edge in zip(counts, edges[1:], strict=True):
            top = self.at_y(count or 0)
            path += ("" if top == last else f"V{top}") + f"H{self.at_x(edge)}"
            last = top
        return path + f"V{BOTTOM}"

    def horizontal(self, y: float) -> str:
        """A line from the left to the right."""
        return f"M{_text(self.left)} {self.at_y(y)}H{RIGHT}"

    def vertical(self, x: float) -> str:
        """A line from the bottom to the top."""
        return f"M{self.at_x(x)} {BOTTOM}V{TOP}"

    def band(self, low: float, high: float) -> str:
        """The area between two horizontal lines."""
        return f"{self.horizontal(high)}V{self.at_y(low)}H{_text(self.left)}z"

    def cells(self, edges: Sequence[float], cells: Iterable[tuple[int, int]]) -> str:
        """A rectangle for each cell [x, y] of a grid that has the same edges on both axes; neighbours in a row are one."""
        path = ""
        for y, row in itertools.groupby(sorted((y, x) for x, y in cells), key=lambda cell: cell[0]):
            for first, last in _neighbours(x for _, x in row):
                left, right = self.at_x(edges[first]), self.at_x(edges[last + 1])
                path += f"M{left} {self.at_y(edges[y])}H{right}V{self.at_y(edges[y + 1])}H{left}z"
        return path


def _ticks_above_another(scale: Scale) -> list[Tick]:
    return fitting_ticks(scale, BOTTOM - TOP, _Y_TICKS, lambda _: FONT, _ABOVE_ANOTHER)


#: A square and a cross around the point where the path is.
SQUARE: Final = "m-1.5-1.5h3v3h-3z"
CROSS: Final = f"m-{_CROSS}-{_CROSS}l{2 * _CROSS} {2 * _CROSS}m0-{2 * _CROSS}l-{2 * _CROSS} {2 * _CROSS}"


def _known(xs: Sequence[float], ys: Sequence[Number]) -> Iterator[list[tuple[float, float]]]:
    """The points whose value is known; those between two unknown ones together."""
    for known, run in itertools.groupby(zip(xs, ys, strict=True), key=lambda point: point[1] is not None):
        if known:
            yield [(x, y) for x, y in run if y is not None]


def _neighbours(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as ranges without a gap: the first and the last number of each."""
    for _, group in itertools.groupby(enumerate(dict.fromkeys(numbers)), key=lambda item: item[1] - item[0]):
        run = [number for _, number in group]
        yield run[0], run[-1]


def _text(number: float) -> str:
    """A coordinate to a tenth of the unit."""
    return f"{number:.1f}".removesuffix(".0")
