"""What a run of pytest adds to its history, and what that history says of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .drift import Series, series_of
from .file import append, read
from .run_record import run_record


def add_run(
    path: Path, records: Iterable[Mapping[str, Any]], created: str, project: str
) -> tuple[list[Series], list[str], list[str]]:
    """Append a run: each of its checks over all runs, lines for people, and warnings of checks that leave their bands.

    Raises UsageError and OSError where the history cannot be read or written.
    """
    line = run_record(records, created, project)
    past, skipped = read(path) if path.exists() else ([], [])
    append(path, line)
    ours = {(record["node_id"] or record["golden"], record["name"]) for record in line["checks"]}
    series = [check for check in series_of([*past, line]) if (check.node_id, check.name) in ours]
    lines = [f"logprob-parity: {text}" for text in skipped]
    lines.append(f"logprob-parity: run {len(past) + 1} in the history {path.name}")
    warnings = [
        f"  warning, not a verdict: {check.node_id}{f' [{check.name}]' if check.name else ''}: {told}"
        for check in series
        if check.runs[-1]["created"] == created
        for told in check.warnings()
    ]
    return series, lines, warnings
