"""The drift of each check: its runs in order, and the band that its newest run is held against. A warning, never a verdict."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from ..results_schema import DRIFTING
from .run_record import CHECK_RECORD, MADE_BY

#: Runs before the newest one, without which there is no band.
FEWEST: Final = 8
_SIGMAS: Final = 3.0
#: The standard deviation of a normal distribution is so many median absolute deviations, and so many mean absolute ones.
_OF_MEDIAN: Final = 1.4826
_OF_MEAN: Final = 1.2533
#: Nats (or a share) that a band is wider than its runs: last digits.
_DIGITS: Final = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Where the number of a new run is expected, from `runs` runs before it."""

    runs: int
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One check over runs, oldest first: each a record with its run's `created` and `version`.

    `bands` are those of the newest run, by metric, and `outside` the metrics in which it leaves them.
    """

    node_id: str
    name: str
    runs: Sequence[Mapping[str, Any]]
    bands: Mapping[str, Band]
    outside: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "node_id": self.node_id,
            "name": self.name,
            "runs": [dict(run) for run in self.runs],
            "bands": {metric: asdict(band) for metric, band in self.bands.items()},
            "outside": list(self.outside),
        }

    def to_plot(self, most: int = 100) -> dict[str, Any]:
        """What a report keeps: the newest runs as columns."""
        runs = self.runs[-most:]
        return {
            "created": [run["created"] for run in runs],
            "engine": [run["engine"] for run in runs],
            "digest": [run["digest"] for run in runs],
            "values": {metric: [run["metrics"].get(metric) for run in runs] for metric in DRIFTING},
            "bands": {metric: asdict(band) for metric, band in self.bands.items()},
            "outside": list(self.outside),
        }

    def warnings(self) -> list[str]:
        """A line for each band that the newest run leaves."""
        lines = []
        for metric in self.outside:
            band = self.bands[metric]
            value = self.runs[-1]["metrics"][metric]
            lines.append(
                f"{metric} {value:.4g} is outside its band, {band.low:.4g} to {band.high:.4g} ({band.runs} earlier runs)"
            )
        return lines


def series_of(lines: Iterable[Mapping[str, Any]]) -> list[Series]:
    """Each check of these runs, by node id and name."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: line["created"]):
        for record in line["checks"]:
            run = {"created": line["created"], "version": line["version"], **{name: record[name] for name in CHECK_RECORD}}
            found.setdefault((record["node_id"] or record["golden"], record["name"]), []).append(run)
    return [_series(*check, runs) for check, runs in sorted(found.items())]


def _series(node_id: str, name: str, runs: Sequence[Mapping[str, Any]]) -> Series:
    *before, newest = runs
    same = [run for run in before if run["digest"] == newest["digest"]]
    bands = {}
    for metric in DRIFTING:
        values = [value for run in same if (value := run["metrics"].get(metric)) is not None]
        if (band := band_of(values)) is not None:
            bands[metric] = band
    values_now = {metric: newest["metrics"].get(metric) for metric in bands}
    outside = tuple(m for m, value in values_now.items() if value is not None and not bands[m].low <= value <= bands[m].high)
    return Series(node_id=node_id, name=name, runs=runs, bands=bands, outside=outside)


def band_of(values: Sequence[float]) -> Band | None:
    """The median of the runs before +- 3 robust standard deviations, widened for few runs; None for fewer than 8 of them.

    A robust standard deviation is 1.4826 times the median absolute deviation (Hampel, "The influence curve and its role in
    robust estimation", 1974), or where that is 0, most runs being equal, 1.2533 times the mean absolute one: the two cases of
    the modified z-score (Iglewicz and Hoaglin, "How to detect and handle outliers", 1993). So one run that went wrong does
    not widen the band. n runs estimate it badly: the factor 1 + 8 / (n - 3) is ours, and has 0.3 to 0.6 % of clean runs with
    normal numbers outside of the band for every n from 8 to 100 (300,000 simulated series each; 7 % at n = 8 without it). Of
    numbers with a long tail (exponential) 3 to 5 % are outside. That is why leaving the band is a warning and no verdict.
    """
    if len(values) < FEWEST:
        return None
    median = statistics.median(values)
    apart = [abs(value - median) for value in values]
    sigma = _OF_MEDIAN * statistics.median(apart) or _OF_MEAN * statistics.fmean(apart)
    limit = _SIGMAS * (1 + 8 / (len(values) - 3)) * sigma + _DIGITS
    return Band(runs=len(values), median=median, low=median - limit, high=median + limit)


def changes(before: Mapping[str, Any] | None, run: Mapping[str, Any]) -> list[str]:
    """What differs from the run before: golden, engine, libraries, hardware, plugin, level and objective."""
    if before is None or before["outcome"] == "recorded":
        return []
    names = ("digest", *MADE_BY, "version", "level", "objective")
    told = {"digest": "golden", "version": "plugin"}
    return [
        "another golden" if name == "digest" else f"{told.get(name, name)} {before[name] or '?'} -> {run[name] or '?'}"
        for name in names
        if before[name] != run[name]
    ]
