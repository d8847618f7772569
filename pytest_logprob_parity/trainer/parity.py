"""Does the trainer agree with the engine? Its logprobs of the rollouts' tokens, held against those that came with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..comparison.alignment import align
from ..comparison.gaps import GAPS, with_gap
from ..comparison.result import Comparison, Finding, MismatchError
from ..comparison.signatures.head import logit_step
from ..comparison.signatures.positions import positions_of
from ..comparison.tolerance import DEFAULTS, Tolerance, default_tolerance, make_tolerance
from ..comparison.verdict import Evidence, judge
from ..errors import UsageError
from ..golden import Golden
from ..message import failure_message
from ..trace import Trace
from .frameworks import framework, with_metrics
from .scoring import Scorer, name_of, score, temperature_of

#: Positions whose top-k lists so much of the probability say what their distribution would be at another temperature.
_LISTED: Final = 0.999
_ENOUGH: Final = 50
#: The grid of a trainer's logits, where only the rollouts' own are known: that of bfloat16 logits from 4 to 8.
_STEP: Final = 1 / 32
#: From the finest to the coarsest; a comparison has the limits of the coarser side.
_COARSER: Final = ("float64", "float32", "float16", "bfloat16")


def assert_trainer_parity(
    rollouts: Trace | Golden,
    scorer: Scorer,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    batch_size: int = 16,
    metrics: str | None = None,
) -> Comparison:
    """Assert that a trainer's logprobs of the tokens of `rollouts` are those that came with them; returns the comparison.

    d = trainer - rollout, in nats, so that exp(d) is the policy ratio of an on-policy step. `scorer` is asked as a trainer
    asks its model: token ids, attention mask, and the temperature of the rollouts. `tolerance` changes limits, names a
    framework whose thresholds they become (`"verl"`), or declares a gap that is there on purpose (`"fp8"`); `metrics` names
    a framework whose metric names are reported with it.

    Rollouts of a truncated distribution are compared without truncation where the trace has `untruncated_logprobs`, over
    their kept sets where it lists them and the scorer can do that, and are else refused with the reason, as those sampled
    under a penalty are.

    Raises MismatchError for the verdicts `fail` and `unverified`, UsageError for what cannot be compared.
    """
    __tracebackhide__ = True
    comparison = compare_with_trainer(rollouts, scorer, tolerance, batch_size=batch_size, metrics=metrics)
    if not comparison.passed:
        raise MismatchError(trainer_message(comparison), comparison)
    return comparison


def compare_with_trainer(
    rollouts: Trace | Golden,
    scorer: Scorer,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    batch_size: int = 16,
    metrics: str | None = None,
) -> Comparison:
    """What `assert_trainer_parity` asserts, whatever its verdict."""
    if not isinstance(rollouts, (Trace, Golden)):
        raise UsageError(f"rollouts are a Trace or a Golden, not {type(rollouts).__name__}")
    trace = rollouts.trace if isinstance(rollouts, Golden) else rollouts
    scored = score(trace, scorer, batch_size=batch_size)
    expected = _as_the_trainer_sees_it(trace, scored)
    limits = trainer_tolerance(trace.dtype, scored.dtype, tolerance)
    comparison = judge(expected, scored, limits, "rl", Evidence(sides=("rollout", "trainer")))
    if of_trainer := _not_a_number(expected, scored):
        return dataclasses.replace(comparison, findings=(of_trainer,))
    findings, notes = list(comparison.findings), list(comparison.notes)
    if comparison.verdict == "fail" and not findings and (other := _other_adapter(expected, scored, scorer, batch_size)):
        findings.append(other)
    head = _head_finding(trace, scorer)
    if head is not None and not any(f.layer in ("semantic", "weights") and f.cause for f in findings):
        if comparison.verdict == "fail" and comparison.metrics["rms_diff"] <= _by_a_head(trace):
            findings.append(head)
        else:
            notes.append(f"head precision: {head.evidence}")
    if comparison.verdict == "fail" and not findings and (forgotten := _forgotten_temperature(expected, scored)):
        findings.append(forgotten)
    if comparison.verdict == "fail" and not findings:
        findings.append(_candidates(rollouts, scored, scorer))
    if expected.replay != trace.replay:
        notes.append(expected.replay)
    comparison = dataclasses.replace(comparison, findings=tuple(findings), notes=tuple(notes))
    prints = rollouts.fingerprint.get("config") if isinstance(rollouts, Golden) else None
    comparison = with_gap(comparison, tolerance, prints)
    name = metrics or (tolerance if isinstance(tolerance, str) and tolerance not in GAPS else "")
    return with_metrics(comparison, name) if name else comparison


def trainer_tolerance(
    rollout_dtype: str, trainer_dtype: str, tolerance: Tolerance | Mapping[str, Any] | str | None = None
) -> Tolerance:
    """The limits between an engine and a trainer: those of the coarser dtype for decode against prefill, changed by
    `tolerance`; a name means the thresholds of that framework, or a declared gap.
    """
    known = [dtype for dtype in (rollout_dtype, trainer_dtype) if dtype in DEFAULTS]
    coarser = max(known, key=_COARSER.index) if len(known) == 2 else "unknown"
    limits = default_tolerance(coarser, ("decode", "prefill"))
    if isinstance(tolerance, str) and tolerance not in GAPS:
        tolerance = framework(tolerance).tolerance
    return make_tolerance(limits, tolerance)


def _as_the_trainer_sees_it(trace: Trace, scored: Trace) -> Trace:
    """The rollouts' logprobs that the trainer's are of the same distribution as: without truncation, where it has none."""
    if scored.sampling == trace.sampling or trace.untruncated_logprobs is None:
        return trace
    return trace.with_(
        logprobs=trace.untruncated_logprobs,
        sampling=trace.sampling.untruncated(),
        top_logprobs=trace.top_logprobs[:, :0],
        top_token_ids=trace.top_token_ids[:, :0],
        replay="compared without truncation: the rollouts' second replay, and the trainer's distribution over all tokens",
    )


def _head_finding(trace: Trace, scorer: Any) -> Finding | None:
    """`head_precision` where the rollouts' logits lie on the grid of one precision and the trainer declares another."""
    declared = getattr(scorer, "head_dtype", "")
    if declared not in DEFAULTS:
        return None
    step = logit_step(positions_of(trace, trace, align(trace, trace)), golden=True)
    if step is None or (step == 0) == (declared in ("float32", "float64")):
        return None
    if step:
        text = (
            f"the rollouts' logits lie on a grid of {step:g}, as those of a head in half precision; the trainer's head is in "
        )
        return Finding("head", "head_precision", text + f"{declared}: one side alone makes it worse, not better")
    text = f"the rollouts' logits lie on no grid, as those of a head in float32; the trainer's head is in {declared}"
    return Finding("head", "head_precision", text)


def _by_a_head(trace: Trace) -> float:
    """The largest RMS (nats) that one side's head in half precision can make: two steps of its grid, over the temperature."""
    step = logit_step(positions_of(trace, trace, align(trace, trace)), golden=True) or _STEP
    return 2 * step / (temperature_of(trace.sampling) or 1.0)


def _not_a_number(trace: Trace, scored: Trace) -> Finding | None:
    """The trainer's own NaN and infinities, of tokens that the rollouts have a number for: its weights, or the scorer."""
    wrong = trace.mask & np.isfinite(trace.logprobs) & (np.isnan(scored.logprobs) | (scored.logprobs == np.inf))
    if not wrong.any():
        return None
    text = f"the trainer gives NaN or +inf for {int(wrong.sum()):,} tokens that the rollouts have a logprob of"
    return Finding(
        "weights", None, f"{text}: its weights or its adapter hold NaN, or the scorer makes them", ("weights_differ", "adapter")
    )


def _forgotten_temperature(trace: Trace, scored: Trace) -> Finding | None:
    """`temperature` where the rollouts' own numbers with their temperature undone are the trainer's.

    A logprob l at temperature T is T l - log sum exp(T l') at 1, over all tokens l' of its position: of positions whose top-k
    lists nearly all of them.
    """
    temperature = temperature_of(trace.sampling)
    if temperature == 1 or trace.distribution() == "raw" or not trace.top_k:
        return None
    top = np.where(np.isfinite(trace.top_logprobs), trace.top_logprobs, -np.inf).astype(np.float64)
    listed = trace.top_token_ids == trace.token_ids[:, None]
    chosen = np.where(listed.any(axis=1), -np.inf, trace.logprobs.astype(np.float64))
    both = np.column_stack([chosen, top])
    scaled = temperature * both
    raw = temperature * trace.logprobs - np.log(np.exp(scaled).sum(axis=1))
    used = trace.mask & (np.exp(both).sum(axis=1) > _LISTED) & np.isfinite(raw) & np.isfinite(scored.logprobs)
    if np.count_nonzero(used) < _ENOUGH:
        return None
    undone, as_told = (np.sqrt(np.mean((scored.logprobs - x)[used] ** 2)) for x in (raw, trace.logprobs))
    if undone > as_told / 2:
        return None
    text = (
        f"the trainer does not divide by the rollouts' temperature {temperature:g}: with that undone they agree to an RMS of "
        f"{undone:.2g} nats, as told to {as_told:.2g} ({int(np.count_nonzero(used)):,} positions)"
    )
    return Finding("semantic", "temperature", text)


def _other_adapter(trace: Trace, scored: Trace, scorer: Any, batch_size: int) -> Finding | None:
    """`adapter` where the rollouts are those of an engine that lacks the scorer's adapter, or scales it otherwise."""
    as_told = _rms(trace, scored)
    for words, load in getattr(scorer, "other_adapters", tuple)():
        other = _rms(trace, score(trace, load(), batch_size=batch_size))
        if other < as_told / 2:
            text = f"the rollouts are those of {words}: RMS {other:.2g} nats, with {name_of(scorer)} {as_told:.2g}"
            return Finding("weights", "adapter", text)
    return None


def _rms(trace: Trace, scored: Trace) -> float:
    d = (scored.logprobs.astype(np.float64) - trace.logprobs)[trace.mask]
    return float(np.sqrt(np.mean(d[np.isfinite(d)] ** 2)))


def _candidates(rollouts: Trace | Golden, scored: Trace, scorer: Any) -> Finding:
    """What is left where nothing is named: another model than the engine's, or another precision."""
    trace = rollouts.trace if isinstance(rollouts, Golden) else rollouts
    if isinstance(rollouts, Golden) and (fewer := _fewer_bits(rollouts.fingerprint)):
        return Finding(
            "weights", None, f"{fewer}: a gap that is there on purpose can be declared", ("quantization", "weights_differ")
        )
    if next(iter(getattr(scorer, "other_adapters", tuple)()), None) is not None:
        text = "the rollouts are neither those of the trainer's adapter nor those without it: another step's comes first"
        return Finding("weights", None, text, ("adapter", "stale_weights", "weights_differ"))
    if trace.dtype != scored.dtype:
        text = f"{trace.dtype} rollouts, a {scored.dtype} trainer; or the two do not have the same weights"
        return Finding("weights", None, text, ("weight_dtype", "weights_differ", "stale_weights"))
    text = "the same distribution by its labels, and no arithmetic that tells more: other weights on the two sides come first"
    return Finding("weights", None, text, ("weights_differ", "stale_weights", "adapter"))


def _fewer_bits(prints: Mapping[str, Any]) -> str:
    """What a fingerprint says of weights or a cache in fewer bits than the model's, in words; empty where nothing."""
    config = prints.get("config", {})
    names = [name for name in ("quantization", "kv_cache_dtype") if config.get(name) not in (None, "auto")]
    return ", ".join(f"rollouts with {name} {config[name]!r}" for name in names)


def trainer_message(comparison: Comparison) -> str:
    """The failure message: rollout against trainer."""
    trace = comparison.expected
    about = (
        f"{trace.engine} {trace.engine_version}, {trace.dtype}, {trace.logprobs_mode.replace('_', ' ')} by {trace.path}; "
        f"{trace.sampling.processing()}"
    )
    sizes = f"{trace.num_sequences} sequences of {trace.num_prompts} prompts, {int(trace.mask.sum()):,} tokens to compare"
    differences = [("dtype", trace.dtype, comparison.actual.dtype)] if trace.dtype != comparison.actual.dtype else []
    return failure_message(comparison, golden=about, about=[sizes], differences=differences, accept="")
