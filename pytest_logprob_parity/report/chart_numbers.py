"""What the report's plots show, as small numbers: histograms and binned points of one comparison, whatever its size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..comparison.alignment import align
from ..comparison.free_generation.result import FreeRun
from ..comparison.metrics import CLIP
from ..comparison.result import Comparison
from ..golden.noise_floor import NoiseFloor

#: Bins of a histogram, cells a side of the scatter, and places along a completion, at most.
_BINS: Final = 61
_CELLS: Final = 48
_PLACES: Final = 96
#: Points of the scatter that are drawn one by one, those furthest off.
_POINTS: Final = 40
#: The scatter shows logprobs down to here (nats).
_LOWEST: Final = -20.0
#: What a histogram of d spans at least, so that a few last bits do not fill the plot.
_NARROWEST: Final = 1e-6


def plots_of(comparison: Comparison, floor: NoiseFloor | None) -> dict[str, Any] | None:
    """The content of `plots` in results.json; None where nothing was compared or no bit moved."""
    expected, actual = comparison.expected, comparison.actual
    rows = align(expected, actual)
    if not rows.tokens or not (comparison.metrics["n_changed"] or comparison.metrics["n_nan"]):
        return None
    e, a = (column.astype(np.float64) for column in (expected.logprobs[rows.expected], actual.logprobs[rows.actual]))
    finite = np.isfinite(e) & np.isfinite(a)
    starts = expected.sequence_offsets[expected.sequence_of_token]
    places = (np.arange(expected.num_tokens) - starts)[rows.expected][finite]
    e, a = e[finite], a[finite]
    subtracted = bool(np.isfinite(comparison.metrics["mean_diff"])) and bool(len(e))
    d = a - e
    return {
        "subtracted": subtracted,
        "scatter": _scatter(e, a) if len(e) else None,
        "by_position": _by_position(d, places, floor) if subtracted else None,
        "histogram": _differences(d, floor) if subtracted else None,
        "ratio": _ratios(d, comparison.metrics) if subtracted else None,
        "divergence": _divergences(comparison.free_run, int(np.max(np.diff(expected.sequence_offsets), initial=1))),
    }


def _scatter(e: Any, a: Any) -> dict[str, Any]:
    lowest = max(float(min(e.min(), a.min())), _LOWEST)
    edges = np.linspace(min(lowest, -1e-3), max(float(max(e.max(), a.max())), 0.0), _CELLS + 1)
    counts, _, _ = np.histogram2d(np.clip(e, edges[0], edges[-1]), np.clip(a, edges[0], edges[-1]), (edges, edges))
    cells = [[int(x), int(y), int(counts[x, y])] for x, y in np.argwhere(counts)]
    far = np.argsort(-np.abs(a - e), kind="stable")[:_POINTS]
    points = [[short(x), short(y)] for x, y in zip(e[far].tolist(), a[far].tolist(), strict=True)]
    return {"edges": _short(edges), "cells": cells, "points": points}


def _by_position(d: Any, places: Any, floor: NoiseFloor | None) -> dict[str, Any]:
    step = -(-(int(places.max()) + 1) // _PLACES)
    bins, size = places // step, np.abs(d)
    order = np.argsort(bins, kind="stable")
    groups = np.split(size[order], np.flatnonzero(np.diff(bins[order])) + 1)
    quantiles = [np.quantile(group, [0.5, 0.95, 1.0]) for group in groups]
    median, p95, most = (_short(column) for column in np.array(quantiles).T)
    known = floor is not None and np.isfinite(floor.rms)
    return {
        "positions": [int(b) * step for b in np.unique(bins)],
        "median": median,
        "p95": p95,
        "max": most,
        "floor": short(floor.rms) if known and floor is not None else None,
    }


def _differences(d: Any, floor: NoiseFloor | None) -> dict[str, Any]:
    noise = np.empty(0)
    if floor is not None and floor.changed > 0:
        noise = np.diff(floor.logprobs[:, floor.finite].astype(np.float64), axis=0).ravel()
    reach = max(float(np.quantile(np.abs(x), 0.999)) if len(x) else 0.0 for x in (d, noise))
    edges = np.linspace(-1, 1, _BINS + 1) * max(reach, _NARROWEST)

    def count(values: Any) -> Any:
        return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]

    scaled = _short(count(noise) * (len(d) / len(noise))) if len(noise) else None
    return {"edges": _short(edges), "counts": count(d).tolist(), "floor": scaled}


def _ratios(d: Any, metrics: Mapping[str, float]) -> dict[str, Any]:
    ratio = np.exp(np.clip(d, -50, 50))
    reach = min(max(2 * CLIP, float(np.quantile(np.abs(ratio - 1), 0.999))), 1.0)
    edges = np.linspace(1 - reach, 1 + reach, _BINS + 1)
    counts = np.histogram(np.clip(ratio, edges[0], edges[-1]), edges)[0].tolist()
    return {"edges": _short(edges), "counts": counts, "clip": CLIP, "outside": metrics["share_outside_clip"]}


def _divergences(free_run: FreeRun | None, longest: int) -> dict[str, Any] | None:
    if free_run is None or not free_run.divergences:
        return None
    step = -(-longest // _PLACES)
    edges = np.arange(0, longest + step, step)
    counts = np.histogram([d.position for d in free_run.divergences], edges)[0].tolist()
    return {"edges": edges.tolist(), "counts": counts, "turns": free_run.turns, "diverged": free_run.diverged}


def short(value: float, digits: int = 6) -> float:
    """A number to so many digits: what a plot or a token shows, in fewer bytes."""
    return float(f"{value:.{digits}g}")


def _short(values: Any) -> list[float]:
    return [short(value) for value in np.asarray(values, np.float64).tolist()]
