"""What a comparison says: Comparison, Finding, Gate, and where the worst tokens are. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..errors import ParityError

if TYPE_CHECKING:
    from ..trace import Trace
    from .free_run import FreeRun
    from .intervals import Clusters

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
    """One number that decides: its value, what is allowed, and the unit both are in.

    `bound` is the upper 95 % confidence bound of what the value says of other prompts; None where it is a count.
    """

    name: str
    value: float
    limit: float
    unit: str = ""
    bound: float | None = None

    @property
    def ok(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value <= self.limit

    @property
    def sure(self) -> bool:
        """Whether the bound is within the limit too."""
        return self.ok and (self.bound is None or self.bound <= self.limit)


@dataclass(frozen=True)
class Difference:
    """The answer to "is it different", whether or not it matters.

    `different` is None where it is not known; `p_value` is that of the block permutation test (NaN where none was made).
    """

    different: bool | None
    reason: str
    p_value: float = float("nan")

    def __str__(self) -> str:
        return f"{ {True: 'yes', False: 'no', None: 'not known'}[self.different] }: {self.reason}"


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
    `level` is what was asked (`bitwise`, `noise`, `rl`), `setup` how the two sides' fingerprints compare (`same`,
    `compatible`, or `unknown` for traces in hand), `difference` the answer to "is it different", `shows` what the comparison
    has shown and would have caught, in words, and `clusters` the sums by sequence that its bounds rest on.
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
    level: str = "rl"
    setup: str = "unknown"
    difference: Difference = Difference(None, "not asked")
    shows: tuple[str, ...] = ()
    clusters: Clusters | None = None

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"

    def to_json(self) -> dict[str, Any]:
        """Everything but the traces and sums, as JSON values; what is not a number becomes None."""
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
                {
                    "name": g.name,
                    "value": _finite(g.value),
                    "limit": g.limit,
                    "unit": g.unit,
                    "ok": g.ok,
                    "bound": None if g.bound is None else _finite(g.bound),
                }
                for g in self.gates
            ],
            "level": self.level,
            "setup": self.setup,
            "difference": {
                "different": self.difference.different,
                "text": str(self.difference),
                "p_value": _finite(self.difference.p_value),
            },
            "shows": list(self.shows),
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
