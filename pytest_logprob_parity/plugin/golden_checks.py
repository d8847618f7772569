"""The fixture `golden_trace`: the goldens of one test, and what it leaves of each check."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..comparison.result import MismatchError
from ..errors import IncomparableError, ParityError, UsageError
from .diagnose import diagnosed
from .records import Records, told_of
from .stash import ASKED, EXPECTS, ITEM, NODE_ID, NOTED, ORIGIN, SESSION, Expected
from .unchecked import compared_something, raises_is_open

if TYPE_CHECKING:
    from ..check.context import Checked, Context
    from ..comparison.result import Comparison
    from ..comparison.tolerance import Tolerance
    from ..comparison.vocabulary import Level
    from ..engines.engine import Engine
    from ..report.outcomes import Outcome
    from ..trace import ReplayPath, Trace


def _is_broken(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


class GoldenTrace:
    """The goldens of one test, by name."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._item: pytest.Item = request.node
        self._config = request.config
        self._hook: Any = request.node.ihook
        self._session = request.config.stash[SESSION]
        self._node_id = request.node.stash.get(NODE_ID, request.node.nodeid)
        self._records = Records(request.node, self._node_id)
        self._names: set[str] = set()
        settings = request.node.stash.get(ITEM, None)
        self._objective = "" if settings is None else settings.objective

    def path(self, name: str | None = None) -> Path:
        """Where the golden of the check `name` lives."""
        from ..golden import golden_path

        path = golden_path(self._session.golden_dir, self._node_id, name or "")
        self._item.stash.setdefault(ASKED, set()).add(path)  # whoever has the path may compare with it
        return path

    def check(
        self,
        engine_or_trace: Engine | Trace,
        *,
        prompts: Sequence[Any] | None = None,
        sampling: Any = None,
        name: str | None = None,
        replay: Sequence[ReplayPath] = ("decode", "regenerate"),
        tolerance: Tolerance | Mapping[str, Any] | str | None = None,
        level: Level | None = None,
        objective: str | None = None,
    ) -> Comparison:
        """Hold an engine, or a trace, against this test's golden; under `--update-golden` make it the golden.

        `prompts` are strings, lists of token ids or message lists; `sampling` a Sampling, dict or vllm.SamplingParams;
        `name` tells several checks of one test apart; `level` says what fails (`bitwise`, `noise`, `rl`; default: the
        run's, see --parity-level), `objective` what matters to an update (`token`, `sequence`, `truncated`, `unclipped`;
        default: the marker's, then the ini file's). Returns the comparison. Raises ParityError; see check_golden.
        """
        from ..check.check import check_golden

        __tracebackhide__ = True
        if name is not None and (not isinstance(name, str) or _is_broken(name)):
            raise UsageError(f"check(name={name!r}): must be a string, without lone surrogates")
        path = self.path(name)
        seen: list[Checked] = []
        context = self._context(path, name, seen.append)
        check = functools.partial(
            check_golden,
            engine=engine_or_trace,
            prompts=prompts,
            sampling=sampling,
            replay=replay,
            tolerance=tolerance,
            level=level or self._session.level,
            objective=objective or self._objective or self._session.objective,
            repeats=self._session.repeats,
        )
        try:
            path = self._file_of(path, engine_or_trace)
            context = self._context(path, name, seen.append)
            comparison = self._check(path, check, context)
        except MismatchError as error:
            return self._failed(error, path, engine_or_trace, context, seen[-1], check)
        except Exception as error:
            if isinstance(error, IncomparableError):  # what an earlier run left is of another question
                self._records.forget(path)
            self._records.note(context, *told_of(error), expected=self._is_expected(error))
            setattr(error, ORIGIN, NOTED)
            if isinstance(error, ParityError):
                raise error.with_traceback(None) from None
            raise
        self._records.forget(path)
        if comparison.recorded:
            self._records.note(context, "recorded", comparison.headline, comparison)
            self._hook.pytest_parity_recorded(item=self._item, name=context.name, path=path, comparison=comparison)
        else:
            self._records.note(context, "passed", comparison.headline, comparison, seen[-1])
            self._hook.pytest_parity_judged(item=self._item, name=context.name, path=path, comparison=comparison)
        return comparison

    def _failed(
        self, error: MismatchError, path: Path, engine: Engine | Trace, context: Context, checked: Checked,
        check: Callable[..., Comparison],
    ) -> Comparison:  # fmt: skip
        """Keep what a failing check saw and leave its record; returns its comparison where the run only warns of it.

        `check` is check_golden with the arguments of the check: with `update` it records what --update-golden would make the
        golden.
        """
        __tracebackhide__ = True
        if self._config.getoption("--parity-diagnose"):
            error = diagnosed(error, path, engine, self._config, self._records)
        checked = dataclasses.replace(checked, comparison=error.comparison)
        told = dataclasses.replace(context, shown_path="a candidate golden", observe=None)
        kept = self._records.keep(path, context.name, checked, functools.partial(check, update=True, context=told))
        outcome: Outcome = "unverified" if error.comparison.verdict == "unverified" else error.kind
        if warns := outcome == "unverified" and self._session.warn_unverified and compared_something(error):
            outcome = "warned"
        expected = not warns and self._is_expected(error)
        self._records.note(context, outcome, str(error), error.comparison, checked, kept, expected=expected)
        self._hook.pytest_parity_judged(item=self._item, name=context.name, path=path, comparison=error.comparison)
        if warns:
            return error.comparison
        setattr(error, ORIGIN, NOTED)
        # The message says it all; the frames and causes below would bury it.
        raise error.with_traceback(None) from None

    def expect_failure(self) -> Expected:
        """Say that a check of this test fails, and that this is what the test is about.

        `with golden_trace.expect_failure() as expected:` takes the failure of a check in it, which is `expected.error` then,
        its comparison `expected.comparison`; a check that passes there is the test's failure. The call alone is for a test that
        takes the exception itself. Without either a test that swallows a failure ends in an error. What is waited for is a
        comparison that fails: never a missing golden, a slip or an engine that does not start. Nothing is recorded meanwhile:
        a check before it, of the same name, has the golden.
        """
        self._item.stash[EXPECTS] = expected = Expected()
        return expected

    def _is_expected(self, error: Exception) -> bool:
        if not isinstance(error, ParityError):
            return False
        if (expects := self._expects()) is not None:
            expects.failed = compared_something(error)
            return expects.failed
        return raises_is_open(error, self._item)

    def _expects(self) -> Expected | None:
        """The failure that is waited for now."""
        expects = self._item.stash.get(EXPECTS, None)
        return None if expects is None or expects.over else expects

    async def check_async(
        self,
        engine_or_trace: Engine | Trace,
        *,
        prompts: Sequence[Any] | None = None,
        sampling: Any = None,
        name: str | None = None,
        replay: Sequence[ReplayPath] = ("decode", "regenerate"),
        tolerance: Tolerance | Mapping[str, Any] | str | None = None,
        level: Level | None = None,
        objective: str | None = None,
    ) -> Comparison:
        """`check` for async tests (pytest-asyncio, anyio): the event loop goes on meanwhile.

        Arguments, verdict and records are those of `check`. An `AsyncLLM` is asked in the loop that it belongs to, any other
        engine in a thread.
        """
        __tracebackhide__ = True
        from ..engines.event_loop import beside_the_loop

        def check() -> Comparison:
            return self.check(
                engine_or_trace,
                prompts=prompts,
                sampling=sampling,
                name=name,
                replay=replay,
                tolerance=tolerance,
                level=level,
                objective=objective,
            )

        return await beside_the_loop(check, "check_async")

    def _context(self, path: Path, name: str | None, observe: Callable[[Checked], None]) -> Context:
        from ..check.context import Context

        return Context(
            node_id=self._node_id,
            name=name or "",
            shown_path=self._records.shown(path),
            accept=self._records.command("--update-golden"),
            tolerance_lines=tuple(self._config.getini("parity_tolerance")),
            max_megabytes=float(self._config.getini("parity_max_golden_mb")),
            metrics=self._config.getoption("--parity-metrics") or "",
            reference=self._session.reference,
            observe=observe,
            orphans=self._orphans,
            beside=functools.partial(self._records.command, "--update-golden"),
            golden_dir=self._records.shown(self._session.golden_dir),
        )

    def _file_of(self, path: Path, engine: Engine | Trace) -> Path:
        """The golden's file, or its variant for this machine, or of the name that the run was given."""
        from ..check.variants import to_compare, to_record
        from ..golden import variant_path

        if self._session.variant:
            return variant_path(path, self._session.variant)
        records = self._session.update == "all" and self._expects() is None
        return (to_record if records else to_compare)(path, engine)

    def _orphans(self) -> list[Path]:
        """Goldens that could be this test's by another name: what no test has, and what no check of this one has asked for."""
        from ..golden import variant_path

        asked = self._item.stash.get(ASKED, set())
        own = [path for path in self._session.goldens_of(self._node_id) if variant_path(path, "") not in asked]
        return own + [self._session.root / path for path in sorted(self._session.unused)]

    def _check(self, path: Path, check: Callable[..., Comparison], context: Context) -> Comparison:
        """Call `check`, which is check_golden with the arguments of the check, as the options of the run want it."""
        from ..golden import ignore_parts, is_there

        __tracebackhide__ = True
        waiting = self._expects() is not None
        if context.name in self._names and not waiting:
            raise UsageError(
                f"two checks named {context.name!r} in one test"
                if context.name
                else "a second check in one test needs a name: check(..., name='...')"
            )
        self._names.add(context.name)
        update = "" if waiting else self._session.update
        record = update == "all" or (update == "missing" and not is_there(path))
        try:
            comparison = check(path, update=record, context=context)
            if record:
                ignore_parts(self._session.golden_dir)
            return comparison
        except ParityError as error:
            if update != "failed":
                raise
            if isinstance(error, MismatchError) and error.comparison.verdict == "unverified":
                told = "--parity-update=failed left this golden: nothing failed; --update-golden records it again"
                raise MismatchError(f"{error}\n{'update':<13}{told}", error.comparison) from None
            if not (isinstance(error, (MismatchError, IncomparableError)) or getattr(error, "replaceable", False)):
                raise
        return check(path, update=True, context=context)
