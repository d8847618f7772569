"""The trainer's own logprobs, as a batch has them beside the rollouts'; and which of the two is off, by a third opinion."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from ..comparison.result import Cause, Comparison, Finding
from ..trace import Trace
from .scoring import as_trainers, name_of, score, temperature_of

#: A reading explains the trainer's numbers where it leaves less than this share of what the scorer leaves (RMS, nats).
_EXPLAINS: Final = 0.25
#: Rows with padding are off where their median is so many times the noise, and the furthest of those without.
_NEARER: Final = 4.0
#: Sequences that are asked about again.
_FEW: Final = 8
#: Two distances are alike within this factor.
_LIKE: Final = 3.0
#: What a trainer's numbers may be where nothing tells more.
_CANDIDATES: Final[tuple[Cause, ...]] = ("dropout", "attention_mask", "weights_differ", "stale_weights")


def column_of(trace: Trace, dtype: str) -> Trace | None:
    """The trainer's column of these rollouts as a trace of its own: over all tokens, divided by the rollouts' temperature, as
    trainers do; None where the rollouts have none.
    """
    if trace.trainer_logprobs is None:
        return None
    sampling = dataclasses.replace(
        trace.sampling.untruncated(), repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
    )
    return as_trainers(trace, trace.trainer_logprobs, sampling=sampling, name="trainer", dtype=dtype)


@dataclass(frozen=True)
class ThirdOpinion:
    """How far two columns are `apart`, and a scorer from each of them: `rollouts`, `trainer` (RMS, nats)."""

    scorer: str
    apart: float
    rollouts: float
    trainer: float

    @classmethod
    def of(cls, scorer: Any, rollouts: Trace, column: Trace, scored: Trace) -> ThirdOpinion:
        """The opinion of `scorer`, which gave `scored`."""
        return cls(name_of(scorer), rms(rollouts, column), rms(rollouts, scored), rms(column, scored))

    @property
    def off(self) -> Literal["rollouts", "trainer", ""]:
        """Which of the two is off: the one that is more than twice as far from the scorer."""
        return "trainer" if self.rollouts < self.trainer / 2 else "rollouts" if self.trainer < self.rollouts / 2 else ""

    def told(self, *, agree: bool) -> str:
        """The opinion in words; `agree` where the two columns do."""
        told = f"{self.scorer} is RMS {self.rollouts:.2g} nats from the rollouts, {self.trainer:.2g} from the trainer"
        if agree:
            return f"third opinion: {told}; the two agree (RMS {self.apart:.2g})"
        which = {"trainer": "the trainer is off", "rollouts": "the rollouts are off", "": "it agrees with neither"}[self.off]
        return f"third opinion: {told}, which are {self.apart:.2g} apart: {which}"


def disagreement(comparison: Comparison, rollouts: Trace, column: Trace, noise: float) -> list[Finding]:
    """What the two columns alone tell, where they disagree and nobody else is asked."""
    if any(finding.cause for finding in comparison.findings):
        return list(comparison.findings)
    told = padding_alone(rollouts, comparison.expected, column, noise)
    text = "nothing in the two columns tells which is off: give a scorer for a third opinion"
    return [told or Finding("trainer", None, text, _CANDIDATES)]


def trainer_is_off(
    comparison: Comparison, rollouts: Trace, column: Trace, scored: Trace, scorer: Any, noise: float
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
    found = (
        _temperature(rollouts, column, scorer, off)
        or padding_alone(rollouts, scored, column, noise)
        or dropout(rollouts, scored, scorer, off, noise)
    )
    if found is not None:
        return [dataclasses.replace(found, evidence=f"{opinion}: {found.evidence}")]
    return [Finding("trainer", None, opinion, _CANDIDATES)]


def _temperature(rollouts: Trace, column: Trace, scorer: Any, off: float) -> Finding | None:
    """`temperature` where the scorer at another one gives the trainer's numbers: least squares over the temperature."""
    from scipy.optimize import minimize_scalar

    few = _spread(rollouts, _FEW)
    asked = temperature_of(rollouts.sampling)

    def left(temperature: float) -> float:
        return rms(score(rollouts, scorer, temperature=temperature, sequences=few), column)

    start = min((1.0, *(asked * factor for factor in (0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 4.0)), asked**2), key=left)
    found = minimize_scalar(left, bounds=(start / 1.25, start * 1.25), method="bounded", options={"xatol": 1e-4})
    if abs(found.x / asked - 1) < 1e-2 or not found.fun < _EXPLAINS * off:
        return None
    text = f"its logprobs are those at a temperature of {found.x:.3f}, and the rollouts' is {asked:g} (leaves {found.fun:.2g})"
    return Finding("semantic", "temperature", text, values={"temperature": float(found.x)})


def dropout(rollouts: Trace, scored: Trace, scorer: Any, off: float, noise: float) -> Finding | None:
    """`dropout` where the scorer's model, in the training mode in which it was found, gives other numbers each time, about as
    far from its own in evaluation as `off`, the trainer's (RMS, nats).
    """
    as_trained = getattr(scorer, "as_trained", lambda: None)()
    if as_trained is None:
        return None
    few = _spread(rollouts, _FEW)
    first, second = (score(rollouts, as_trained, sequences=few) for _ in range(2))
    apart, away = rms(first, second), rms(scored, first)
    if apart <= noise or not 1 / _LIKE < away / off < _LIKE:
        return None
    text = (
        f"in training mode, as it was found, its model gives other numbers each time (RMS {apart:.2g} nats between two), "
        f"{away:.2g} from those in evaluation: dropout is on where old logprobs are computed"
    )
    return Finding("trainer", "dropout", text, values={"apart": apart, "away": away})


def _spread(trace: Trace, count: int) -> list[int]:
    """So many sequences at even distances, or all."""
    places: list[int] = np.linspace(0, trace.num_sequences - 1, min(trace.num_sequences, count)).astype(int).tolist()
    return places


def padding_alone(rollouts: Trace, expected: Trace, column: Trace, noise: float) -> Finding | None:
    """`attention_mask` where the rows of the longest prompt, which have no padding before it, agree up to `noise` (RMS,
    nats), and the others do not.
    """
    lengths = np.diff(rollouts.prompt_offsets)[rollouts.group]
    longest = lengths == lengths.max()
    if longest.all():
        return None
    owner = np.repeat(np.arange(len(longest)), np.diff(rollouts.sequence_offsets))
    by_row = np.array([rms(expected.with_(mask=expected.mask & (owner == row)), column) for row in range(len(longest))])
    padded, unpadded = float(np.median(by_row[~longest])), float(by_row[longest].max())
    if unpadded > noise or padded < _NEARER * max(unpadded, noise):
        return None
    text = (
        f"rows of the longest prompt agree (RMS {unpadded:.2g} nats at most), those that are padded before it do not "
        f"({padded:.2g} in the median): the trainer sees the padding"
    )
    return Finding("trainer", "attention_mask", text, values={"padded": padded, "unpadded": unpadded})


def rms(one: Trace, other: Trace) -> float:
    """RMS of the difference of two columns over the tokens of the first one's mask (nats); 0 where there is none."""
    d = (other.logprobs.astype(np.float64) - one.logprobs)[one.mask]
    d = d[np.isfinite(d)]
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0
