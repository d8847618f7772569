"""Why a scorer, which stands for the trainer, does not agree with the rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from ..comparison.alignment import align
from ..comparison.findings import Cause
from ..comparison.result import Comparison, Finding
from ..comparison.signatures.lm_head import logit_step
from ..comparison.signatures.positions import positions_of
from ..comparison.tolerance import DTYPES, Tolerance
from ..golden import Golden
from ..golden.fingerprint import adapter_digest
from ..notes import Note
from ..trace import Trace
from .logit_function import explaining_logit_function
from .misplaced_logprobs import few_off, misplaced
from .scorer import Declared, Scorer, TakesAdapters, name_of
from .scoring import rms, score
from .temperature_causes import sampled_at_another_temperature, undivided_temperature
from .trainer_faults import explaining_fault
from .truncation_causes import lost_truncation

#: The grid of the trainer's logits, where only the rollouts' grid is known: that of bfloat16 logits from 4 to 8.
_STEP: Final = 1 / 32
#: Where the trainer's logprob is below this (nats), a rollout's logprob of exactly 0 is not rounding.
_UNLIKE_ZERO: Final = -0.1
#: How many sequences are scored again.
_FEW: Final = 8
#: An adapter explains the rollouts where it leaves less than this share of the allowed RMS.
_FITS: Final = 1 / 3


def causes(
    comparison: Comparison,
    rollouts: Trace | Golden,
    *,
    scored: Trace,
    scorer: Scorer,
    batch_size: int,
    limits: Tolerance,
) -> tuple[list[Finding], list[Note]]:
    """The findings of a comparison of the scorer's logprobs `scored` with the rollouts' own, its `expected`, and notes.

    In this order: NaN and infinities, what the comparison found by itself, misplaced numbers, dropout and mask, adapters, LM
    head, temperature, and other faults, for which the scorer is called again. Where nothing is named there are candidates.
    """
    expected, noise = comparison.expected, limits.fit_rms
    if (broken := not_a_number(expected, scored)) is not None:
        return [broken], []
    unverified = comparison.verdict == "unverified"
    if unverified and not comparison.findings and (undivided := undivided_temperature(expected, scored, noise)):
        return [undivided], []
    trace = rollouts.trace if isinstance(rollouts, Golden) else rollouts
    one_version = len(_by_version(trace, scored)) < 2
    findings, notes, nearest = list(comparison.findings), list[Note](), None
    # a difference that is too small to fail on other prompts, and is beyond noise, has a cause too
    failed = comparison.verdict == "fail" or (unverified and any(note.key == "beyond_dtype" for note in comparison.notes))
    if failed and not findings:
        found = _misplaced(expected, scored, noise) if one_version else None
        found = found or _scored_again(expected, scored, scorer, noise) or _recorded_adapter(rollouts, scorer)
        if found is None:
            found, nearest = _other_adapter(expected, scored, scorer, batch_size, _FITS * noise)
        findings += [] if found is None else [found]
    head = _head_finding(trace, scorer)
    if head is not None and not any(f.layer in ("semantic", "weights") and f.cause for f in findings):
        if failed and comparison.metrics["rms_diff"] <= _by_a_head(trace):
            findings.append(head)
        else:
            notes.append(Note("head_precision", f"LM head precision: {head.evidence}"))
    if failed and not findings:
        found = (
            undivided_temperature(expected, scored, noise)
            or sampled_at_another_temperature(expected, scorer, noise)
            or lost_truncation(expected, scored)
            or nearest
        )
        if found is None and one_version:
            found = _explained_by_the_scorer(expected, scored, scorer, noise)
        findings.append(found or _candidates(rollouts, scored, scorer))
    if zeros := int(np.count_nonzero(expected.mask & (expected.logprobs == 0) & (scored.logprobs < _UNLIKE_ZERO))):
        text = f"{zeros:,} of the rollouts' logprobs are exactly 0 where the trainer's are not: they may stand for missing ones"
        notes.append(Note("fillers", text))
    return findings, notes


def _misplaced(expected: Trace, scored: Trace, noise: float) -> Finding | None:
    """Rollouts whose numbers are those of other tokens, by the scorer's."""
    columns = scored, expected, noise
    return misplaced(*columns, whose="the rollout") or few_off(*columns, whose="the rollout")


def _explained_by_the_scorer(trace: Trace, scored: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """The fault, or the function of its logits, with which the scorer gives the rollouts' numbers."""
    fault = explaining_fault(trace, scored, trace, scorer, noise, whose="the engine")
    return fault or explaining_logit_function(trace, scored, trace, scorer, noise)


def _scored_again(trace: Trace, scored: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """Candidates by scoring the sequences that differ most again: `dropout` first where the trainer gives other numbers each
    time, `attention_mask` first where row by row it agrees with the rollouts, up to `noise` (RMS, nats).
    """
    owner = trace.sequence_of_token
    d = np.where(trace.mask, scored.logprobs.astype(np.float64) - trace.logprobs, 0.0)
    d2 = np.square(np.where(np.isfinite(d), d, 0.0))
    furthest = np.argsort(-np.bincount(owner, d2, trace.num_sequences))[:_FEW].tolist()
    in_batches = rms(trace.with_(mask=trace.mask & np.isin(owner, furthest)), scored)
    alone = score(trace, scorer, sequences=furthest, batch_size=1)
    apart = rms(alone, score(trace, scorer, sequences=furthest, batch_size=1))
    if apart > max(noise, in_batches / 4):
        text = f"the trainer gives other numbers each time (RMS {apart:.2g} nats between two runs): dropout may be on"
        return Finding(
            layer="trainer", cause=None, evidence=text, candidates=("dropout", "engine_build"), values={"apart": apart}
        )
    if (left := rms(trace, alone)) <= min(noise, in_batches / 4):
        text = (
            f"row by row the trainer agrees with the rollouts (RMS {left:.2g} nats), in batches it does not "
            f"({in_batches:.2g}): its mask may not hide padding or other rows"
        )
        values = {"alone": left, "batch": in_batches}
        return Finding(
            layer="trainer", cause=None, evidence=text, candidates=("attention_mask", "packing", "batch_shape"), values=values
        )
    return None


def _head_finding(trace: Trace, scorer: Scorer) -> Finding | None:
    """`head_precision` where the grid of the rollouts' logits is of one precision and the trainer declares another."""
    declared = Declared.by(scorer).head_dtype
    if declared not in DTYPES:
        return None
    step = logit_step(positions_of(trace, trace, align(trace, trace)), "expected")
    if step is None or (step == 0) == (declared in ("float32", "float64")):
        return None
    values = {"step": step, "trainer": declared}
    if step:
        text = (
            f"the rollouts' logits lie on a grid of {step:g}, as those of an LM head in half precision; the trainer's LM head "
            f"is in {declared}: a higher precision on one side only increases the difference"
        )
        return Finding(layer="head", cause="head_precision", evidence=text, values=values)
    text = f"the rollouts' logits lie on no grid, as those of an LM head in float32; the trainer's LM head is in {declared}"
    return Finding(layer="head", cause="head_precision", evidence=text, values=values)


def _by_a_head(trace: Trace) -> float:
    """The largest RMS (nats) that an LM head in half precision on one side explains: two grid steps, over the temperature."""
    step = logit_step(positions_of(trace, trace, align(trace, trace)), "expected") or _STEP
    return 2 * step / trace.sampling.applied_temperature


def not_a_number(trace: Trace, scored: Trace) -> Finding | None:
    """NaN and infinities of the trainer, for tokens that have a number in the rollouts."""
    wrong = trace.mask & np.isfinite(trace.logprobs) & (np.isnan(scored.logprobs) | (scored.logprobs == np.inf))
    if not wrong.any():
        return None
    text = f"the trainer gives NaN or +inf for {int(wrong.sum()):,} tokens that the rollouts have a logprob of"
    starts = np.array([segment.start for segment in trace.segments()])
    if len(starts) > 1 and np.array_equal(np.flatnonzero(wrong), starts[trace.mask[starts]]):
        text += ", the first token of each turn: the code that shifts or slices its numbers loses it"
        return Finding(layer="semantic", cause=None, evidence=text, candidates=("shifted_positions", "wrong_values"))
    return Finding(
        layer="weights",
        cause=None,
        evidence=f"{text}: its weights or its adapter contain NaN, or the scorer makes it",
        candidates=("weights_differ", "adapter", "attention_mask"),
    )


def _recorded_adapter(rollouts: Trace | Golden, scorer: Scorer) -> Finding | None:
    """`adapter` where the golden was recorded with an adapter and the trainer has another."""
    recorded = rollouts.fingerprint.get("adapter") if isinstance(rollouts, Golden) else None
    trainers = scorer.adapter if isinstance(scorer, TakesAdapters) else None
    if not isinstance(recorded, str) or trainers is None or trainers.digest == adapter_digest(recorded):
        return None
    return Finding(layer="weights", cause="adapter", evidence=f"{recorded} in the golden, {trainers} in the trainer")


def _other_adapter(
    trace: Trace, scored: Trace, scorer: Scorer, batch_size: int, noise: float
) -> tuple[Finding | None, Finding | None]:  # fmt: skip
    """`adapter` where the rollouts are, up to `noise` (RMS, nats), those of an engine without the scorer's adapter, or with
    another scale of it. Where no such engine fits, the second one is the finding with the nearest.
    """
    as_is, best, nearest = rms(trace, scored), "", math.inf
    for words, load in _other_adapters(scorer):
        other = rms(trace, score(trace, load(), batch_size=batch_size))
        if other < min(noise, as_is / 2):
            text = f"the rollouts are those of {words}: RMS {other:.2g} nats, with {name_of(scorer)} {as_is:.2g}"
            return Finding(layer="weights", cause="adapter", evidence=text, values={"left": other, "as_is": as_is}), None
        best, nearest = (words, other) if other < nearest else (best, nearest)
    if nearest > as_is / 2:
        return None, None
    text = (
        f"nearest: {best}, which leaves RMS {nearest:.2g} nats, beyond noise (with {name_of(scorer)} {as_is:.2g}): the engine "
        "probably has the adapter of another step"
    )
    return None, Finding(layer="weights", cause=None, evidence=text, candidates=("adapter", "stale_weights", "weights_differ"))


def _other_adapters(scorer: Scorer) -> Iterator[tuple[str, Callable[[], Scorer]]]:
    """Usual mistakes with the scorer's adapter, where it has one: words, and how to load the scorer that makes it."""
    return scorer.other_adapters() if isinstance(scorer, TakesAdapters) else iter(())


def _candidates(rollouts: Trace | Golden, scored: Trace, scorer: Scorer) -> Finding:
    """The candidates where nothing is named: another model than the engine's, or another precision."""
    trace = rollouts.trace if isinstance(rollouts, Golden) else rollouts
    if isinstance(rollouts, Golden) and (fewer := _fewer_bits(rollouts.fingerprint)):
        return Finding(
            layer="weights",
            cause=None,
            evidence=f"{fewer}: a difference on purpose can be declared",
            candidates=("quantization", "weights_differ"),
        )
    if next(_other_adapters(scorer), None) is not None:
        text = (
            "the rollouts are neither those with the trainer's adapter nor those without: the engine probably has the adapter "
            "of another step"
        )
        return Finding(layer="weights", cause=None, evidence=text, candidates=("adapter", "stale_weights", "weights_differ"))
    if len(versions := _by_version(trace, scored)) > 1:
        text = f"{len(versions)} versions of the weights wrote the rollouts, and the trainer has one: {', '.join(versions)}"
        values = {"versions": len(versions)}
        return Finding(
            layer="weights",
            cause=None,
            evidence=text,
            candidates=("stale_weights", "weights_differ", "stale_kv_cache"),
            values=values,
        )
    if trace.dtype != scored.dtype:
        trainer = "a trainer of unknown dtype" if scored.dtype == "unknown" else f"a {scored.dtype} trainer"
        text = f"{trace.dtype} rollouts, {trainer}; or the two have different weights"
        return Finding(
            layer="weights", cause=None, evidence=text, candidates=("weight_dtype", "weights_differ", "stale_weights")
        )
    text = "the labels of both sides are the same, and no fault that was tried explains the difference: the weights may differ"
    others: tuple[Cause, ...] = ("temperature", "attention_mask", "prompt", "engine_build")
    return Finding(
        layer="weights", cause=None, evidence=text, candidates=("weights_differ", "stale_weights", "adapter", *others)
    )


def _by_version(trace: Trace, scored: Trace) -> list[str]:
    """How many tokens each version of the weights wrote, and their RMS difference to the trainer, in words."""
    if trace.weight_versions is None:
        return []
    versions = trace.weight_versions
    found = []
    for version in np.unique(versions[trace.mask])[::-1]:
        of = trace.mask & (versions == version)
        found.append(f"{int(of.sum()):,} tokens of version {version} (RMS {rms(trace.with_(mask=of), scored):.2g} nats)")
    return found


def _fewer_bits(prints: Mapping[str, Any]) -> str:
    """The weights or KV cache of a fingerprint that have fewer bits than the model, in words; "" where there are none."""
    config = prints.get("config", {})
    names = [name for name in ("quantization", "kv_cache_dtype") if config.get(name) not in (None, "auto")]
    return ", ".join(f"rollouts with {name} {config[name]!r}" for name in names)
