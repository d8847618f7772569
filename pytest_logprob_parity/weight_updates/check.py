"""Did an engine take a weight update as it was asked to? A trace, held against what transformers does."""

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
from .reference import BETTER, CLEARED, FITS, KEPT, UpdateReading, UpdateReference


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

    `trace` is what `Engine.update_weights(..., prompts=...)` returned, or what was written after it; its `weight_versions`
    say which tokens are of which weights. `before` and `after` are the checkpoints, or folders of LoRA adapters on top of
    `model`, which the reference merges. The reference is transformers in float32,
    which does the same with its `past_key_values`: old keys and values under new weights for `keep` without clearing (and
    `v0`), computed again with clearing. Other ways it could have gone are held against the trace too: an update that never
    came, at another token, not in every layer, keys and values that should have been thrown away (of the request itself, or
    of its prompt in a prefix cache).

    Raises MismatchError for the verdicts `fail` and `unverified`, with `stale_weights`, `adapter` (what `stale_weights` is
    called where adapters are what changed) or `stale_kv_cache` by name, and UsageError for a trace that says nothing of
    weights.
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
    """What `assert_weight_update` asserts, whatever its verdict."""
    WeightUpdate(Path(after), mode, clear_cache)
    reference = UpdateReference(Path(before), Path(after), trace, None if model is None else Path(model))
    asked = CLEARED if clear_cache else KEPT
    reading = reference.read(asked)
    expected = trace.with_(
        logprobs=reference.logprobs(asked), top_token_ids=trace.top_token_ids[:, :0], top_logprobs=trace.top_logprobs[:, :0],
        engine="transformers", engine_version="", dtype="float32", logprobs_mode="processed_logprobs",
        untruncated_logprobs=None,
    )  # fmt: skip
    limits = make_tolerance(trainer_tolerance("float32", trace.dtype), tolerance)
    comparison = judge(expected, trace, limits, "rl", Evidence(sides=("reference", "engine")))
    comparison = with_gap(comparison, tolerance)
    notes = [*without_top_k(comparison).notes, Note("reading", f"explained by {reading}")]
    far_better = reading.rms[reading.best] < BETTER * reading.rms[asked]
    if reading.best != asked and (comparison.verdict != "pass" or far_better):
        return _failed(comparison, _finding(reading, reference.stale, FITS * limits.fit_rms), notes)
    if comparison.passed and not reading.tells_arrival:
        why = "the two checkpoints give these tokens the same logprobs" if reference.updated else "none was written after it"
        headline = f"Not shown that the update arrived: {why}"
        return dataclasses.replace(comparison, verdict="unverified", headline=headline, notes=tuple(notes))
    if not reading.tells_cache:
        text = "these tokens do not tell whether keys and values were kept or computed again"
        notes.append(Note("cache_not_told", text))
    return dataclasses.replace(comparison, notes=tuple(notes))


def _failed(comparison: Comparison, finding: Finding, notes: Sequence[Note]) -> Comparison:
    return dataclasses.replace(
        comparison, verdict="fail", headline=f"The weight update did not go as asked: {finding.evidence}", findings=(finding,),
        notes=tuple(notes),
    )  # fmt: skip


def _finding(reading: UpdateReading, stale: WeightsCause, noise: float) -> Finding:
    """What a reading comes to; `stale` is the cause of weights that did not come. A way that leaves more than `noise` (nats)
    is no cause, only the nearest of those that were tried.
    """
    best = reading.best
    cause: WeightsCause = "stale_kv_cache" if best == KEPT or best.prompt_block else "weights_differ" if best.swapped else stale
    values: dict[str, Any] = {"rms": reading.rms[best], "rms_as_asked": reading.rms[reading.asked], **best.to_json()}
    if reading.rms[best] > noise:
        text = f"nearest: {best}, which leaves RMS {reading.rms[best]:.2g} (as asked: {reading.rms[reading.asked]:.2g})"
        candidates: tuple[WeightsCause, ...] = (cause, stale, "stale_kv_cache", "weights_differ")
        return Finding("weights", None, text, tuple(dict.fromkeys(candidates)), values)
    text = f"{best} (RMS {reading.rms[best]:.2g}; as asked: {reading.rms[reading.asked]:.2g})"
    if best == CLEARED:
        return Finding("weights", None, text, ("stale_kv_cache", "engine_build"), values)
    return Finding("weights", cause, text, values=values)
