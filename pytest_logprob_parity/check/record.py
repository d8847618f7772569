"""Record a golden: the run, its noise floor, and what a golden of this noise and size can show. Refuses what cannot pass."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..checkpoint.digests import digest_of
from ..comparison.alignment import align
from ..comparison.compare import compare
from ..comparison.evidence import Evidence
from ..comparison.judge import judge
from ..comparison.result import Comparison
from ..comparison.signatures.semantics import semantic_findings
from ..comparison.token_differences import setting_of
from ..comparison.tolerance import Tolerance, default_tolerance, make_tolerance, parse_tolerance, with_floor
from ..engines.engine import Engine
from ..errors import EngineError, GoldenError, UsageError
from ..golden import Golden
from ..grammar import counted
from ..notes import Note
from ..progress import doing
from ..spec import Sampling
from ..trace import FloatArray, ReplayPath, Trace
from ..trainer.retokenisation import retokenisation_notes
from .chance_to_pass import DRAWS, WANTED, chance_to_pass
from .compatibility import check_belongs, temperature_notes
from .context import Context
from .measure import Measured, check_numbers, disagreement, measure, replays_of
from .reference_pass import reference_of

#: RMS (nats) between clean builds of vLLM 0.8.5 to 0.32.0 on the same tokens (docs/how-to/diagnosis.md, the migration), where a
#: golden has no reference to know better.
_OTHER_BUILDS: Final = {"float64": 1e-6, "float32": 1e-6, "float16": 0.0025, "bfloat16": 0.02}


def record(
    path: Path,
    engine: Engine | Trace,
    prompts: list[Any] | None,
    sampling: Sampling | None,
    replay: Sequence[ReplayPath],
    tolerance: Tolerance | Mapping[str, Any] | str | None,
    repeats: int,
    context: Context,
) -> Comparison:
    """Make a golden of what an engine writes, or of a trace, and say what it can show; nothing is written otherwise.

    Raises UsageError for what no check could ever pass or make sense of, EngineError for an engine that does not agree
    with itself beyond what its dtype explains.
    """
    _check_place(path, repeats, context)
    about: dict[str, Any] = {"node_id": context.node_id, "name": context.name, "tolerance": _as_mapping(tolerance)}
    if isinstance(engine, Engine):
        _check_size(prompts, sampling or Sampling(), context)
        with doing(f"starting {engine.spec}"):
            _ = engine.config  # starts it, which is no part of what generating takes
        about["prompts_digest"] = digest_of(prompts)
    raised = temperature_notes(sampling, engine.engine if isinstance(engine, Trace) else engine.config.engine)
    notes: list[Note] = []
    measured = None
    if isinstance(engine, Trace):
        golden = Golden(trace=engine, **about)
        check_belongs(golden, engine, prompts, sampling, context)
    else:
        measured = measure(engine, prompts, sampling, replay, repeats, context.shown_path)
        golden = dataclasses.replace(measured.golden, **about)
    explicit = {**parse_tolerance(context.tolerance_lines, golden.trace.dtype, ("decode",)), **golden.tolerance}
    _check_passes_itself(golden.trace, context.shown_path)
    if measured is not None and measured.own is not None:
        _check_agrees_with_itself(golden, measured.own, explicit, context.shown_path)
    if measured is not None and isinstance(engine, Engine):
        began = time.monotonic()
        with doing("computing the reference"):
            reference, told = reference_of(engine, golden.trace, measured.generating, context.reference)
        notes += [Note("reference", told), _times(measured, None if reference is None else time.monotonic() - began)]
        notes += retokenisation_notes(golden.trace, engine.tokenizer)
        golden = dataclasses.replace(golden, reference=reference)
        _check_agrees_with_reference(golden, context.shown_path)
    limits = make_tolerance(
        with_floor(default_tolerance(golden.trace.dtype, objective=context.objective), golden.floor), explicit
    )
    golden.save(path, context.max_megabytes)
    written = Golden.load(path)
    same = Evidence(
        floor=written.floor,
        reference=written.reference,
        routed=written.routed,
        setup="same",
        policy_logprobs=golden.trace.untruncated_logprobs,
    )
    proof = judge(written.trace, golden.trace, limits, "rl", same)
    floor = "no noise floor: the defaults of its dtype stand in" if written.floor is None else written.floor.describe()
    return dataclasses.replace(
        proof, recorded=True, notes=(Note("floor", floor), *notes, *_what_it_can_show(golden, limits), *raised), shown=None
    )


def _times(measured: Measured, reference: float | None) -> Note:
    """How many seconds each part of the recording took; `reference` is None where none was computed."""
    parts = [f"generating {measured.generating:.1f} s"]
    parts += [f"noise floor {measured.replaying:.1f} s"] if measured.own is not None else []
    parts += [f"reference {reference:.1f} s"] if reference is not None else []
    return Note("floor_seconds", f"times: {', '.join(parts)}")


def _check_place(path: Path, repeats: int, context: Context) -> None:
    """Refuse a directory in the golden's place, and a number of repeats that makes no noise floor."""
    if path.is_dir():
        raise GoldenError(f"{context.shown_path}: a directory stands where the golden should be; move it away")
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 0 or repeats == 1:
        raise UsageError(f"repeats={repeats!r}: a noise floor needs 2 repeats or more; 0 records none")


#: The share of its tokens that a completion is taken to have, where it may end early; and the bytes of one place of a top-k.
_LENGTH: Final = 0.25
_BYTES: Final = 8


def _check_size(prompts: Sequence[Any] | None, sampling: Sampling, context: Context) -> None:
    """Refuse what would be larger than the limit, before an engine runs. Raises UsageError."""
    if context.max_megabytes is None or prompts is None:
        return
    tokens = sampling.max_tokens if sampling.ignore_eos else max(_LENGTH * sampling.max_tokens, sampling.min_tokens, 1)
    megabytes = len(prompts) * sampling.n * tokens * sampling.logprobs * _BYTES / 1e6
    if megabytes > context.max_megabytes:
        raise UsageError(
            f"{context.shown_path}: not recorded, and no engine was started: {len(prompts)} prompts x {sampling.n} samples x "
            f"{tokens:.0f} tokens with top-{sampling.logprobs} would be {megabytes:.3g} MB, and parity_max_golden_mb is "
            f"{context.max_megabytes:g}: sample fewer prompts, a smaller max_tokens, or fewer logprobs"
        )


def check_recorded(
    golden: Golden, explicit: Mapping[str, float], name: str, own: FloatArray | None = None
) -> None:  # fmt: skip
    """Everything that recording refuses and a file can show; `explicit` are the limits that hold. Raises as `record` does.

    `own` [N] are the logprobs of a replay on the golden's own schedule, where they are at hand: no file keeps them.
    """
    if golden.fingerprint:
        check_numbers(golden.trace, name)
    _check_passes_itself(golden.trace, name)
    if golden.floor is not None:
        _check_agrees_with_itself(golden, golden.trace.logprobs if own is None else own, explicit, name)
    _check_agrees_with_reference(golden, name)


def _check_passes_itself(trace: Trace, name: str) -> None:
    itself = compare(expected=trace, actual=trace)
    if not itself.passed:
        raise UsageError(f"{name}: not recorded: it could never pass: {itself.headline}")


def _check_agrees_with_itself(golden: Golden, own: FloatArray, explicit: Mapping[str, float], name: str) -> None:
    """Refuse a golden whose own engine would fail it."""
    trace, floor = golden.trace, golden.floor
    assert floor is not None
    limits = make_tolerance(default_tolerance(trace.dtype), explicit)
    # the repeats have no top-k: held against the golden's, a token at the edge of a nucleus would contradict it
    chosen = trace.with_(
        top_logprobs=trace.top_logprobs[:, :0], top_token_ids=trace.top_token_ids[:, :0], ranks=0 * trace.ranks
    )
    for way, logprobs in replays_of(own, floor).items():
        again = judge(chosen, chosen.with_(logprobs=logprobs), limits, "rl", Evidence(routed=golden.routed))
        if again.verdict == "fail":
            raise disagreement(trace, way, again.headline, name)


#: A golden is refused where all but its largest errors have a larger RMS than this (nats), or one token is further off; both
#: are divided by a temperature below 1. Ten times what was measured of clean engines (benchmarks/bench_clean.py).
_REFUSED_RMS: Final = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.4}
_REFUSED_TOKEN: Final = {"float32": 1.0, "float16": 3.0, "bfloat16": 8.0}
#: Errors that are left out of that RMS: ties between experts, and tokens at the edge of a window.
_LARGEST: Final = 0.005


def _check_agrees_with_reference(golden: Golden, name: str) -> None:
    """Refuse a golden that is further from its own model in float32 than its dtype explains: it would record a bug."""
    trace, reference = golden.trace, golden.reference
    if reference is None:
        return
    errors = np.abs(reference.errors(trace.logprobs))
    errors = np.sort(errors[np.isfinite(errors)])
    if not len(errors):
        return
    setting = setting_of(trace, golden.routed, trace.dtype)
    enlarged, dtype = setting.enlarged, {"float64": "float32"}.get(trace.dtype, trace.dtype)
    dtype = dtype if dtype in _REFUSED_RMS else "bfloat16"
    rms = float(np.sqrt(np.mean(errors[: max(round(len(errors) * (1 - _LARGEST)), 1)] ** 2)))
    far = float(errors[-1])
    if rms <= _REFUSED_RMS[dtype] * enlarged and (golden.routed or far <= _REFUSED_TOKEN[dtype] * enlarged):
        return
    as_trace = trace.with_(logprobs=np.where(np.isnan(reference.logprobs), trace.logprobs, reference.logprobs))
    found = semantic_findings(as_trace, trace, align(as_trace, trace))
    why = f"; {found[0]}" if found else ""
    raise EngineError(
        f"{name}: not recorded: the engine's logprobs are further from the model's own in float32 "
        f"({reference.source}) than {trace.dtype} explains: RMS {rms:.2g} nats, the largest {far:.2g}{why}. Find out which is "
        "wrong; ini `parity_reference = none` records without a reference"
    )


def _what_it_can_show(golden: Golden, limits: Tolerance) -> list[Note]:
    """What this golden cannot show, and what it would need."""
    notes = []
    if golden.trace.sampling.raw_is_processed:
        text = "cannot tell raw from processed logprobs: at T=1 without truncation and penalties they are the same"
        notes.append(Note("cannot_tell_raw", text))
    chance = chance_to_pass(golden, limits, _OTHER_BUILDS.get(golden.trace.dtype, _OTHER_BUILDS["bfloat16"]))
    prompts = f"{'this' if chance.prompts == 1 else 'these'} {counted(chance.prompts, 'prompts')}"
    text = f"simulated: {chance.passes} of {DRAWS} fault-free engines of another version pass with {prompts}"
    if chance.share < WANTED:
        text += (
            f"; with {chance.needed} prompts like these, {WANTED:.0%} would pass"
            if chance.needed is not None
            else f"; more prompts would not bring this to {WANTED:.0%}: the noise is too large for the objective's limits"
        )
    notes.append(Note("chance", text))
    if chance.hidden:
        text = (
            f"objective {limits.objective}: noise alone is larger than its limits in {golden.trace.dtype}; checks of engines "
            "of another version will be unverified"
        )
        notes.append(Note("noise_hides", text))
    if chance.prompts == 1:
        notes.append(Note("one_prompt", "all sequences have the same prompt: the golden shows nothing about other prompts"))
    return notes


def _as_mapping(tolerance: Tolerance | Mapping[str, Any] | str | None) -> dict[str, float]:
    if isinstance(tolerance, str):
        return {}  # a gap is declared by whoever checks, not by the golden: it is not part of what was recorded
    if isinstance(tolerance, Tolerance):
        return tolerance.limits()
    return dict(tolerance or {})
