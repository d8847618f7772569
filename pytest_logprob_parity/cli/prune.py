"""`logprob-parity prune`: goldens that no test asks for."""

from __future__ import annotations

import argparse
from pathlib import Path

from .verb import Verbs, add_verb, say, say_line


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "prune",
        "list goldens that no test asks for, and remove them",
        "Collects all tests as `pytest --collect-only` does and runs none. Listed are goldens whose test, or test file, is "
        "gone, and those that no check of their test asked for when it last passed here. Where not everything can be collected "
        "nothing is removed.",
        run=run,
        status={0: "nothing is left that no test asks for", 1: "something is, and --yes was not given"},
    )
    verb.add_argument("--yes", action="store_true", help="remove what is listed")
    verb.add_argument("--root", type=Path, default=Path(), help="root of the repo (default: here)")


def run(given: argparse.Namespace) -> int:
    """List, or remove. Gives 1 where something is left."""
    from .unused_goldens import find_unused

    unused, root = find_unused(given.root)
    for path in unused.gone:
        say_line(f"its test is gone: {path}")
    for path in unused.unasked or ():
        say_line(f"no check of its test asked for it: {path}")
    if unused.unasked is None:
        say("which names tests ask for is not known: pytest's cache remembers no run here")
    if given.yes:
        for path in unused.all():
            (root / path).unlink()
    count = len(unused.all())
    say(f"{count} {'removed' if given.yes else 'unused'}" + ("; --yes removes them" if count and not given.yes else ""))
    return 1 if count and not given.yes else 0
