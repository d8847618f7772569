"""Which settings account for a mismatch: from the failing configuration towards the golden's, one step at a time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..comparison.findings import LAYERS, Layer
from ..comparison.result import Finding
from ..comparison.suspected_causes import SUSPECTS
from ..comparison.tolerance import default_tolerance, with_floor
from ..engines.pool import Pool
from ..errors import EngineError, ParityError, UsageError
from ..golden import Golden
from ..progress import doing
from ..spec import EngineSpec
from ..spec.server_settings import SERVERS
from ..trace import Trace
from .reference_evaluation import ReferenceDistances, read_against, weigh

#: Engine arguments that can be moved one by one, as fingerprints name them; `head_dtype` goes by way of hf_overrides.
MOVABLE: Final = (
    "logprobs_mode", "enable_prefix_caching", "async_scheduling", "enable_chunked_prefill", "max_num_batched_tokens",
    "max_num_seqs", "enforce_eager", "attention_backend", "block_size", "kv_cache_dtype", "dtype", "head_dtype",
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "enable_expert_parallel", "quantization",
    "hf_overrides",
)  # fmt: skip
#: Differences are cut off here (nats). What truncation excludes on one side is a support flip, and no difference.
_CUT: Final = 5.0
#: Another build or processor may have so many times the noise that other batch shapes have.
_OTHER_BUILDS: Final = 4
#: A step that takes away less than this share of the mismatch accounts for nothing by itself.
_ACCOUNTS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Budget:
    """How many engines may start besides the failing one, and how long all may take. Raises UsageError below 0."""

    engines: int = 12
    minutes: float = 10.0

    def __post_init__(self) -> None:
        for name, value in (("engines", self.engines), ("minutes", self.minutes)):
            if not value >= 0:  # NaN is not
                raise UsageError(f"a budget of {value:g} {name}: must be 0 or more")


@dataclass(frozen=True, slots=True)
class Step:
    """One engine on the way: the settings that were moved to the golden's values, and what is left of the mismatch.

    `rms` (nats) is over the golden's tokens, each difference cut off at 5; NaN where the engine did not start, with the
    reason in `problem`.
    """

    moved: tuple[str, ...]
    rms: float
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """All steps, the first being the failing configuration itself.

    `differs` are the settings that differ, setting -> (golden's value, value now); `reference` what an independent
    implementation says of both sides, where one was asked, now with the settings `reference_of` as the golden had them;
    `left_out` says what the budget did not allow. `noise` (nats) is an RMS that the golden's own noise explains;
    `other_build` says that the golden is of another engine or version.
    """

    steps: tuple[Step, ...]
    differs: Mapping[str, tuple[Any, Any]]
    noise: float
    reference: ReferenceDistances | None = None
    reference_of: tuple[str, ...] = ()
    left_out: str = ""
    other_build: bool = False

    def share(self, step: Step) -> float:
        """Share (0 to 1) of the mismatch, in squares, that a step takes away; below 0 where it adds to it."""
        before = self.steps[0].rms
        return 1 - (step.rms / before) ** 2 if before else 0.0

    @property
    def best(self) -> Step:
        """The step that leaves least, of those the one that moves fewest settings."""
        least = min((s.rms for s in self.steps if not s.problem), default=float("nan"))
        near = [s for s in self.steps if not s.problem and s.rms <= max(least * 1.05, self.noise)]
        return min(near, key=lambda s: (len(s.moved), s.rms))

    def describe(self) -> list[str]:
        """The table for people: in the order of suspicion, then what the settings explain together and what remains."""
        singles = [s for s in self.steps[1:] if len(s.moved) == 1]
        singles.sort(key=lambda s: (LAYERS.index(layer_of(s.moved[0])), 0.0 if s.problem else -self.share(s)))
        several = [s for s in self.steps[1:] if len(s.moved) > 1]
        return [
            f"as it failed: RMS {self.steps[0].rms:.3g} nats over the golden's tokens (noise explains {self.noise:.2g})",
            *(self._line(step) for step in [*singles, *several]),
            self._conclusion(),
            *([] if self.reference is None else [_conclusion_of_reference(self.reference, self.reference_of)]),
            *([self.left_out] if self.left_out else []),
        ]

    def weigh(self, findings: Sequence[Finding]) -> list[Finding]:
        """The findings of the comparison that failed, with what the reference adds to them."""
        if self.reference is None:
            return list(findings)
        if self.reference_of:  # what those settings do not explain has a cause of its own
            return [*findings, *weigh((), self.reference, other_build=self.other_build)]
        return weigh(findings, self.reference, other_build=self.other_build)

    def _conclusion(self) -> str:
        best = self.best
        if not best.moved:
            tried = {name for step in self.steps if not step.problem for name in step.moved}
            unknown = [name for name in self.differs if name not in tried]
            if unknown:
                known = ", ".join(n for n in self.differs if n in tried)
                said = f"of {known}, the settings that were tried, none accounts for the mismatch; " if known else ""
                return f"{said}not known of {', '.join(unknown)}: not tried, or not started"
            what = "accounts for the mismatch" if self.differs else "differs"
            return f"no setting {what}: the weights, the build or the hardware are left"
        verb = "accounts" if len(best.moved) == 1 else "account"
        untried = [name for name in self.differs if not any(name in step.moved and not step.problem for step in self.steps)]
        rest = "noise" if best.rms <= self.noise else "what no setting that was tried explains"
        if untried and best.rms > self.noise:
            rest += f"; not known of {', '.join(untried)}: not tried, or not started"
        return (
            f"{' and '.join(best.moved)} {verb} for {self.share(best):.0%} of the mismatch; what remains, RMS {best.rms:.2g} "
            f"nats, is {rest}"
        )

    def _line(self, step: Step) -> str:
        changes = ", ".join(f"{n} {self.differs[n][1]!r} -> {self.differs[n][0]!r}" for n in step.moved)
        layer = layer_of(step.moved[0])
        if step.problem:
            return f"  {layer:<9} {changes}: {step.problem}"
        share = self.share(step)
        what = f"{share:.0%} of the mismatch" if share >= _ACCOUNTS else "accounts for nothing"
        return f"  {layer:<9} {changes}: RMS {step.rms:.3g}, {what}"


def _conclusion_of_reference(reference: ReferenceDistances, moved: Sequence[str]) -> str:
    says = {"now": "the golden agrees with it, this run does not", "golden": "this run agrees with it, the golden does not"}
    where = f" (now with {' and '.join(moved)} as the golden had it)" if moved else ""
    return f"{reference}{where}: {says.get(reference.off, 'it sides with neither')}"


def layer_of(setting: str) -> Layer:
    """The layer that a setting belongs to."""
    suspect = SUSPECTS.get(setting, SUSPECTS.get(f"config.{setting}"))
    return "path" if suspect is None else suspect[0]


def ablate(
    golden: Golden, spec: EngineSpec, pool: Pool, budget: Budget, notify: Callable[[str], None], *, read: bool = True
) -> Ablation:
    """Replay a golden under the failing `spec`, then with each setting that differs moved to the golden's value, then with
    what helped together and with what helps only in that company: one setting, or two.

    An engine that does not start is a step with its reason. Raises EngineError where the failing one itself does not,
    UsageError for a server, whose settings stay as they are.
    """
    if spec.engine in SERVERS:
        raise UsageError("a server's settings cannot be moved: run it with engine='vllm', without --parity-server")
    trace = golden.trace
    limits = with_floor(default_tolerance(trace.dtype), golden.floor)
    floor = golden.floor.rms if golden.floor is not None and np.isfinite(golden.floor.rms) else 0.0
    noise = max(_OTHER_BUILDS * floor, limits.fit_rms / 5)
    engine = pool.engine(spec)
    with doing("diagnosing: replaying the golden as it fails"):
        actual = engine.replay(trace)
    differs = _differences(
        {**golden.fingerprint.get("config", {}), "dtype": golden.fingerprint.get("dtype")},
        {**engine.config.values, "dtype": engine.config.dtype},
    )
    search = _Search(trace, spec, pool, budget, notify, differs, actual)
    notify(f"as it fails: RMS {search.steps[0].rms:.3g} nats; settings that differ: {', '.join(differs) or 'none'}")
    search.run(noise)
    found = Ablation(steps=tuple(search.steps), differs=differs, noise=noise, left_out=search.left_out)
    if not read:
        return found
    moved: tuple[str, ...] = ()
    if found.best.rms > noise:  # two meanings are held against no reference, even where other weights hide what they are worth
        moved = found.best.moved or next((m for m in search.replays if m == ("logprobs_mode",)), ())
    reference = _evaluate_reference(golden, search.replays[moved], spec, pool, limits.outlier, notify)
    other_build = golden.fingerprint.get("engine") != engine.fingerprint()["engine"]
    return dataclasses.replace(
        found, reference=reference, reference_of=moved if reference is not None else (), other_build=other_build
    )


class _Search:
    """Replays of one golden, each with some settings at the golden's values, within a budget of engines and minutes."""

    def __init__(
        self, trace: Trace, spec: EngineSpec, pool: Pool, budget: Budget, notify: Callable[[str], None],
        differs: Mapping[str, tuple[Any, Any]], actual: Trace,
    ) -> None:  # fmt: skip
        self.steps = [Step((), _rms(trace, actual))]
        self.replays: dict[tuple[str, ...], Trace] = {(): actual}
        self._trace, self._spec, self._pool, self._budget, self._notify, self._differs = (
            trace, spec, pool, budget, notify, differs
        )  # fmt: skip
        self._began, self._started, self._left = time.monotonic(), 0, 0

    def run(self, noise: float) -> None:
        """Move each setting alone, then those that helped together, then what helps only in that company."""
        for name in self._differs:
            self._measure((name,))
        helped = tuple(s.moved[0] for s in self.steps[1:] if not s.problem and _takes_away(self.steps[0], s))
        rest = [name for name in self._differs if name not in helped]
        self._measure(helped)
        if len(self._differs) < 2 or not _least(self.steps) > noise:
            return
        whole = self._measure(tuple(self._differs))
        if whole is None or whole.problem or not whole.rms < 0.9 * _least(self.steps[:-1]):
            return
        for size in (1, 2):
            if _least([step for step in self.steps if step is not whole]) > max(1.05 * whole.rms, noise):
                for company in itertools.combinations(rest, size):
                    self._measure((*helped, *company))

    @property
    def left_out(self) -> str:
        """What the budget did not allow; "" where it allowed all."""
        if not self._left:
            return ""
        engines, minutes = self._budget.engines, self._budget.minutes
        return f"{self._left} more steps were left out: the budget is {engines} engines and {minutes:g} minutes"

    def _measure(self, moved: tuple[str, ...]) -> Step | None:
        """Replay with these settings at the golden's values; None where that is done already, or beyond the budget."""
        if any(set(step.moved) == set(moved) for step in self.steps):
            return None
        if self._started >= self._budget.engines or time.monotonic() - self._began > self._budget.minutes * 60:
            self._left += 1
            return None
        self._started += 1
        try:
            with doing(f"diagnosing, engine {self._started} of {self._budget.engines} at most: {' + '.join(moved)}"):
                replayed = self._pool.engine(_moved(self._spec, moved, self._differs)).replay(self._trace)
            step = Step(moved, _rms(self._trace, replayed))
            self.replays[moved] = replayed
        except ParityError as error:
            step = Step(moved, float("nan"), str(error).splitlines()[0])
        self.steps.append(step)
        self._notify(f"{' + '.join(moved)}: " + (step.problem or f"RMS {step.rms:.3g} nats"))
        return step


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that can be moved and differ, in the order of suspicion: (the golden's value, the value now).

    What one of the two engines does not report is no difference: nothing is known to move, or nowhere to move it.
    """
    then, now = ({**config, "hf_overrides": _overrides(config)} for config in (then, now))
    names = [name for name in MOVABLE if name in then and name in now and then[name] != now[name]]
    if then["dtype"] is None and "dtype" in names:
        names.remove("dtype")
    if "dtype" in names and "head_dtype" in names:
        names.remove("head_dtype")  # it follows the dtype
    names.sort(key=lambda name: LAYERS.index(layer_of(name)))
    return {name: (then[name], now[name]) for name in names}


def _overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """What was put in place of the checkpoint's own configuration, but for the head's precision, a setting of its own."""
    return {name: value for name, value in (config.get("hf_overrides") or {}).items() if name != "head_dtype"}


def _moved(spec: EngineSpec, moved: Sequence[str], differs: Mapping[str, tuple[Any, Any]]) -> EngineSpec:
    """The spec with these settings at the golden's values."""
    changes = {name: differs[name][0] for name in moved if name != "head_dtype"}
    own = spec.settings.get("hf_overrides", {})
    overrides = changes["hf_overrides"] | {k: own[k] for k in own if k == "head_dtype"} if "hf_overrides" in moved else own
    if "head_dtype" in moved:
        overrides = {**overrides, "head_dtype": differs["head_dtype"][0]}
    if overrides != own:
        changes["hf_overrides"] = overrides
    return spec.replace(**changes)


def _rms(golden: Trace, now: Trace) -> float:
    rows = golden.mask & now.mask
    e, a = golden.logprobs[rows].astype(np.float64), now.logprobs[rows].astype(np.float64)
    finite = np.isfinite(e) & np.isfinite(a)
    if not finite.any():
        return float("nan")
    return float(np.sqrt(np.mean(np.clip(a[finite] - e[finite], -_CUT, _CUT) ** 2)))


def _takes_away(first: Step, step: Step) -> bool:
    return step.rms**2 <= (1 - _ACCOUNTS) * first.rms**2


def _least(steps: Sequence[Step]) -> float:
    return min((step.rms for step in steps if not step.problem), default=float("nan"))


def _evaluate_reference(
    golden: Golden, now: Trace, spec: EngineSpec, pool: Pool, outlier: float, notify: Callable[[str], None]
) -> ReferenceDistances | None:
    """A reference evaluation of the checkpoint, by transformers in float32; None where it cannot be had."""
    mode = golden.trace.logprobs_mode
    reader = EngineSpec(
        spec.model,
        engine="transformers",
        dtype="float32",
        revision=spec.revision,
        tokenizer=spec.tokenizer,
        adapter=spec.adapter,
        logprobs_mode=mode,
    )
    try:
        with doing("reference evaluation by transformers in float32"):
            reference = pool.engine(reader).replay(golden.trace)
    except EngineError as error:
        notify(f"no reference evaluation: {str(error).splitlines()[0]}")
        return None
    found = read_against(golden.trace, now, reference, outlier)
    notify(str(found))
    return found
