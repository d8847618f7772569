"""The report's charts: ticks that say where they are, labels that never overlap, and marks that lie where their numbers are."""

import math
import random
import re
from itertools import pairwise

import pytest

from pytest_logprob_parity.report.chart_paths import BOTTOM, FONT, RIGHT, TOP, WIDTH, Axes
from pytest_logprob_parity.report.chart_scales import LinearScale, fitting_ticks, log_scale, nice_ticks, number_text, text_width
from pytest_logprob_parity.report.charts import charts_of, history_charts
from pytest_logprob_parity.report.page import _environment

HISTOGRAM = {"edges": [-1.0, 0.0, 1.0], "counts": [3, 100]}
PLOTS = {
    "scatter": {"edges": [-2.0, -1.0, 0.0], "cells": [[0, 0, 5], [1, 1, 1], [9, 9, 7]], "points": [[-0.5, -1.5]]},
    "histogram": {**HISTOGRAM, "floor": [1.0, None]},
    "by_position": {
        "positions": [0, 1, 2],
        "median": [0.0, None, 0.1],
        "p95": [0.1, None, 0.2],
        "max": [1, 2, None],
        "floor": 0.01,
    },
    "ratio": {"edges": [0.0, 1.0, 2.0], "counts": [0, 7], "clip": 0.2, "outside": 0.25},
    "divergence": {"edges": [0, 1, 2], "counts": [1, 0], "turns": 1234, "diverged": 1},
}
HISTORY = {
    "created": ["2026-01-01T00:00:00Z", "<script>", "2026-01-03T00:00:00Z"],
    "digest": ["a", "b", "b"],
    "values": {"k3": [0.5, 0.1, 0.3]},
    "bands": {"k3": {"runs": 8, "median": 0.1, "low": 0.0, "high": 0.2}},
    "outside": ["k3"],
}


def number(label):
    """The number that a label says."""
    return float(label.replace("−", "-").replace(",", ""))


def ranges():
    """Ranges of every size and place, tame ones and such as nobody but an attacker writes."""
    yield from [
        (-1, 1),
        (0, 1),
        (-3.4, 0),
        (0.3, 3.9),
        (0, 63),
        (-1e-6, 1e-6),
        (0, 1e99),
        (-1e100, 1e100),
        (0, 5e-324),
        (0, 2**53),
    ]
    yield from [(1, 1 + 2**-52), (1e100, math.nextafter(1e100, math.inf)), (-1e-300, 1e-300), (2**53, 2**53), (0.1, 0.3)]
    rng = random.Random(0)
    for _ in range(500):
        low, size = rng.uniform(-1, 1) * 10 ** rng.randint(-9, 9), 10 ** rng.uniform(-9, 9)
        yield low, low + size


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (0, 10, 6, [0, 2, 4, 6, 8, 10]),
        (-1.9, 1.9, 8, [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]),
        (0, 0.3, 4, [0, 0.1, 0.2, 0.3]),  # not 0.30000000000000004
        (-3.4, 0, 5, [-3, -2, -1, 0]),
        (0, 1e-6, 3, [0, 5e-7, 1e-6]),
        (1, 1 + 1e-16, 5, []),
    ],
)
def test_ticks_are_nice_numbers(low, high, most, ticks):
    assert nice_ticks(low, high, most) == ticks


def test_ticks_of_whole_numbers_are_whole():
    assert nice_ticks(0, 2, 6, whole=True) == [0, 1, 2]
    assert nice_ticks(0, 2, 6) == [0, 0.5, 1, 1.5, 2]  # the negative control


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0.25, 0.05, "0.25"), (1000, 500, "1,000"), (-0.5, 0.5, "−0.5"), (0, 1, "0"), (2e6, 1e6, "2e6"), (-5e-7, 5e-7, "−5e-7"),
     (1.5e-7, 5e-8, "1.5e-7"), (1, 0.5, "1.0"), (1e-3, 1e-3, "0.001"), (1e-4, 1e-4, "1e-4")],
)  # fmt: skip
def test_labels_are_written_as_people_write_them(value, step, text):
    assert number_text(value, step) == text


def test_a_label_says_exactly_where_its_tick_is_and_never_touches_another_one():
    for low, high in ranges():
        scale = LinearScale(low, high)
        for length in (60, 280):
            ticks = fitting_ticks(scale, length, 8, lambda label: text_width(label, FONT), 8)
            assert len(ticks) >= 2
            for tick in ticks:
                assert tick.place == pytest.approx(scale.place(number(tick.label)), abs=0.003), (low, high)
            if len(ticks) > 2:
                ends = [
                    (t.place * length - text_width(t.label, FONT) / 2, t.place * length + text_width(t.label, FONT) / 2)
                    for t in ticks
                ]
                assert all(right[0] - left[1] >= 8 for left, right in pairwise(ends))
    crowded = LinearScale(0, 1).ticks(8)  # the negative control: more ticks than there is room for touch each other
    assert len(crowded) > len(fitting_ticks(LinearScale(0, 1), 60, 8, lambda label: text_width(label, FONT), 8))


@pytest.mark.parametrize("values", [[1], [3, 0], [12_000], [10**9], [1, 2**53], [1e-6, 3.0], [1e-300], [1e100, 1.0], []])
def test_a_log_axis_has_0_and_powers_of_ten_that_do_not_overlap(values):
    scale = log_scale(values, threshold=min([value for value in values if value > 0], default=1))
    ticks = fitting_ticks(scale, BOTTOM - TOP, 6, lambda _: FONT, 2)
    assert 2 <= len(ticks) <= 6
    assert (ticks[0].place, ticks[0].label) == (0, "0")
    assert all(tick.place == pytest.approx(scale.place(number(tick.label))) for tick in ticks)
    assert all(b.place - a.place >= 12 / (BOTTOM - TOP) for a, b in pairwise(ticks))
    assert all(0 <= scale.place(value) <= 1 for value in values)


def test_a_log_axis_goes_up_without_a_jump():
    scale = log_scale([1000], threshold=1)
    places = [scale.place(value) for value in (-5, 0, 0.5, 1, 1 + 1e-9, 10, 100, 1000, 1e9)]
    assert places == sorted(places)
    assert places[:2] == [0, 0]
    assert places[-1] == 1
    assert places[4] - places[3] < 1e-6
    assert places[6] - places[5] == pytest.approx(places[7] - places[6])  # as far from 10 to 100 as from there to 1000


def test_marks_lie_where_their_numbers_are():
    axes = Axes.of(LinearScale(0, 2), LinearScale(0, 10))
    left, middle = axes.left, (axes.left + RIGHT) / 2
    assert axes.line([0, 1, 2], [0, 10, 5]) == f"M{left:g} {BOTTOM}L{middle:.1f} {TOP}L{RIGHT} {(TOP + BOTTOM) // 2}"
    assert axes.line([0, 1, 2], [0, None, 10]) == f"M{left:g} {BOTTOM}h0M{RIGHT} {TOP}h0"  # an unknown value breaks it
    assert axes.stairs([0, 1, 2], [10, None]) == f"M{left:g} {BOTTOM}V{TOP}H{middle:.1f}V{BOTTOM}H{RIGHT}V{BOTTOM}"
    assert axes.dots([0, 1], [None, 10]) == f"M{middle:.1f} {TOP}h0"
    assert axes.between([0, 2], [0, 5], [10, None]) == f"M{left:g} {TOP}L{left:g} {BOTTOM}z"
    assert axes.line([-9, 9], [-9, 99]) == f"M{left:g} {BOTTOM}L{RIGHT} {TOP}"  # what is beyond an axis lies at its end


def test_cells_beside_each_other_are_one_rectangle_and_no_others_are():
    axes = Axes.of(LinearScale(0, 4), LinearScale(0, 4))
    edges = [0, 1, 2, 3, 4]
    assert axes.cells(edges, [(0, 0), (1, 0)]) == axes.cells([0, 2, 4], [(0, 0)]).replace(axes.at_y(2), axes.at_y(1))
    assert axes.cells(edges, [(0, 0), (2, 0), (0, 1)]).count("M") == 3
    assert axes.cells(edges, []) == ""


def test_every_chart_has_its_axes_its_units_and_says_in_words_what_they_span():
    charts = [*charts_of({**PLOTS, "subtracted": True}, "c0"), *history_charts(HISTORY, "c0")]
    assert [chart.key for chart in charts] == [f"c0-{name}" for name in (*PLOTS, "history")]
    for chart in charts:
        assert chart.description.startswith(chart.caption)
        assert re.search(r"x axis: .+, .+ to .+\. y axis: .+, .+ to .+\.$", chart.description)
    labels = {chart.key.removeprefix("c0-"): (chart.x_label, chart.y_label) for chart in charts}
    assert labels["scatter"] == ("logprob in the golden (nats)", "logprob in this run (nats)")
    assert labels["histogram"] == ("d = this run − golden (nats)", "tokens (log)")
    assert labels["by_position"] == ("position in the completion", "|d| (nats, log)")
    assert labels["history"] == ("run", "k3 (nats)")


def test_what_differs_in_colour_differs_in_form():
    for chart in [*charts_of({**PLOTS, "subtracted": True}, "c0"), *history_charts(HISTORY, "c0")]:
        forms = [
            (entry.sample.style.split(" ", 1)[1], entry.sample.path.partition(" ")[2])
            for entry in chart.legend
            if entry.text.text
        ]
        assert len(forms) == len(set(forms)), chart.key


def test_legends_fit_beside_each_other():
    for chart in [*charts_of({**PLOTS, "subtracted": True}, "c0"), *history_charts(HISTORY, "c0")]:
        ends = [entry.text.x + text_width(entry.text.text, FONT - 1) for entry in chart.legend]
        starts = [float(re.match(r"M([\d.]+)", entry.sample.path)[1]) for entry in chart.legend]
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
        assert not ends or ends[-1] <= WIDTH


def test_there_is_no_chart_without_numbers():
    assert charts_of(None, "c0") == []
    assert charts_of({**dict.fromkeys(PLOTS), "subtracted": False}, "c0") == []
    assert history_charts(None, "c0") == []
    one = {**HISTORY, "created": ["x"], "digest": ["a"], "values": {"k3": [1.0]}}
    assert history_charts(one, "c0") == []
    assert history_charts({**HISTORY, "values": {"k3": [None] * 3}}, "c0") == []


def test_texts_in_a_chart_are_escaped():
    (chart,) = history_charts({**HISTORY, "created": ["</desc><script>", *HISTORY["created"][1:]]}, 'c0"><b>')
    svg = _environment().get_template("charts.svg.jinja").module.svg(chart)
    assert "&lt;/desc&gt;" in svg
    assert not re.search(r"<(script|b)\b", svg)
    assert re.fullmatch(r"(<(svg|title|desc|path|g|text)\b[^<>]*>|</(svg|title|desc|g|text)>|[^<>])*", svg)
