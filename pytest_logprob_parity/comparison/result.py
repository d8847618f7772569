"""What a comparison says: Comparison, Finding, Gate, and where the worst tokens are. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..errors import ParityError

if TYPE_CHECKING:
    from ..trace import Trace
    from .free_run import FreeRun

#: After the order in which to rule things out.
LAYERS: Final = ("semantic", "path", "head", "weights", "sampling", "noise")


@dataclass(frozen=True)
class Finding:
    """One cause: its layer, its name (None where the evidence does not single one out), candidates, and evidence."""

    layer: str
    cause: str | None
    evidence: str
    candidates: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = self.cause or "one of " + ", ".join(self.candidates)
        return f"{self.layer}: {name} ({self.evidence})"


@dataclass(frozen=True)
class Gate:
    """One number that decides: its value, what is allowed, and the unit both are in."""

    name: str
    value: float
    limit: float
    unit: str = ""

    @property
    def ok(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value <= self.limit


@dataclass(frozen=True)
class TokenDiff:
    """One token on both sides: `sequence` and `position` in the golden, logprobs in nats, ranks from 1 (0: unknown)."""

    sequence: int
    group: int
    sample: int
    position: int
    token_id: int
    text: str
    expected: float
    actual: float
    expected_rank: int
    actual_rank: int

    @property
    def diff(self) -> float:
        """actual - expected."""
        return self.actual - self.expected


@dataclass(frozen=True)
class Comparison:
    """Two traces compared: `verdict` is `pass`, `fail` or `unverified`.

    `metrics` are floats by name (nats, shares from 0 to 1, counts), d = actual - expected over the tokens that were
    compared; `policy_metrics` are the same without truncation, where the sampling truncates and both sides have them.
    """

    verdict: str
    headline: str
    metrics: Mapping[str, float]
    findings: tuple[Finding, ...]
    gates: tuple[Gate, ...]
    worst: tuple[TokenDiff, ...]
    expected: Trace
    actual: Trace
    policy_metrics: Mapping[str, float] = field(default_factory=dict)
    free_run: FreeRun | None = None
    notes: tuple[str, ...] = ()
    recorded: bool = False

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"

    def to_json(self) -> dict[str, Any]:
        """Everything but the traces, as JSON values; what is not a number becomes None."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "metrics": {k: _finite(v) for k, v in self.metrics.items()},
            "policy_metrics": {k: _finite(v) for k, v in self.policy_metrics.items()},
            "findings": [
                {"layer": f.layer, "cause": f.cause, "candidates": list(f.candidates), "evidence": f.evidence}
                for f in self.findings
            ],
            "gates": [
                {"name": g.name, "value": _finite(g.value), "limit": g.limit, "unit": g.unit, "ok": g.ok} for g in self.gates
            ],
            "free_run": None if self.free_run is None else self.free_run.to_json(),
            "notes": list(self.notes),
            "recorded": self.recorded,
        }


class MismatchError(ParityError):
    """The numbers differ from the golden's by more than the tolerance allows, or could not be compared.

    `comparison` holds what was measured.
    """

    __module__ = __package__.partition(".")[0]

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison


def _finite(value: float) -> float | None:
    return float(value) if abs(value) < float("inf") else None
