"""`logprob-parity diff`: two traces or goldens held against each other."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..comparison.vocabulary import LEVELS
from .json_output import to_text
from .verb import Verbs, add_verb, say

if TYPE_CHECKING:
    from ..check.context import Checked


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "diff",
        "compare two traces or goldens",
        "Prints the verdict and the message that a check of EXPECTED gives for ACTUAL. Needs no engine.",
        run=run,
        status={0: "no difference beyond tolerance", 1: "a difference, or too little evidence to tell"},
    )
    verb.add_argument("expected", type=Path, help="a golden or a trace")
    verb.add_argument("actual", type=Path, help="the trace or golden to compare with it")
    verb.add_argument(
        "--level", choices=LEVELS, help="what counts as a difference (default: that of the run that left ACTUAL, or rl)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON (see docs/reference/json.md)")


def run(given: argparse.Namespace) -> int:
    """Print the comparison. Gives 0 where it passes, 1 where it does not."""
    from ..check.two_files import compare_files
    from ..report.check_entry import differences_to_json

    checked = compare_files(given.expected, given.actual, given.level)
    if given.json:
        apart = differences_to_json(checked.differences)
        say(to_text("diff", {**checked.comparison.to_json(), "fingerprint_differences": apart}))
    else:
        say(text_of(checked, given.expected, given.actual))
    return 0 if checked.comparison.passed else 1


def text_of(checked: Checked, expected: Path, actual: Path) -> str:
    """The comparison of two files for people."""
    from ..check.obtained import is_obtained
    from ..comparison.message import failure_message
    from ..golden import describe

    comparison = checked.comparison
    if comparison.passed:
        return "\n".join([f"pass: {comparison.headline}", *comparison.shows, *comparison.notes])
    about = describe(checked.golden)
    accept = f"logprob-parity accept {shlex.quote(str(actual))}" if is_obtained(actual) else ""
    return failure_message(comparison, golden=str(expected), about=about, differences=checked.differences, accept=accept)
