"""`logprob-parity accept`: goldens made of what a failing run left."""

from __future__ import annotations

import argparse
from pathlib import Path

from .diff import text_of
from .verb import Verbs, add_verb


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "accept",
        "make goldens of what a failing run left; needs no engine",
        "Shows each difference and asks; `view` shows the tokens, `all` and `quit` answer for the rest. What was agreed to is "
        "written: all of it or nothing.",
        run=run,
        status={0: "nothing is left to accept", 1: "something was refused, or not agreed to"},
    )
    verb.add_argument("places", nargs="*", type=Path, metavar="DIR_OR_FILE", help="obtained traces (default: parity-obtained)")
    verb.add_argument(
        "--name", action="append", default=[], metavar="TEXT",
        help="only checks whose test, name or golden contains this text or fits this glob; may be given again",
    )  # fmt: skip
    verb.add_argument("--yes", action="store_true", help="accept all that may be, without asking for each")
    verb.add_argument("--root", type=Path, default=Path(), help="root of the repo whose goldens they are (default: here)")


def run(given: argparse.Namespace) -> int:
    """Show each difference and ask. Gives what `accept.review` gives."""
    from ..check.accept import Proposal, review
    from ..check.two_files import compare_files

    def view(proposal: Proposal) -> str:
        return text_of(compare_files(proposal.target, proposal.path), proposal.target, proposal.path)

    return review(given.places, given.name, given.root, None if given.yes else input, view)
