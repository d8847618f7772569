"""Plant every fault of the catalogue in a real engine, judge it as a check does, and hold the verdict against the truth."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .. import fingerprint
from ..comparison.free_run import compare_free_run
from ..comparison.result import CAUSES as LAYER_CAUSES
from ..comparison.result import Comparison, Finding
from ..comparison.support import depth
from ..comparison.tolerance import Tolerance, default_tolerance, with_floor
from ..comparison.verdict import Evidence, judge
from ..diagnosis.reading import read_against, weigh
from ..errors import EngineError, UsageError
from ..pool import Engine, Pool
from ..recording import measure_floor, with_untruncated
from ..replay import replay
from ..spec import EngineSpec, Sampling
from ..suspects import suspects
from ..trace import Trace
from .catalogue import GOLDENS, Fault, catalogue, causes_of, sampling_of
from .prompts import make_prompts
from .reference import Reference, load_checkpoint
from .sites import EngineSite

if TYPE_CHECKING:
    from ..floor import NoiseFloor

#: A true effect of so many margins has to fail; one of at most so much of a margin must not.
MUST_FAIL: Final = 2.0
MUST_NOT_FAIL: Final = 0.5
_SAMPLES: Final = 8
_REPEATS: Final = 3


@dataclass(frozen=True)
class Row:
    """One fault, judged. `effect` is the largest true effect, as a multiple of its margin, and `on` which one it is."""

    fault: Fault
    dtype: str
    effect: float
    on: str
    verdict: str
    said: str
    findings: tuple[Finding, ...] = ()

    @property
    def expected(self) -> str:
        """`fail`, `no fail`, or empty between, and where a proven semantic cause may fail at any size."""
        if self.effect >= MUST_FAIL:
            return "fail"
        return "no fail" if self.effect <= MUST_NOT_FAIL and not self.fault.semantic else ""

    @property
    def right(self) -> bool:
        """Whether the verdict is as expected."""
        failed = self.verdict in ("fail", "error")
        return not self.expected or failed == (self.expected == "fail")

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


@dataclass(frozen=True)
class _Golden:
    fingerprint: Mapping[str, Any]
    trace: Trace
    floor: NoiseFloor
    limits: Tolerance


class Selftest:
    """The catalogue on one model. `sequences` x `tokens` is the size of its goldens, `notify` gets a line of progress."""

    def __init__(
        self, pool: Pool, model: str, other_step: Path | None, sequences: int, tokens: int, notify: Callable[[str], None]
    ) -> None:
        self._pool = pool
        self._model = model
        self._notify = notify
        folder, _ = pool.folders(EngineSpec(model))
        self._reference = Reference(folder)
        self._sampling = Sampling(
            temperature=0.7, n=_SAMPLES, max_tokens=tokens, ignore_eos=True, seed=1, logprobs=5
        )  # fmt: skip
        if sequences % _SAMPLES:
            raise UsageError(f"selftest: sequences come in groups of {_SAMPLES}, so not {sequences}")
        self._prompts = make_prompts(pool.engine(EngineSpec(model)).tokenizer, sequences // _SAMPLES)
        vocabulary = len(self._reference.checkpoint["model.embed_tokens.weight"])
        other = {} if other_step is None else load_checkpoint(other_step)
        self.faults = catalogue(other, vocabulary)
        self._readings: dict[Any, Trace] = {}
        self._plain: Trace | None = None

    def run(self, dtypes: Sequence[str], chosen: Callable[[Fault], bool]) -> Iterator[Row]:
        """Judge the chosen faults, a row each, in the order that starts the fewest engines."""
        for dtype in dtypes:
            faults = [f for f in self.faults if dtype in f.dtypes and chosen(f)]
            base = EngineSpec(self._model, dtype=dtype)
            goldens = {name: self._record(base, name) for name in GOLDENS if any(f.golden == name for f in faults)}
            runs: dict[Any, Trace] = {}
            for fault in sorted(faults, key=lambda f: (bool(f.settings), str(sorted(f.settings.items())))):
                yield self._judge(fault, base.replace(**fault.settings), dtype, goldens[fault.golden], runs)

    def _record(self, spec: EngineSpec, name: str) -> _Golden:
        """Record a golden; the plain one has the same tokens in every dtype, so that one reference serves them all."""
        engine = self._pool.engine(spec)
        sampling = dataclasses.replace(self._sampling, **GOLDENS[name])
        if name == "plain" and self._plain is not None:
            trace = engine.replay(self._plain).with_(replay="")
        else:
            trace = engine.generate(self._prompts, sampling)
        if name == "plain":
            self._plain = trace
        trace = with_untruncated(engine, trace)
        _, floor = measure_floor(engine, trace, _REPEATS)
        self._notify(f"golden {name}, {spec.dtype}: {trace.num_sequences} sequences, {trace.num_tokens:,} tokens; "
                     + floor.describe())  # fmt: skip
        return _Golden(engine.fingerprint(), trace, floor, with_floor(default_tolerance(spec.dtype), floor))

    # -- one fault -----------------------------------------------------------------------------------------------------

    def _judge(self, fault: Fault, spec: EngineSpec, dtype: str, golden: _Golden, runs: dict[Any, Trace]) -> Row:
        engine = self._pool.engine(spec)
        evidence = Evidence(golden.floor, setup="same")
        if fault.unforced:
            return Row(fault, dtype, math.inf, "by construction", *self._unforced(fault, engine, golden))
        if fault.free_run is not None:
            changed = engine.replay(fault.free_run(golden.trace), "regenerate")
            free = compare_free_run(golden.trace, changed.with_(sampling=golden.trace.sampling), golden.limits.near_tie)
            evidence = dataclasses.replace(evidence, free_run=free)
            clean = self._engine_run(dataclasses.replace(fault, free_run=None), engine, golden, runs)
            result = judge(golden.trace, clean, golden.limits, "rl", evidence)
            effect, on = (0.0, "same tokens") if free.same else (math.inf, "other tokens")
            return Row(fault, dtype, effect, on, result.verdict, result.headline, result.findings)
        candidate = self._carried(fault, golden.trace, self._engine_run(fault, engine, golden, runs))
        result = judge(golden.trace, candidate, golden.limits, "rl", evidence)
        clean = self._truth(Fault(name="", size="", golden=fault.golden), golden)
        faulty = self._carried(fault, clean, self._truth(fault, golden))
        effect, on = true_effect(clean, faulty, golden.limits)
        apart = fingerprint.differences(golden.fingerprint, engine.fingerprint())
        checkpoint = faulty if "weights_differ" in causes_of(fault) else clean
        findings = self._diagnosis(result, apart, checkpoint, golden.limits.outlier)
        return Row(fault, dtype, effect, on, result.verdict, result.headline, findings)

    @staticmethod
    def _diagnosis(result: Comparison, apart: Any, checkpoint: Trace, outlier: float) -> tuple[Finding, ...]:
        """What a diagnosis comes to: the comparison's findings, the fingerprints', and a reading of the checkpoint as it is
        now, which for faults planted in the weights is the faulty one.
        """
        findings = list(result.findings)
        if result.verdict != "fail":
            return tuple(findings)
        if not findings and apart:
            findings = suspects(apart)
        return tuple(weigh(findings, read_against(result.expected, result.actual, checkpoint, outlier)))

    def _engine_run(self, fault: Fault, engine: Engine, golden: _Golden, runs: dict[Any, Trace]) -> Trace:
        """The engine's logprobs of the golden's tokens with the fault planted, under the golden's labels."""
        if fault.run_key not in runs:
            asked = _asked(golden.trace, fault)
            if fault.site is None:
                answer = engine.replay(asked)
            else:
                answer = self._operated(engine, fault.site, lambda: engine.replay(asked))
            runs[fault.run_key] = golden.trace.with_(
                logprobs=answer.logprobs, ranks=answer.ranks, top_token_ids=answer.top_token_ids,
                top_logprobs=answer.top_logprobs, replay=answer.replay, logprobs_mode=answer.logprobs_mode,
                untruncated_logprobs=None,
            )  # fmt: skip
        return runs[fault.run_key]

    def _operated(self, engine: Engine, operate: Callable[[Any], None], work: Callable[[], Any]) -> Any:
        (site,) = engine.on_worker(lambda worker: EngineSite(worker, self._reference.checkpoint))
        try:
            operate(site)
            return work()
        finally:
            site.undo()

    def _unforced(self, fault: Fault, engine: Engine, golden: _Golden) -> tuple[str, str]:
        backend = self._pool.backend(engine.spec)  # an Engine would shut it down, as a check does
        try:
            self._operated(engine, lambda site: site.free_of_force(fault.unforced), lambda: replay(backend, golden.trace))
        except EngineError as error:
            return "error", str(error)
        return "pass", "tokens that were not forced went unnoticed"

    def _truth(self, fault: Fault, golden: _Golden) -> Trace:
        """What float64 says of the golden's tokens with the fault planted."""
        key = (*fault.run_key, id(golden.trace) if fault.golden != "plain" else 0)
        if key not in self._readings:
            operate = fault.reference or fault.site
            try:
                if operate is not None:
                    operate(self._reference)
                prompts = [fault.prompt(list(p)) for p in self._prompts] if fault.prompt is not None else self._prompts
                self._readings[key] = self._reference.read(
                    golden.trace, prompts, sampling_of(fault, golden.trace.sampling),
                    processed=fault.settings.get("logprobs_mode") != "raw_logprobs",
                )  # fmt: skip
            finally:
                self._reference.undo()
        return self._readings[key]

    def _carried(self, fault: Fault, clean: Trace, faulty: Trace) -> Trace:
        """The faulty trace in as many sequences or tokens as carry the fault, the clean one elsewhere."""
        rng = np.random.default_rng(zlib.crc32(f"{fault.name} {fault.size}".encode()))
        if fault.trace is not None:
            faulty = fault.trace(faulty, rng)
        count = fault.sequences or clean.num_sequences
        hit = np.isin(np.arange(clean.num_sequences), rng.permutation(clean.num_sequences)[:count])
        tokens = np.repeat(hit, np.diff(clean.sequence_offsets))
        if fault.tokens:
            tokens = np.isin(np.arange(clean.num_tokens), rng.permutation(clean.num_tokens)[: fault.tokens])
        if tokens.all():
            return faulty
        return faulty.with_(
            logprobs=np.where(tokens, faulty.logprobs, clean.logprobs),
            top_logprobs=np.where(tokens[:, None], faulty.top_logprobs, clean.top_logprobs),
            top_token_ids=np.where(tokens[:, None], faulty.top_token_ids, clean.top_token_ids),
        )


def _asked(trace: Trace, fault: Fault) -> Trace:
    """The trace as the engine is asked about it: other prompts, other sampling."""
    asked = trace.with_(sampling=sampling_of(fault, trace.sampling))
    if fault.prompt is None:
        return asked
    bounds = zip(trace.prompt_offsets[:-1].tolist(), trace.prompt_offsets[1:].tolist(), strict=True)
    prompts = [fault.prompt(trace.prompt_token_ids[a:b].tolist()) for a, b in bounds]
    return asked.with_(
        prompt_token_ids=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=np.cumsum([0, *map(len, prompts)]).astype(np.int64),
    )


def true_effect(clean: Trace, faulty: Trace, limits: Tolerance) -> tuple[float, str]:
    """The largest effect of a fault, as a multiple of its margin or budget, and its name. Both traces are the reference's.

    The effects are those of statistics.md's table, computed anew here: not by the code under test.
    """
    if np.isnan(faulty.logprobs).any():
        return math.inf, "NaN"
    lost = np.isneginf(faulty.logprobs) & np.isfinite(clean.logprobs)
    both = np.isfinite(faulty.logprobs) & np.isfinite(clean.logprobs)
    d = faulty.logprobs[both].astype(np.float64) - clean.logprobs[both]
    sequences = np.repeat(np.arange(clean.num_sequences), np.diff(clean.sequence_offsets))[both]
    cut = np.clip(d, -limits.winsorize, limits.winsorize)
    limit = max(limits.winsorize, 2 * limits.sequence_rms)
    in_sequence = np.clip(d, -limit, limit)
    per_sequence = [_rms_but_largest(in_sequence[sequences == s]) for s in np.unique(sequences)]
    tokens = len(clean.token_ids)
    deep = bool(lost.any()) and bool((depth(clean, np.flatnonzero(lost), limits) > MUST_FAIL).any())
    effects = {
        "mean": abs(cut.mean()) / limits.mean_diff,
        "RMS": math.sqrt(np.mean(cut**2)) / limits.rms_diff,
        "clip share": float(np.mean(np.abs(np.expm1(np.minimum(d, 300))) > 0.2)) / limits.clip_share,
        "outlier tokens": int(np.sum(np.abs(d) > limits.outlier)) / (1 + len(d) // 5000),
        "outlier sequences": _ratio(sum(rms > limits.sequence_rms for rms in per_sequence), clean.num_sequences // 200),
        "support flips": _ratio(int(lost.sum()), math.ceil(limits.support_flips * tokens) if clean.sampling.truncates else 0),
        "flips deep inside": math.inf if deep else 0.0,
    }
    on = max(effects, key=lambda name: effects[name])
    return float(effects[on]), on


def _rms_but_largest(d: Any) -> float:
    """RMS of a sequence's differences, the largest taken for 0."""
    squares = np.sort(d * d)
    return math.sqrt(float(squares[:-1].sum()) / len(squares))


def _ratio(count: int, budget: int) -> float:
    return count / budget if budget else math.inf if count else 0.0
