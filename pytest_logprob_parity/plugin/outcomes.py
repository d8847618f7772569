"""What happened to all checks of a run, wherever they ran: counted, told, reported and remembered at its end."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from ..errors import UsageError
from ..visible_text import visible_line
from .stash import PROPERTY, Session
from .summary import summary
from .unchecked import SWALLOWED, UNCHECKED, remember

if TYPE_CHECKING:
    from ..report.folder import Run
    from ..report.history.drift import Series

#: What needs no word of its own in a test that passes.
_TOLD: Final = ("passed", "recorded", "warned", SWALLOWED, UNCHECKED)


class Outcomes:
    """Counts the records of all checks, wherever they ran, and says so at the end; lives where the terminal is."""

    def __init__(self, config: pytest.Config, session: Session, run: Run | None) -> None:
        self._config = config
        self._session = session
        self._run = run
        self._records: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        self._failing: set[tuple[Any, ...]] = set()
        self._xfailed: set[tuple[Any, ...]] = set()
        self._cut_off: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._warnings: list[str] = []
        self._problems: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = (getattr(report, "worker_id", ""), report.nodeid, *report.location)
        if report.failed:
            self._failing.add(test)
        if report.skipped and hasattr(report, "wasxfail"):
            self._xfailed.add(test)
        if report.when != "teardown":  # every phase carries all properties so far
            return
        records = [json.loads(str(value)) for name, value in report.user_properties if name == PROPERTY]
        for record in records:
            bad = record["outcome"] not in _TOLD
            if bad and (record.get("expected") or test in self._xfailed):
                record["outcome"] = "expected"
            elif bad and test not in self._failing:  # a hook of somebody's made it green
                record |= {"outcome": SWALLOWED, "was": record["outcome"]}
        self._failing.discard(test)
        self._xfailed.discard(test)
        self._records[test] = records  # of a test that is run again the last attempt

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["logprob_parity_update"] = self._session.update
        node.workerinput["logprob_parity_report"] = str(self._session.report or "")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})
        self._session.unused |= set(output.get("logprob_parity_unused", ()))
        self._session.uncompared |= set(output.get("logprob_parity_uncompared", ()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write report and history, whether there is a terminal or not: when xdist's workers are down, before the summary."""
        asked = [record["golden"] for test in self._records.values() for record in test if record.get("golden")]
        if (cache := getattr(self._config, "cache", None)) is not None and (asked or self._session.uncompared):
            remember(cache, asked, self._session.uncompared)
        if self._run is None and self._session.history is None:
            return
        from ..report.write import now

        created = now()
        if self._run is not None:
            self._cut_off = _cut_off(self._run.path, self._all_records())
        records = self._all_records()
        series = self._keep_history(self._session.history, records, created)
        if self._run is not None:
            self._report(self._run, records, created, series)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        own, verbosity = self._session, terminalreporter.config.getoption("verbose")
        for line in summary(self._all_records(), sorted(own.unused), sorted(own.uncompared), verbosity):
            terminalreporter.write_line(line.text, **({line.colour: True} if line.colour else {}))
        for lines in self._config.hook.pytest_parity_summary(config=self._config, records=self._all_records()):
            for text in lines or ():
                terminalreporter.write_line(visible_line(text))
        self._say(terminalreporter)

    def pytest_unconfigure(self) -> None:
        """Say what no summary said: there was none (an internal error), or no terminal. GitHub Actions reads stdout anyway."""
        if not (self._lines or self._warnings or self._problems):
            return
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        with contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled():
            if terminal is not None:
                self._say(terminal)
                return
            for line in self._lines:
                if line.startswith("::"):
                    print(line, flush=True)
            for line in self._problems:
                print(line, file=sys.stderr, flush=True)

    def _all_records(self) -> list[dict[str, Any]]:
        return [record for test in self._records.values() for record in test] + self._cut_off

    def _say(self, terminal: pytest.TerminalReporter) -> None:
        for line in self._lines:
            terminal.write_line(line)
        for line in self._warnings:
            terminal.write_line(line, yellow=True)
        for line in self._problems:
            terminal.write_line(line, red=True)
        self._lines, self._warnings, self._problems = [], [], []

    def _keep_history(self, path: Path | None, records: Sequence[Mapping[str, Any]], created: str) -> Sequence[Series]:
        readings = [{**record["history"], "outcome": record["outcome"]} for record in records if "history" in record]
        if path is None or not readings:
            return ()
        from ..report.history.add_run import add_run
        from ..report.write import project_of

        try:
            series, lines, self._warnings = add_run(path, readings, created, project_of(self._config.rootpath))
        except (UsageError, OSError) as error:
            self._problems.append(f"logprob-parity: not in the history: {error}")
            return ()
        self._lines += lines
        if self._config.getoption("verbose") < 0 and len(self._warnings) > 1:
            self._warnings = [f"{self._warnings[0]} (and {len(self._warnings) - 1} more; without -q all are shown)"]
        return series

    def _report(self, run: Run, records: Sequence[Mapping[str, Any]], created: str, series: Sequence[Series]) -> None:
        from ..report.run_report import report_run

        parts = [record.get("part", "") for record in records if record["outcome"] != UNCHECKED or record.get("part")]
        expected = {record.get("part", "") for record in records if record["outcome"] == "expected"}
        try:
            self._lines += report_run(
                run, parts, self._config.rootpath, sorted(self._session.unused), expected, created, series
            )
        except (UsageError, OSError) as error:
            self._problems.append(f"logprob-parity: no report: {visible_line(error)}")


def _cut_off(run: Path, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records of checks that ended before their worker died or the run was broken off: only their parts are there."""
    from ..report.folder import unnamed_parts
    from ..report.history.run_record import check_record_of_entry

    parts = unnamed_parts(run, {record.get("part", "") for record in records})
    return [{"outcome": e["outcome"], "part": name, "history": check_record_of_entry(e)} for name, e in parts.items()]
