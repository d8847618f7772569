"""Record a golden: the run, its noise floor, and what a golden of this noise and size can show. Refuses what cannot pass."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from . import fingerprint
from .belonging import Context, check_belongs
from .comparison.intervals import CONFIDENCE, MIN_SEQUENCES, POWER, t_quantile
from .comparison.result import Comparison
from .comparison.tolerance import Tolerance, default_tolerance, make_tolerance, parse_tolerance, with_floor
from .comparison.verdict import Evidence, compare, judge
from .errors import EngineError, GoldenError, UsageError
from .floor import NoiseFloor, Shapes
from .golden import Golden
from .pool import Engine
from .spec import Sampling
from .trace import FloatArray, Trace

#: RMS (nats) between clean builds of vLLM 0.8.5 to 0.32.0 on the same tokens (docs/how-to/diagnosis.md, the migration).
_OTHER_BUILDS: Final = {"float64": 1e-6, "float32": 1e-6, "float16": 0.0025, "bfloat16": 0.02}
#: Sequences beyond this many are not counted on to make a golden pass.
_MOST_SEQUENCES: Final = 100_000


def record(
    path: Path,
    engine: Engine | Trace,
    prompts: list[Any] | None,
    sampling: Sampling | None,
    replay: Sequence[str],
    tolerance: Tolerance | Mapping[str, Any] | str | None,
    repeats: int,
    context: Context,
) -> Comparison:
    """Make a golden of what an engine writes, or of a trace, and say what it can show; nothing is written otherwise.

    Raises UsageError for what no check could ever pass or make sense of, EngineError for an engine that does not agree
    with itself beyond what its dtype explains.
    """
    if path.is_dir():
        raise GoldenError(f"{context.shown_path}: a directory stands where the golden should be; move it away")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0 or repeats == 1:
        raise UsageError(f"repeats={repeats!r}: a noise floor needs 2 repeats or more; 0 records none")
    golden = Golden(engine) if isinstance(engine, Trace) else Golden(_generate(engine, prompts, sampling, replay))
    golden = dataclasses.replace(golden, node_id=context.node_id, name=context.name, tolerance=_as_mapping(tolerance))
    explicit = {**parse_tolerance(context.tolerance_lines, golden.trace.dtype, ("decode",)), **golden.tolerance}
    notes: list[str] = []
    if isinstance(engine, Trace):
        check_belongs(golden, engine, prompts, sampling, context)
    else:
        digest = fingerprint.digest_of(prompts)
        golden = dataclasses.replace(golden, fingerprint=engine.fingerprint(), prompts_digest=digest)
        _check_numbers(golden.trace, context)
    itself = compare(expected=golden.trace, actual=golden.trace)
    if not itself.passed:
        raise UsageError(f"{context.shown_path}: not recorded: it could never pass: {itself.headline}")
    if isinstance(engine, Engine) and repeats and engine.config.forcing in ("sampler", "native"):
        began = time.monotonic()
        own, measured = measure_floor(engine, golden.trace, repeats)
        golden = dataclasses.replace(golden, floor=measured)
        notes.append(f"the noise floor took {time.monotonic() - began:.1f} s beside the recording pass")
        _check_agrees_with_itself(golden, own, explicit, context)
    limits = make_tolerance(with_floor(default_tolerance(golden.trace.dtype), golden.floor), explicit)
    comparison = _what_it_can_show(golden, limits)
    golden.save(path, context.max_megabytes)
    written = Golden.load(path)
    same = Evidence(written.floor, setup="same", policy_logprobs=golden.trace.untruncated_logprobs)
    proof = judge(written.trace, golden.trace, limits, "rl", same)
    floor = "no noise floor: the defaults of its dtype stand in" if written.floor is None else written.floor.describe()
    return dataclasses.replace(
        proof, recorded=True, notes=(floor, *notes, *_gaps(golden, comparison, limits)), shows=comparison.shows
    )


def _check_numbers(trace: Trace, context: Context) -> None:
    """Raise EngineError where an engine reported no number: such a golden would hide the next one."""
    broken = int(np.count_nonzero((np.isnan(trace.logprobs) | np.isposinf(trace.logprobs)) & trace.mask))
    if broken:
        raise EngineError(
            f"{context.shown_path}: not recorded: {broken} of {int(trace.mask.sum())} logprobs of this engine are NaN or +inf"
        )


def measure_floor(engine: Engine, trace: Trace, repeats: int) -> tuple[FloatArray, NoiseFloor]:
    """Replay a trace on its own schedule (logprobs [N]), and `repeats` times with every block in a shape of its own."""
    own = engine.replay(trace).logprobs
    shapes = Shapes()
    drawn = [engine.replay_in_drawn_shapes(trace, shapes, number) for number in range(repeats)]
    reproduces = bool(np.array_equal(own[trace.mask], trace.logprobs[trace.mask]))
    return own, NoiseFloor(np.stack(drawn), shapes, reproduces)


def _generate(engine: Engine, prompts: list[Any] | None, sampling: Sampling | None, replay: Sequence[str]) -> Trace:
    if prompts is None:
        raise UsageError("recording needs prompts=")
    sampling = sampling or Sampling()
    _check_can_replay(engine, replay, sampling)
    trace = engine.generate(prompts, sampling)
    return with_untruncated(engine, trace) if "decode" in replay else trace


def with_untruncated(engine: Engine, trace: Trace) -> Trace:
    """The trace with its logprobs without truncation beside the processed ones, where it truncates: one more replay."""
    if not trace.sampling.truncates or trace.logprobs_mode != "processed_logprobs":
        return trace
    free = engine.replay(trace.with_(sampling=trace.sampling.untruncated()))
    return trace.with_(untruncated_logprobs=free.logprobs)


def _check_can_replay(engine: Engine, replay: Sequence[str], sampling: Sampling) -> None:
    """Refuse to record what no replay could check later."""
    forcing = engine.config.forcing
    if "prefill" in replay and engine.config.logprobs_mode == "processed_logprobs" and not sampling.raw_is_processed:
        raise UsageError(f"not recorded: replay 'prefill' gives raw logprobs, {sampling.processing()} other ones; use 'decode'")
    if "window" in replay and (sampling.presence_penalty or sampling.frequency_penalty):
        raise UsageError("not recorded: replay 'window' cannot follow presence and frequency penalties")
    if "decode" in replay and forcing not in ("sampler", "native"):
        raise EngineError(f"not recorded: its golden could not be replayed: {forcing}")


def _check_agrees_with_itself(golden: Golden, own: FloatArray, explicit: Mapping[str, float], context: Context) -> None:
    """Refuse a golden whose own engine would fail it, or whose noise leaves no room below a margin."""
    trace, floor = golden.trace, golden.floor
    assert floor is not None
    where = f"{context.shown_path}: not recorded"
    # A mean over few tokens is noise of their number, not of the engine: how many are missing is told beside the recording.
    limits = make_tolerance(default_tolerance(trace.dtype), {"mean_diff": math.inf})
    names = [
        "on its own schedule",
        *(f"in other batch shapes, repeat {n + 1} of {floor.repeats}" for n in range(floor.repeats)),
    ]
    for name, logprobs in zip(names, (own, *floor.logprobs), strict=True):
        again = judge(trace, trace.with_(logprobs=logprobs), limits, "rl", Evidence())
        if again.verdict == "fail":
            raise EngineError(
                f"{where}: this engine does not agree with itself beyond what {trace.dtype} explains: the same tokens {name}: "
                f"{again.headline}"
            )
    margin = make_tolerance(default_tolerance(trace.dtype), explicit).rms_diff
    if floor.rms > margin / 2 and "rms_diff" not in explicit:
        raise UsageError(
            f"{where}: its noise (rms_diff {floor.rms:.2g} nats) exceeds half the margin of {margin:g}: say what may pass, "
            "tolerance={'rms_diff': ...}"
        )


def _what_it_can_show(golden: Golden, limits: Tolerance) -> Comparison:
    """The comparison that a clean engine of another shape or build would get: the worst of the floor's repeats, and of noise
    as builds have it.
    """
    trace, floor = golden.trace, golden.floor
    candidates = [trace.logprobs] if floor is None else list(floor.logprobs)
    candidates.append(_as_another_build(trace))
    comparisons = [
        judge(trace, trace.with_(logprobs=logprobs), limits, "rl", Evidence(floor, setup="compatible"))
        for logprobs in candidates
    ]
    return max(comparisons, key=lambda c: c.metrics["rms_diff"])


def _as_another_build(trace: Trace) -> FloatArray:
    """The logprobs [N] with the noise that clean builds of other versions were seen to have in this dtype.

    Shapes often move nothing on the engine that records, and say nothing then of what another version will do.
    """
    rng = np.random.default_rng(0)
    scale = _OTHER_BUILDS.get(trace.dtype, _OTHER_BUILDS["bfloat16"])
    sequences = np.repeat(rng.lognormal(-0.125, 0.5, trace.num_sequences), np.diff(trace.sequence_offsets))
    return (trace.logprobs + scale * sequences * rng.normal(size=trace.num_tokens)).astype(np.float32)


def _gaps(golden: Golden, clean: Comparison, limits: Tolerance) -> list[str]:
    """What this golden cannot show, and what it would need."""
    gaps = []
    if golden.trace.sampling.raw_is_processed:
        gaps.append("cannot tell raw from processed logprobs: at T=1 without truncation and penalties they are the same")
    missing = missing_sequences(clean, limits)
    if missing:
        gaps.append(
            f"a clean engine of another version would be unverified: {missing:,} more sequences are needed"
            if missing < _MOST_SEQUENCES
            else "a clean engine of another version could pass with no number of sequences: the noise is too near the margins"
        )
    return gaps


def missing_sequences(clean: Comparison, limits: Tolerance) -> int:
    """How many sequences more it takes for a clean engine to pass with probability POWER.

    Its mean is nothing but noise, its spread that of `clean`; errors shrink with the root of the number of sequences.
    """
    if clean.clusters is None:
        return MIN_SEQUENCES
    have = clean.clusters.count
    if clean.passed:
        return 0
    if have < 2:
        return MIN_SEQUENCES - have
    needed = max(have, MIN_SEQUENCES)
    while needed < _MOST_SEQUENCES:
        mean, rms = clean.clusters.mean(needed), clean.clusters.rms(needed)
        degrees = needed - 1
        room = 1 + t_quantile(POWER, degrees) / t_quantile(CONFIDENCE, degrees)
        shift = (mean.upper - mean.estimate) * room
        spread = rms.estimate * (rms.upper / rms.estimate) ** room if rms.estimate else 0.0
        if shift <= limits.mean_diff and spread <= limits.rms_diff:
            break
        needed = max(needed + 1, int(needed * 1.1))
    return needed - have


def _as_mapping(tolerance: Tolerance | Mapping[str, Any] | str | None) -> dict[str, float]:
    if isinstance(tolerance, str):
        return {}  # a gap is declared by whoever checks, not by the golden: it is not part of what was recorded
    if isinstance(tolerance, Tolerance):
        return dataclasses.asdict(tolerance)
    return dict(tolerance or {})
