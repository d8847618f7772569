"""What verbs share."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TypeAlias

from ..errors import UsageError

#: What verbs are added to.
Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def tell(text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"# {text}", file=sys.stderr, flush=True)


def check_model(model: str, recorded: str | None) -> None:
    """Raise UsageError where there is no such model; the golden knows a name, not where this machine keeps it."""
    from ..fingerprint import find_model

    try:
        find_model(model, Path.cwd())
    except UsageError as error:
        hint = "; the golden knows its model by that name: give model=FOLDER" if model == recorded else ""
        raise UsageError(f"{error}{hint}") from None
