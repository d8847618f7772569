"""The trainer's own logprobs, as a batch has them beside the rollouts'; and which of the two is off, by a third opinion."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

import numpy as np

from ..comparison.findings import Cause
from ..comparison.result import Comparison, Finding
from ..trace import Trace
from .limits import is_coarser
from .logit_function import function_of_logits
from .misplaced_logprobs import few_off, misplaced, off_from_a_token_on
from .scorer import HasTrainingMode, Scorer, TakesAdapters, name_of
from .scoring import score, spread
from .trainer_column import rms
from .trainer_faults import furthest_off, otherwise

#: Temperatures that far apart (relative) are one; one that explains more than this share tells of something like it.
_SAME, _MOSTLY = 0.01, 0.6
#: The grid of logits in half precision, where they are not known: that of bfloat16 from 16 to 32.
_STEP: Final = 1 / 8
#: Rows with padding are off where their median is so many times the noise, and the furthest of those without.
_NEARER: Final = 4.0
#: Sequences that are asked about again.
_FEW: Final = 8
#: Two distances are alike within this factor.
_LIKE: Final = 3.0
#: What a trainer's numbers may be where nothing tells more.
_CANDIDATES: Final[tuple[Cause, ...]] = (
    "attention_mask", "prompt", "packing", "dropout", "logits", "stale_weights", "weights_differ",
)  # fmt: skip


def disagreement(comparison: Comparison, rollouts: Trace, column: Trace, noise: float) -> list[Finding]:
    """What the two columns alone tell, where they disagree and nobody else is asked."""
    if any(finding.cause for finding in comparison.findings):
        return list(comparison.findings)
    columns = comparison.expected, column, noise
    told = (
        misplaced(*columns, whose="the trainer")
        or few_off(*columns, whose="the trainer")
        or padding_alone(rollouts, *columns)
        or off_from_a_token_on(*columns, whose="the trainer")
    )
    text = "nothing in the two columns tells which is off: give a scorer for a third opinion"
    return [told or Finding("trainer", None, text, _CANDIDATES)]


def trainer_is_off(
    comparison: Comparison, rollouts: Trace, column: Trace, scored: Trace, scorer: Scorer, noise: float
) -> list[Finding]:
    """Why the trainer's column is off, where the scorer gives what the rollouts report."""
    off = rms(scored, column)
    opinion = (
        f"{name_of(scorer)} gives what the rollouts report (RMS {rms(scored, comparison.expected):.2g} nats), and not what the "
        f"trainer does ({off:.2g}): the trainer is off"
    )
    named = [dataclasses.replace(f, evidence=f"{opinion}: {f.evidence}") for f in comparison.findings if f.cause]
    if named:
        return named
    found = misplaced(scored, column, noise, whose="the trainer")
    temperature = None if found is not None else _temperature(rollouts, scored, column, scorer, noise)
    if temperature is not None and temperature.layer == "semantic":
        found = temperature
    found = (
        found
        or otherwise(rollouts, scored, column, scorer, noise)
        or dropout(rollouts, scored, scorer, off, noise)
        or few_off(scored, column, noise, whose="the trainer")
        or padding_alone(rollouts, scored, column, noise)
        or off_from_a_token_on(scored, column, noise, whose="the trainer")
        or function_of_logits(rollouts, scored, column, scorer, noise)
        or _precision(rollouts, scored, column)
        or temperature
    )
    if found is not None:
        return [dataclasses.replace(found, evidence=f"{opinion}: {found.evidence}")]
    if comparison.verdict == "unverified" and is_coarser(column.dtype, scored.dtype):
        return [Finding("noise", None, f"{opinion}, by what noise may make", ("numerical_noise", *_CANDIDATES))]
    return [Finding("trainer", None, opinion, _CANDIDATES)]


def _temperature(rollouts: Trace, scored: Trace, column: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """`temperature` where the scorer at another one gives the trainer's numbers up to `noise` (RMS, nats), by least squares.

    Named where it is one that a mistake makes: 1, or the rollouts' twice; any other may be a scale of the logits too. Where
    most of what is off goes with it and not all, something else was done to the logits: a soft cap, say.
    """
    from scipy.optimize import minimize_scalar

    few = sorted({*furthest_off(rollouts, scored, column, noise)[: _FEW // 2], *spread(rollouts, _FEW // 2)})
    asked = rollouts.sampling.applied_temperature
    inside = np.concatenate([np.arange(*rollouts.bounds(s)) for s in few])

    def fit(numbers: Trace) -> tuple[float, float]:
        if np.count_nonzero(np.isfinite(numbers.logprobs[inside]) & rollouts.mask[inside]) < _FEW:
            return asked, np.inf

        def left(temperature: float) -> float:
            return rms(score(rollouts, scorer, temperature=temperature, sequences=few), numbers)

        start = min((1.0, *(asked * factor for factor in (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)), asked**2), key=left)
        found = minimize_scalar(left, bounds=(start / 1.25, start * 1.25), method="bounded", options={"xatol": 1e-4})
        return min((start, left(start)), (float(found.x), float(found.fun)), key=lambda fit: fit[1])

    found, remains = fit(column)
    if (off := rms(score(rollouts, scorer, sequences=few), column)) <= _NEARER * noise:
        return None
    values = {"temperature": found, "left": remains}
    text = f"at a temperature of {found:.3f} in place of {asked:g} the scorer is RMS {remains:.2g} nats from the trainer"
    if remains > noise:
        for by, where in ((-1, "late"), (1, "early")):
            other, rest = fit(_moved(column, by))
            if rest <= noise:
                text = f"its numbers are one position {where}, and of a temperature of {other:.3f} in place of {asked:g}"
                return Finding("semantic", "shifted_positions", f"{text} (leaves RMS {rest:.2g} nats)")
        if remains >= _MOSTLY * off:
            return None
        what = "something like a temperature is done to the logits: a soft cap, a scale of some"
        return Finding("trainer", None, f"{text}: {what}", ("logits", "temperature", "head_precision"), values=values)
    if abs(found / asked - 1) < _SAME:
        return None
    if any(abs(found / by_mistake - 1) < _SAME for by_mistake in (1.0, asked**2)) and not _is_a_usual_scale(asked / found):
        return Finding("semantic", "temperature", text, values=values)
    return Finding("semantic", None, f"{text}; or a scale of the logits", ("temperature", "logits"), values=values)


def _is_a_usual_scale(scale: float) -> bool:
    """Whether models scale their logits so: by a power of two."""
    return math.isclose(math.log2(scale), round(math.log2(scale)), abs_tol=_SAME)


def _moved(column: Trace, by: int) -> Trace:
    """The column with each number so many places further on in its sequence, NaN where none comes."""
    moved = np.roll(column.logprobs, by)
    owner = column.sequence_of_token
    moved[np.roll(owner, by) != owner] = np.nan
    return column.with_(logprobs=moved)


def _precision(rollouts: Trace, scored: Trace, column: Trace) -> Finding | None:
    """`head_precision` among others where no token is further off than two steps of a head in half precision make it."""
    d = (column.logprobs.astype(np.float64) - scored.logprobs)[rollouts.mask]
    largest = float(np.abs(d[np.isfinite(d)]).max(initial=0.0))
    if not np.isfinite(d).all() or largest > (most := 2 * _STEP / rollouts.sampling.applied_temperature):
        return None
    text = f"no token is off by more than {largest:.2g} nats, and a head or logits in half precision make up to {most:.2g}"
    return Finding("head", None, text, ("head_precision", "logits", "stale_weights"))


def dropout(rollouts: Trace, scored: Trace, scorer: Scorer, off: float, noise: float) -> Finding | None:
    """`dropout` first where the scorer's model, in the training mode in which it was found, gives other numbers each time,
    about as far from its own in evaluation as `off`, the trainer's (RMS, nats).
    """
    as_trained = scorer.as_trained() if isinstance(scorer, HasTrainingMode) else None
    if as_trained is None:
        return None
    few = spread(rollouts, _FEW)
    first, second = (score(rollouts, as_trained, sequences=few) for _ in range(2))
    apart, away = rms(first, second), rms(scored, first)
    if apart <= noise or not 1 / _LIKE < away / off < _LIKE:
        return None
    text = (
        f"in training mode, as it was found, its model gives other numbers each time (RMS {apart:.2g} nats between two), "
        f"{away:.2g} from those in evaluation: dropout may be on where old logprobs are computed"
    )
    adapter: tuple[Cause, ...] = ("adapter",) if isinstance(scorer, TakesAdapters) and scorer.has_adapters else ()
    candidates: tuple[Cause, ...] = ("dropout", *adapter, "weights_differ", "stale_weights")
    return Finding("trainer", None, text, candidates, {"apart": apart, "away": away})


def padding_alone(rollouts: Trace, expected: Trace, column: Trace, noise: float) -> Finding | None:
    """Candidates where the rows of the longest prompt, which have no padding before it, agree up to `noise` (RMS, nats), and
    the others do not; or where the first row does, which has no other before it in a pack.
    """
    lengths = np.diff(rollouts.prompt_offsets)[rollouts.group]
    if not len(lengths):
        return None
    longest = lengths == lengths.max()
    owner = rollouts.sequence_of_token
    by_row = np.array([rms(expected.with_(mask=expected.mask & (owner == row)), column) for row in range(len(longest))])
    if len(by_row) > _FEW and by_row[0] <= noise and by_row[1:].min() > _NEARER * noise:
        text = "the first row agrees, and no other does: the trainer may have packed them, each seeing those before it"
        return Finding("trainer", None, text, ("packing", "attention_mask", "prompt"))
    if longest.all():
        return None
    padded, unpadded = float(np.median(by_row[~longest])), float(by_row[longest].max())
    if unpadded > noise or padded < _NEARER * max(unpadded, noise):
        return None
    text = (
        f"rows of the longest prompt agree (RMS {unpadded:.2g} nats at most), those that are padded before it do not "
        f"({padded:.2g} in the median): the trainer may see the padding"
    )
    candidates: tuple[Cause, ...] = ("attention_mask", "prompt", "shifted_positions")
    return Finding("trainer", None, text, candidates, values={"padded": padded, "unpadded": unpadded})
