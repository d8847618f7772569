"""The trainer's own logprobs in a batch, beside the rollouts', as a trace; and how far a scorer is from both columns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..trace import Trace
from .scorer import Scorer, name_of
from .scoring import rms, trainers_trace

#: Which tokens a trainer's distributions are over: all, or those that truncation kept.
TrainerTokens: TypeAlias = Literal["all", "kept"]


def column_of(trace: Trace, dtype: str, tokens: TrainerTokens) -> Trace | None:
    """The trainer's column of these rollouts as a trace of its own; None where the rollouts have none. Its distributions are
    over `tokens`, divided by the rollouts' temperature, as trainers compute them.
    """
    if trace.trainer_logprobs is None:
        return None
    sampling = trace.sampling if tokens == "kept" else trace.sampling.untruncated()
    sampling = dataclasses.replace(sampling, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    own, entropies = trace.trainer_logprobs, trace.trainer_entropies
    return trainers_trace(trace, own, entropies=entropies, sampling=sampling, name="trainer", dtype=dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceEvaluation:
    """How a scorer compares with the two columns of a batch: RMS differences in nats.

    `apart`: between the two columns; `rollouts`, `trainer`: between the scorer and each of them.
    """

    scorer: str
    apart: float
    rollouts: float
    trainer: float

    @classmethod
    def by(cls, scorer: Scorer, *, rollouts: Trace, column: Trace, scored: Trace) -> ReferenceEvaluation:
        """The evaluation by `scorer`, whose logprobs are `scored`."""
        return cls(
            scorer=name_of(scorer),
            apart=rms(rollouts, column),
            rollouts=rms(rollouts, scored),
            trainer=rms(column, scored),
        )

    @property
    def wrong(self) -> Literal["rollouts", "trainer", ""]:
        """The side that is wrong: its difference to the scorer is more than twice the other's. "" where neither is."""
        return "trainer" if self.rollouts < self.trainer / 2 else "rollouts" if self.trainer < self.rollouts / 2 else ""

    def text(self, *, agree: bool) -> str:
        """The evaluation in words; `agree` where the two columns do."""
        text = (
            f"reference evaluation: {self.scorer} differs from the rollouts by RMS {self.rollouts:.2g} nats, from the trainer "
            f"by {self.trainer:.2g}"
        )
        if agree:
            return f"{text}; the two agree (RMS {self.apart:.2g})"
        wrong = {"trainer": "the trainer is wrong", "rollouts": "the rollouts are wrong", "": "it agrees with neither"}
        return f"{text}; the two differ by {self.apart:.2g}: {wrong[self.wrong]}"
