"""Does the trainer agree with the engine? Its logprobs of the rollouts' tokens, held against those that came with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..comparison.declared_gap import with_gap
from ..comparison.evidence import Evidence
from ..comparison.judge import judge
from ..comparison.message import failure_message
from ..comparison.objectives import DEFAULT_OBJECTIVE
from ..comparison.precision_gaps import GAPS
from ..comparison.result import Comparison, Finding, MismatchError
from ..comparison.tolerance import DTYPES, Tolerance, default_tolerance, make_tolerance
from ..errors import UsageError
from ..golden import Golden
from ..notes import Note
from ..spec import nearest
from ..trace import Trace
from .batch_logprobs import ThirdOpinion, column_of, disagreement, trainer_is_off
from .causes import causes, not_a_number
from .entropy import entropy_note, entropy_numbers
from .frameworks import framework, with_metrics
from .scoring import FINEST_FIRST, Scorer, score

#: So many turns that lack their first logprob are no chance.
_TURNS: Final = 4


def assert_trainer_parity(
    rollouts: Trace | Golden,
    scorer: Scorer | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    objective: str = DEFAULT_OBJECTIVE,
    trainer_dtype: str = "unknown",
    batch_size: int = 16,
    metrics: str | None = None,
    config: Any = None,
) -> Comparison:
    """Assert that a trainer's logprobs of the tokens of `rollouts` are those that came with them; returns the comparison.

    d = trainer - rollout, in nats, so that exp(d) is the policy ratio of an on-policy step. The trainer's logprobs are those
    in hand: the column `trainer_logprobs` that a framework's reader takes from its batch (computed in `trainer_dtype`). No
    model is needed for that. A `scorer` is asked as a trainer asks its model: token ids, attention mask, and the temperature
    of the rollouts. Where there is no column, it stands for the trainer. Where there is one, it is a third opinion: if the
    columns agree it has to agree with them, and if they do not it says which of the two is off.

    `tolerance` changes limits, names a framework whose thresholds they become (`"verl"`), or declares a gap that is there on
    purpose (`"fp8"`); `objective` is the update that they are judged for (`token`, `sequence`, `truncated`, `unclipped`);
    `metrics` names a framework whose metrics are reported with it, by its own names, and `config` is its configuration
    (a GRPOConfig; veRL's, or the `rollout_correction` of it), whose caps and modes they go by.

    Rollouts of a truncated distribution are compared without truncation where the trace has `untruncated_logprobs`, over
    their kept sets where it lists them and the scorer can do that, and are else refused with the reason, as those sampled
    under a penalty are. A column in hand is over all tokens: held against them it fails, for that is what the update sees.

    Raises MismatchError for the verdicts `fail` and `unverified`, UsageError for what cannot be compared.
    """
    __tracebackhide__ = True
    comparison = compare_with_trainer(
        rollouts,
        scorer,
        tolerance,
        objective=objective,
        trainer_dtype=trainer_dtype,
        batch_size=batch_size,
        metrics=metrics,
        config=config,
    )
    if not comparison.passed:
        raise MismatchError(trainer_message(comparison), comparison)
    return comparison


def compare_with_trainer(
    rollouts: Trace | Golden,
    scorer: Scorer | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    objective: str = DEFAULT_OBJECTIVE,
    trainer_dtype: str = "unknown",
    batch_size: int = 16,
    metrics: str | None = None,
    config: Any = None,
) -> Comparison:
    """What `assert_trainer_parity` asserts, whatever its verdict."""
    if not isinstance(rollouts, (Trace, Golden)):
        raise UsageError(f"rollouts are a Trace or a Golden, not {type(rollouts).__name__}")
    if trainer_dtype not in (*DTYPES, "unknown"):
        raise UsageError(f"trainer_dtype={trainer_dtype!r}: known are {', '.join(DTYPES)}{nearest(str(trainer_dtype), DTYPES)}")
    name = metrics or (tolerance if isinstance(tolerance, str) and tolerance not in GAPS else "")
    if config is not None and not name:
        raise UsageError('config= is what a framework\'s metrics go by: say which, metrics="trl"')
    trace, left_out = _where_it_may_end(rollouts.trace if isinstance(rollouts, Golden) else rollouts)
    rollouts = dataclasses.replace(rollouts, trace=trace) if isinstance(rollouts, Golden) else trace
    _check_first_tokens(trace)
    column = column_of(trace, trainer_dtype)
    if column is None and scorer is None:
        raise UsageError(
            "these rollouts have no logprobs of a trainer (trainer_logprobs): read a batch in which the trainer has written "
            "its own, or give a scorer"
        )
    scored = None if scorer is None else score(trace, scorer, batch_size=batch_size, entropies=True)

    def limits(trainer: Trace) -> Tolerance:
        return trainer_tolerance(trace.dtype, trainer.dtype, tolerance, objective)

    def against(trainer: Trace) -> Comparison:
        expected = _as_the_trainer_sees_it(trace, trainer)
        return judge(expected, trainer, limits(trainer), "rl", Evidence(sides=("rollout", "trainer")))

    def why_not(comparison: Comparison) -> tuple[list[Finding], list[Note]]:
        assert scored is not None
        return causes(comparison, rollouts, comparison.expected, scored, scorer, batch_size, limits(scored))

    more: list[Note] = []
    if column is None:
        assert scored is not None
        comparison = against(scored)
        findings, more = why_not(comparison)
    else:
        comparison = against(column)
        noise = limits(column).fit_rms
        agree = comparison.verdict != "fail" and all(gate.sure for gate in comparison.gates)
        findings = list(comparison.findings) if agree else disagreement(comparison, trace, column, noise)
    broken = None if column is None else not_a_number(comparison.expected, column)
    if broken is not None:
        findings = [broken]
    elif column is not None and scored is not None and scorer is not None:
        opinion = ThirdOpinion.of(scorer, comparison.expected, column, scored)
        if agree and not (third := against(scored)).passed:
            comparison = third
            findings, more = why_not(third)
        elif not agree and opinion.off == "rollouts":
            findings, more = why_not(against(scored))
        elif not agree and opinion.off == "trainer":
            findings = trainer_is_off(comparison, trace, column, scored, scorer, noise)
        more = [Note("third_opinion", opinion.told(agree=agree)), *more]
    if column is not None and comparison.actual is column and comparison.passed and not comparison.metrics["n_changed"]:
        text = "the trainer's logprobs are the rollouts', bit for bit: if it copies them (a bypass), nothing of it was checked"
        more.append(Note("copied", text))
    knows = next((side for side in (column, scored) if side is not None and side.trainer_entropies is not None), None)
    entropies = {} if knows is None else entropy_numbers(comparison.expected, knows)
    drawn = entropy_note(trace, entropies, agree=comparison.passed)
    notes = [*without_top_k(comparison).notes, *more, *left_out, *([] if drawn is None else [drawn])]
    if comparison.expected is not trace:
        text = "compared without truncation: the rollouts' second replay, and the trainer's distribution over all tokens"
        notes.append(Note("without_truncation", text))
    if unknown := _unknown_dtypes(trace, comparison.actual):
        notes.append(Note("unknown_dtype", unknown))
    comparison = dataclasses.replace(
        comparison, findings=tuple(findings), notes=tuple(notes), metrics={**comparison.metrics, **entropies}
    )
    prints = rollouts.fingerprint.get("config") if isinstance(rollouts, Golden) else None
    comparison = with_gap(comparison, tolerance, prints)
    return with_metrics(comparison, name, config) if name else comparison


def _check_first_tokens(trace: Trace) -> None:
    """Refuse rollouts that lack the logprob of the first token of each turn: a reader or an engine lost it everywhere."""
    starts = np.array([segment.start for segment in trace.segments() if trace.mask[segment.start]], np.int64)
    lacks = int(np.count_nonzero(np.isnan(trace.logprobs[starts])))
    if lacks >= _TURNS and lacks == len(starts) and not np.isnan(trace.logprobs[trace.mask]).all():
        raise UsageError(
            f"these rollouts have no logprob of the first token of any of their {lacks:,} turns: what reads the engine's "
            "answers lost it, and an update takes something else for it"
        )


def without_top_k(comparison: Comparison) -> Comparison:
    """The comparison without the notes of how much of a top-k would tell more: trainers have none."""
    return dataclasses.replace(comparison, notes=tuple(note for note in comparison.notes if note.key != "top_k"))


def _where_it_may_end(trace: Trace) -> tuple[Trace, list[Note]]:
    """The trace without the tokens at which `min_tokens` kept the engine from ending: it left the tokens that end a sequence
    out there, and a trainer does not. Raw logprobs are of before that. Raises UsageError where nothing is left.
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
    why = f"until min_tokens={least} the engine leaves out what ends a sequence, and a trainer does not"
    if trace.mask.any() and not mask.any():
        raise UsageError(f"these rollouts have no token that a trainer can be held against: {why}; sample without")
    note = Note("min_tokens", f"{int((trace.mask & ~mask).sum()):,} tokens left out: {why}")
    return trace.with_(sampling=sampling, mask=mask), [note]


def trainer_tolerance(
    rollout_dtype: str,
    trainer_dtype: str,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    objective: str = DEFAULT_OBJECTIVE,
) -> Tolerance:
    """The limits between an engine and a trainer: those of the coarser dtype for decode against prefill, changed by
    `tolerance`; a name means the thresholds of that framework, or a declared gap.
    """
    known = [dtype for dtype in (rollout_dtype, trainer_dtype) if dtype in DTYPES]
    coarser = max(known, key=FINEST_FIRST.index) if len(known) == 2 else "unknown"
    limits = default_tolerance(coarser, ("decode", "prefill"), objective)
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
    )


def _unknown_dtypes(trace: Trace, scored: Trace) -> str:
    sides = [side for side, trace in (("rollouts'", trace), ("trainer's", scored)) if trace.dtype not in DTYPES]
    return f"the {' and the '.join(sides)} dtype is not known: the limits are those of bfloat16" if sides else ""


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
