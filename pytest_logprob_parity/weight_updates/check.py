"""Did an engine take a weight update as asked? Its trace is compared with what transformers computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.weight_update import WeightUpdate
from ..comparison.declared_gap import with_gap
from ..comparison.evidence import Evidence
from ..comparison.findings import WeightsCause
from ..comparison.judge import judge
from ..comparison.message import require
from ..comparison.result import Comparison, Finding
from ..comparison.tolerance import Tolerance, make_tolerance
from ..notes import Note
from ..trace import Trace
from ..trainer.agreement import without_top_k
from ..trainer.limits import trainer_tolerance
from .outcomes import CLEARED, KEPT, Evaluation
from .update_reference import BETTER, FITS, UpdateReference


def assert_weight_update(
    trace: Trace,
    *,
    before: str | Path,
    after: str | Path,
    mode: str = "keep",
    clear_cache: bool = False,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    model: str | Path | None = None,
) -> Comparison:
    """Assert that an engine took a weight update as `mode` and `clear_cache` ask; returns the comparison.

    `trace` is what `Engine.update_weights(..., prompts=...)` returned, or what was generated after it. Its `weight_versions`
    say which weights wrote each token. `before` and `after` are the checkpoints, or folders of LoRA adapters on top of `model`,
    which the reference merges. The reference is transformers in float32 with its `past_key_values`: old keys and values under
    new weights for `keep` without clearing (and `v0`), computed again with clearing. The trace is compared with other outcomes
    too: an update that never arrived, arrived at another token, or not in every layer, and old keys and values that should
    have been cleared (of the request itself, or of its prompt in a prefix cache).

    Raises MismatchError for the verdicts `fail` and `unverified`, with the cause `stale_weights`, `adapter` (the same for
    adapters) or `stale_kv_cache`, and UsageError for a trace without weight versions.
    """
    __tracebackhide__ = True
    comparison = check_weight_update(
        trace, before=before, after=after, mode=mode, clear_cache=clear_cache, tolerance=tolerance, model=model
    )  # fmt: skip
    return require(comparison, f"transformers, float32: {Path(before).name} until the update, then {Path(after).name}")


def check_weight_update(
    trace: Trace,
    *,
    before: str | Path,
    after: str | Path,
    mode: str = "keep",
    clear_cache: bool = False,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    model: str | Path | None = None,
) -> Comparison:
    """The comparison that `assert_weight_update` makes, whatever its verdict."""
    WeightUpdate(weights=Path(after), mode=mode, clear_cache=clear_cache)
    reference = UpdateReference(Path(before), Path(after), trace, None if model is None else Path(model))
    asked = CLEARED if clear_cache else KEPT
    evaluation = reference.evaluate(asked)
    expected = trace.with_(
        logprobs=reference.logprobs(asked), top_token_ids=trace.top_token_ids[:, :0], top_logprobs=trace.top_logprobs[:, :0],
        engine="transformers", engine_version="", dtype="float32", logprobs_mode="processed_logprobs",
        untruncated_logprobs=None, kept_counts=None, kept_token_ids=None, routed_experts=None, router_margins=None,
        router_inputs=None,
    )  # fmt: skip
    limits = make_tolerance(trainer_tolerance("float32", trace.dtype), tolerance)
    comparison = judge(expected, trace, limits, "rl", Evidence(sides=("reference", "engine")))
    comparison = with_gap(comparison, tolerance)
    notes = [*without_top_k(comparison).notes, Note("reference_evaluation", f"explained by {evaluation}")]
    far_better = evaluation.rms[evaluation.best] < BETTER * evaluation.rms[asked]
    if evaluation.best != asked and (comparison.verdict != "pass" or far_better):
        return _failed(comparison, _finding(evaluation, reference.stale, FITS * limits.fit_rms), notes)
    if comparison.passed and not evaluation.shows_arrival:
        why = "both checkpoints give these tokens the same logprobs" if reference.updated else "no token was written after it"
        headline = f"Inconclusive: the trace cannot show whether the update arrived: {why}"
        return dataclasses.replace(comparison, verdict="unverified", headline=headline, notes=tuple(notes))
    if not evaluation.shows_cache:
        text = "these tokens do not show whether keys and values were kept or computed again"
        notes.append(Note("cache_not_told", text))
    return dataclasses.replace(comparison, notes=tuple(notes))


def _failed(comparison: Comparison, finding: Finding, notes: Sequence[Note]) -> Comparison:
    return dataclasses.replace(
        comparison, verdict="fail", headline=f"The weight update did not go as asked: {finding.evidence}", findings=(finding,),
        notes=tuple(notes),
    )  # fmt: skip


def _finding(evaluation: Evaluation, stale: WeightsCause, noise: float) -> Finding:
    """The finding of an evaluation whose best outcome is not the one that was asked for; `stale` is the cause where weights did
    not arrive. An outcome that leaves more than `noise` (RMS, nats) is not named as the cause, only as the nearest.
    """
    best = evaluation.best
    cause: WeightsCause = "stale_kv_cache" if best == KEPT or best.prompt_block else "weights_differ" if best.swapped else stale
    values: dict[str, Any] = {"rms": evaluation.rms[best], "rms_as_asked": evaluation.rms[evaluation.asked], **best.to_json()}
    if evaluation.rms[best] > noise:
        text = (
            f"nearest: {best}, which leaves RMS {evaluation.rms[best]:.2g} (as asked: {evaluation.rms[evaluation.asked]:.2g})"
        )
        candidates: tuple[WeightsCause, ...] = (cause, stale, "stale_kv_cache", "weights_differ")
        return Finding(layer="weights", cause=None, evidence=text, candidates=tuple(dict.fromkeys(candidates)), values=values)
    text = f"{best} (RMS {evaluation.rms[best]:.2g}; as asked: {evaluation.rms[evaluation.asked]:.2g})"
    if best == CLEARED:
        return Finding(layer="weights", cause=None, evidence=text, candidates=("stale_kv_cache", "engine_build"), values=values)
    return Finding(layer="weights", cause=cause, evidence=text, values=values)
