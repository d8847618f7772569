"""`logprob-parity history`: how the numbers of each check drift over runs and versions."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
from ..grammar import counted
from .json_output import to_text
from .verb import Verbs, add_verb, say


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "history",
        "how the numbers of each check drift over runs and versions",
        "A table for each check, newest run last, and the band of the runs before: leaving it is a warning, not a verdict. "
        "Needs no engine.",
        run=run,
        status={0: "shown, whether a run leaves its band or not"},
    )
    verb.add_argument(
        "places", nargs="+", type=Path, metavar="DIR_OR_FILE",
        help="files that ini parity_history names, results.json files, and folders that hold such",
    )  # fmt: skip
    verb.add_argument(
        "--last", type=int, default=10, metavar="N", help="newest runs to show of each check (default: %(default)s)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON, with all runs (see docs/reference/json.md)")


def run(given: argparse.Namespace) -> int:
    """Print the drift of each check. Gives 0. Raises UsageError."""
    from ..report.history.drift import series_of
    from ..report.history.table import read_places, table

    if given.last < 1:
        raise UsageError(f"--last {given.last}: must be 1 or more")
    lines, skipped = read_places(given.places)
    series = series_of(lines)
    if given.json:
        say(to_text("history", {"checks": [check.to_json() for check in series], "skipped": skipped}))
        return 0
    say("\n".join([line for check in series for line in table(check, given.last)] + skipped))
    outside = sum(bool(check.outside) for check in series)
    counts = f"{counted(len(lines), 'runs')}, {counted(len(series), 'checks')}"
    say(f"{counts}, {outside} outside its band" + ": a warning, not a verdict" * bool(outside))
    return 0
