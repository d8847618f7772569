"""`logprob-parity --print-completion SHELL`: a completion script, which shtab makes of the parser.

shtab writes a static script once; completing then starts no Python. (argcomplete would import this package at each press of
the key.) Nothing else needs shtab, so it is not a dependency.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

SHELLS: Final = ("bash", "zsh")


class PrintCompletion(argparse.Action):
    """Print the script and end the program, as --help and --version do."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """See argparse.Action."""
        try:
            import shtab
        except ImportError:
            parser.error(f"{option_string} needs shtab: pip install 'pytest-logprob-parity[completion]'")
        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, kind: Any) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_files(verb, kind)
        elif action.type is Path:
            action.complete = kind  # type: ignore[attr-defined]
