"""The drift of each check over runs and versions as a table, from results.json files and a history's lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...visible_text import visible_token
from ..merge import find_results
from ..results_file import NAME, read_results
from .drift import Series, changes
from .file import is_history, read
from .run_record import METRICS, run_record_of_results


def read_places(places: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The runs in these files and folders, and a line about each that is left out. Raises UsageError where there are none.

    A check that a history has and a results.json of the same run counts once.
    """
    lines: list[dict[str, Any]] = []
    skipped: list[str] = []
    results: dict[Path, None] = {}
    for place in places:
        histories = [place] if is_history(place) else []
        if place.is_dir():
            histories = [file for file in sorted(place.rglob("*.jsonl")) if is_history(file)]
        for file in histories:
            more, cut = read(file)
            lines += more
            skipped += cut
        if not histories or (place.is_dir() and any(place.rglob(NAME))):
            results |= dict.fromkeys(file.absolute() for file in find_results([place]))
    known = {_key(line, record) for line in lines for record in line["checks"]}
    for file in results:
        line = run_record_of_results(read_results(file))
        new = {_key(line, record): record for record in line["checks"]}
        checks = [record for key, record in new.items() if key not in known]
        lines += [{**line, "checks": checks}] if checks else []
        known |= set(new)
    if not lines:
        raise UsageError(f"{places[0]}: no runs in it" + "".join(f"; {line}" for line in skipped[:1]))
    return lines, skipped


def _key(line: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, str]:
    return line["created"], json.dumps(record, sort_keys=True)


def table(series: Series, last: int) -> Iterator[str]:
    """The newest runs of a check, one a line, and what the newest one leaves."""
    shown = series.runs[-last:]
    name = f" [{series.name}]" if series.name else ""
    yield visible_token(f"{series.node_id}{name}") + (
        f" ({len(shown)} of {len(series.runs)} runs)" if len(series.runs) > last else ""
    )
    rows: list[tuple[str, ...]] = [("run", "engine", "outcome", *METRICS)]
    for run in shown:
        numbers = (_number(run["metrics"].get(metric)) for metric in METRICS)
        rows.append((run["created"], run["engine"] or "-", run["outcome"], *numbers))
    if series.bands:
        count = max(band.runs for band in series.bands.values())
        for end in ("low", "high"):
            cells = (_number(getattr(series.bands[m], end)) if m in series.bands else "" for m in METRICS)
            rows.append((f"band, {end}", f"{count} runs", "", *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    before = series.runs[-last - 1] if len(series.runs) > last else None
    for index, row in enumerate(rows):
        sizes = enumerate(zip(row, widths, strict=True))
        padded = [cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in sizes]
        note = ""
        if 0 < index <= len(shown):
            note = ", ".join(changes(before, shown[index - 1]))
            before = shown[index - 1]
        yield visible_token("  " + "  ".join(padded).rstrip() + (f"  {note}" if note else ""))
    yield from (f"  warning: {line}" for line in series.warnings())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.3g}"
