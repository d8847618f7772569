"""Nothing is green that checked nothing: tests that end without a comparison, and failures that their tests swallow."""

from __future__ import annotations

import dis
import gc
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import MethodType
from typing import Any, Final

import pytest

from ..errors import ParityError, UsageError
from .records import Records
from .stash import ASKED, ENDED, EXPECTS, NODE_ID, NOTED, ORIGIN, PROPERTY, SESSION, TALLIED, UNCOMPARED, note_outcome

#: Outcomes of checks that fail nobody's test.
_MET: Final = ("passed", "recorded", "warned")
#: What a test's own ending leaves, where its checks do not tell it.
SWALLOWED: Final = "swallowed"
UNCHECKED: Final = "unchecked"

#: What `pytest.raises` gives (up to pytest 8.3, and since), what is like it, and where these keep what they name.
_RAISES: Final = ("RaisesContext", "RaisesExc", "RaisesGroup", "_AssertRaisesContext")
_NAMED: Final = ("expected_exceptions", "expected_exception", "expected")
_WITH: Final = dis.opmap["WITH_EXCEPT_START"]
_HOLDS_BOUND: Final = sys.version_info < (3, 14)
_RESULT: Final = "pytest_logprob_parity.comparison.result"


def comparisons_made() -> int:
    """How many comparisons this process has made; it imports nothing to know."""
    module = sys.modules.get(_RESULT)
    return 0 if module is None else int(module.TALLY.made)


def raises_is_open(error: ParityError, item: pytest.Item) -> bool:
    """Whether the test waits for this very error: in a `pytest.raises` that names an exception of ours.

    One that names AssertionError or Exception would take anything. pytest does not tell which are open, so the living ones are
    looked at, which takes up to half a second where an engine lives in this process: only if the check may be in such a block.
    """
    for raises in _open_raises() if _may_be_in_a_block(item) else ():
        named = next((value for name in _NAMED if (value := getattr(raises, name, None))), ())
        named = tuple(one for one in (named if isinstance(named, tuple) else (named,)) if isinstance(one, type))
        if isinstance(error, named) and all(issubclass(one, ParityError) for one in named):
            return compared_something(error) if ParityError in named or error.kind == ParityError.kind else True
    return False


def _may_be_in_a_block(item: pytest.Item) -> bool:
    """Whether a function between the test and here has a `with` block; or the test itself is not among those that called, as
    where the check is in a fixture, in a thread or in a task.
    """
    function = getattr(item, "function", None)
    test = getattr(inspect.unwrap(function), "__code__", None) if function else None
    frame, of_the_test = inspect.currentframe(), False
    while frame is not None and frame.f_code.co_name != "pytest_pyfunc_call":
        ours = frame.f_globals.get("__name__", "").startswith(__name__.partition(".")[0] + ".")
        if not ours and _WITH in frame.f_code.co_code[::2]:
            return True
        of_the_test = of_the_test or frame.f_code is test
        frame = frame.f_back
    return not of_the_test


def _open_raises() -> list[Any]:
    """What `pytest.raises` and its like gave, of those whose `with` block runs.

    For as long as it does, the interpreter holds the `__exit__` that is bound to its object. From Python 3.14 on it holds the
    two apart: there it is those that have seen no exception yet.
    """
    if gc.get_freeze_count():
        gc.unfreeze()  # an engine that starts in this process freezes what is there, and nobody sees it then
    if _HOLDS_BOUND:
        exits = [thing for thing in gc.get_objects() if type(thing) is MethodType]
        living = [thing.__self__ for thing in exits if getattr(thing.__func__, "__name__", "") == "__exit__"]
        del exits  # this list holds what it lists: a block that ends now would seem open for as long as it lives
        return [thing for thing in living if _is_raises(type(thing))]
    kinds = {kind for kind in set(map(type, gc.get_objects())) if _is_raises(kind)}
    living = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return [thing for thing in living if _waits(getattr(thing, "excinfo", None))]


def _is_raises(kind: type) -> bool:
    return kind.__name__ in _RAISES and str(kind.__module__).startswith(("_pytest.", "unittest."))


def _waits(excinfo: Any) -> bool:
    try:
        return excinfo is not None and excinfo.value is None
    except AssertionError:  # nothing was raised in it yet
        return True


class Subtests:
    """Collects the tests with a subtest that failed: its own report tells of it, though the test may pass."""

    def __init__(self, failed: set[str]) -> None:
        self._failed = failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and getattr(report, "context", None) is not None:
            self._failed.add(report.nodeid)


def compared_something(error: ParityError) -> bool:
    """Whether a failure is that of a comparison: not of a golden that is missing, of a slip, or of nothing in common."""
    comparison = getattr(error, "comparison", None)
    return comparison is not None and bool(comparison.metrics["n_tokens"] or comparison.metrics["n_nan"])


def look_at_the_end(item: pytest.Item, *, marked: bool) -> None:
    """Raise ParityError for a test that passes although it compared nothing, or although a check of it failed.

    Its records say so then. Fixtures have ended: they may check, too.
    """
    __tracebackhide__ = True
    ended = item.stash.get(ENDED, "")
    if not ended:
        return
    records = [json.loads(str(value)) for name, value in item.user_properties if name == PROPERTY]
    swallowed = [record for record in records if record["outcome"] not in _MET and not record.get("expected")]
    if swallowed and item.nodeid not in item.config.stash[SESSION].subtests:
        _mark(item, swallowed)
        first = swallowed[0]
        more = f", and {len(swallowed) - 1} more" if len(swallowed) > 1 else ""
        raise _told(
            ParityError(
                f"swallowed: the test is {ended}, and its check failed{more}: {first['headline']}\nLet it fail; where the "
                "failure is what the test is about, say `with golden_trace.expect_failure():`"
            )
        )
    if ended == "skipped":
        return
    expects = item.stash.get(EXPECTS, None)
    if expects is not None and not expects.failed:
        raise _told(ParityError("golden_trace.expect_failure(): the test passes, and no check of it failed"))
    _look_for_unchecked(item, checked=bool(records), marked=marked)


def _look_for_unchecked(item: pytest.Item, *, checked: bool, marked: bool) -> None:
    __tracebackhide__ = True
    session = item.config.stash[SESSION]
    asked: set[Path] = item.stash.get(ASKED, set())
    own = session.goldens_of(item.stash.get(NODE_ID, item.nodeid))
    left = [path for path in own if _without_variant(path) not in asked]
    compared = comparisons_made() > item.stash.get(TALLIED, 0)
    if checked or compared:
        session.uncompared |= {session.shown(path) for path in left}
        return
    candidate = marked or bool(own) or "golden_trace" in getattr(item, "fixturenames", ())
    if not candidate:
        return
    fails = session.unchecked == "error" or (not session.unchecked and bool(own))
    names = ", ".join(session.shown(path) for path in own)
    headline = f"nothing was compared, with {names}" if own else "nothing was compared, and there is no golden"
    test = item.stash.get(NODE_ID, item.nodeid)
    error = UsageError(
        f"unchecked: the test passes and has compared nothing{f': nobody looked at {names}' if own else ''}\nCall "
        "golden_trace.check(...) in it; ini `parity_unchecked = warn` makes a warning of this"
    )
    part = Records(item, test).write_part_of(error, names) if fails else ""
    about = {"outcome": UNCHECKED, "test": test, "golden": names, "headline": headline, "fails": fails}
    note_outcome(item, {**about, "part": part} if part else about)
    if fails:
        raise _told(error)


def _without_variant(path: Path) -> Path:
    from ..golden import variant_path

    return variant_path(path, "")


def _told(error: ParityError) -> ParityError:
    """An error whose record is there already."""
    setattr(error, ORIGIN, NOTED)
    return error


def remember(cache: Any, asked: Iterable[str], uncompared: Iterable[str]) -> None:
    """Keep in pytest's cache, for `logprob-parity prune`, which goldens no check of a test that passed asked for."""
    kept = cache.get(UNCOMPARED, None)
    before = {path for path in kept if isinstance(path, str)} if isinstance(kept, list) else set()
    cache.set(UNCOMPARED, sorted((before - set(asked)) | set(uncompared)))


def _mark(item: pytest.Item, swallowed: list[dict[str, Any]]) -> None:
    """Say in the test's records which failures it swallowed."""
    kept = []
    for name, value in item.user_properties:
        record = json.loads(str(value)) if name == PROPERTY else None
        if record in swallowed:
            value = json.dumps({**record, "outcome": SWALLOWED, "was": record["outcome"]}, sort_keys=True)
        kept.append((name, value))
    item.user_properties[:] = kept
