"""The charts of one check: for each its axes, its marks and what it says in words. charts.svg.jinja writes them as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from .chart_paths import CROSS, FONT, HEIGHT, SQUARE, WIDTH, Axes, Number, Text
from .chart_scales import LinearScale, LogScale, Scale, log_scale, text_width

#: Strengths of a cell's colour, by the logarithm of how many tokens it holds.
_STRENGTHS: Final = 5
#: A log axis begins at this share of its greatest value, or above; and no number below `_SMALLEST` is told from 0.
_REACH: Final = 1e-5
_SMALLEST: Final = 1e-300
#: A legend's samples as paths.
_SAMPLES: Final[Mapping[str, str]] = {
    "line": "h14", "area": "m0 4h14v-8h-14z", "dot": "m7 0h0", "cross": f"m7 0{CROSS}", "square": f"m7 0{SQUARE}",
}  # fmt: skip


class Mark(NamedTuple):
    """A path, and the classes of page.css that say how it looks."""

    style: str
    path: str


class Entry(NamedTuple):
    """An entry of a legend."""

    sample: Mark
    text: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart as the template needs it. `caption` says what it shows, `description` also what its axes span."""

    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    key: str
    title: str
    caption: str
    axes: Axes
    x_label: str
    y_label: str
    marks: Sequence[Mark]
    legend: Sequence[Entry] = ()

    @property
    def description(self) -> str:
        """The chart in words, for readers who do not see it."""
        spans = []
        for name, label, ticks in (("x", self.x_label, self.axes.x_ticks()), ("y", self.y_label, self.axes.y_ticks())):
            spans.append(f"{name} axis: {label}, {ticks[0].text} to {ticks[-1].text}.")
        return " ".join([self.caption, *spans])


def charts_of(plots: Mapping[str, Any] | None, key: str) -> list[Chart]:
    """The charts of one check's `plots` in results.json; `key` keeps their ids apart from those of other checks."""
    if plots is None:
        return []
    return [draw(plots[name], f"{key}-{name}") for name, draw in _CHARTS.items() if plots[name] is not None]


def _scatter(data: Mapping[str, Any], key: str) -> Chart:
    edges, points = data["edges"], data["points"]
    scale = LinearScale(edges[0], edges[-1])
    axes, last = Axes.of(scale, scale), len(edges) - 2
    counts = {(x, y): count for x, y, count in data["cells"] if count and x <= last and y <= last}
    most = max(counts.values(), default=1)
    strengths: dict[int, list[tuple[int, int]]] = {}
    for cell, count in counts.items():
        share = math.log(count) / math.log(most) if most > 1 else 1.0
        strengths.setdefault(1 + round((_STRENGTHS - 1) * share), []).append(cell)
    marks = [Mark(f"cell s{strength}", axes.cells(edges, cells)) for strength, cells in sorted(strengths.items())]
    marks += [Mark("ink dashed", axes.line([edges[0], edges[-1]], [edges[0], edges[-1]]))]
    marks += [Mark("bad line", axes.crosses(points))]
    tokens = "1 token" if most == 1 else f"1 to {most:,} tokens"
    return Chart(
        key=key,
        title="Logprobs, golden against this run",
        caption="The stronger the colour of a cell, the more tokens it holds. Crosses: the tokens with the greatest |d|. On the"
        " dashed line nothing changed. What is beyond an axis lies at its end.",
        axes=axes,
        x_label="logprob in the golden (nats)",
        y_label="logprob in this run (nats)",
        marks=marks,
        legend=_legend(("cell s1", "area", ""), ("cell s5", "area", tokens), ("bad line", "cross", "greatest |d|"),
                       ("ink dashed", "line", "no change")),
    )  # fmt: skip


def _histogram(data: Mapping[str, Any], key: str) -> Chart:
    edges, counts, floor = data["edges"], data["counts"], data["floor"]
    axes = Axes.of(LinearScale(edges[0], edges[-1]), _counts_scale([*counts, *(floor or ())]))
    marks = [Mark("noise area", axes.stairs(edges, floor))] if floor is not None else []
    marks += [Mark("now line", axes.stairs(edges, counts))]
    noise = " Grey: the noise floor of the golden, scaled to as many tokens." if floor is not None else ""
    return Chart(
        key=key,
        title="Differences",
        caption=f"How many tokens have which d. The outermost bins also hold the tokens beyond them.{noise}",
        axes=axes,
        x_label="d = this run − golden (nats)",
        y_label="tokens (log)",
        marks=marks,
        legend=_legend(
            ("now line", "line", "this run − golden"), *([("noise area", "area", "noise floor")] if floor is not None else [])
        ),
    )


def _by_position(data: Mapping[str, Any], key: str) -> Chart:
    places, floor = data["positions"], data["floor"]
    median, high, most = data["median"], data["p95"], data["max"]
    axes = Axes.of(_span(places, whole=True), _sizes_scale([*median, *high, *most], floor))
    marks = [Mark("now area", axes.between(places, median, high)), Mark("now line", axes.line(places, high))]
    marks += [Mark("ink thick", axes.line(places, median)), Mark("bad dots", axes.dots(places, most))]
    marks += [Mark("noise dashed", axes.horizontal(floor))] if floor else []
    return Chart(
        key=key,
        title="Difference by position",
        caption="Over all sequences. A |d| that grows along the completion points to the KV cache, a step to a block or to a"
        " chunk.",
        axes=axes,
        x_label="position in the completion",
        y_label="|d| (nats, log)",
        marks=marks,
        legend=_legend(("bad dots", "dot", "maximum"), ("now line", "line", "95 %"), ("ink thick", "line", "median"),
                       *([("noise dashed", "line", "noise floor (RMS)")] if floor else [])),
    )  # fmt: skip


def _ratio(data: Mapping[str, Any], key: str) -> Chart:
    edges, counts, clip = data["edges"], data["counts"], data["clip"]
    axes = Axes.of(LinearScale(edges[0], edges[-1]), _counts_scale(counts))
    marks = [Mark("now bars", axes.stairs(edges, counts))]
    marks += [Mark("bad dashed", axes.vertical(1 - clip) + axes.vertical(1 + clip))]
    outside = f" {data['outside']:.2%} of the tokens are outside." if data["outside"] is not None else ""
    return Chart(
        key=key,
        title="Policy ratio",
        caption=f"How many tokens have which policy ratio. Dashed: PPO's clip at 1 ± {clip:g}.{outside}",
        axes=axes,
        x_label="policy ratio exp(d)",
        y_label="tokens (log)",
        marks=marks,
        legend=_legend(("now bars", "area", "tokens"), ("bad dashed", "line", f"PPO's clip at 1 ± {clip:g}")),
    )


def _divergence(data: Mapping[str, Any], key: str) -> Chart:
    edges, counts = data["edges"], data["counts"]
    most = max((count for count in counts if count is not None), default=0)
    axes = Axes.of(LinearScale(edges[0], edges[-1], whole=True), LinearScale(0, max(most, 1) * 1.05, whole=True))
    return Chart(
        key=key,
        title="First divergence of the free generation",
        caption=f"With the same seeds, {data['diverged']:,} of {data['turns']:,} completions differ from the golden.",
        axes=axes,
        x_label="position of the first other token",
        y_label="completions",
        marks=[Mark("now bars", axes.stairs(edges, counts))],
    )


_CHARTS: Final = {
    "scatter": _scatter, "histogram": _histogram, "by_position": _by_position, "ratio": _ratio, "divergence": _divergence,
}  # fmt: skip


def history_charts(history: Mapping[str, Any] | None, key: str) -> list[Chart]:
    """One number over runs: the one that leaves its band, else the RMS; none where fewer than 2 runs have it."""
    if history is None or len(history["created"]) < 2:
        return []
    metric = next(iter(history["outside"]), "rms_diff")
    values = history["values"].get(metric, ())
    known = [value for value in values if value is not None]
    if not known:
        return []
    band, digests, runs = history["bands"].get(metric), history["digest"], range(1, len(values) + 1)
    ends = (band["low"], band["high"]) if band is not None else ()
    axes = Axes.of(_span(runs, whole=True), _span([*known, *ends], room=0.05))
    same = [value if digest == digests[-1] else None for value, digest in zip(values, digests, strict=True)]
    other = [value if digest != digests[-1] else None for value, digest in zip(values, digests, strict=True)]
    marks = [Mark("noise area", axes.band(*ends))] if band is not None else []
    marks += [
        Mark("faint line", axes.squares(runs, other)),
        Mark("now line", axes.line(runs, same)),
        Mark("now dots", axes.dots(runs, same)),
    ]
    leaves = metric in history["outside"] and values[-1] is not None
    marks += [Mark("bad line", axes.crosses([(runs[-1], values[-1])]))] if leaves else []
    legend = [("now dots", "dot", "this golden")]
    legend += [("faint line", "square", "another golden")] if any(value is not None for value in other) else []
    legend += [("noise area", "area", "band")] if band is not None else []
    legend += [("bad line", "cross", "outside its band")] if leaves else []
    chart = Chart(
        key=f"{key}-history",
        title=f"{metric} over {len(values)} runs",
        caption=_history_caption(history),
        axes=axes,
        x_label="run",
        y_label=f"{metric} (share)" if metric == "share_outside_clip" else f"{metric} (nats)",
        marks=marks,
        legend=_legend(*legend),
    )
    return [chart]


def _history_caption(history: Mapping[str, Any]) -> str:
    bands = history["bands"]
    when = f"Runs from {history['created'][0][:10]} to {history['created'][-1][:10]}, in order."
    if not bands:
        return f"{when} There is no band: it takes 8 earlier runs on the same golden."
    runs = max(band["runs"] for band in bands.values())
    left = [
        f"{name} {value:.4g} ({bands[name]['low']:.4g} to {bands[name]['high']:.4g})"
        for name in history["outside"]
        if (value := history["values"][name][-1]) is not None
    ]
    outside = f" The newest run is outside its band (a warning, not a verdict): {', '.join(left)}." if left else ""
    return f"{when} The band is of the {runs} earlier runs on the same golden.{outside}"


def _legend(*entries: tuple[str, str, str]) -> list[Entry]:
    """A row of entries (style, sample, text); one without a text stands close to the next one."""
    legend, x = [], 6.0
    for style, sample, text in entries:
        legend.append(Entry(Mark(style, f"M{x:g} 8{_SAMPLES[sample]}"), Text(x + 18, 11, text)))
        x = round(x + 18 + text_width(text, FONT - 1) + 8 * bool(text), 1)
    return legend


def _span(values: Sequence[float], *, room: float = 0.0, whole: bool = False) -> LinearScale:
    """An axis over all values, and `room`, a share of their range, on both sides; with `whole`, of whole numbers."""
    low, high = min(values), max(values)
    wide = (high - low) * room
    if low == high:
        wide = abs(low) * room or 0.5
    return LinearScale(low - wide, high + wide, whole)


def _counts_scale(counts: Sequence[Number]) -> Scale:
    """A log axis for counts, of which many are 0."""
    return log_scale([count for count in counts if count is not None], threshold=1)


def _sizes_scale(sizes: Sequence[Number], floor: Number) -> LogScale:
    """A log axis for |d|: below its smallest twentieth, or the noise floor, it is linear, so that 0 is on it too."""
    positive = sorted(size for size in (*sizes, floor) if size is not None and size > _SMALLEST)
    if not positive:
        return log_scale([], threshold=1)
    smallest = positive[len(positive) // 20]
    return log_scale(positive, threshold=max(positive[-1] * _REACH, min(smallest, floor or smallest), _SMALLEST))
