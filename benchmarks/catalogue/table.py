"""The catalogue's table and its summary, for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from pytest_logprob_parity.selftest.truth import TrueEffect

from .causes import causes_of
from .row import Row

#: How many of the material cases have to fail; none of them may pass.
HAVE_TO_FAIL: Final = 0.95
#: Faults that hit part of what runs.
_PARTIAL: Final = ("place", "experts")


def header() -> str:
    """The head of the table."""
    return (
        f"{'fault':<38} {'size':<28} {'model':<12} {'dtype':<9} {'true effect':>34}  {'truth':<11} {'verdict':<11} named"
    )  # fmt: skip


def line(row: Row) -> str:
    """One row of it; a wrong verdict is marked, with what it said."""
    effect, named = "by construction", row.named if row.verdict == "fail" else ""
    if row.effect is not None:
        largest = row.effect.largest
        times = "any" if math.isinf(largest.multiple) else f"{largest.multiple:.3g} x limit"
        effect = f"{times} ({largest.name})"
    if row.diagnosed and not row.right_cause:
        named += f"  <-- not {causes_of(row.fault)[0]}" + ("" if row.right_layer else ", another layer")
    mark = "" if row.right else f"  <-- {'UNVERIFIED' if row.verdict == 'unverified' else 'WRONG'}: {row.said}"
    return (
        f"{row.fault.name:<38} {row.fault.size:<28} {row.model:<12} {row.dtype:<9} {effect:>34}  {row.truth:<11} "
        f"{row.verdict:<11} {named}{mark}"
    ).rstrip()


def show(row: Row) -> None:
    """Print one row."""
    print(line(row), flush=True)


def reached(rows: Sequence[Row]) -> bool:
    """Whether no material case passes, enough of them fail, and no immaterial one does."""
    must = [r for r in rows if r.expected == "fail"]
    return (
        all(r.verdict != "pass" for r in must)
        and sum(r.failed for r in must) >= HAVE_TO_FAIL * len(must)
        and not any(r.failed for r in rows if r.expected == "no fail")
    )


def summary(rows: Sequence[Row], objective: str) -> list[str]:
    """How many cases on which side of the limits, by model and dtype, and what their verdicts are."""
    lines = [f"objective {objective}: {len({r.fault.name for r in rows})} faults, {len(rows)} cases", _COUNTS_HEADER]
    groups = sorted({(r.model, r.dtype) for r in rows})
    for model, dtype in groups:
        lines.append(_counts(f"{model}, {dtype}", [r for r in rows if (r.model, r.dtype) == (model, dtype)]))
    if len(groups) > 1:
        lines.append(_counts("all", rows))
    material = [r for r in rows if r.truth == "material"]
    partial = [r for r in material if r.fault.group in _PARTIAL]
    if material:
        failed = sum(r.failed for r in material)
        lines.append(f"material cases: {len(material)}, {failed / len(material):.1%} fail, "
                     f"{sum(r.verdict == 'pass' for r in material)} pass (to reach: {HAVE_TO_FAIL:.0%} and 0)")  # fmt: skip
        lines.append(f"material cases that hit part of what runs (a position, prompt, range of ids, few tokens, experts): "
                     f"{len(partial)}, {len(partial) / len(material):.0%}")  # fmt: skip
    told = [r for r in rows if r.diagnosed]
    below = [r for r in rows if r.expected == "no fail" and not r.failed]
    invented = sum(any(f.cause and f.layer != "noise" for f in r.findings) for r in below)
    lines.append(f"diagnosis of those that had to fail and did: {sum(r.right_cause for r in told)} of {len(told)} causes right "
                 f"or first among the candidates, {sum(r.right_layer for r in told)} layers right; causes named where nothing "
                 f"failed: {invented}")  # fmt: skip
    return lines


_COLUMNS: Final = (
    ("material", "fail", "unverified", "pass"), ("between",), ("immaterial", "fail", "unverified", "pass"),
    ("constructed", "right"),
)  # fmt: skip
_COUNTS_HEADER: Final = f"{'':<26}" + "   ".join(
    " ".join(f"{name:>{max(len(name), 4)}}" for name in group) for group in _COLUMNS
)


def _counts(name: str, rows: Sequence[Row]) -> str:
    values: list[list[int]] = []
    for group in _COLUMNS:
        of = [r for r in rows if r.truth == group[0]]
        count = {
            "fail": sum(r.failed for r in of),
            "unverified": sum(r.verdict == "unverified" for r in of),
            "pass": sum(r.verdict == "pass" for r in of),
            "right": sum(r.right for r in of),
        }
        values.append([len(of), *(count[part] for part in group[1:])])
    return f"{name:<26}" + "   ".join(
        " ".join(f"{value:>{max(len(part), 4)}}" for part, value in zip(group, numbers, strict=True))
        for group, numbers in zip(_COLUMNS, values, strict=True)
    )


def _finite(effect: TrueEffect | None) -> float | None:
    return None if effect is None or math.isinf(effect.multiple) else effect.multiple


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values; an infinite multiple is None."""
    return [
        {
            "fault": r.fault.name, "size": r.fault.size, "group": r.fault.group, "model": r.model, "dtype": r.dtype,
            "truth": r.truth, "on": "" if r.effect is None else r.effect.largest.name,
            "effect": _finite(r.effect), "seen": _finite(r.seen),
            "quantities": {} if r.effect is None else {q.name: q.value for q in r.effect.quantities if math.isfinite(q.value)},
            "verdict": r.verdict, "expected": r.expected, "right": r.right, "said": r.said, "named": r.named,
            "findings": [str(f) for f in r.findings],
        }
        for r in rows
    ]  # fmt: skip
