"""Functions that the verbs share: add a verb, print its output and its progress, check its model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from .. import progress
from ..errors import UsageError
from ..visible_text import visible, visible_line

#: The parser's list of verbs.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(
    verbs: Verbs, name: str, help: str, about: str, *, run: Callable[[argparse.Namespace], int], status: Mapping[int, str]
) -> argparse.ArgumentParser:
    """Add a verb: `help` is its line in the list of verbs, `about` a longer text, `status` the meaning of its exit statuses.

    Statuses 2 (trouble) and 130 (interrupted) mean the same for every verb and are added here.
    """
    meanings = {**status, 2: "trouble, which one line on stderr names", 130: "interrupted"}
    verb = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}. {about}")
    verb.epilog = f"Exit status: {'; '.join(f'{number} {meaning}' for number, meaning in meanings.items())}."
    verb.set_defaults(run=run)
    return verb


def say(text: str) -> None:
    """Print the output of a verb, or a part of it; control characters from goldens and servers are made visible."""
    print(visible(text), flush=True)


def say_line(text: str) -> None:
    """`say` for a line with a path in it, which may hold anything."""
    print(visible_line(text), flush=True)


def tell(text: str) -> None:
    """Print a line of progress to stderr."""
    over = progress.ERASE if progress.is_wanted(sys.stderr) else ""  # a thread may have written a progress line meanwhile
    print(f"{over}# {visible_line(text)}", file=sys.stderr, flush=True)


def check_model(model: str, recorded: str | None) -> None:
    """Raise UsageError where there is no such model: a golden has the name of its model, not its folder on this machine."""
    from ..checkpoint.digests import find_model

    try:
        find_model(model, Path.cwd())
    except UsageError as error:
        hint = "; this is the name in the golden: give model=FOLDER" if model == recorded else ""
        raise UsageError(f"{error}{hint}") from None
