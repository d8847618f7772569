"""What a run says at its end: one line, and below it what somebody has to look at, or asked to see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..comparison.findings import one_of
from ..errors import ParityError
from ..grammar import counted
from ..visible_text import visible_line
from .unchecked import SWALLOWED, UNCHECKED

#: How many checks that passed are told of, without -v.
_SHOWN: Final = 5
_GOOD: Final = ("passed", "recorded")
#: Outcomes that fail a run, as the line has them: of one, of several.
_BAD: Final[Mapping[str, tuple[str, str]]] = {
    "failed": ("failed", "failed"),
    "unverified": ("unverified", "unverified"),
    "golden": ("without a usable golden", "without a usable golden"),
    "incomparable": ("incomparable", "incomparable"),
    "usage": ("misused", "misused"),
    "engine": ("engine error", "engine errors"),
    SWALLOWED: ("failed and swallowed by its test", "failed and swallowed by their tests"),
}
_CHECKED: Final = ("passed", "failed", "unverified", "warned", "expected", SWALLOWED)


class Line(NamedTuple):
    """A line, and its colour (`red`, `yellow`, "")."""

    text: str
    colour: str = ""


def summary(
    records: Sequence[Mapping[str, Any]], unused: Sequence[str], uncompared: Sequence[str], verbosity: int
) -> Iterator[Line]:
    """The lines for the records of all checks; nothing where there is nothing to say.

    `unused` are goldens whose test is gone, `uncompared` those that no check of their test asked for. With a `verbosity`
    below 0 (`-q`) all checks that pass have one line in all; below -1 what was recorded has, too.
    """
    counts = Counter(_kind(record) for record in records)
    parts = list(_parts(counts, len(unused), len(uncompared)))
    if not parts:
        return
    bad = any(counts.get(kind) for kind in (*_BAD, "unchecked, fails"))
    odd = unused or uncompared or counts.get("warned") or counts.get(UNCHECKED)
    yield Line(f"logprob-parity: {', '.join(parts)}", "red" if bad else "yellow" if odd else "")
    for record in records:
        kind = _kind(record)
        if kind == "warned":
            yield _line(f"  unverified {record['golden']}: {record['headline']}", "yellow")
        elif kind == SWALLOWED:
            yield _line(f"  swallowed by its test: {record['golden']}: {record['headline']}", "red")
        elif kind in (UNCHECKED, "unchecked, fails"):
            yield _line(f"  {record['test']}: {record['headline']}", "red" if kind != UNCHECKED else "yellow")
    shown = _GOOD if verbosity >= 0 else ("recorded",) if verbosity == -1 else ()
    good = [record for record in records if record["outcome"] in shown and "shows" in record]
    most = len(good) if verbosity > 0 else _SHOWN
    for record in good[:most]:
        yield from map(_line, _told(record))
    if len(good) > most:
        yield Line(f"  and {len(good) - most} more; -v shows all")
    for path in unused:
        yield _line(f"  unused, its test is gone: {path}", "yellow")
    for path in uncompared:
        yield _line(f"  unused, no check of its test asked for it: {path}", "yellow")
    if (unused or uncompared) and verbosity >= 0:
        yield Line("  renamed? `logprob-parity move`; to be removed: `logprob-parity prune`")


def one_line(error: ParityError) -> str:
    """An error in a line that begins with what it is: `fail: raw_vs_processed: The logprobs do not mean the same`."""
    first = next(iter(str(error).splitlines()), "")
    comparison = getattr(error, "comparison", None)
    if comparison is None:
        return first if error.kind == ParityError.kind else f"{error.kind}: {first}"
    causes = [str(finding.cause or f"{finding.layer} ({one_of(finding.candidates)})") for finding in comparison.findings[:1]]
    return ": ".join([comparison.verdict, *causes, first.removeprefix(f"{comparison.verdict}: ")])


def _kind(record: Mapping[str, Any]) -> str:
    return "unchecked, fails" if record["outcome"] == UNCHECKED and record["fails"] else str(record["outcome"])


def _parts(counts: Mapping[str, int], unused: int, uncompared: int) -> Iterator[str]:
    if recorded := counts.get("recorded"):
        yield f"{recorded} recorded"
    if checked := sum(counts.get(outcome, 0) for outcome in _CHECKED):
        yield f"{checked} checked"
    for kind, (one, several) in _BAD.items():
        if count := counts.get(kind):
            yield f"{count} {one if count == 1 else several}"
    if count := counts.get(UNCHECKED, 0) + counts.get("unchecked, fails", 0):
        yield f"{counted(count, 'tests')} that compared nothing"
    if count := counts.get("warned"):
        yield f"{count} unverified and only warned of"
    if count := counts.get("expected"):
        yield f"{count} failed as expected"
    if count := unused + uncompared:
        yield counted(count, "unused goldens")


def _line(text: str, colour: str = "") -> Line:
    return Line(visible_line(text), colour)


def _told(record: Mapping[str, Any]) -> list[str]:
    """What a check that passed, or a recording, has shown: a failure has its own message."""
    name = record["golden"] + (f", check {record['name']!r}" if record.get("name") else "")
    if record["outcome"] == "recorded":
        about = [f"  recorded {name}", *(f"    {note['text']}" for note in record["notes"])]
    else:
        judged = f"{record['setup']} setup, level {record['level']}, objective {record['objective']}"
        about = [f"  pass ({judged}) {name}: {record['headline']}"]
        about.append(f"    different? {record['difference']['text']}")
    return about + [f"    {line}" for line in [*record["shows"], *record.get("logged", {}).get("lines", ())]]
