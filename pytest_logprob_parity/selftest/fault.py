"""What a fault is, and what came of it: one row of the selftest's table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from .engine_under_test import EngineUnderTest
from .truth import IMMATERIAL, MATERIAL

if TYPE_CHECKING:
    from ..check.ask import Answers

#: What a fault is planted in; `control` is no fault at all.
Kind = Literal["setting", "sampler", "report", "weights", "control"]
KINDS: Final[tuple[Kind, ...]] = ("control", "sampler", "report", "weights", "setting")

#: What a check said: a verdict, or `error` where it ended with an error, which is as red as `fail`.
Outcome = Literal["pass", "unverified", "fail", "error", "not possible"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One fault in one size. `plant` gives the answers of an engine that has it, and takes it back afterwards.

    `recomputes` says that the engine computes anew: its rounding errors are then other ones, fault or no fault. `unchanged`
    says that a check would find nothing changed, so that any other bit fails; only controls are judged like that.
    """

    name: str
    size: str
    kind: Kind
    plant: Callable[[EngineUnderTest], AbstractContextManager[Answers]]
    recomputes: bool = False
    unchanged: bool = False

    def is_named(self, texts: tuple[str, ...]) -> bool:
        """Whether its kind is one of the texts, or its name contains one; for no texts True."""
        return not texts or any(text == self.kind or text in self.name for text in texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One fault, judged.

    `rms` (nats) is the root mean square of the change against the engine without the fault, over the same tokens; None where
    no token has a number. `multiple` is how many times the objective's limit the fault's largest effect is, and `quantity` the
    name of that effect. `cause` is what the check names, `said` its headline, or why the fault is not possible here.
    """

    fault: str
    size: str
    kind: Kind
    outcome: Outcome
    rms: float | None = None
    multiple: float = 0.0
    quantity: str = ""
    cause: str = ""
    said: str = ""

    @classmethod
    def without_answer(cls, fault: Fault, outcome: Outcome, said: str) -> Row:
        """The row of a fault about which there is no answer to compare: not possible here, or the engine broke."""
        row = cls(fault=fault.name, size=fault.size, kind=fault.kind, outcome=outcome, said=said)
        return row if outcome == "not possible" else dataclasses.replace(row, multiple=math.inf, quantity="no answer")

    @property
    def planted(self) -> bool:
        """Whether this is a fault, and was possible here."""
        return self.kind != "control" and self.outcome != "not possible"

    @property
    def failed(self) -> bool:
        """Whether the check failed, or ended with an error."""
        return self.outcome in ("fail", "error")

    @property
    def size_class(self) -> Literal["matters", "near the limit", "too small"]:
        """Whether the fault matters to the objective: at twice its limit it does, below half of it it does not."""
        if self.multiple >= MATERIAL:
            return "matters"
        return "too small" if self.multiple <= IMMATERIAL else "near the limit"

    @property
    def missed(self) -> bool:
        """Whether the fault matters and the check did not fail."""
        return self.planted and self.size_class == "matters" and not self.failed

    @property
    def false_alarm(self) -> bool:
        """Whether the check failed with no fault there."""
        return self.kind == "control" and self.failed

    def to_json(self) -> dict[str, object]:
        """As JSON values; a multiple without bound becomes None."""
        values: dict[str, object] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **values,
            "multiple": self.multiple if math.isfinite(self.multiple) else None,
            "size_class": self.size_class if self.planted else None,
            "missed": self.missed,
            "false_alarm": self.false_alarm,
        }
