"""Does the trainer agree with the engine? Its logprobs of the rollouts' tokens, compared with the rollouts' own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, get_args

import numpy as np

from ..comparison.declared_gap import with_gap
from ..comparison.evidence import Evidence
from ..comparison.judge import judge
from ..comparison.message import failure_message
from ..comparison.objectives import DEFAULT_OBJECTIVE
from ..comparison.result import Comparison, Finding
from ..comparison.tolerance import DTYPES, Tolerance
from ..errors import UsageError
from ..golden import Golden
from ..notes import Note
from ..suggest import nearest
from ..trace import Trace
from .column_causes import causes_in_two_columns, causes_of_a_wrong_trainer
from .entropy import entropy_note, entropy_numbers
from .expert_routing import TrainersRouting, trainers_routing, with_watched_routers
from .limits import trainer_tolerance
from .scorer import Scorer
from .scorer_causes import causes, not_a_number
from .scoring import score
from .trainer_column import ReferenceEvaluation, TrainerTokens, column_of

#: If this many turns lack the logprob of their first token, it was lost.
_TURNS: Final = 4


def agreement(
    rollouts: Trace | Golden,
    scorer: Scorer | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    objective: str = DEFAULT_OBJECTIVE,
    trainer_dtype: str = "unknown",
    trainer_tokens: TrainerTokens = "all",
    batch_size: int = 16,
) -> Comparison:
    """The comparison of a trainer's logprobs with those of the rollouts, without a framework's metrics."""
    if not isinstance(rollouts, (Trace, Golden)):
        raise UsageError(f"rollouts are a Trace or a Golden, not {type(rollouts).__name__}")
    if trainer_dtype not in (*DTYPES, "unknown"):
        raise UsageError(f"trainer_dtype={trainer_dtype!r}: known are {', '.join(DTYPES)}{nearest(str(trainer_dtype), DTYPES)}")
    trace = _over(trainer_tokens, rollouts.trace if isinstance(rollouts, Golden) else rollouts)
    trace, left_out = _without_min_tokens(trace)
    rollouts = dataclasses.replace(rollouts, trace=trace) if isinstance(rollouts, Golden) else trace
    _check_first_tokens(trace)
    column = column_of(trace, trainer_dtype, trainer_tokens)
    if column is None and scorer is None:
        raise UsageError(
            "these rollouts have no logprobs of a trainer (trainer_logprobs): read a batch that has the trainer's own, or give "
            "a scorer"
        )
    reference = None if scorer is None else _Reference.of(trace, scorer, batch_size)
    inputs = _Inputs(rollouts=rollouts, trace=trace, reference=reference, tolerance=tolerance, objective=objective)
    answer = _by_scorer(inputs) if column is None else _by_column(inputs, column)
    comparison = _with_what_was_seen(answer, inputs, column, left_out)
    prints = rollouts.fingerprint.get("config") if isinstance(rollouts, Golden) else None
    return with_gap(comparison, tolerance, prints)


class _Reference(NamedTuple):
    """A scorer, its logprobs in batches of `batch_size`, and how its model routes tokens to experts."""

    scorer: Scorer
    scored: Trace
    batch_size: int
    routing: TrainersRouting | None

    @classmethod
    def of(cls, trace: Trace, scorer: Scorer, batch_size: int) -> _Reference:
        watching = with_watched_routers(trace, scorer)
        scored = score(trace, watching, batch_size=batch_size, entropies=True)
        expected = _in_the_trainers_distribution(trace, scored)
        return cls(scorer, scored, batch_size, trainers_routing(trace, expected, scored, watching, batch_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Inputs:
    """Rollouts that a trainer's logprobs are compared with, the scorer if there is one, and the limits."""

    rollouts: Trace | Golden
    trace: Trace
    reference: _Reference | None
    tolerance: Tolerance | Mapping[str, Any] | str | None
    objective: str

    def limits(self, trainer: Trace) -> Tolerance:
        return trainer_tolerance(self.trace.dtype, trainer.dtype, self.tolerance, self.objective)

    def judge(self, trainer: Trace) -> Comparison:
        expected = _in_the_trainers_distribution(self.trace, trainer)
        return judge(expected, trainer, self.limits(trainer), "rl", Evidence(sides=("rollout", "trainer")))

    def causes(self, comparison: Comparison) -> tuple[list[Finding], list[Note]]:
        """Why the scorer's logprobs differ from the rollouts', and notes."""
        assert self.reference is not None
        scorer, scored, batch_size, routing = self.reference
        if routing is not None and comparison.verdict == "fail" and not any(f.cause for f in comparison.findings):
            found = routing.finding()
            if found is not None:
                return [found], []
        limits = self.limits(scored)
        return causes(comparison, self.rollouts, scored=scored, scorer=scorer, batch_size=batch_size, limits=limits)


class _Answer(NamedTuple):
    """A comparison, what explains it, and notes besides."""

    comparison: Comparison
    findings: list[Finding]
    notes: list[Note]


def _by_scorer(inputs: _Inputs) -> _Answer:
    """The scorer stands for the trainer."""
    assert inputs.reference is not None
    comparison = inputs.judge(inputs.reference.scored)
    return _Answer(comparison, *inputs.causes(comparison))


def _by_column(inputs: _Inputs, column: Trace) -> _Answer:
    """The trainer's column is compared with the rollouts'. A scorer, where there is one, evaluates both: where they agree it
    has to agree with them, and where they differ it shows which of the two is wrong.
    """
    comparison = inputs.judge(column)
    if (broken := not_a_number(comparison.expected, column)) is not None:
        return _Answer(comparison, [broken], [])
    noise = inputs.limits(column).fit_rms
    agree = comparison.verdict != "fail" and all(gate.sure for gate in comparison.gates)
    alone = list(comparison.findings) if agree else causes_in_two_columns(comparison, inputs.trace, column, noise)
    if inputs.reference is None:
        return _Answer(comparison, alone, [])
    scorer, scored, *_ = inputs.reference
    evaluation = ReferenceEvaluation.by(scorer, rollouts=comparison.expected, column=column, scored=scored)
    note = Note("reference_evaluation", evaluation.text(agree=agree))
    by_scorer = inputs.judge(scored) if agree or evaluation.wrong == "rollouts" else comparison
    if agree and by_scorer.passed:
        return _Answer(comparison, alone, [note])
    if agree or evaluation.wrong == "rollouts":
        findings, notes = inputs.causes(by_scorer)
        return _Answer(by_scorer if agree else comparison, findings, [note, *notes])
    if evaluation.wrong == "trainer":
        findings = causes_of_a_wrong_trainer(comparison, inputs.trace, column, scored, scorer, noise)
        return _Answer(comparison, findings, [note])
    return _Answer(comparison, alone, [note])


def _with_what_was_seen(answer: _Answer, inputs: _Inputs, column: Trace | None, left_out: list[Note]) -> Comparison:
    """The comparison with its findings, the entropies that a side has, and notes on what was compared and what was not."""
    comparison, more, trace = answer.comparison, answer.notes, inputs.trace
    if comparison.actual is column and comparison.passed and not comparison.metrics["n_changed"]:
        text = "the trainer's logprobs are bit-identical to the rollouts': if it copies them (a bypass), it was not checked"
        more = [*more, Note("copied", text)]
    sides = (column, None if inputs.reference is None else inputs.reference.scored)
    knows = next((side for side in sides if side is not None and side.trainer_entropies is not None), None)
    entropies = {} if knows is None else entropy_numbers(comparison.expected, knows)
    drawn = entropy_note(trace, entropies, agree=comparison.passed)
    notes = [*without_top_k(comparison).notes, *more, *left_out, *([] if drawn is None else [drawn])]
    if comparison.expected is not trace:
        text = "compared without truncation: the rollouts' untruncated logprobs with the trainer's distribution over all tokens"
        notes.append(Note("without_truncation", text))
    if unknown := _unknown_dtypes(trace, comparison.actual):
        notes.append(Note("unknown_dtype", unknown))
    routing = None if inputs.reference is None else inputs.reference.routing
    if routing is not None:
        notes.append(routing.note())
    metrics = {**comparison.metrics, **entropies, **({} if routing is None else routing.numbers)}
    return dataclasses.replace(comparison, findings=tuple(answer.findings), notes=tuple(notes), metrics=metrics)


def _check_first_tokens(trace: Trace) -> None:
    """Raise UsageError for rollouts that lack the logprob of the first token of every turn."""
    starts = np.array([segment.start for segment in trace.segments() if trace.mask[segment.start]], np.int64)
    lacks = int(np.count_nonzero(np.isnan(trace.logprobs[starts])))
    if lacks >= _TURNS and lacks == len(starts) and not np.isnan(trace.logprobs[trace.mask]).all():
        raise UsageError(
            f"these rollouts have no logprob of the first token of any of their {lacks:,} turns: the code that reads the "
            "engine's output loses it, and the update uses another number in its place"
        )


def without_top_k(comparison: Comparison) -> Comparison:
    """The comparison without the note that a larger top-k would show more: trainers have none."""
    return dataclasses.replace(comparison, notes=tuple(note for note in comparison.notes if note.key != "top_k"))


def _over(tokens: TrainerTokens, trace: Trace) -> Trace:
    """The rollouts as they are compared with a trainer whose distributions are over `tokens`. Raises UsageError."""
    known = get_args(TrainerTokens)
    if tokens not in known:
        raise UsageError(f"trainer_tokens={tokens!r}: known are {', '.join(known)}{nearest(str(tokens), known)}")
    if tokens == "all":
        return trace
    if trace.logprobs_mode == "raw_logprobs" or not (trace.sampling.truncates or trace.kept_counts is not None):
        raise UsageError(
            f"trainer_tokens='kept': these rollouts are not of a truncated distribution ({trace.distribution()}), so no tokens "
            "were left out; leave it out, or give the rollouts' sampling"
        )
    return trace.with_(untruncated_logprobs=None)


def _without_min_tokens(trace: Trace) -> tuple[Trace, list[Note]]:
    """The trace without the first `min_tokens` tokens of each request: there the engine excludes the tokens that end a
    sequence, and a trainer does not. Raw logprobs are not affected. Raises UsageError where no token is left.
    """
    least = trace.sampling.min_tokens
    if not least:
        return trace, []
    sampling = dataclasses.replace(trace.sampling, min_tokens=0)
    if trace.logprobs_mode == "raw_logprobs":
        return trace.with_(sampling=sampling), []
    mask = trace.mask.copy()
    for segment in trace.segments():
        mask[segment.start : min(segment.start + least, segment.stop)] = False
    why = f"before min_tokens={least} the engine excludes the tokens that end a sequence, and a trainer does not"
    if trace.mask.any() and not mask.any():
        raise UsageError(f"these rollouts have no token that can be compared with a trainer: {why}; sample without min_tokens")
    note = Note("min_tokens", f"{int((trace.mask & ~mask).sum()):,} tokens left out: {why}")
    return trace.with_(sampling=sampling, mask=mask), [note]


def _in_the_trainers_distribution(trace: Trace, scored: Trace) -> Trace:
    """The rollouts with the logprobs of the distribution that the trainer has: without truncation, where it has none."""
    if scored.sampling == trace.sampling or trace.untruncated_logprobs is None:
        return trace
    return trace.with_(
        logprobs=trace.untruncated_logprobs,
        sampling=trace.sampling.untruncated(),
        top_logprobs=trace.top_logprobs[:, :0],
        top_token_ids=trace.top_token_ids[:, :0],
    )


def _unknown_dtypes(trace: Trace, scored: Trace) -> str:
    sides = [side for side, trace in (("rollouts'", trace), ("trainer's", scored)) if trace.dtype not in DTYPES]
    return f"the {' and the '.join(sides)} dtype is unknown: the limits are those of bfloat16" if sides else ""


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
