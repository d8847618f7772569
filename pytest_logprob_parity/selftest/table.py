"""The selftest's table and its summary, for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .catalogue import causes_of
from .run import Row


def header() -> str:
    """The head of the table."""
    return f"{'fault':<38} {'size':<20} {'dtype':<9} {'true effect':>26}  {'verdict':<11} {'expected':<8}  named"


def line(row: Row) -> str:
    """One row of it; a wrong verdict is marked, with what it said."""
    effect = "any" if math.isinf(row.effect) else f"{row.effect:.3g} x margin"
    mark = "" if row.right else f"  <-- WRONG: {row.said}"
    named = row.named if row.verdict == "fail" else ""
    if row.diagnosed and not row.right_cause:
        named += f"  <-- not {causes_of(row.fault)[0]}" + ("" if row.right_layer else ", another layer")
    return (
        f"{row.fault.name:<38} {row.fault.size:<20} {row.dtype:<9} {f'{effect} ({row.on})':>26}  {row.verdict:<11} "
        f"{row.expected or '-':<8}  {named}{mark}"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """How many faults, on which side of the margins, and how many verdicts are wrong."""
    above, below = ([r for r in rows if r.expected == side] for side in ("fail", "no fail"))
    names, told = {r.fault.name for r in rows}, [r for r in rows if r.diagnosed]
    invented = sum(any(f.cause and f.layer != "noise" for f in r.findings) for r in below if r.verdict != "fail")
    return [
        f"{len(names)} faults, {len(rows)} cases on {', '.join(sorted({r.dtype for r in rows}))}",
        f"true effect of 2 margins or more: {len(above)} cases of {len({r.fault.name for r in above})} faults, "
        f"{sum(r.right for r in above)} failed",
        f"true effect of half a margin or less: {len(below)} cases of {len({r.fault.name for r in below})} faults, "
        f"{sum(not r.right for r in below)} failed, {sum(r.verdict == 'unverified' for r in below)} unverified",
        f"between, or semantic below the margins: {sum(not r.expected for r in rows)} cases, not scored",
        f"diagnosis of those that had to fail: {sum(r.right_cause for r in told)} of {len(told)} causes right or first among "
        f"the candidates, {sum(r.right_layer for r in told)} layers right; causes named where nothing failed: {invented}",
    ]


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [
        {
            "fault": r.fault.name, "size": r.fault.size, "dtype": r.dtype, "on": r.on, "verdict": r.verdict,
            "effect": None if math.isinf(r.effect) else r.effect, "expected": r.expected, "right": r.right, "said": r.said,
            "named": r.named, "findings": [str(f) for f in r.findings],
        }
        for r in rows
    ]  # fmt: skip
