"""The command line as a whole: its parser, and what every verb's run is wrapped in."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Final

from ..errors import ParityError
from . import accept, bisect, diagnose, diff, matrix, report, selftest, serve, show

#: In the order of the help. Each has `add(verbs)` and `run(given)`, which gives the exit status.
VERBS: Final = (show, diff, report, accept, selftest, matrix, diagnose, serve, bisect)


def make_parser() -> argparse.ArgumentParser:
    """The verbs and their arguments."""
    parser = argparse.ArgumentParser(prog="logprob-parity", description="Look at golden traces and compare them.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status as diff(1): 0 no difference beyond tolerance, or no wrong verdict; 1 one; 2 trouble."""
    parser = make_parser()
    given, rest = parser.parse_known_args(arguments)  # settings behind options are left over: argparse fills a list once
    if given.verb == "serve":
        given.flags = []
        for before, text in itertools.pairwise(["", *rest]):  # what stands behind an option is its value
            (given.flags if text.startswith("-") or before.startswith("-") else given.settings).append(text)
        rest = []
    elif hasattr(given, "settings"):
        given.settings += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in given.settings]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _ended_as_by_ctrl_c():
            return int(given.run(given))
    except ParityError as error:
        print(f"logprob-parity: {error}", file=sys.stderr)
    except BrokenPipeError:
        pass
    except OSError as error:
        print(f"logprob-parity: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
    except KeyboardInterrupt:
        kept = f"; answers so far are kept in {given.out}" if given.verb in ("matrix", "bisect") else ""
        print(f"logprob-parity: interrupted{kept}", file=sys.stderr)
        return 130
    return 2


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt: engines and workers are then ended with us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
