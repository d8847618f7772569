"""The report of one pytest run, from the parts that its checks left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from .folder import read_part, sweep
from .github import add_to_summary, on_github, workflow_commands
from .results import EXPECTED
from .write import results_of, write_report


def report_run(
    folder: Path, parts: Sequence[str], root: Path, unused: Sequence[str], expected: Collection[str] = ()
) -> list[str]:
    """Write the report, tell GitHub Actions where it runs there, and give the lines for the terminal.

    `parts` names the part of every check there was, `expected` those of checks that failed as their tests expect.
    Raises UsageError and OSError where something cannot be written.
    """
    entries = [read_part(folder, part) for part in parts]
    for part, entry in zip(parts, entries, strict=True):
        if entry is not None and part in expected:
            entry["outcome"] = EXPECTED
    content = results_of([entry for entry in entries if entry is not None], root, unused)
    page = write_report(folder, content)
    sweep(folder)
    shown = page
    with contextlib.suppress(ValueError):  # another drive
        shown = Path(os.path.relpath(page))
    lines = [f"logprob-parity: report in {shown}"]
    if lost := entries.count(None):
        lines.append(f"logprob-parity: {lost} checks are not in it: their parts did not come here from their workers")
    if on_github():
        add_to_summary(content)
        lines += workflow_commands(content)
    return lines
