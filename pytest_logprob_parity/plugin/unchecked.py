"""Nothing is green that checked nothing: tests that end without a comparison, and failures that their tests swallow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from ..errors import ParityError, UsageError
from . import open_raises
from .records import Records
from .stash import ASKED, ENDED, EXPECTS, NODE_ID, NOTED, ORIGIN, PROPERTY, SESSION, TALLIED, UNCOMPARED, note_outcome

#: Outcomes of checks that fail nobody's test.
_MET: Final = ("passed", "recorded", "warned")
#: What a test's own ending leaves, where its checks do not tell it.
SWALLOWED: Final = "swallowed"
UNCHECKED: Final = "unchecked"

_RESULT: Final = "pytest_logprob_parity.comparison.result"


def comparisons_made() -> int:
    """How many comparisons this process has made; it imports nothing to know."""
    module = sys.modules.get(_RESULT)
    return 0 if module is None else int(module.TALLY.made)


def raises_is_open(error: ParityError, since: int) -> bool:
    """Whether the test waits for this very error: in a `pytest.raises` that names an exception of ours.

    One that names AssertionError or Exception would take anything. Those that ran before the test began, `since` of them, are
    not the test's.
    """
    for named in open_raises.named_by_each(since):
        if isinstance(error, named) and all(issubclass(one, ParityError) for one in named):
            return compared_something(error) if ParityError in named or error.kind == ParityError.kind else True
    return False


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
