"""The report of one pytest run, from the parts that its checks left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from .folder import read_part, sweep
from .github import add_to_summary, no_summary, on_github, workflow_commands
from .results import EXPECTED, NAME
from .write import PAGE, results_of, write_report


def report_run(
    folder: Path, parts: Sequence[str], root: Path, unused: Sequence[str], expected: Collection[str] = ()
) -> list[str]:
    """Write the report, tell GitHub Actions where it runs there, and give the lines for the terminal.

    `parts` names the part of every check there was, `expected` those of checks that failed as their tests expect.
    Without any check an earlier report stays.
    Raises UsageError and OSError where something cannot be written.
    """
    if not parts and (folder / NAME).is_file():
        sweep(folder)
        return [f"logprob-parity: no check ran; the report in {_shown(folder / PAGE)} is an earlier run's"]
    entries = [read_part(folder, part) for part in parts]
    for part, entry in zip(parts, entries, strict=True):
        if entry is not None and part in expected:
            entry["outcome"] = EXPECTED
    content = results_of([entry for entry in entries if entry is not None], root, unused)
    page = write_report(folder, content)
    sweep(folder)
    lines = [f"logprob-parity: report in {_shown(page)}"]
    if lost := entries.count(None):
        lines.append(f"logprob-parity: {lost} checks are not in it: their parts did not come here from their workers")
    if on_github():
        try:
            add_to_summary(content)
        except OSError as error:
            lines.append(no_summary(error))
        lines += workflow_commands(content)
    return lines


def _shown(page: Path) -> Path:
    with contextlib.suppress(ValueError):  # another drive
        return Path(os.path.relpath(page))
    return page
