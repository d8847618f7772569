"""`logprob-parity report`: render results again, merge those of several runs, or report two traces without pytest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..check.two_files import compare_files
from ..comparison.message import failure_message
from ..comparison.vocabulary import Verdict
from ..errors import UsageError
from ..golden import SUFFIX
from .check_entry import make_entry
from .github import add_to_summary, no_summary, workflow_commands
from .merge import read_all
from .outcomes import GOOD, Outcome, counts_of
from .write import results_of, write_report

_OUT: Final = Path("parity-report")
_OUTCOMES: Final[Mapping[Verdict, Outcome]] = {"pass": "passed", "fail": "failed", "unverified": "unverified"}


def report(places: Sequence[Path], out: Path | None, github: bool) -> int:
    """Write a report of `places`; exit status 0 where nothing fails a run, 1 otherwise. Raises ParityError."""
    if any(place.suffix == SUFFIX for place in places):
        if len(places) != 2:
            raise UsageError("a report of traces takes two of them: GOLDEN OBTAINED")
        content = _report_of_two(*places)
        folder = out or _OUT
    else:
        content = read_all(places)
        alone = places[0] if len(places) == 1 else None
        folder = out or (alone if alone is not None and (alone / "results.json").is_file() else _OUT)
    page = write_report(folder, content)
    if github:
        lines = list(workflow_commands(content))
        try:
            if add_to_summary(content) is None:
                lines.append("GITHUB_STEP_SUMMARY is not set: no step summary was written")
        except OSError as error:
            lines.append(no_summary(error))
        print("\n".join(lines))
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts_of(content).items())
    print(f"{page}: {told or 'no checks'}")
    return 0 if set(counts_of(content)) <= set(GOOD) else 1


def _report_of_two(golden: Path, obtained: Path) -> dict[str, Any]:
    """results.json's content for a golden and a trace that lie on the disk: one check, with `logprob-parity diff`'s numbers."""
    checked = compare_files(golden, obtained)
    comparison, told = checked.comparison, checked.golden
    about: dict[str, Any] = {
        "node_id": told.node_id,
        "name": told.name,
        "file": told.node_id.partition("::")[0],
        "line": 1 if told.node_id else 0,
        "golden": str(golden),
        "message": "",
        "obtained": str(obtained),
        "refusal": "",
        "commands": [],
    }
    if not comparison.passed:
        look = f"logprob-parity diff {shlex.quote(str(golden))} {shlex.quote(str(obtained))}"
        about["commands"] = [{"what": "look closer", "command": look}]
        about["message"] = failure_message(comparison, golden=str(golden), about=[], differences=checked.differences, accept="")
    outcome = _OUTCOMES[comparison.verdict]
    return results_of([make_entry(about, outcome, comparison.headline, comparison, checked, Path.cwd())], Path.cwd())
