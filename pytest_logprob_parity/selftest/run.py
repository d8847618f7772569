"""Plant every fault of the catalogue in a real engine, judge it as a check does, and hold the verdict against the truth."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..check.measure import measure_floor, with_untruncated
from ..check.reference_pass import reference_of
from ..comparison.free_run import compare_free_run
from ..comparison.result import CAUSES as LAYER_CAUSES
from ..comparison.result import Comparison, Finding, Setup
from ..comparison.suspected_causes import suspects
from ..comparison.tolerance import Tolerance, default_tolerance, with_floor
from ..comparison.verdict import Evidence, judge
from ..diagnosis.reference_evaluation import read_against, weigh
from ..engines.pool import Engine, Pool
from ..engines.replay import replay
from ..errors import EngineError, UsageError
from ..golden import Golden, fingerprint
from ..progress import doing
from ..spec import EngineSpec, Sampling
from ..trace import BoolArray, FloatArray, Trace
from .anatomy import load_checkpoint
from .catalogue import catalogue
from .causes import causes_of
from .fault import GOLDENS, Case, Fault, sampling_of
from .prompts import LENGTH, make_prompts
from .reference import Reading, Reference
from .sites import EngineSite, Shifts
from .store import Store
from .truth import Doubles, Objective, TrueEffect, true_effect

_SAMPLES: Final = 8
_REPEATS: Final = 3
#: Faults in the logprobs are judged as those of another engine: on an unchanged one any other bit fails, whatever it does.
_SETUP: Final[Setup] = "compatible"


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Plan:
    """What a selftest is asked for; `only` are texts of which a fault's name has to contain one, () for all faults."""

    other_step: Path | None = None
    sequences: int = 200
    tokens: int = 64
    objective: Objective = "token"
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    only: tuple[str, ...] = ()
    runs: Path | None = None

    def chosen(self, fault: Case) -> bool:
        """Whether the fault is asked for."""
        return not self.only or any(part in fault.name for part in self.only)


def run_model(model: str, plan: Plan, notify: Callable[[str], None], show: Callable[[Row], None]) -> list[Row]:
    """Judge the catalogue on one model in this process; `show` gets each row as it comes."""
    step = plan.other_step or Path(f"{model}-step2")
    rows = []
    with Pool(notify=notify) as pool:
        other = step if step.is_dir() else None
        selftest = Selftest(pool, model, other, plan.sequences, plan.tokens, plan.objective, notify, plan.runs)
        for row in selftest.run(plan.dtypes, plan.chosen):
            rows.append(row)
            show(row)
    return rows


def run_models(models: Sequence[str], plan: Plan, notify: Callable[[str], None], show: Callable[[Row], None]) -> Iterator[Row]:
    """Judge the catalogue on each model, several in a process of their own each.

    vLLM does not start a mixture of experts in a process where a dense model has run (0.32.0). `notify` and `show` are
    functions of a module, for they are sent there.
    """
    if len(models) == 1:
        yield from run_model(models[0], plan, notify, show)
        return
    for model in models:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            yield from executor.submit(run_model, model, plan, notify, show).result()


class Selftest:
    """The catalogue on one model. `sequences` x `tokens` is the size of its goldens, `notify` gets a line of progress.

    `runs` is a folder that keeps what the engine and the reference said, for another selftest with the same catalogue.
    """

    def __init__(
        self, pool: Pool, model: str, other_step: Path | None, sequences: int, tokens: int, objective: Objective,
        notify: Callable[[str], None], runs: Path | None = None,
    ) -> None:  # fmt: skip
        self._pool = pool
        self._model = model
        self._objective = objective
        self._notify = notify
        if sequences % _SAMPLES:
            raise UsageError(f"selftest: sequences come in groups of {_SAMPLES}, so not {sequences}")
        folder, _ = pool.folders(EngineSpec(model))
        self._reference = Reference(folder)
        self._sampling = Sampling(
            temperature=0.7, n=_SAMPLES, max_tokens=tokens, ignore_eos=True, seed=1, logprobs=5
        )  # fmt: skip
        self._prompts = make_prompts(pool.engine(EngineSpec(model)).tokenizer, sequences // _SAMPLES)
        other = {} if other_step is None else load_checkpoint(other_step)
        self.faults = catalogue(self._reference.anatomy, self._reference.checkpoint, other, LENGTH, tokens)
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
        self._store = Store(runs, Path(model).name, files, sequences, tokens)
        self._plain: Trace | None = None

    def run(self, dtypes: Sequence[str], chosen: Callable[[Fault], bool]) -> Iterator[Row]:
        """Judge the chosen faults, a row each, in the order that starts the fewest engines."""
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
        return Golden(trace, fingerprint=self._fingerprint(spec), floor=floor, reference=reference)

    def _fingerprint(self, spec: EngineSpec) -> dict[str, Any]:
        key = ("fingerprint", spec.dtype, str(sorted(spec.settings.items())))
        return self._store.value(key, lambda: self._pool.engine(spec).fingerprint())

    def _limits(self, golden: Golden) -> Tolerance:
        """The limits of a check of this golden under the objective."""
        return with_floor(default_tolerance(golden.trace.dtype, objective=self._objective), golden.floor)

    @staticmethod
    def _evidence(golden: Golden, setup: Setup) -> Evidence:
        """What a check knows of the golden besides its trace."""
        return Evidence(golden.floor, golden.reference, golden.routed, setup=setup)

    # -- one fault -----------------------------------------------------------------------------------------------------

    def _judge(self, fault: Fault, spec: EngineSpec, golden: Golden) -> Row:
        model, dtype, limits = Path(self._model).name, spec.dtype, self._limits(golden)
        if fault.unforced:
            key = ("unforced", fault.size, dtype)
            verdict, said = self._store.value(key, lambda: list(self._unforced(fault, spec, golden)))
            return Row(fault.case, model, dtype, None, verdict, said)
        if fault.free_run is not None:
            changed = self._regenerated(fault, spec, golden)
            free = compare_free_run(golden.trace, changed.with_(sampling=golden.trace.sampling), limits.near_tie)
            evidence = dataclasses.replace(self._evidence(golden, "same"), free_run=free)
            clean = self._engine_run(dataclasses.replace(fault, free_run=None), spec, golden)
            result = judge(golden.trace, clean, limits, "rl", evidence)
            return Row(fault.case, model, dtype, None, result.verdict, result.headline, result.findings, differs=not free.same)
        candidate = _carried(fault, golden.trace, self._engine_run(fault, spec, golden))
        result = judge(golden.trace, candidate, limits, "rl", self._evidence(golden, _SETUP))
        clean_reading = self._truth(Fault(name="", size="", group=fault.group, golden=fault.golden), golden)
        column, depth = self._with_fault(fault, golden, clean_reading)
        effect = self._effect(golden, clean_reading.logprobs, column, depth)
        seen = self._effect(golden, golden.trace.logprobs, candidate.logprobs, np.nan_to_num(depth))
        apart = fingerprint.differences(golden.fingerprint, self._fingerprint(spec))
        checkpoint = column if "weights_differ" in causes_of(fault) else clean_reading.logprobs
        findings = self._diagnosis(result, apart, checkpoint.astype(np.float32), limits.outlier)
        return Row(fault.case, model, dtype, effect, result.verdict, result.headline, findings, seen=seen)

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
            clean.astype(np.float64), faulty.astype(np.float64), golden.trace.sequence_offsets, self._objective, depth=depth,
            experts=self._reference.anatomy.experts > 0,
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
