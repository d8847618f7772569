"""Ask an engine for a golden: its completions, and its noise floor. Refuses numbers that are none, and judges nothing.

Recording and a matrix's workers share it. A worker's environment has numpy and no scipy, which a judgement needs: what is
refused for that reason is in record.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EngineError, UsageError
from ..golden import Golden
from ..golden.noise_floor import NoiseFloor
from ..grammar import is_or_are
from ..progress import doing, each
from ..spec import Sampling
from ..trace.batch_composition import BatchCompositions

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from ..trace import FloatArray, ReplayPath, Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A golden as its engine gave it, and how long that took in seconds.

    `own` [N] are the logprobs of a replay on the golden's own schedule, None where no noise floor was measured.
    """

    golden: Golden
    own: FloatArray | None
    generating: float
    replaying: float


def measure(
    engine: Engine, prompts: list[Any] | None, sampling: Sampling | None, replay: Sequence[ReplayPath], repeats: int, name: str
) -> Measured:  # fmt: skip
    """The golden of an engine that checks will replay by `replay`, with a noise floor of `repeats`; `name` is for messages.

    Raises UsageError and EngineError for what no replay could check, and EngineError for logprobs that are NaN or +inf.
    """
    began = time.monotonic()
    trace = _generate(engine, prompts, sampling, replay)
    generated = time.monotonic()
    golden = Golden(trace=trace, fingerprint=engine.fingerprint())
    check_numbers(trace, name)
    own = None
    if repeats and engine.config.forces:
        own, floor = measure_floor(engine, trace, repeats)
        _check_floor_numbers(trace, own, floor, name)
        golden = dataclasses.replace(golden, floor=floor)
    return Measured(golden=golden, own=own, generating=generated - began, replaying=time.monotonic() - generated)


def check_numbers(trace: Trace, name: str) -> None:
    """Raise EngineError where an engine reported NaN or +inf: such a golden would hide the next one."""
    broken = _count_broken(trace.logprobs, trace)
    if broken:
        of = int(trace.mask.sum())
        raise EngineError(f"{name}: not recorded: {broken} of {of} logprobs of this engine {is_or_are(broken)} NaN or +inf")


def measure_floor(engine: Engine, trace: Trace, repeats: int) -> tuple[FloatArray, NoiseFloor]:
    """Replay a trace on its own schedule (logprobs [N]), and `repeats` times in sampled batch compositions."""
    own = engine.replay(trace).logprobs
    shapes = BatchCompositions()
    numbers = each("noise floor, repeat", range(repeats), repeats)
    drawn = [engine.replay_in_batch_compositions(trace, shapes, number) for number in numbers]
    reproduces = bool(np.array_equal(own[trace.mask], trace.logprobs[trace.mask]))
    return own, NoiseFloor(np.stack(drawn), shapes, reproduces)


def with_untruncated(engine: Engine, trace: Trace) -> Trace:
    """The trace with its logprobs without truncation beside the processed ones, where it truncates: one more replay."""
    if not trace.sampling.truncates or trace.logprobs_mode != "processed_logprobs" or trace.untruncated_logprobs is not None:
        return trace
    free = engine.replay(trace.with_(sampling=trace.sampling.untruncated()))
    return trace.with_(untruncated_logprobs=free.logprobs)


def replays_of(own: FloatArray, floor: NoiseFloor) -> dict[str, FloatArray]:
    """The logprobs [N] of each replay that recording makes of its own tokens, by how it was made."""
    drawn = {f"in other batch compositions, repeat {n + 1} of {floor.repeats}": row for n, row in enumerate(floor.logprobs)}
    return {"on its own schedule": own, **drawn}


def disagreement(trace: Trace, way: str, headline: str, name: str) -> EngineError:
    """The refusal of an engine whose replay, made in this `way`, is not what it generated."""
    return EngineError(
        f"{name}: not recorded: this engine does not agree with itself beyond what {trace.dtype} "
        f"explains: the same tokens {way}: {headline}"
    )


def _check_floor_numbers(trace: Trace, own: FloatArray, floor: NoiseFloor, name: str) -> None:
    """Raise EngineError where a replay of the noise floor has NaN or +inf."""
    for way, logprobs in replays_of(own, floor).items():
        if broken := _count_broken(logprobs, trace):
            raise disagreement(trace, way, f"{broken} of {int(trace.mask.sum())} logprobs are NaN or +inf", name)


def _count_broken(logprobs: FloatArray, trace: Trace) -> int:
    return int(np.count_nonzero((np.isnan(logprobs) | np.isposinf(logprobs)) & trace.mask))


def _generate(engine: Engine, prompts: list[Any] | None, sampling: Sampling | None, replay: Sequence[ReplayPath]) -> Trace:
    if prompts is None:
        raise UsageError("recording needs prompts=")
    sampling = sampling or Sampling()
    _check_can_replay(engine, replay, sampling)
    with doing(f"recording {len(prompts) * sampling.n:,} completions"):
        trace = engine.generate(prompts, sampling)
    return with_untruncated(engine, trace) if "decode" in replay else trace


def _check_can_replay(engine: Engine, replay: Sequence[ReplayPath], sampling: Sampling) -> None:
    """Refuse to record what no replay could check later."""
    if "prefill" in replay and engine.config.logprobs_mode == "processed_logprobs" and not sampling.raw_is_processed:
        raise UsageError(f"not recorded: replay 'prefill' gives raw logprobs, {sampling.processing()} other ones; use 'decode'")
    if "window" in replay and (sampling.presence_penalty or sampling.frequency_penalty):
        raise UsageError("not recorded: replay 'window' cannot follow presence and frequency penalties")
    if "decode" in replay and not engine.config.forces:
        raise EngineError(f"not recorded: its golden could not be replayed: {engine.config.unforced}")
