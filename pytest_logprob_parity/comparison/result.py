"""What a comparison says: Comparison, Finding, Gate, FreeRun, and where the worst tokens are. Data only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ..errors import ParityError

if TYPE_CHECKING:
    from ..trace import Trace
    from .intervals import Clusters

#: Layers, in the order in which to rule them out, and the causes of each.
CAUSES: Final[Mapping[str, tuple[str, ...]]] = {
    "semantic": (
        "raw_vs_processed", "temperature", "truncation", "penalties", "shifted_positions", "wrong_token", "wrong_values",
    ),
    "path": (
        "prefix_cache", "async_scheduling", "chunked_prefill", "batch_shape", "compilation", "attention_backend",
        "kv_cache_dtype", "parallelism", "speculative_decoding", "expert_routing", "engine_build",
    ),
    "head": ("head_precision",),
    "weights": ("weights_differ", "weight_dtype", "quantization", "adapter", "stale_weights", "stale_kv_cache"),
    "sampling": ("seed_stream",),
    "noise": ("numerical_noise",),
}  # fmt: skip
LAYERS: Final = tuple(CAUSES)

#: What the two sides of a comparison are called, unless they are others: a rollout and a trainer, say.
SIDES: Final = ("golden", "now")


def in_words(side: str) -> str:
    """Where a number is, in a sentence: `in the golden`, `now`."""
    return side if side == SIDES[1] else f"in the {side}"


def by_their_names(text: str, sides: tuple[str, str]) -> str:
    """A sentence about `the golden` and `this run`, where the two sides are called otherwise."""
    if sides == SIDES:
        return text
    return text.replace("the golden", f"the {sides[0]}").replace("this run", f"the {sides[1]}")


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
class Divergence:
    """Where a free run first leaves the golden. `gap` is the golden's top-2 gap there (nats; NaN without a top-2)."""

    sequence: int
    turn: int
    position: int
    golden: str
    now: str
    gap: float
    near_tie: bool

    def __str__(self) -> str:
        gap = f"top-2 gap {self.gap:.3g} nats" if math.isfinite(self.gap) else "top-2 gap not recorded"
        return f"sequence {self.sequence}, position {self.position}: {self.golden} became {self.now} ({gap}" + (
            ", a near tie)" if self.near_tie else ")"
        )


@dataclass(frozen=True)
class FreeRun:
    """How many turns were written again, how many of them diverged, and how many only ended elsewhere.

    `relabelled` counts those that end with an end token at the last allowed place, and have the other of both reasons.
    `ends` are those of `stops_changed` where one side wrote its end token and the other went on.
    `likelihood_shift` is how much likelier its tokens are than the golden's, in nats a token on average over turns, and
    `shift_p` how often chance alone does that (paired t): both runs are draws from one distribution, whatever the seeds.
    `distinct` counts the different completions (`distinct_p`: how often chance leaves so few now), `not_likeliest` the
    tokens that were not the likeliest, in the golden and now.
    """

    turns: int
    diverged: int
    stops_changed: int
    divergences: tuple[Divergence, ...]
    likelihood_shift: float = 0.0
    shift_p: float = 1.0
    distinct: tuple[int, int] = (0, 0)
    not_likeliest: tuple[int, int] = (0, 0)
    relabelled: int = 0
    distinct_p: float = 1.0
    ends: tuple[Divergence, ...] = ()

    @property
    def same(self) -> bool:
        """Whether every turn came back as it was, its end included."""
        return self.diverged == 0 and self.stops_changed == 0 and self.relabelled == 0

    def to_json(self) -> dict[str, Any]:
        """The counts and the first divergences, as JSON values."""
        return {
            "turns": self.turns,
            "diverged": self.diverged,
            "stops_changed": self.stops_changed,
            "relabelled": self.relabelled,
            "first": [str(d) for d in self.divergences[:10]],
            "likelihood_shift": self.likelihood_shift,
            "shift_p": self.shift_p,
            "distinct": list(self.distinct),
            "not_likeliest": list(self.not_likeliest),
        }

    def __str__(self) -> str:
        if self.same:
            return f"all {self.turns} came back token for token and stopped where they stopped"
        text = f"{self.diverged} of {self.turns} wrote other tokens"
        if self.stops_changed:
            text += f", {self.stops_changed} stopped elsewhere"
        if self.relabelled:
            text += f", {self.relabelled} name the other of two finish reasons that both hold"
        return text + (f"; first at {self.divergences[0]}" if self.divergences else "")


@dataclass(frozen=True)
class Logged:
    """What a training framework would log of the two sides: its metrics by its own names, and the same in lines."""

    framework: str
    metrics: Mapping[str, float]
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        values = {name: _finite(value) for name, value in self.metrics.items()}
        return {"framework": self.framework, "metrics": values, "lines": list(self.lines)}


@dataclass(frozen=True)
class Comparison:
    """Two traces compared: `verdict` is `pass`, `fail` or `unverified`.

    `metrics` are floats by name (nats, shares from 0 to 1, counts), d = actual - expected over the tokens that were
    compared; `policy_metrics` are the same without truncation, where the sampling truncates and both sides have them.
    `level` is what was asked (`bitwise`, `noise`, `rl`), `setup` how the two sides' fingerprints compare (`same`,
    `compatible`, or `unknown` for traces in hand), `difference` the answer to "is it different", `shows` what the comparison
    has shown and would have caught, in words, `clusters` the sums by sequence that its bounds rest on, `sides` what the two
    are called, and `logged` what a framework's own metrics say, where they were asked for.
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
    sides: tuple[str, str] = SIDES
    logged: Logged | None = None

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
                    "limit": _finite(g.limit),
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


def _finite(value: float) -> float | None:
    return float(value) if abs(value) < float("inf") else None
