"""The trainer's own logprobs in a batch, beside the rollouts', as a trace; and how far a scorer is from both columns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..trace import Trace
from .scorer import Scorer, name_of
from .scoring import as_trainers


def column_of(trace: Trace, dtype: str) -> Trace | None:
    """The trainer's column of these rollouts as a trace of its own: over all tokens, divided by the rollouts' temperature, as
    trainers do; None where the rollouts have none.
    """
    if trace.trainer_logprobs is None:
        return None
    sampling = dataclasses.replace(
        trace.sampling.untruncated(), repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
    )
    own, entropies = trace.trainer_logprobs, trace.trainer_entropies
    return as_trainers(trace, own, entropies=entropies, sampling=sampling, name="trainer", dtype=dtype)


@dataclass(frozen=True)
class ThirdOpinion:
    """How far two columns are `apart`, and a scorer from each of them: `rollouts`, `trainer` (RMS, nats)."""

    scorer: str
    apart: float
    rollouts: float
    trainer: float

    @classmethod
    def of(cls, scorer: Scorer, rollouts: Trace, column: Trace, scored: Trace) -> ThirdOpinion:
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


def rms(one: Trace, other: Trace) -> float:
    """RMS of the difference of two columns over the tokens of the first one's mask (nats); 0 where there is none."""
    d = (other.logprobs.astype(np.float64) - one.logprobs)[one.mask]
    d = d[np.isfinite(d)]
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0
