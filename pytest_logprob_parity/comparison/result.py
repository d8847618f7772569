"""What a comparison says: Comparison, Finding, Gate, FreeRun, and where the worst tokens are. Data only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, get_args

from ..errors import ParityError

if TYPE_CHECKING:
    from ..trace import Trace

Verdict: TypeAlias = Literal["pass", "fail", "unverified"]
#: What fails: any other bit; any difference beyond what other batch compositions do; an effect that matters to an RL update.
Level: TypeAlias = Literal["bitwise", "noise", "rl"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
#: How two fingerprints compare.
Setup: TypeAlias = Literal["same", "compatible", "unknown"]
GateKey: TypeAlias = Literal[
    "nan", "nucleus_flips", "mean_diff", "k3", "clip_share", "weight_variance", "outlier_tokens", "outlier_sequences"
]

OUTLIERS: Final[tuple[GateKey, ...]] = ("outlier_tokens", "outlier_sequences")
#: What a gate's number is, in words.
GATE_NAMES: Final[Mapping[GateKey, str]] = {
    "nan": "NaN or +inf",
    "nucleus_flips": "nucleus flips",
    "mean_diff": "|mean difference|",
    "k3": "k3 (KL)",
    "clip_share": "ratios outside the clip",
    "weight_variance": "variance of the weights",
    "outlier_tokens": "with a token off by more than",
    "outlier_sequences": "with an RMS above",
}

SemanticCause: TypeAlias = Literal[
    "raw_vs_processed",
    "temperature",
    "truncation",
    "penalties",
    "min_tokens",
    "shifted_positions",
    "wrong_token",
    "wrong_values",
]
PathCause: TypeAlias = Literal[
    "prefix_cache", "async_scheduling", "chunked_prefill", "batch_shape", "compilation", "attention_backend",
    "kv_cache_dtype", "parallelism", "speculative_decoding", "expert_routing", "engine_build",
]  # fmt: skip
WeightsCause: TypeAlias = Literal[
    "weights_differ", "weight_dtype", "quantization", "adapter", "stale_weights", "stale_kv_cache"
]  # fmt: skip
TrainerCause: TypeAlias = Literal["attention_mask", "dropout", "packing", "prompt", "logits"]
Cause: TypeAlias = (
    SemanticCause
    | PathCause
    | Literal["head_precision"]
    | TrainerCause
    | WeightsCause
    | Literal["seed_stream", "numerical_noise"]
)
Layer: TypeAlias = Literal["semantic", "path", "head", "trainer", "weights", "sampling", "noise"]
#: Layers, in the order in which to rule them out, and the causes of each.
CAUSES: Final[Mapping[Layer, tuple[Cause, ...]]] = {
    "semantic": get_args(SemanticCause),
    "path": get_args(PathCause),
    "head": ("head_precision",),
    "trainer": get_args(TrainerCause),
    "weights": get_args(WeightsCause),
    "sampling": ("seed_stream",),
    "noise": ("numerical_noise",),
}
LAYERS: Final[tuple[Layer, ...]] = tuple(CAUSES)

#: What a note is about.
NoteKey: TypeAlias = Literal[
    # what was compared, and what was not
    "temperature", "top_k_judged", "contradiction",
    "not_compared", "no_logprob", "excluded", "labels", "one_prompt", "top_k", "left_unexplained", "beyond_dtype", "no_floor",
    "free_generation", "prefill_for_decode", "to_verify", "without_truncation", "min_tokens", "fillers",
    # by which limits
    "declared_gap", "gap_not_there", "recorded_limits", "unknown_dtype", "as_in_its_run",
    # of the engine, the weights and the trainer
    "another_adapter", "unverified_pins", "sent_again", "reading", "cache_not_told", "head_precision",
    "third_opinion", "copied", "checksums", "entropy", "drawn_otherwise",
    # of a recording
    "floor", "floor_seconds", "reference", "cannot_tell_raw", "chance", "noise_hides",
]  # fmt: skip


@dataclass
class Tally:
    """How many comparisons this process has `made`: a test that leaves the number as it was has compared nothing."""

    made: int = 0


TALLY: Final = Tally()

#: What the two sides of a comparison are called, unless they are others: a rollout and a trainer, say.
SIDES: Final = ("golden", "now")


def in_words(side: str) -> str:
    """Where a number is, in a sentence: `in the golden`, `now`."""
    return side if side == SIDES[1] else f"in the {side}"


class Names(NamedTuple):
    """What sentences call the two sides of a comparison."""

    expected: str = "the golden"
    actual: str = "this run"


def names_of(sides: tuple[str, str]) -> Names:
    """The names of two sides in a sentence: those of Names, or of sides that are called otherwise."""
    return Names() if sides == SIDES else Names(*(f"the {side}" for side in sides))


@dataclass(frozen=True)
class Finding:
    """One cause: its layer, its name (None where the evidence does not single one out), candidates, and evidence.

    `evidence` is for people; `values` are the numbers in it, by name, for code (JSON values).
    """

    layer: Layer
    cause: Cause | None
    evidence: str
    candidates: tuple[Cause, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        return {
            "layer": self.layer,
            "cause": self.cause,
            "candidates": list(self.candidates),
            "evidence": self.evidence,
            "values": _value(self.values),
        }

    def __str__(self) -> str:
        name = self.cause or one_of(self.candidates)
        return f"{self.layer}: {name} ({self.evidence})"


def one_of(candidates: Iterable[str]) -> str:
    """Candidates in words: `one of adapter, stale_weights`, or `perhaps adapter` where there is one."""
    names = list(candidates)
    return f"perhaps {names[0]}" if len(names) == 1 else f"one of {', '.join(names)}"


@dataclass(frozen=True)
class Errors:
    """How far both sides are from the reference, in the unit of a gate, and the interval and the limits of `actual`.

    The limits are what the objective bears beside the golden's own error; `limit` with the room in which a clean build passes,
    `fail_limit` with the room beyond which noise explains it no longer.
    """

    golden: float
    actual: float
    limit: float
    fail_limit: float
    low: float
    high: float

    @property
    def outcome(self) -> Verdict:
        """Whether the error has grown by what matters."""
        return _outcome(self.low, self.high, self.limit, self.fail_limit)


@dataclass(frozen=True)
class Gate:
    """One number that decides, with its interval and limits, all in `unit`.

    - it passes where `high` is within `limit`, fails where `low` is above `fail_limit`, and is unverified between
    - `errors` is the same of the distances to the reference: an effect that passes there passes, for nothing has got worse;
      one fails only where it fails there and matters itself
    - `hidden`: noise alone exceeds what the objective bears, so a difference that does not pass is not told from noise
    - `threshold` is what makes an outlier; `worst` the largest one, `unexplained` what no noise explains (nats), and `beyond`
      the outcome where the worst is above that
    """

    key: GateKey
    value: float
    limit: float
    fail_limit: float
    low: float
    high: float
    unit: str = ""
    errors: Errors | None = None
    hidden: bool = False
    threshold: float = math.nan
    worst: float = math.nan
    unexplained: float = math.nan
    beyond: Verdict | None = None

    @property
    def outcome(self) -> Verdict:
        """`pass`, `fail` or `unverified`."""
        if self.beyond is not None:
            return "fail" if self.low > self.fail_limit else self.beyond
        direct = _outcome(self.low, self.high, self.limit, self.fail_limit)
        if direct == "pass" or (self.errors is None and not self.hidden):
            return direct
        if self.errors is not None and self.errors.outcome == "pass" and not self.hidden:
            return "pass"
        if self.hidden or self.errors is None:
            return "unverified"
        return "fail" if self.errors.outcome == "fail" and self.low > self.limit else "unverified"

    @property
    def between(self) -> bool:
        """Whether an effect itself, not its interval alone, lies between what passes and what fails: no prompts decide that."""
        if self.low == self.high:
            return False  # a count
        if self.errors is not None and self.errors.outcome != "pass":
            return self.errors.limit < self.errors.actual <= self.errors.fail_limit
        return self.limit < self.value <= self.fail_limit

    @property
    def ok(self) -> bool:
        """Whether it does not fail."""
        return self.outcome != "fail"

    @property
    def sure(self) -> bool:
        """Whether it passes."""
        return self.outcome == "pass"

    @property
    def excess(self) -> float:
        """How many times the limit of failing the value is; infinite where nothing is allowed."""
        if self.beyond is not None:
            return max(self.value / self.fail_limit if self.fail_limit else math.inf, self.worst / self.unexplained)
        if self.errors is not None:
            return self.errors.actual / self.errors.fail_limit if self.errors.fail_limit else math.inf
        return self.value / self.fail_limit if self.fail_limit else math.inf if self.value else 0.0

    @property
    def name(self) -> str:
        """The number in words; code goes by `key`."""
        return GATE_NAMES[self.key] + (f" {self.threshold:.2g}" if math.isfinite(self.threshold) else "")


def _outcome(low: float, high: float, limit: float, fail_limit: float) -> Verdict:
    """Where an interval lies: NaN, which is no number to compare, fails."""
    if math.isnan(low) or math.isnan(high) or low > fail_limit:
        return "fail"
    return "pass" if high <= limit else "unverified"


@dataclass(frozen=True)
class Shown:
    """What a comparison says of other prompts, exact whatever the noise (Clopper-Pearson over distinct prompts).

    `bad_prompts` of `prompts` hold a sequence whose RMS is above `threshold` (nats), so with CONFIDENCE no more than `share`
    (0 to 1) of such prompts do. A fault that moves the sequences of a prompt by more than `threshold` does not pass with
    probability POWER where it hits `reach` of the prompts (1: wherever it hits them all).
    """

    prompts: int
    sequences: int
    threshold: float
    bad_prompts: int
    share: float
    reach: float
    tokens_allowed: int
    sequences_allowed: int


class Note(str):
    """A sentence beside a verdict, with the `key` that code finds it by."""

    __slots__ = ("key",)
    key: NoteKey

    def __new__(cls, key: NoteKey, text: str) -> Note:
        """`text` under `key`."""
        note = super().__new__(cls, text)
        note.key = key
        return note

    def __getnewargs__(self) -> tuple[NoteKey, str]:  # type: ignore[override]
        """For copies, and for other processes."""
        return self.key, str(self)


@dataclass(frozen=True)
class Difference:
    """The answer to "is it different", whether or not it matters.

    `different` is None where it is not known; `p_value` is that of the block permutation test (NaN where none was made);
    `decided` says that the headline of a failure is the reason.
    """

    different: bool | None
    reason: str
    p_value: float = float("nan")
    decided: bool = False

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
    `compatible`, or `unknown` for traces in hand), `objective` whose limits hold, `difference` the answer to "is it
    different", `shown` what the comparison says of other prompts, `sides` what the two are called, and `logged` what a
    framework's own metrics say, where they were asked for.
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
    difference: Difference = Difference(None, "not asked")
    shown: Shown | None = None
    sides: tuple[str, str] = SIDES
    logged: Logged | None = None

    @property
    def shows(self) -> tuple[str, ...]:
        """What the comparison says of other prompts, in words; () where it has nothing to say of them."""
        from .wording import shown_lines

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
            "metrics": {k: _finite(v) for k, v in self.metrics.items()},
            "policy_metrics": {k: _finite(v) for k, v in self.policy_metrics.items()},
            "findings": [finding.to_json() for finding in self.findings],
            "gates": [
                {
                    "key": g.key,
                    "name": g.name,
                    "value": _finite(g.value),
                    "limit": _finite(g.limit),
                    "fail_limit": _finite(g.fail_limit),
                    "unit": g.unit,
                    "outcome": g.outcome,
                    "ok": g.ok,
                    "low": _finite(g.low),
                    "threshold": _finite(g.threshold),
                    "bound": _finite(g.high),
                    "errors": None if g.errors is None else {k: _finite(v) for k, v in vars(g.errors).items()},
                }
                for g in self.gates
            ],
            "objective": self.objective,
            "level": self.level,
            "setup": self.setup,
            "difference": {
                "different": self.difference.different,
                "text": str(self.difference),
                "p_value": _finite(self.difference.p_value),
                "decided": self.difference.decided,
            },
            "shows": list(self.shows),
            "shown": None if self.shown is None else {k: _finite(v) for k, v in vars(self.shown).items()},
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


def _value(value: Any) -> Any:
    """A value of a finding as a JSON value; what is not a number becomes None."""
    if isinstance(value, Mapping):
        return {key: _value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return _finite(value) if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    return float(value) if abs(value) < float("inf") else None
