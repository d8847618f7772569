"""Temperature as the cause: not applied, applied with another value, or something that acts like it.

Each function asks which temperature makes one side the other, and returns a finding or None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ..comparison.result import Finding
from ..comparison.signatures.logit_scale import is_a_temperature
from ..trace import Trace
from .scorer import Scorer
from .scoring import rms, score, spread
from .trainer_faults import furthest_off

#: Top-k lists with this share of the probability say what their distribution would be at another temperature.
_LISTED: Final = 0.999
#: What the unlisted rest may add: this share of the difference that the temperature makes.
_UNLISTED: Final = 0.1
#: Positions that this needs.
_ENOUGH: Final = 50
#: Temperatures at which the scorer is asked first, and on how many sequences.
_TEMPERATURES: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 2.0)
_FEW: Final = 8
#: Temperatures are equal up to this (relative).
_SAME: Final = 0.01
#: A temperature that leaves less than this share of the difference explains most of it.
_MOSTLY: Final = 0.6
#: The column differs where its RMS difference is more than this many times the noise.
_FAR: Final = 4.0


def undivided_temperature(rollouts: Trace, scored: Trace, noise: float) -> Finding | None:
    """`temperature` where the trainer does not divide by the rollouts' temperature: with this temperature undone the rollouts'
    own numbers are the trainer's, up to `noise` (RMS, nats).

    A logprob l at temperature T is T l - log sum exp(T l') at temperature 1, over all tokens l' of its position: computed at
    positions whose top-k lists nearly all of them.
    """
    temperature = rollouts.sampling.applied_temperature
    if temperature == 1 or rollouts.is_raw or not rollouts.top_k:
        return None
    top = np.where(np.isfinite(rollouts.top_logprobs), rollouts.top_logprobs, -np.inf).astype(np.float64)
    listed = rollouts.top_token_ids == rollouts.token_ids[:, None]
    chosen = np.where(listed.any(axis=1), -np.inf, rollouts.logprobs.astype(np.float64))
    both = np.column_stack([chosen, top])
    undone = temperature * rollouts.logprobs - np.log(np.exp(temperature * both).sum(axis=1))
    used = rollouts.mask & (np.exp(both).sum(axis=1) > _LISTED) & np.isfinite(undone) & np.isfinite(scored.logprobs)
    if np.count_nonzero(used) < _ENOUGH:
        return None
    left, as_labelled = (np.sqrt(np.mean((scored.logprobs - x)[used] ** 2)) for x in (undone, rollouts.logprobs))
    if left > max(min(noise, as_labelled / 2), _UNLISTED * as_labelled):
        return None
    text = (
        f"the trainer does not divide by the rollouts' temperature {temperature:g}: without it the RMS difference is "
        f"{left:.2g} nats, with it {as_labelled:.2g} ({int(np.count_nonzero(used)):,} positions)"
    )
    return Finding(layer="semantic", cause="temperature", evidence=text, values={"fault": "undivided"})


def sampled_at_another_temperature(rollouts: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """`temperature` where the scorer gives the rollouts' numbers at another temperature, up to `noise` (RMS, nats): they were
    sampled at that one, whatever their label says.

    Named where it is a round number, as people choose them: any other may be a scale of the trainer's logits. Least squares
    over temperatures, on a few sequences.
    """
    if rollouts.is_raw and not rollouts.sampling.raw_is_processed:
        return None

    def left(temperature: float | None) -> float:
        few = range(min(rollouts.num_sequences, _FEW))
        return rms(rollouts, score(rollouts, scorer, temperature=temperature, sequences=few))

    as_labelled, (found, remains) = left(None), _least(left, _TEMPERATURES, within=1.2)
    if not remains < min(noise, as_labelled / 4):
        return None
    label = rollouts.sampling.applied_temperature
    text = (
        f"at a temperature of {found:.3f} the trainer agrees with the rollouts (RMS {remains:.2g} nats), at the temperature of "
        f"their label, {label:g}, it does not ({as_labelled:.2g}): "
    )
    values: dict[str, Any] = {"fault": "other_temperature", "temperature": found, "left": remains}
    if math.isclose(found, 1, rel_tol=_SAME):
        text += (
            "they are raw logprobs (logprobs_mode, vLLM's default) with a label that says processed, or were sampled at a "
            "temperature of 1"
        )
        return Finding(
            layer="semantic", cause=None, evidence=text, candidates=("raw_vs_processed", "temperature"), values=values
        )
    twice, times = math.isclose(found**2, label, rel_tol=_SAME), math.isclose(found * label, 1, rel_tol=_SAME)
    values["or"] = "divided_twice" if twice else "multiplied" if times else ""
    other = ", or the trainer divides by it twice" if twice else ", or the trainer multiplies by it" if times else ""
    text = f"{text}they were sampled at another temperature{other}"
    if not is_a_temperature(found, label) and not other:
        text += ", or the trainer's logits have another scale"
        return Finding(layer="semantic", cause=None, evidence=text, candidates=("temperature", "logits"), values=values)
    return Finding(layer="semantic", cause="temperature", evidence=text, values=values)


def columns_temperature(rollouts: Trace, scored: Trace, column: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """`temperature` where the scorer gives the trainer's column at another temperature, up to `noise` (RMS, nats).

    Named where it is one that a mistake makes: 1, or the rollouts' twice; any other may be a scale of the logits too. Where it
    explains most of the difference and not all, something else is done to the logits: a soft cap, for example.
    """
    few = sorted({*furthest_off(rollouts, scored, column, noise)[: _FEW // 2], *spread(rollouts, _FEW // 2)})
    label = rollouts.sampling.applied_temperature
    at = functools.cache(lambda temperature: score(rollouts, scorer, temperature=temperature, sequences=few))
    if (off := rms(at(label), column)) <= _FAR * noise:
        return None
    found, remains = _fit(rollouts, column, at, few)
    values = {"temperature": found, "left": remains}
    text = (
        f"at a temperature of {found:.3f} in place of {label:g} the scorer differs from the trainer by RMS {remains:.2g} nats"
    )
    if remains > noise:
        for by, where in ((-1, "late"), (1, "early")):
            other, rest = _fit(rollouts, _moved(column, by), at, few)
            if rest <= noise:
                text = (
                    f"the trainer's numbers are one position {where}, and of a temperature of {other:.3f} in place of {label:g}"
                )
                return Finding(
                    layer="semantic", cause="shifted_positions", evidence=f"{text} (this leaves RMS {rest:.2g} nats)"
                )
        if remains >= _MOSTLY * off:
            return None
        what = "something like a temperature is applied to the logits, such as a soft cap or a scale of some of them"
        return Finding(
            layer="trainer",
            cause=None,
            evidence=f"{text}: {what}",
            candidates=("logits", "temperature", "head_precision"),
            values=values,
        )
    if abs(found / label - 1) < _SAME:
        return None
    if any(abs(found / mistake - 1) < _SAME for mistake in (1.0, label**2)) and not _is_a_usual_scale(label / found):
        return Finding(layer="semantic", cause="temperature", evidence=text, values=values)
    return Finding(
        layer="semantic",
        cause=None,
        evidence=f"{text}; or the logits have another scale",
        candidates=("temperature", "logits"),
        values=values,
    )


def _fit(rollouts: Trace, column: Trace, at: Callable[[float], Trace], few: Sequence[int]) -> tuple[float, float]:
    """The temperature at which the scorer is nearest to the column on a few sequences, and the RMS (nats) that this leaves.
    `at` has the scorer's numbers at a temperature: those that are tried first are the same for each column.
    """
    label = rollouts.sampling.applied_temperature
    inside = np.concatenate([np.arange(*rollouts.bounds(s)) for s in few])
    if np.count_nonzero(np.isfinite(column.logprobs[inside]) & rollouts.mask[inside]) < _FEW:
        return label, np.inf

    def left(temperature: float) -> float:
        return rms(at(temperature), column)

    starts = (1.0, *(label * factor for factor in (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)), label**2)
    return _least(left, starts, within=1.25, or_start=True)


def _least(
    left: Callable[[float], float], starts: Sequence[float], *, within: float, or_start: bool = False
) -> tuple[float, float]:
    """The temperature with the least `left`, and what it leaves: searched within a factor of the best of `starts`, which is
    itself a candidate with `or_start`.
    """
    from scipy.optimize import minimize_scalar

    start = min(starts, key=left)
    found = minimize_scalar(left, bounds=(start / within, start * within), method="bounded", options={"xatol": 1e-4})
    best = float(found.x), float(found.fun)
    return min((start, left(start)), best, key=lambda fit: fit[1]) if or_start else best


def _is_a_usual_scale(scale: float) -> bool:
    """Whether models scale their logits so: by a power of two."""
    return math.isclose(math.log2(scale), round(math.log2(scale)), abs_tol=_SAME)


def _moved(column: Trace, by: int) -> Trace:
    """The column with each number moved by so many places in its sequence; NaN where none comes."""
    moved, owner = np.roll(column.logprobs, by), column.sequence_of_token
    moved[np.roll(owner, by) != owner] = np.nan
    return column.with_(logprobs=moved)
