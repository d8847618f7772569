"""What a comparison says: Comparison, what it is made of, and the error that carries it. Data only: light to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ParityError
from ..notes import Note as Note
from .difference import NOT_ASKED
from .difference import Difference as Difference
from .findings import CAUSES as CAUSES
from .findings import Finding as Finding
from .free_generation.result import Divergence as Divergence
from .free_generation.result import FreeRun as FreeRun
from .gate import Errors as Errors
from .gate import Gate as Gate
from .json_values import finite_or_none
from .shown import Shown as Shown
from .shown import shown_lines
from .sides import SIDES as SIDES
from .tally import TALLY as TALLY
from .token_diff import TokenDiff as TokenDiff
from .vocabulary import LEVELS as LEVELS
from .vocabulary import Level, Verdict

if TYPE_CHECKING:
    from ..golden.setup import Setup
    from ..trace import Trace


@dataclass(frozen=True, slots=True)
class Logged:
    """What a training framework would log of the two sides: its metrics by its own names, and the same in lines."""

    framework: str
    metrics: Mapping[str, float]
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        values = {name: finite_or_none(value) for name, value in self.metrics.items()}
        return {"framework": self.framework, "metrics": values, "lines": list(self.lines)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two traces compared: `verdict` is `pass`, `fail` or `unverified`.

    `metrics` are floats by name (nats, shares from 0 to 1, counts), d = actual - expected over the tokens that were
    compared; `policy_metrics` are the same without truncation, where the sampling truncates and both sides have them.
    `level` is what fails (`bitwise`, `noise`, `rl`), `setup` how the two sides' fingerprints compare (`same`,
    `compatible`, or `unknown` for traces in hand), `objective` whose limits hold, `difference` the answer to "is it
    different", `shown` what the comparison says of other prompts, `sides` what the two are called, and `logged` what a
    framework's own metrics say, where one was named.
    """

    verdict: Verdict
    headline: str
    metrics: Mapping[str, float]
    findings: tuple[Finding, ...]
    gates: tuple[Gate, ...]
    worst: tuple[TokenDiff, ...]
    expected: Trace
    actual: Trace
    policy_metrics: Mapping[str, float] = field(default_factory=dict)
    free_run: FreeRun | None = None
    notes: tuple[Note, ...] = ()
    recorded: bool = False
    level: Level = "rl"
    setup: Setup = "unknown"
    objective: str = "token"
    difference: Difference = NOT_ASKED
    shown: Shown | None = None
    sides: tuple[str, str] = SIDES
    logged: Logged | None = None

    @property
    def shows(self) -> tuple[str, ...]:
        """What the comparison says of other prompts, in words; () where it has nothing to say of them."""
        return () if self.shown is None else shown_lines(self.shown)

    @property
    def passed(self) -> bool:
        """Whether the verdict is `pass`."""
        return self.verdict == "pass"

    def to_json(self) -> dict[str, Any]:
        """Everything but the traces and sums, as JSON values; what is not a number becomes None."""
        return {
            "verdict": self.verdict,
            "headline": self.headline,
            "metrics": {k: finite_or_none(v) for k, v in self.metrics.items()},
            "policy_metrics": {k: finite_or_none(v) for k, v in self.policy_metrics.items()},
            "findings": [finding.to_json() for finding in self.findings],
            "gates": [gate.to_json() for gate in self.gates],
            "objective": self.objective,
            "level": self.level,
            "setup": self.setup,
            "difference": {
                "different": self.difference.different,
                "text": str(self.difference),
                "p_value": finite_or_none(self.difference.p_value),
                "decided": self.difference.decided,
            },
            "shows": list(self.shows),
            "shown": None if self.shown is None else self.shown.to_json(),
            "free_run": None if self.free_run is None else self.free_run.to_json(),
            "notes": [{"key": note.key, "text": str(note)} for note in self.notes],
            "recorded": self.recorded,
            "logged": None if self.logged is None else self.logged.to_json(),
        }


class MismatchError(ParityError):
    """The numbers differ from the golden's by more than the tolerance allows, or could not be compared.

    `comparison` holds what was measured.
    """

    __module__ = __package__.partition(".")[0]

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison
