"""The plots as inline SVG, drawn by matplotlib; colours are the page's own variables, so they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import UsageError

#: Colours that nothing else has, and the page's variables that take their places.
_COLOURS: Final = {"#010203": "--ink", "#010204": "--faint", "#010205": "--now", "#010206": "--noise", "#010207": "--bad"}
_INK, _FAINT, _NOW, _NOISE, _BAD = _COLOURS
#: Blue of the scatter's cells: a picture in the SVG knows no variables, so it is one that both backgrounds bear.
_CELL: Final = (0.20, 0.50, 0.90)
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.unicode_minus": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": _FAINT,
    "grid.linewidth": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.2,
    "path.simplify": True,
}  # fmt: skip


class Chart(NamedTuple):
    """A plot, what it is called, and what it says in a sentence, for those who do not see it too."""

    title: str
    svg: Markup
    caption: str


def charts_of(plots: Mapping[str, Any] | None, salt: str) -> list[Chart]:
    """The plots of one check that there is something to show in; `salt` keeps their ids apart from other checks'."""
    if plots is None:
        return []
    charts = []
    for name, (title, draw, caption) in _CHARTS.items():
        if plots[name] is not None:
            text = caption(plots[name])
            try:
                charts.append(Chart(title, _svg(draw, plots[name], f"{salt}-{name}", f"{title}. {text}"), text))
            except (ValueError, IndexError, OverflowError) as error:
                raise UsageError(f"plot {name!r} is not as pytest-logprob-parity writes it: {error}") from None
    return charts


def history_chart(history: Mapping[str, Any] | None, salt: str) -> list[Chart]:
    """One check over runs: the number that left its band, else the RMS; the runs of the newest run's golden are joined."""
    if history is None or len(history["created"]) < 2:
        return []
    metric = next(iter(history["outside"]), "rms_diff")
    if not any(value is not None for value in history["values"].get(metric, ())):
        return []
    title = f"{metric} over {len(history['created'])} runs"
    text = _drift_told(history)
    try:
        return [
            Chart(
                title, _svg(lambda axes, data: _drift(axes, data, metric), history, f"{salt}-history", f"{title}. {text}"), text
            )
        ]
    except (ValueError, IndexError, OverflowError) as error:
        raise UsageError(f"plot of the history is not as pytest-logprob-parity writes it: {error}") from None


def _drift_told(history: Mapping[str, Any]) -> str:
    bands = history["bands"]
    first, last = history["created"][0][:10], history["created"][-1][:10]
    when = f"{first} to {last}, all runs in order; red: the newest one leaves its band."
    if not bands:
        return f"{when} No band: it takes 8 runs before on the same golden."
    runs = max(band["runs"] for band in bands.values())
    told = f" Grey: the band of {runs} runs before on the same golden."
    left = [
        f"{name} {value:.4g} ({bands[name]['low']:.4g} to {bands[name]['high']:.4g})"
        for name in history["outside"]
        if (value := history["values"][name][-1]) is not None
    ]
    told += f" Outside of its band, a warning and no verdict: {', '.join(left)}." if left else ""
    return when + told


def _drift(axes: Axes, data: Mapping[str, Any], metric: str) -> None:
    values = _numbers(data["values"][metric])
    places = np.arange(1, len(values) + 1)
    same = np.array([digest == data["digest"][-1] for digest in data["digest"]])
    if (band := data["bands"].get(metric)) is not None:
        axes.axhspan(float(band["low"]), float(band["high"]), color=_NOISE, alpha=0.3, linewidth=0)
    axes.plot(places[~same], values[~same], color=_FAINT, linestyle="", marker="o", markersize=2.4)
    axes.plot(places[same], values[same], color=_NOW, linewidth=1.1, marker="o", markersize=2.4)
    if metric in data["outside"]:
        axes.plot(places[-1:], values[-1:], color=_BAD, linestyle="", marker="o", markersize=5)
    _axes(axes, "run", "share" if metric == "share_outside_clip" else "nats")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _svg(draw: Callable[[Axes, Mapping[str, Any]], None], data: Mapping[str, Any], salt: str, label: str) -> Markup:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(4.2, 2.7))
        figure.patch.set_visible(False)
        axes = figure.add_axes((0.15, 0.17, 0.82, 0.74))
        axes.patch.set_visible(False)
        draw(axes, data)
        buffer = io.StringIO()
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Markup(_lean(buffer.getvalue(), salt, label))  # of our own numbers and words alone


def _lean(svg: str, salt: str, label: str) -> str:
    """What matplotlib wrote, without its prologue, its unused ids and fonts, and with our colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    head = f'role="img" aria-label="{escape(label)}"'
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda match: f'<svg viewBox="{match[1]}" {head}>', svg, count=1)
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda match: match[0] if match[1] in used else "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = svg.replace(' xlink:href="', ' href="').replace("stroke-linejoin: miter", "")
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'="[^"]*"', lambda match: re.sub(r"(\d\.\d\d)\d+", r"\1", match[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _axes(axes: Axes, x: str, y: str, ticks: int = 5) -> None:
    axes.set_xlabel(x, labelpad=2)
    axes.set_ylabel(y, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.grid(visible=True, axis="y")


def _scatter(axes: Axes, data: Mapping[str, Any]) -> None:
    edges = _numbers(data["edges"])
    size = len(edges) - 1
    image = np.zeros((size, size, 4))
    image[..., :3] = _CELL
    for x, y, count in data["cells"]:
        if 0 <= x < size and 0 <= y < size:
            image[y, x, 3] = np.log1p(float(count))
    image[..., 3] = np.where(image[..., 3] > 0, 0.25 + 0.75 * image[..., 3] / max(image[..., 3].max(), 1e-9), 0)
    extent = (edges[0], edges[-1], edges[0], edges[-1])
    axes.imshow(image, origin="lower", extent=extent, aspect="auto", interpolation="none")
    axes.plot(edges[[0, -1]], edges[[0, -1]], color=_INK, linewidth=0.7, linestyle=(0, (4, 3)))
    points = np.array(data["points"], np.float64).reshape(-1, 2)
    axes.plot(points[:, 0], points[:, 1], linestyle="", marker="o", markersize=2.4, color=_BAD, markeredgewidth=0)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(edges[0], edges[-1])
    _axes(axes, "golden, nats", "now, nats")


def _by_position(axes: Axes, data: Mapping[str, Any]) -> None:
    places = _numbers(data["positions"])
    floor = data["floor"]
    for name, style in (("max", _BAD), ("p95", _NOW), ("median", _INK)):
        axes.plot(places, _numbers(data[name]), color=style, linewidth=1.1, label={"p95": "95 %"}.get(name, name))
    values = _numbers([*data["max"], *data["p95"], *data["median"]])
    if floor:
        axes.axhline(floor, color=_NOISE, linewidth=1.2, linestyle=(0, (4, 3)), label="noise floor, RMS")
    if (positive := values[values > 0]).size:
        least, smallest = float(positive.max()) * 1e-5, float(np.quantile(positive, 0.05))
        axes.set_yscale("symlog", linthresh=max(least, min(smallest, floor or smallest)))
        axes.set_ylim(bottom=0)
        _few_decades(axes)
    _axes(axes, "position in the completion", "|d|, nats")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderpad=0, columnspacing=1)


def _histogram(axes: Axes, data: Mapping[str, Any]) -> None:
    edges = _numbers(data["edges"])
    if data["floor"] is not None:
        axes.stairs(_numbers(data["floor"]), edges, fill=True, color=_NOISE, alpha=0.45, linewidth=0, label="noise floor")
    axes.stairs(_numbers(data["counts"]), edges, color=_NOW, linewidth=1.2, label="now - golden")
    _log_counts(axes, [*data["counts"], *(data["floor"] or ())])
    _axes(axes, "d = now - golden, nats", "tokens")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderpad=0, columnspacing=1)


def _ratio(axes: Axes, data: Mapping[str, Any]) -> None:
    edges, clip = _numbers(data["edges"]), float(data["clip"])
    axes.stairs(_numbers(data["counts"]), edges, fill=True, color=_NOW, alpha=0.55, linewidth=0)
    for bound in (1 - clip, 1 + clip):
        axes.axvline(bound, color=_BAD, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set_xlim(edges[0], edges[-1])
    _log_counts(axes, data["counts"])
    _axes(axes, "policy ratio exp(d)", "tokens")


def _divergence(axes: Axes, data: Mapping[str, Any]) -> None:
    axes.stairs(_numbers(data["counts"]), _numbers(data["edges"]), fill=True, color=_NOW, alpha=0.55, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _axes(axes, "position of the first other token", "completions")


def _numbers(values: Any) -> Any:
    """Numbers for matplotlib: null is NaN, which it leaves out."""
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _log_counts(axes: Axes, counts: Any) -> None:
    most = np.nanmax(_numbers(counts), initial=1.0)
    axes.set_yscale("symlog", linthresh=1, linscale=0.3)
    axes.set_ylim(0, most * 1.8)
    _few_decades(axes)


def _few_decades(axes: Axes) -> None:
    """At most five powers of ten on the y axis, and no lines between them."""
    ticks = [tick for tick in axes.yaxis.get_major_locator()() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks[:: -(-len(ticks) // 5)] if ticks else [])
    axes.minorticks_off()


def _furthest(data: Mapping[str, Any]) -> str:
    return (
        "Each cell is stronger the more tokens it holds; the tokens furthest off are red dots; on the diagonal nothing changed."
    )


_CHARTS: Final[Mapping[str, tuple[str, Any, Callable[[Mapping[str, Any]], str]]]] = {
    "scatter": ("Logprobs, golden against now", _scatter, _furthest),
    "histogram": (
        "Differences",
        _histogram,
        lambda data: (
            "Tokens by d, the outermost bins with all beyond them"
            + ("." if data["floor"] is None else "; behind them the recording engine's own noise, scaled to as many tokens.")
        ),
    ),
    "by_position": (
        "Difference by position",
        _by_position,
        lambda data: "Over all sequences: a drift along the completion points at the KV cache, a step at a block or chunk.",
    ),
    "ratio": (
        "Policy ratio",
        _ratio,
        lambda data: (
            f"Dashed: PPO's clip at 1 ± {data['clip']:g}"
            + ("." if data["outside"] is None else f"; {data['outside']:.2%} of the tokens are outside.")
        ),
    ),
    "divergence": (
        "First divergence of the free run",
        _divergence,
        lambda data: f"{data['diverged']} of {data['turns']} completions wrote other tokens under the same seeds.",
    ),
}
