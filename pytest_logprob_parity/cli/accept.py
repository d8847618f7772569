"""`logprob-parity accept`: goldens made of what a failing run left."""

from __future__ import annotations

import argparse
from pathlib import Path

from .verb import Verbs


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = verbs.add_parser("accept", help="make goldens of what a failing run left; needs no engine")
    verb.add_argument("places", nargs="*", type=Path, metavar="DIR_OR_FILE", help="obtained traces (default: parity-obtained)")
    verb.add_argument(
        "--name", action="append", default=[], metavar="TEXT",
        help="only checks whose test, name or golden contains this text or fits this glob; may be given again",
    )  # fmt: skip
    verb.add_argument("--yes", action="store_true", help="accept all that may be, without asking for each")
    verb.add_argument("--root", type=Path, default=Path(), help="root of the repo whose goldens they are (default: here)")
    verb.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Show each difference and ask. Gives what `accept.review` gives."""
    from ..accept import review

    return review(given.places, given.name, given.root, ask=None if given.yes else input)
