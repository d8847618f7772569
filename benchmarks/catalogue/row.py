"""One judged fault: its true effect, the verdict, and whether the verdict and the named cause are right."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_logprob_parity.comparison.result import CAUSES as LAYER_CAUSES
from pytest_logprob_parity.comparison.result import Finding
from pytest_logprob_parity.selftest.truth import TrueEffect

from .causes import causes_of
from .fault import Case


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One fault on one model, judged. `effect` is what float64 says it does to an update.

    It is None for a fault that fails by construction, whatever the objective; `differs` says then whether it did anything.
    `seen` is the same of the engine's logprobs with and without the fault: it has the engine's noise, and is near `effect` in
    float32 where the fault that was planted in the engine is the one that was planted in the reference.
    """

    fault: Case
    model: str
    dtype: str
    effect: TrueEffect | None
    verdict: str
    said: str
    findings: tuple[Finding, ...] = ()
    differs: bool = True
    seen: TrueEffect | None = None

    @property
    def truth(self) -> str:
        """`material`, `between` or `immaterial`; `constructed` where it fails by construction."""
        return "constructed" if self.effect is None else self.effect.size

    @property
    def expected(self) -> str:
        """`fail`, `no fail`, or empty between, and where a proven semantic cause may fail at any size."""
        if self.effect is None:
            return "fail" if self.differs else "no fail"
        if self.effect.size == "material":
            return "fail"
        return "no fail" if self.effect.size == "immaterial" and not self.fault.semantic else ""

    @property
    def failed(self) -> bool:
        """Whether the check failed, or the engine refused."""
        return self.verdict in ("fail", "error")

    @property
    def right(self) -> bool:
        """Whether the verdict is as expected; `unverified` is not `fail`."""
        return not self.expected or self.failed == (self.expected == "fail")

    @property
    def diagnosed(self) -> bool:
        """Whether there is a diagnosis to score: a fault that has to fail, and did."""
        return self.expected == "fail" and self.verdict == "fail"

    @property
    def named(self) -> str:
        """The cause that comes out first: named, or the first candidate."""
        first = self.findings[0] if self.findings else None
        return "" if first is None else first.cause or (first.candidates[0] if first.candidates else "")

    @property
    def right_cause(self) -> bool:
        """Whether the cause that comes out first is the fault's."""
        return self.named in causes_of(self.fault)

    @property
    def right_layer(self) -> bool:
        """Whether the layer that comes out first is the fault's."""
        layers = {layer for layer, causes in LAYER_CAUSES.items() if set(causes) & set(causes_of(self.fault))}
        return bool(self.findings) and self.findings[0].layer in layers
