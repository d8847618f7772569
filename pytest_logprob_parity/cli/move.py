"""`logprob-parity move`: goldens to the new name of their test."""

from __future__ import annotations

import argparse
from pathlib import Path

from .verb import Verbs, add_verb, say, say_line


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "move",
        "give goldens to the new name of their test",
        "A golden's file is named after its test: after a rename the test finds none. OLD is a golden's file, a test "
        "(FILE::TEST) or a test file; NEW is the test, or the test file, that has them now. Numbers and limits stay.",
        run=run,
        status={0: "moved"},
    )
    verb.add_argument("old", metavar="OLD", help="a golden's file, FILE::TEST or a test file")
    verb.add_argument("new", metavar="NEW", help="FILE::TEST, or a test file for a test file")
    verb.add_argument("--name", help="name of the check there, check(..., name=NAME), where it is another one")
    verb.add_argument("--root", type=Path, default=Path(), help="root of the repo (default: here)")
    verb.add_argument("--golden-dir", type=Path, default=Path("golden"), help="folder of the goldens (default: %(default)s)")


def run(given: argparse.Namespace) -> int:
    """Move, and print what went where. Gives 0."""
    from ..golden.moving import move, moves

    made = moves(given.old, given.new, given.name, given.root, given.golden_dir)
    move(made)
    for step in made:
        say_line(f"{step.old} -> {step.new}")
    say(f"{len(made)} moved; commit both folders")
    return 0
