"""Why a trainer does not agree with the rollouts, by name where arithmetic or the trainer itself can tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from ..comparison.alignment import align
from ..comparison.findings import Cause
from ..comparison.result import Comparison, Finding
from ..comparison.signatures.lm_head import logit_step
from ..comparison.signatures.logit_scale import is_a_temperature
from ..comparison.signatures.positions import positions_of
from ..comparison.tolerance import DTYPES, Tolerance
from ..golden import Golden
from ..golden.fingerprint import adapter_digest
from ..notes import Note
from ..trace import Trace
from .logit_function import function_of_logits
from .misplaced_logprobs import few_off, misplaced
from .scorer import Declared, Scorer, TakesAdapters, name_of
from .scoring import score
from .trainer_faults import otherwise

#: Positions whose top-k lists so much of the probability say what their distribution would be at another temperature.
_LISTED: Final = 0.999
#: What the rest makes of it: up to this share of what is undone.
_UNLISTED: Final = 0.1
_ENOUGH: Final = 50
#: The grid of a trainer's logits, where only the rollouts' own are known: that of bfloat16 logits from 4 to 8.
_STEP: Final = 1 / 32
#: A trainer's logprob (nats) beside which one of exactly 0 is no rounding.
_UNLIKE_ZERO: Final = -0.1
#: Temperatures at which a trainer is asked whether the rollouts are of them, and on how many sequences.
_TEMPERATURES: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0)
_FEW: Final = 8
#: Temperatures that far apart (relative) are one.
_SAME: Final = 0.01
#: An adapter explains rollouts where it leaves less than this share of the RMS that is allowed: a claim has to fit.
_FITS: Final = 1 / 3
#: Share of the differences that have one sign where a truncation made them, and how much it takes (nats): it keeps more than a
#: twentieth of the probability.
_ALMOST_ALL: Final = 0.99
_KEPT: Final = -3.0


def causes(
    comparison: Comparison,
    rollouts: Trace | Golden,
    expected: Trace,
    scored: Trace,
    scorer: Scorer,
    batch_size: int,
    limits: Tolerance,
) -> tuple[list[Finding], list[Note]]:
    """The findings of a comparison of a trainer's logprobs `scored` with the rollouts' own `expected`, and notes besides.

    What the trainer cannot have given is first; then what the comparison found by itself; then adapters, head and
    temperature, for which the trainer may be asked again; what is left are candidates.
    """
    if (of_trainer := not_a_number(expected, scored)) is not None:
        return [of_trainer], []
    trace = rollouts.trace if isinstance(rollouts, Golden) else rollouts
    findings, notes = list(comparison.findings), list[Note]()
    # what is too little to fail on other prompts, and yet is no noise, has a cause
    failed = comparison.verdict == "fail" or (
        comparison.verdict == "unverified" and any(note.key == "beyond_dtype" for note in comparison.notes)
    )
    if (
        comparison.verdict == "unverified"
        and not findings
        and (forgotten := _forgotten_temperature(expected, scored, limits.fit_rms))
    ):
        return [forgotten], []
    nearest = None
    if failed and not findings and len(_by_version(trace, scored)) < 2:
        columns = scored, expected, limits.fit_rms
        elsewhere = misplaced(*columns, whose="the rollout") or few_off(*columns, whose="the rollout")
        findings += [] if elsewhere is None else [elsewhere]
    if failed and not findings and (asked := _asked_again(expected, scored, scorer, limits.fit_rms)) is not None:
        findings.append(asked)
    if failed and not findings:
        adapter = _recorded_adapter(rollouts, scorer)
        if adapter is None:
            adapter, nearest = _other_adapter(expected, scored, scorer, batch_size, _FITS * limits.fit_rms)
        findings += [] if adapter is None else [adapter]
    head = _head_finding(trace, scorer)
    if head is not None and not any(f.layer in ("semantic", "weights") and f.cause for f in findings):
        if failed and comparison.metrics["rms_diff"] <= _by_a_head(trace):
            findings.append(head)
        else:
            notes.append(Note("head_precision", f"head precision: {head.evidence}"))
    if failed and not findings:
        noise = limits.fit_rms
        temperature = _forgotten_temperature(expected, scored, noise) or _other_temperature(expected, scorer, noise)
        told = temperature or _truncated(expected, scored) or nearest
        if told is None and len(_by_version(trace, scored)) < 2:
            told = _otherwise(expected, scored, scorer, noise)
        findings.append(told or _candidates(rollouts, scored, scorer))
    if fillers := int(np.count_nonzero(expected.mask & (expected.logprobs == 0) & (scored.logprobs < _UNLIKE_ZERO))):
        text = f"{fillers:,} of the rollouts' logprobs are exactly 0 where the trainer's are not: fillers for missing ones?"
        notes.append(Note("fillers", text))
    return findings, notes


def _otherwise(trace: Trace, scored: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """What gives the rollouts' numbers if the trainer is asked so: other context, a function of its logits."""
    found = otherwise(trace, scored, trace, scorer, noise) or function_of_logits(trace, scored, trace, scorer, noise)
    return None if found is None else dataclasses.replace(found, evidence=f"what gives the rollouts' numbers: {found.evidence}")


def _asked_again(trace: Trace, scored: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """`dropout` first where the trainer gives other numbers when it is asked the same again, `attention_mask` first where it
    gives what the rollouts report when it is asked row by row: of the sequences furthest off, up to `noise` (RMS, nats).
    """
    owner = trace.sequence_of_token
    d = np.where(trace.mask, scored.logprobs.astype(np.float64) - trace.logprobs, 0.0)
    d2 = np.square(np.where(np.isfinite(d), d, 0.0))
    furthest = np.argsort(-np.bincount(owner, d2, trace.num_sequences))[:_FEW].tolist()
    told = _rms(trace.with_(mask=trace.mask & np.isin(owner, furthest)), scored)
    alone = score(trace, scorer, sequences=furthest, batch_size=1)
    apart = _rms(alone, score(trace, scorer, sequences=furthest, batch_size=1))
    if apart > max(noise, told / 4):
        text = f"asked the same twice, row by row, it gives other numbers (RMS {apart:.2g} nats between two): dropout may be on"
        return Finding("trainer", None, text, ("dropout", "engine_build"), {"apart": apart})
    if (left := _rms(trace, alone)) <= min(noise, told / 4):
        text = (
            f"asked row by row it gives what the rollouts report (RMS {left:.2g} nats), in a batch it does not ({told:.2g}): "
            "its mask may let padding or other rows in"
        )
        return Finding("trainer", None, text, ("attention_mask", "packing", "batch_shape"), {"alone": left, "batch": told})
    return None


def _head_finding(trace: Trace, scorer: Scorer) -> Finding | None:
    """`head_precision` where the rollouts' logits lie on the grid of one precision and the trainer declares another."""
    declared = Declared.by(scorer).head_dtype
    if declared not in DTYPES:
        return None
    step = logit_step(positions_of(trace, trace, align(trace, trace)), "expected")
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
    step = logit_step(positions_of(trace, trace, align(trace, trace)), "expected") or _STEP
    return 2 * step / (trace.sampling.applied_temperature)


def not_a_number(trace: Trace, scored: Trace) -> Finding | None:
    """The trainer's own NaN and infinities, of tokens that the rollouts have a number for: its weights, or the scorer."""
    wrong = trace.mask & np.isfinite(trace.logprobs) & (np.isnan(scored.logprobs) | (scored.logprobs == np.inf))
    if not wrong.any():
        return None
    text = f"the trainer gives NaN or +inf for {int(wrong.sum()):,} tokens that the rollouts have a logprob of"
    starts = np.array([segment.start for segment in trace.segments()])
    if len(starts) > 1 and np.array_equal(np.flatnonzero(wrong), starts[trace.mask[starts]]):
        text += ", the first token of each turn: what shifts or slices its numbers lost it"
        return Finding("semantic", None, text, ("shifted_positions", "wrong_values"))
    return Finding(
        "weights",
        None,
        f"{text}: its weights or its adapter hold NaN, or the scorer makes them",
        ("weights_differ", "adapter", "attention_mask"),
    )


def _forgotten_temperature(trace: Trace, scored: Trace, noise: float) -> Finding | None:
    """`temperature` where the rollouts' own numbers with their temperature undone are the trainer's, up to `noise` (RMS, nats).

    A logprob l at temperature T is T l - log sum exp(T l') at 1, over all tokens l' of its position: of positions whose top-k
    lists nearly all of them.
    """
    temperature = trace.sampling.applied_temperature
    if temperature == 1 or trace.is_raw or not trace.top_k:
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
    if undone > max(min(noise, as_told / 2), _UNLISTED * as_told):
        return None
    text = (
        f"the trainer does not divide by the rollouts' temperature {temperature:g}: with that undone they agree to an RMS of "
        f"{undone:.2g} nats, as told to {as_told:.2g} ({int(np.count_nonzero(used)):,} positions)"
    )
    return Finding("semantic", "temperature", text)


def _other_temperature(trace: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """`temperature` where the trainer at another one gives the rollouts' numbers up to `noise` (RMS, nats): they were sampled
    at that one, whatever their label says. Named where it is a round one, as people choose them: any other may be a scale of
    the trainer's logits. The RMS is least squares over temperatures, on a few sequences.
    """
    from scipy.optimize import minimize_scalar

    if trace.is_raw and not trace.sampling.raw_is_processed:
        return None

    def rms(temperature: float | None) -> float:
        few = range(min(trace.num_sequences, _FEW))
        return _rms(trace, score(trace, scorer, temperature=temperature, sequences=few))

    told, start = rms(None), min(_TEMPERATURES, key=rms)
    found = minimize_scalar(rms, bounds=(start / 1.2, start * 1.2), method="bounded", options={"xatol": 1e-4})
    if not found.fun < min(noise, told / 4):
        return None
    label = trace.sampling.applied_temperature
    text = (
        f"at a temperature of {found.x:.3f} the trainer gives what the rollouts report (RMS {found.fun:.2g} nats), at that of "
        f"their label, {label:g}, it does not ({told:.2g}): "
    )
    if math.isclose(found.x, 1, rel_tol=_SAME):
        text += "they are raw logprobs (logprobs_mode, vLLM's default) under a label that says processed, or were sampled at 1"
        return Finding("semantic", None, text, ("raw_vs_processed", "temperature"))
    twice, times = math.isclose(found.x**2, label, rel_tol=_SAME), math.isclose(found.x * label, 1, rel_tol=_SAME)
    other = ", or the trainer divides by it twice" if twice else ", or the trainer multiplies by it" if times else ""
    text = f"{text}they were sampled at another one{other}"
    if not is_a_temperature(float(found.x), label) and not other:
        return Finding("semantic", None, f"{text}, or the trainer's logits have another scale", ("temperature", "logits"))
    return Finding("semantic", "temperature", text)


def _recorded_adapter(rollouts: Trace | Golden, scorer: Scorer) -> Finding | None:
    """`adapter` where the rollouts' golden was recorded with one, and the trainer has another."""
    recorded = rollouts.fingerprint.get("adapter") if isinstance(rollouts, Golden) else None
    trainers = scorer.adapter if isinstance(scorer, TakesAdapters) else None
    if not isinstance(recorded, str) or trainers is None or trainers.digest == adapter_digest(recorded):
        return None
    return Finding("weights", "adapter", f"{recorded} in the golden, {trainers} in the trainer")


def _other_adapter(
    trace: Trace, scored: Trace, scorer: Scorer, batch_size: int, noise: float
) -> tuple[Finding | None, Finding | None]:  # fmt: skip
    """`adapter` where the rollouts are those of an engine that lacks the scorer's adapter, or scales it otherwise: but for
    `noise` (RMS, nats). Beside it, where none does as well, the finding that names the nearest: another step's comes first.
    """
    as_told, best, nearest = _rms(trace, scored), "", math.inf
    for words, load in _other_adapters(scorer):
        other = _rms(trace, score(trace, load(), batch_size=batch_size))
        if other < min(noise, as_told / 2):
            text = f"the rollouts are those of {words}: RMS {other:.2g} nats, with {name_of(scorer)} {as_told:.2g}"
            return Finding("weights", "adapter", text), None
        best, nearest = (words, other) if other < nearest else (best, nearest)
    if nearest > as_told / 2:
        return None, None
    text = (
        f"nearest: {best}, which leaves RMS {nearest:.2g} nats, beyond noise (with {name_of(scorer)} {as_told:.2g}): another "
        "step's adapter comes first"
    )
    return None, Finding("weights", None, text, ("adapter", "stale_weights", "weights_differ"))


def _other_adapters(scorer: Scorer) -> Iterator[tuple[str, Callable[[], Scorer]]]:
    """Usual mistakes with the scorer's adapter, where it has one: words, and how to load the scorer that makes it."""
    return scorer.other_adapters() if isinstance(scorer, TakesAdapters) else iter(())


def _truncated(trace: Trace, scored: Trace) -> Finding | None:
    """Rollouts whose label says nothing of a truncation, and whose numbers do: their top-k excludes tokens, or none of them is
    likelier to the trainer, as where the rest was made a distribution again.
    """
    if trace.sampling.truncates:
        return None
    excluded = (np.isneginf(trace.top_logprobs) & (trace.top_token_ids >= 0)).any(axis=1) & trace.mask
    why = ""
    if (positions := int(np.count_nonzero(excluded))) >= _ENOUGH:
        why = f"their own top-k excludes tokens at {positions:,} positions"
    else:
        d = (scored.logprobs.astype(np.float64) - trace.logprobs)[trace.mask & (trace.logprobs != 0)]  # 0 may be a filler
        d = d[np.isfinite(d)]
        apart = d[np.abs(d) > np.sqrt(np.mean(d**2)) / 2] if len(d) else d
        if len(apart) >= _ENOUGH and np.mean(apart < 0) > _ALMOST_ALL and apart.min() > _KEPT:
            why = f"no token is likelier to the trainer: {len(apart):,} are less likely, by {-apart.mean():.2g} nats on average"
    if not why:
        return None
    text = f"{why}: rollouts of a truncated distribution (top-p, top-k, min-p), which their label says nothing of"
    return Finding("semantic", None, text, ("truncation", "penalties", "weights_differ"))


def _rms(trace: Trace, scored: Trace) -> float:
    d = (scored.logprobs.astype(np.float64) - trace.logprobs)[trace.mask]
    return float(np.sqrt(np.mean(d[np.isfinite(d)] ** 2)))


def _candidates(rollouts: Trace | Golden, scored: Trace, scorer: Scorer) -> Finding:
    """What is left where nothing is named: another model than the engine's, or another precision."""
    trace = rollouts.trace if isinstance(rollouts, Golden) else rollouts
    if isinstance(rollouts, Golden) and (fewer := _fewer_bits(rollouts.fingerprint)):
        return Finding(
            "weights", None, f"{fewer}: a gap that is there on purpose can be declared", ("quantization", "weights_differ")
        )
    if next(_other_adapters(scorer), None) is not None:
        text = "the rollouts are neither those of the trainer's adapter nor those without it: another step's comes first"
        return Finding("weights", None, text, ("adapter", "stale_weights", "weights_differ"))
    if len(versions := _by_version(trace, scored)) > 1:
        text = f"the rollouts are of {len(versions)} weights, the trainer's are of one: {', '.join(versions)}"
        return Finding("weights", None, text, ("stale_weights", "weights_differ", "stale_kv_cache"))
    if trace.dtype != scored.dtype:
        trainer = "a trainer of unknown dtype" if scored.dtype == "unknown" else f"a {scored.dtype} trainer"
        text = f"{trace.dtype} rollouts, {trainer}; or the two do not have the same weights"
        return Finding("weights", None, text, ("weight_dtype", "weights_differ", "stale_weights"))
    text = (
        "the same distribution by its labels, and nothing that was tried tells more than that: other weights, or what one does"
    )
    others: tuple[Cause, ...] = ("temperature", "attention_mask", "prompt", "engine_build")
    return Finding("weights", None, text, ("weights_differ", "stale_weights", "adapter", *others))


def _by_version(trace: Trace, scored: Trace) -> list[str]:
    """How many tokens each version of the weights wrote, and how far from the trainer they are, in words."""
    if trace.weight_versions is None:
        return []
    versions = trace.weight_versions
    told = []
    for version in np.unique(versions[trace.mask])[::-1]:
        of = trace.mask & (versions == version)
        told.append(f"{int(of.sum()):,} tokens of version {version} (RMS {_rms(trace.with_(mask=of), scored):.2g} nats)")
    return told


def _fewer_bits(prints: Mapping[str, Any]) -> str:
    """What a fingerprint says of weights or a cache in fewer bits than the model's, in words; empty where nothing."""
    config = prints.get("config", {})
    names = [name for name in ("quantization", "kv_cache_dtype") if config.get(name) not in (None, "auto")]
    return ", ".join(f"rollouts with {name} {config[name]!r}" for name in names)
