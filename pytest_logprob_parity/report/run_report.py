"""The report of one pytest run, from the parts that its checks left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from .finite_json import to_text
from .folder import Run, ended_beside, in_turn, read_part
from .github import add_to_summary, no_summary, on_github, workflow_commands
from .history.drift import Series
from .merge import merge
from .outcomes import EXPECTED
from .results_file import NAME, read_results
from .write import PAGE, results_of, write_report


def report_run(
    run: Run,
    parts: Sequence[str],
    root: Path,
    unused: Sequence[str],
    expected: Collection[str] = (),
    created: str = "",
    series: Sequence[Series] = (),
) -> list[str]:
    """Write the report, tell GitHub Actions where it runs there, and give the lines for people.

    `parts` names the part of every check there was, `expected` those of checks that failed as their tests expect. `created` is
    when the run ended (now, without), `series` what is known of its checks from earlier runs.
    Without any check an earlier report stays. Runs into the same folder at the same time are merged.
    Raises UsageError and OSError where something cannot be written.
    """
    entries = [read_part(run.path, part) for part in parts]
    for part, entry in zip(parts, entries, strict=True):
        if entry is not None and part in expected:
            entry["outcome"] = EXPECTED
    known = {(check.node_id, check.name): check.to_plot() for check in series}
    for entry in entries:
        if entry is not None and (history := known.get((entry["node_id"] or entry["golden"]["path"], entry["name"]))):
            entry["history"] = history
    content = results_of([entry for entry in entries if entry is not None], root, unused, created)
    with in_turn(run.folder):
        others, killed = ended_beside(run.path)
        if not parts and (others or (run.folder / NAME).is_file()):
            run.leave(None)
            return [f"logprob-parity: no check ran; the report in {_shown(run.folder / PAGE)} is an earlier run's"]
        merged = merge([(run.path / NAME, content), *((path, read_results(path)) for path in others)])
        page = write_report(run.folder, merged)
        run.leave(to_text(content))
    lines = [f"logprob-parity: report in {_shown(page)}"]
    if others:
        lines[0] += f", with the checks of {_many(len(others), 'other run')} at the same time"
    if killed:
        lines.append(
            f"logprob-parity: {_many(killed, 'run')} into the same folder ended without a report: its checks are missing"
        )
    if lost := entries.count(None):
        lines.append(f"logprob-parity: {lost} checks are missing in the report: their workers did not deliver them")
    if on_github():
        try:
            add_to_summary(content)
        except OSError as error:
            lines.append(no_summary(error))
        lines += workflow_commands(content)
    return lines


def _many(count: int, name: str) -> str:
    return f"{count} {name}" + "s" * (count != 1)


def _shown(page: Path) -> Path:
    with contextlib.suppress(ValueError):  # another drive
        return Path(os.path.relpath(page))
    return page
