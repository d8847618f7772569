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

from .. import progress
from .._version import __version__
from ..errors import EngineError, ParityError
from ..suggest import nearest
from ..visible_text import visible_line
from . import accept, bisect, diagnose, diff, history, matrix, move, prune, report, selftest, serve, show
from .completion import SHELLS, PrintCompletion

#: In the order of the help. Each has `add(verbs)` and `run(given)`, which gives the exit status.
VERBS: Final = (show, diff, report, history, accept, move, prune, selftest, matrix, diagnose, serve, bisect)


def make_parser() -> argparse.ArgumentParser:
    """The verbs and their arguments."""
    parser = argparse.ArgumentParser(
        prog="logprob-parity",
        description="Look at golden traces, compare them, and find out why they differ.",
        epilog="`logprob-parity VERB --help` has the arguments and exit statuses of a verb.",
    )
    parser.add_argument("--version", action="version", version=f"pytest-logprob-parity {__version__}")
    parser.add_argument("--print-completion", action=PrintCompletion, dest="shell", choices=SHELLS,
                        help="print a script that completes verbs, options and files in this shell; needs shtab")  # fmt: skip
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add(verbs)
    return parser


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb, by name."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status as diff(1): 0 no difference beyond tolerance, or no wrong verdict; 1 one; 2 trouble."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = make_parser()
    verbs = verbs_of(parser)
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        hint = nearest(arguments[0], verbs) or f"; there are {', '.join(verbs)}"
        parser.error(f"there is no verb {arguments[0]!r}{hint}")
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
        verb = verbs[given.verb]
        slips = (text.partition("=")[0] for text in rest if text.startswith("--"))
        hints = (nearest(slip, verb._option_string_actions, 0.7) for slip in slips)
        verb.error(f"unrecognized arguments: {' '.join(rest)}{next(filter(None, hints), '')}")
    try:
        quiet = getattr(given, "json", False) or not progress.is_wanted(sys.stderr)
        with _ended_as_by_ctrl_c(), progress.shown_on(None if quiet else _write):
            return int(given.run(given))
    except ParityError as error:
        told = str(error) if isinstance(error, EngineError) else visible_line(error)  # an engine's own words may have lines
        print(f"logprob-parity: {told}", file=sys.stderr)
    except BrokenPipeError:
        pass
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        print(f"logprob-parity: {visible_line(f'{error.strerror or error}{place}')}", file=sys.stderr)
    except KeyboardInterrupt:
        kept = f"; answers so far are kept in {given.out}" if given.verb in ("matrix", "bisect") else ""
        print(f"logprob-parity: interrupted{kept}", file=sys.stderr)
        return 130
    return 2


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


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
