"""What a check leaves when it is over: its record, what it obtained, its part of the report. Light until it has to write."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ..errors import GoldenError, ParityError
from .stash import PROPERTY, SESSION, note_outcome, tell

if TYPE_CHECKING:
    from ..check.context import Checked, Context
    from ..comparison.result import Comparison
    from ..errors import Kind
    from ..report.outcomes import Outcome


@dataclass(frozen=True, slots=True)
class Kept:
    """Where an obtained trace lies, from the root, and why it cannot be accepted ("" where it can)."""

    path: str
    refusal: str


def told_of(error: BaseException) -> tuple[Kind, str]:
    """The outcome and the message of a check that ended in this error."""
    if isinstance(error, ParityError):
        return error.kind, str(error)
    return "engine", f"{type(error).__name__}: {error}"


class Records:
    """Those of the checks of one test."""

    def __init__(self, item: pytest.Item, node_id: str) -> None:
        self._item = item
        self._config = item.config
        self._session = item.config.stash[SESSION]
        self._node_id = node_id

    def shown(self, path: Path) -> str:
        """A path as people see it: from the root, where it lies below."""
        return self._session.shown(path)

    def command(self, flag: str, variant: str = "") -> str:
        """How to run this test alone, from where pytest was called, with a flag, this run's ini file and settings; with the
        goldens of `variant`, by default this run's.
        """
        option = self._config.getoption
        settings = f" -c {shlex.quote(str(option('inifilename')))}" if option("inifilename") else ""
        settings += f" --rootdir {shlex.quote(str(option('rootdir')))}" if option("rootdir") else ""
        settings += "".join(f" --parity-set {shlex.quote(s)}" for s in option("--parity-set"))
        settings += f" --parity-server {shlex.quote(self._session.server)}" if self._session.server else ""
        variant = variant or self._session.variant
        settings += f" --parity-variant {variant}" if variant else ""
        file, colons, rest = self._node_id.partition("::")
        return f"pytest {shlex.quote(self._from_here(file) + colons + rest)} {flag}{settings}"

    def _from_here(self, shown: str) -> str:
        """A path from the root as one from where pytest was called; absolute ones stay."""
        config = self._config
        return shown if Path(shown).is_absolute() else os.path.relpath(config.rootpath / shown, config.invocation_params.dir)

    def keep(self, path: Path, name: str, checked: Checked, record: Callable[[Path], object]) -> Kept | None:
        """What an engine said in place of the golden at `path`, which the check `name` asked for; a full disk is no reason to
        hide the failure.
        """
        from ..check.obtained import folder_for, keep

        try:
            kept = folder_for(self._config.rootpath) / path.relative_to(self._session.golden_dir)
            keeps = record if self._session.keep_candidates else None
            return Kept(self.shown(kept), keep(kept, checked, self.shown(path), (self._node_id, name), keeps).refusal)
        except (OSError, GoldenError):
            return None

    def forget(self, path: Path) -> None:
        """Remove what an earlier run kept."""
        from ..check.obtained import OBTAINED, forget

        forget(self._config.rootpath / OBTAINED / path.relative_to(self._session.golden_dir))

    def drop(self) -> None:
        """Forget what an earlier attempt at this test has left, where it is run again: the last one counts."""
        kept = [(name, value) for name, value in self._item.user_properties if name != PROPERTY]
        dropped = [json.loads(str(value)) for name, value in self._item.user_properties if name == PROPERTY]
        self._item.user_properties[:] = kept
        if self._session.report is not None and dropped:
            from ..report.folder import remove_part

            for record in dropped:
                remove_part(self._session.report, record.get("part", ""))

    def note_error(self, error: BaseException) -> None:
        """Leave the record of what went wrong outside of a check: in a marker, a fixture, a call to an engine."""
        from ..check.context import Context

        self.note(Context(node_id=self._node_id), *told_of(error))

    def note(
        self,
        context: Context,
        outcome: Outcome,
        message: str,
        comparison: Comparison | None = None,
        checked: Checked | None = None,
        kept: Kept | None = None,
        *,
        expected: bool = False,
    ) -> None:
        """Leave the record of one check, for the summary and junitxml, and its part of the report where there is to be one.

        `expected` says that the test waits for this failure.
        """
        headline = next(iter(message.splitlines()), "")
        record: dict[str, Any] = {"outcome": outcome, "golden": context.shown_path, "headline": headline}
        if expected:
            record["expected"] = True
        if context.name:
            record["name"] = context.name
        if comparison is not None:
            told = comparison.to_json()
            record |= {key: told[key] for key in ("verdict", "level", "objective", "setup", "difference", "shows", "notes")}
            if told["logged"] is not None:
                record["logged"] = told["logged"]
            record["metrics"] = {k: v for k, v in told["metrics"].items() if v is not None}
        if self._session.history is not None:
            from ..report.history.run_record import check_record, made_by

            digest = "" if checked is None else checked.golden.digest
            place = {"node_id": self._node_id, "name": context.name, "golden": context.shown_path, "digest": digest}
            record["history"] = check_record(place, outcome, record, record.get("metrics", {}), made_by(comparison, checked))
        if self._session.report is not None:
            about = self._about(context, outcome, message, kept)
            record["part"] = self._write_part(self._session.report, about, record, comparison, checked)
        note_outcome(self._item, record)

    def write_part_of(self, error: ParityError, golden: str) -> str:
        """The part of the report of an error that no check told of; "" where there is no report."""
        from ..check.context import Context

        if self._session.report is None:
            return ""
        context = Context(node_id=self._node_id, shown_path=golden)
        record = {"outcome": error.kind, "headline": str(error).splitlines()[0]}
        return self._write_part(self._session.report, self._about(context, "usage", str(error), None), record, None, None)

    def _about(self, context: Context, outcome: Outcome, message: str, kept: Kept | None) -> dict[str, Any]:
        file, line, _ = self._item.location
        bad = outcome not in ("passed", "recorded")
        return {
            "node_id": self._node_id,
            "name": context.name,
            "file": file.replace(os.sep, "/"),
            "line": 0 if line is None else line + 1,
            "golden": context.shown_path,
            "message": message if bad else "",
            "obtained": "" if kept is None else kept.path,
            "refusal": "" if kept is None else kept.refusal,
            "commands": self._commands(context, kept) if bad and context.shown_path else [],
        }

    def _commands(self, context: Context, kept: Kept | None) -> list[dict[str, str]]:
        commands = [{"what": "record again", "command": self.command("--update-golden")}]
        if kept is not None:
            commands.append({"what": "diagnose", "command": self.command("--parity-diagnose")})
            golden, obtained = (shlex.quote(self._from_here(path)) for path in (context.shown_path, kept.path))
            commands.append({"what": "look closer", "command": f"logprob-parity diff {golden} {obtained}"})
            if not kept.refusal:
                root = self._from_here("")
                below = "" if root == "." else f" --root {shlex.quote(root)}"
                accept = "logprob-parity accept"
                told = {"what": "accept", "command": f"{accept} {obtained}{below}", "for_all": f"{accept}{below}"}
                commands.insert(0, told)
        called = os.path.relpath(self._config.invocation_params.dir, self._config.rootpath).replace(os.sep, "/")
        return [{**command, "from": called} for command in commands]

    def _write_part(
        self,
        report: Path,
        about: Mapping[str, Any],
        record: Mapping[str, Any],
        comparison: Comparison | None,
        checked: Checked | None,
    ) -> str:
        """The name of this check's part of the report; "" where it could not be written, which the report then says."""
        from ..report.check_entry import make_entry
        from ..report.folder import report_of, write_part

        headline = record["headline"] if comparison is None else comparison.headline
        entry = make_entry(about, record["outcome"], headline, comparison, checked, self._config.rootpath)
        try:
            return write_part(report, entry)
        except OSError as error:
            tell(self._config, f"{report_of(report)}: not written: {error.strerror or error}")
            return ""
