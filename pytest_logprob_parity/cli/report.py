"""`logprob-parity report`: results rendered again, or merged."""

from __future__ import annotations

import argparse
from pathlib import Path

from .verb import Verbs, add_verb


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "report",
        "render results.json again, merge several, or report two traces",
        "Writes index.html, results.json and summary.md. Needs no engine.",
        run=run,
        status={0: "written, and every check in it passed", 1: "written, and a check in it did not pass"},
    )
    verb.add_argument(
        "places", nargs="+", type=Path, metavar="DIR_OR_FILE",
        help="reports or their results.json (CI's shards are merged); or a golden and a trace, both .safetensors",
    )  # fmt: skip
    verb.add_argument("--out", type=Path, help="folder to write (default: the report given, or parity-report)")
    verb.add_argument("--github", action="store_true", help="annotate, and append to $GITHUB_STEP_SUMMARY, as in a workflow")


def run(given: argparse.Namespace) -> int:
    """Write the report. Gives what `report.command.report` gives."""
    from ..report.command import report

    return report(given.places, given.out, given.github)
