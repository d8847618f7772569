"""The selftest's table and its summary, for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .fault import Row
from .truth import IMMATERIAL, MATERIAL


def header() -> str:
    """The head of the table."""
    return _line("fault", "size", "verdict", "RMS, nats", "x limit", "cause named")


def line(row: Row) -> str:
    """One row of the table; what is wrong about it is marked."""
    outcome = "fail (error)" if row.outcome == "error" else row.outcome
    if row.outcome == "not possible":
        return _line(row.fault, row.size, outcome, "", "", row.said)
    rms = "no number" if row.rms is None else f"{row.rms:.2g}"
    times = f"{row.multiple:.2g}" if math.isfinite(row.multiple) else "any"
    named = row.cause or (row.said if row.outcome == "error" else "")
    mark = "  <-- NOT CAUGHT" if row.missed else "  <-- FALSE ALARM" if row.false_alarm else ""
    if row.false_alarm:
        mark += f": {row.said}"
    return _line(row.fault, row.size, outcome, rms, times, named + mark)


def _line(*cells: str) -> str:
    fault, size, outcome, rms, times, named = cells
    return f"{fault:<33} {size:<32} {outcome:<12} {rms:>9} {times:>8}  {named}".rstrip()


def summary(rows: Sequence[Row], objective: str) -> list[str]:
    """One sentence that says what is caught, and what the other rows are."""
    matters = [row for row in rows if row.planted and row.size_class == "matters"]
    missed = [row for row in matters if row.missed]
    controls = [row for row in rows if row.kind == "control" and row.outcome != "not possible"]
    alarms = [row for row in controls if row.false_alarm]
    caught = f"{len(matters) - len(missed)} of {len(matters):,} faults are caught"
    left = f"not caught: {_names(missed)}; " if missed else ""
    lines = [
        f"On this machine, with this golden, {caught}; {left}false alarms {len(alarms)} of {len(controls)}"
        + (f": {_names(alarms)}" if alarms else "") + "."
    ]  # fmt: skip
    lines.append(
        f"A fault counts where its true effect is {MATERIAL:g} times the limit of objective {objective} or more. "
        + _others(rows)
    )
    unsure = [row for row in controls if row.outcome == "unverified"]
    if unsure:
        lines.append(f"Unverified although nothing was wrong: {_names(unsure)}: the golden has too few prompts")
    return lines


def _others(rows: Sequence[Row]) -> str:
    """What the rows are that do not count."""
    planted = [row for row in rows if row.planted]
    small = [row for row in planted if row.size_class == "too small"]
    near = [row for row in planted if row.size_class == "near the limit"]
    impossible = [row for row in rows if row.outcome == "not possible"]
    return (
        f"Not counted: {len(near)} near the limit ({IMMATERIAL:g} to {MATERIAL:g} times), {len(small)} too small to matter "
        f"(of these {sum(row.failed for row in small)} fail all the same), {len(impossible)} not possible here."
    )


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row.fault} ({row.size})" for row in rows)


def exit_status(rows: Sequence[Row]) -> int:
    """0 where all faults that matter are caught and no control fails, and there was one of them; 1 otherwise."""
    something = any(row.outcome != "not possible" for row in rows)
    return 0 if something and not any(row.missed or row.false_alarm for row in rows) else 1


def to_json(rows: Sequence[Row], objective: str) -> dict[str, Any]:
    """The rows and the summary as JSON values."""
    return {"rows": [row.to_json() for row in rows], "summary": summary(rows, objective)[0], "status": exit_status(rows)}
