"""Running: what each test leaves, and that none is green which compared nothing."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from ..errors import ParityError
from . import open_raises
from .fixtures import FIXTURES
from .records import Records
from .stash import ASKED, ENDED, ITEM, MARKER, NODE_ID, ORIGIN, RAISED, RAISES, SESSION, TALLIED
from .summary import one_line
from .unchecked import comparisons_made, look_at_the_end


def pytest_runtest_setup(item: pytest.Item) -> None:
    __tracebackhide__ = True
    item.stash[ENDED], item.stash[TALLIED], item.stash[RAISES] = "", comparisons_made(), open_raises.count()
    item.stash[ASKED] = set()
    Records(item, item.stash.get(NODE_ID, item.nodeid)).drop()
    settings = item.stash.get(ITEM, None)
    if settings is not None and settings.error is not None:
        raise settings.error.with_traceback(None)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    """Tell what comes out of our fixtures, or of a test's own in their place, from any other exception."""
    try:
        return (yield)
    except Exception as error:
        if fixturedef.argname in FIXTURES:
            setattr(error, ORIGIN, RAISED)
        raise


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Once its fixtures have ended, too: a test that passes has compared something, and has swallowed no failure."""
    __tracebackhide__ = True
    result = yield
    look_at_the_end(item, marked=any(mark.name == MARKER for mark in item.iter_markers()))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Leave the record of an error of ours that no check has told of, and whether the test itself passed."""
    if call.excinfo is not None:
        error = call.excinfo.value
        origin = getattr(error, ORIGIN, "")
        if origin == RAISED or (not origin and isinstance(error, ParityError) and error.kind != ParityError.kind):
            Records(item, item.stash.get(NODE_ID, item.nodeid)).note_error(error)
    report = yield
    xfailed = report.skipped and hasattr(report, "wasxfail")
    if call.when == "call" or (call.when == "setup" and report.skipped):
        item.stash[ENDED] = "passed" if report.passed else "skipped" if report.skipped and not xfailed else ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and call.excinfo is not None and isinstance(call.excinfo.value, ParityError):
        crash.message = one_line(call.excinfo.value)  # for the short summary, which would repeat the class and cut the rest
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        own = session.config.stash[SESSION]
        output["logprob_parity_unused"] = sorted(own.unused)
        output["logprob_parity_uncompared"] = sorted(own.uncompared)
