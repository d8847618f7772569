"""Plants each fault of the catalogue in a real engine, judges it as a check does, and computes its true effect."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from pytest_logprob_parity.check.measure import measure_floor, with_untruncated
from pytest_logprob_parity.check.reference_pass import reference_of
from pytest_logprob_parity.comparison.evidence import Evidence
from pytest_logprob_parity.comparison.free_generation.compare import compare_free_run
from pytest_logprob_parity.comparison.judge import judge
from pytest_logprob_parity.comparison.result import Comparison, Finding
from pytest_logprob_parity.comparison.suspected_causes import suspects
from pytest_logprob_parity.comparison.tolerance import Tolerance, default_tolerance, with_floor
from pytest_logprob_parity.diagnosis.reference_evaluation import read_against, weigh
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.engines.replay import replay
from pytest_logprob_parity.errors import EngineError, UsageError
from pytest_logprob_parity.golden import Golden, fingerprint
from pytest_logprob_parity.golden.setup import Setup
from pytest_logprob_parity.progress import doing
from pytest_logprob_parity.selftest.prompts import LENGTH, make_prompts
from pytest_logprob_parity.selftest.truth import Doubles, TrueEffect, true_effect
from pytest_logprob_parity.spec import EngineSpec, Sampling
from pytest_logprob_parity.trace import BoolArray, FloatArray, Trace

from .all_faults import catalogue
from .anatomy import load_checkpoint
from .causes import causes_of
from .engine_site import EngineSite
from .fault import GOLDENS, Fault, sampling_of
from .plan import Plan
from .reference import Reading, Reference
from .row import Row
from .site import Shifts
from .stored_answers import Store

_SAMPLES: Final = 8
_REPEATS: Final = 3
#: Faults in the logprobs are judged as those of another engine: on an unchanged one any other bit fails, whatever it does.
_SETUP: Final[Setup] = "compatible"


class CatalogueRun:
    """The catalogue on one model; `notify` gets a line of progress, `other_step` is a later checkpoint of the model or None."""

    def __init__(
        self, pool: Pool, model: str, other_step: Path | None, plan: Plan, notify: Callable[[str], None]
    ) -> None:  # fmt: skip
        if plan.sequences % _SAMPLES:
            raise UsageError(f"catalogue: sequences come in groups of {_SAMPLES}, so not {plan.sequences}")
        self._pool = pool
        self._model = model
        self._plan = plan
        self._notify = notify
        folder, _ = pool.folders(EngineSpec(model))
        self._reference = Reference(folder)
        self._sampling = Sampling(
            temperature=0.7, n=_SAMPLES, max_tokens=plan.tokens, ignore_eos=True, seed=1, logprobs=5
        )  # fmt: skip
        self._prompts = make_prompts(pool.engine(EngineSpec(model)).tokenizer, plan.sequences // _SAMPLES)
        other = {} if other_step is None else load_checkpoint(other_step)
        self.faults = catalogue(self._reference.anatomy, self._reference.checkpoint, other, LENGTH, plan.tokens)
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
        self._store = Store(plan.runs, Path(model).name, files, plan.sequences, plan.tokens)
        self._plain: Trace | None = None

    def run(self) -> Iterator[Row]:
        """Judge the chosen faults, a row each, in the order that starts the fewest engines."""
        dtypes, chosen = self._plan.dtypes, self._plan.chosen
        total, done = sum(dtype in f.dtypes and chosen(f) for f in self.faults for dtype in dtypes), 0
        for dtype in dtypes:
            faults = [f for f in self.faults if dtype in f.dtypes and chosen(f)]
            base = EngineSpec(self._model, dtype=dtype)
            goldens = {name: self._golden(base, name) for name in GOLDENS if any(f.golden == name for f in faults)}
            for fault in sorted(faults, key=lambda f: (bool(f.settings), str(sorted(f.settings.items())))):
                done += 1
                with doing(f"fault {done} of {total}: {fault.name} {fault.size}, {dtype}"):
                    row = self._judge(fault, base.replace(**fault.settings), goldens[fault.golden])
                yield row

    def _golden(self, spec: EngineSpec, name: str) -> Golden:
        """The golden of this name; the plain one has the same tokens in every dtype, so that one reference serves them all."""
        plain = "" if name != "plain" or self._plain is None else self._plain.dtype
        golden = self._store.golden((spec.dtype, name, plain), lambda: self._record(spec, name))
        if name == "plain":
            self._plain = golden.trace
        return golden

    def _record(self, spec: EngineSpec, name: str) -> Golden:
        engine = self._pool.engine(spec)
        sampling = dataclasses.replace(self._sampling, **GOLDENS[name])
        if name == "plain" and self._plain is not None:
            trace = engine.replay(self._plain).with_(replay="")
        else:
            trace = engine.generate(self._prompts, sampling)
        trace = with_untruncated(engine, trace)
        _, floor = measure_floor(engine, trace, _REPEATS)
        reference, told = reference_of(engine, trace, math.inf)
        self._notify(f"golden {name}, {spec.dtype}: {trace.num_sequences} sequences, {trace.num_tokens:,} tokens; "
                     f"{floor.describe()}; {told}")  # fmt: skip
        return Golden(trace=trace, fingerprint=self._fingerprint(spec), floor=floor, reference=reference)

    def _fingerprint(self, spec: EngineSpec) -> dict[str, Any]:
        key = ("fingerprint", spec.dtype, str(sorted(spec.settings.items())))
        return self._store.value(key, lambda: self._pool.engine(spec).fingerprint())

    def _limits(self, golden: Golden) -> Tolerance:
        """The limits of a check of this golden under the objective."""
        return with_floor(default_tolerance(golden.trace.dtype, objective=self._plan.objective), golden.floor)

    @staticmethod
    def _evidence(golden: Golden, setup: Setup) -> Evidence:
        """What a check knows of the golden besides its trace."""
        return Evidence(floor=golden.floor, reference=golden.reference, routed=golden.routed, setup=setup)

    # -- one fault -----------------------------------------------------------------------------------------------------

    def _judge(self, fault: Fault, spec: EngineSpec, golden: Golden) -> Row:
        model, dtype, limits = Path(self._model).name, spec.dtype, self._limits(golden)
        if fault.unforced:
            key = ("unforced", fault.size, dtype)
            verdict, said = self._store.value(key, lambda: list(self._unforced(fault, spec, golden)))
            return Row(fault=fault.case, model=model, dtype=dtype, effect=None, verdict=verdict, said=said)
        if fault.free_run is not None:
            changed = self._regenerated(fault, spec, golden)
            free = compare_free_run(golden.trace, changed.with_(sampling=golden.trace.sampling), limits.near_tie)
            evidence = dataclasses.replace(self._evidence(golden, "same"), free_run=free)
            clean = self._engine_run(dataclasses.replace(fault, free_run=None), spec, golden)
            result = judge(golden.trace, clean, limits, "rl", evidence)
            return Row(
                fault=fault.case, model=model, dtype=dtype, effect=None, verdict=result.verdict, said=result.headline,
                findings=result.findings, differs=not free.same,
            )  # fmt: skip
        candidate = _carried(fault, golden.trace, self._engine_run(fault, spec, golden))
        result = judge(golden.trace, candidate, limits, "rl", self._evidence(golden, _SETUP))
        clean_reading = self._truth(Fault(name="", size="", group=fault.group, golden=fault.golden), golden)
        column, depth = self._with_fault(fault, golden, clean_reading)
        effect = self._effect(golden, clean_reading.logprobs, column, depth)
        seen = self._effect(golden, golden.trace.logprobs, candidate.logprobs, np.nan_to_num(depth))
        apart = fingerprint.differences(golden.fingerprint, self._fingerprint(spec))
        checkpoint = column if "weights_differ" in causes_of(fault) else clean_reading.logprobs
        findings = self._diagnosis(result, apart, checkpoint.astype(np.float32), limits.outlier)
        return Row(
            fault=fault.case, model=model, dtype=dtype, effect=effect, verdict=result.verdict, said=result.headline,
            findings=findings, seen=seen,
        )  # fmt: skip

    @staticmethod
    def _diagnosis(result: Comparison, apart: Any, checkpoint: FloatArray, outlier: float) -> tuple[Finding, ...]:
        """What a diagnosis comes to: the comparison's findings, the fingerprints', and a reading of the checkpoint as it is
        now, which for faults planted in the weights is the faulty one.
        """
        findings = list(result.findings)
        if result.verdict != "fail":
            return tuple(findings)
        if not findings and apart:
            findings = suspects(apart)
        reading = result.expected.with_(logprobs=checkpoint)
        return tuple(weigh(findings, read_against(result.expected, result.actual, reading, outlier)))

    def _engine_run(self, fault: Fault, spec: EngineSpec, golden: Golden) -> Trace:
        """The engine's logprobs of the golden's tokens with the fault planted, under the golden's labels."""

        def run() -> Trace:
            engine, asked = self._pool.engine(spec), _asked(golden.trace, fault)
            operate: Callable[[Any], None] | None = fault.site
            if fault.shift is not None:
                shifts = _shifts(golden.trace, self._shift(fault, golden))
                operate = lambda site: site.shift(shifts)  # noqa: E731 - one of the two operations on the engine
            answer = engine.replay(asked) if operate is None else self._operated(engine, operate, lambda: engine.replay(asked))
            return golden.trace.with_(
                logprobs=answer.logprobs, ranks=answer.ranks, top_token_ids=answer.top_token_ids,
                top_logprobs=answer.top_logprobs, replay=answer.replay, logprobs_mode=answer.logprobs_mode,
                untruncated_logprobs=None,
            )  # fmt: skip

        return self._store.trace((spec.dtype, *fault.run_key), run)

    def _regenerated(self, fault: Fault, spec: EngineSpec, golden: Golden) -> Trace:
        """What the engine writes of its own with the fault."""
        assert fault.free_run is not None
        asked = fault.free_run(golden.trace)
        key = ("regenerated", spec.dtype, fault.name, fault.size)
        return self._store.trace(key, lambda: self._pool.engine(spec).replay(asked, "regenerate"))

    def _operated(self, engine: Engine, operate: Callable[[Any], None], work: Callable[[], Any]) -> Any:
        (site,) = engine.on_worker(lambda worker: EngineSite(worker, self._reference.checkpoint, self._reference.anatomy))
        try:
            operate(site)
            return work()
        finally:
            site.undo()

    def _unforced(self, fault: Fault, spec: EngineSpec, golden: Golden) -> tuple[str, str]:
        engine = self._pool.engine(spec)
        backend = self._pool.backend(engine.spec)  # an Engine would shut it down, as a check does
        try:
            self._operated(engine, lambda site: site.free_of_force(fault.unforced), lambda: replay(backend, golden.trace))
        except EngineError as error:
            return "error", str(error)
        return "pass", "tokens that were not forced went unnoticed"

    # -- the truth -----------------------------------------------------------------------------------------------------

    def _truth(self, fault: Fault, golden: Golden) -> Reading:
        """What float64 says of the golden's tokens with the fault planted."""

        def read() -> Reading:
            operate = fault.reference or fault.site
            try:
                if operate is not None:
                    operate(self._reference)
                prompts = [fault.prompt(list(p)) for p in self._prompts] if fault.prompt is not None else self._prompts
                return self._reference.read(
                    golden.trace, prompts, sampling_of(fault, golden.trace.sampling),
                    processed=fault.settings.get("logprobs_mode") != "raw_logprobs",
                )  # fmt: skip
            finally:
                self._reference.undo()

        tokens = hashlib.sha256(golden.trace.token_ids.tobytes()).hexdigest()
        return self._store.reading((tokens, *fault.run_key), golden.trace, read)

    def _with_fault(self, fault: Fault, golden: Golden, clean: Reading) -> tuple[Doubles, Doubles]:
        """The logprobs [N] that float64 gives with the fault planted, and how deep what is excluded lies."""
        if fault.shift is not None:
            return clean.logprobs + self._shift(fault, golden), clean.depth
        faulty = self._truth(fault, golden)
        column, _ = _mixed(fault, clean.logprobs, faulty.logprobs, faulty.trace)
        return column, np.where(np.isneginf(column), faulty.depth, clean.depth)

    def _effect(self, golden: Golden, clean: FloatArray | Doubles, faulty: FloatArray | Doubles, depth: Doubles) -> TrueEffect:
        return true_effect(
            clean.astype(np.float64), faulty.astype(np.float64), golden.trace.sequence_offsets, self._plan.objective,
            depth=depth, experts=self._reference.anatomy.experts > 0,
        )  # fmt: skip

    def _shift(self, fault: Fault, golden: Golden) -> Doubles:
        """The fault's shift of each token [N]; tokens of equal completions of one prompt are shifted alike."""
        assert fault.shift is not None
        column = fault.shift(golden.trace, _draws(fault))
        shifts = _shifts(golden.trace, column)
        return np.concatenate([shifts[key] for key in _keys(golden.trace)])


def _draws(fault: Fault) -> np.random.Generator:
    """Random numbers that are the same for a fault's engine run and for its truth."""
    return np.random.default_rng(zlib.crc32(f"{fault.name} {fault.size}".encode()))


def _mixed(fault: Fault, clean: Doubles, faulty: Doubles, trace: Trace) -> tuple[Doubles, BoolArray]:
    """The faulty logprobs [N] in the tokens that carry the fault, the clean ones elsewhere; and which tokens do.

    `trace` is the faulty run.
    """
    rng = _draws(fault)
    if fault.reported is not None:
        faulty = fault.reported(faulty, trace, rng)
    hit = np.ones(len(clean), bool) if fault.where is None else fault.where(trace, rng)
    return np.where(hit, faulty, clean), hit


def _carried(fault: Fault, clean: Trace, faulty: Trace) -> Trace:
    """The trace of an engine in which those tokens carry the fault that should. Both runs are the engine's."""
    column, hit = _mixed(fault, clean.logprobs.astype(np.float64), faulty.logprobs.astype(np.float64), faulty)
    return faulty.with_(
        logprobs=column.astype(np.float32),
        ranks=np.where(hit, faulty.ranks, clean.ranks),
        top_logprobs=np.where(hit[:, None], faulty.top_logprobs, clean.top_logprobs),
        top_token_ids=np.where(hit[:, None], faulty.top_token_ids, clean.top_token_ids),
    )


def _keys(trace: Trace) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion of each sequence."""
    return [(tuple(trace.prompt(i)), tuple(trace.completion(i))) for i in range(trace.num_sequences)]


def _shifts(trace: Trace, column: Doubles) -> Shifts:
    """A column [N] by prompt and completion; that of the first where several sequences are equal."""
    shifts: dict[Any, list[float]] = {}
    for i, key in enumerate(_keys(trace)):
        shifts.setdefault(key, column[slice(*trace.bounds(i))].tolist())
    return shifts


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
