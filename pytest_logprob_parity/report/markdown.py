"""The step summary: results.json as a table in GitHub's Markdown. Only the standard library."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..visible_text import visible
from .outcomes import EXPECTED, GOOD, IN_WORDS, WARNED, counts_of
from .titles import cause_of, title_of

#: Checks that are listed one by one; GitHub cuts a summary off at 1 MiB.
_LISTED: Final = 60
_LONGEST: Final = 300
#: Checks that are named because they drift.
_DRIFTS: Final = 5
_MARKS: Final = {"passed": "✅", "recorded": "🆕", "unverified": "⚠️", WARNED: "⚠️", EXPECTED: "☑️"}
#: The numbers of a row: name, metric.
_COLUMNS: Final = (("tokens", "n_tokens"), ("mean d", "mean_diff"), ("RMS", "rms_diff"), ("max \\|d\\|", "max_abs_diff"))


def render_markdown(content: Mapping[str, Any]) -> str:
    """A headline, a table of the checks (worst first, those that pass only counted), and how to accept."""
    counts = counts_of(content)
    told = ", ".join(f"{count} {IN_WORDS[outcome]}" for outcome, count in counts.items())
    lines = [f"### Logprob parity: {told or 'no checks'}", ""]
    bad = [check for check in content["checks"] if check["outcome"] != "passed"]
    if bad:
        names = " | ".join(name for name, _ in _COLUMNS)
        lines += [f"| | check | verdict | cause | {names} | |", f"|---|---|---|---|{'---:|' * len(_COLUMNS)}---|"]
        lines += [_row(check) for check in bad[:_LISTED]]
        lines += ["", f"and {len(bad) - _LISTED} more: see the report"] if len(bad) > _LISTED else []
    failing = [check for check in bad if check["outcome"] not in GOOD]
    accept = [command for check in failing for command in check["commands"] if command["what"] == "accept"]
    if accept:
        name = "command" if len(accept) == 1 else "for_all"
        shown = list(dict.fromkeys(command.get(name, command["command"]) for command in accept))
        lines += ["", "To accept, with the artifact of this run unpacked in the repository:", "", *_code(shown)]
    drifts = [f"{title_of(c)} ({', '.join(left)})" for c in content["checks"] if (left := c.get("history", {}).get("outside"))]
    lines += ["", f"Outside their band (a warning, not a verdict): {escape(', '.join(drifts[:_DRIFTS]))}"] if drifts else []
    lines += [f"and {len(drifts) - _DRIFTS} more: see the report"] if len(drifts) > _DRIFTS else []
    unused = [escape(path) for path in content["unused"]]
    lines += ["", f"{len(unused)} unused goldens: {', '.join(unused)}"] if unused else []
    return "\n".join(lines) + "\n"


def _row(check: Mapping[str, Any]) -> str:
    numbers = [_number(check["metrics"].get(metric)) for _, metric in _COLUMNS]
    cells = [
        _MARKS.get(check["outcome"], "❌"), escape(title_of(check)), escape(IN_WORDS.get(check["outcome"], check["outcome"])),
        escape(cause_of(check)), *numbers, escape(check["headline"]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value == int(value) and abs(value) >= 1 else f"{value:.3g}"


def _code(commands: Sequence[str]) -> list[str]:
    return ["```sh", *(visible(command).replace("`", "'").replace("\n", " ") for command in commands), "```"]


def escape(text: str) -> str:
    """Text in a cell: on one line, nothing in it is markup, a mention or a link."""
    shown = " ".join(visible(text).split())
    shown = shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"
    return re.sub(r"[&<>|`*_~\[\]()\\@#:!$]", lambda match: f"&#{ord(match[0])};", shown)
