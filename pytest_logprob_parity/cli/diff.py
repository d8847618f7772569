"""`logprob-parity diff`: two traces or goldens held against each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .verb import Verbs


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("diff", help="compare two traces or goldens")
    verb.add_argument("expected", type=Path)
    verb.add_argument("actual", type=Path)
    verb.add_argument(
        "--level", choices=("bitwise", "rl"), help="what counts as a difference (default: as in the run that left it, or rl)"
    )
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print the comparison. Gives 0 where it passes, 1 where it does not."""
    from ..files import compare_files
    from ..golden import describe
    from ..message import failure_message
    from ..obtained import is_obtained
    from ..report.entry import differences_to_json

    checked = compare_files(given.expected, given.actual, given.level)
    comparison, apart = checked.comparison, checked.differences
    if given.json:
        told = {**comparison.to_json(), "fingerprint_differences": differences_to_json(apart)}
        print(json.dumps(told, indent=1, sort_keys=True))
    elif comparison.passed:
        print("\n".join([f"pass: {comparison.headline}", *comparison.shows, *comparison.notes]))
    else:
        about, accept = describe(checked.golden), f"logprob-parity accept {given.actual}" if is_obtained(given.actual) else ""
        print(failure_message(comparison, golden=str(given.expected), about=about, differences=apart, accept=accept))
    return 0 if comparison.passed else 1
