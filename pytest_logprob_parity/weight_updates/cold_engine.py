"""Does an engine that took new weights give what a fresh engine of these weights gives?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.adapter import is_adapter
from ..comparison.evidence import Evidence
from ..comparison.judge import judge
from ..comparison.message import require
from ..comparison.result import Comparison, Finding
from ..comparison.tolerance import default_tolerance
from ..errors import UsageError
from ..notes import Note

if TYPE_CHECKING:
    from ..engines.engine import Engine


def assert_updated_equals_cold(
    engine: Engine, weights: str | Path, *, prompts: Sequence[Any], sampling: Any = None
) -> Comparison:  # fmt: skip
    """Assert that `engine`, once it has taken `weights`, gives what a fresh engine of them gives; returns the comparison.

    `weights` is a checkpoint folder. The engine takes them at rest and answers `prompts` under `sampling`; a fresh engine of
    the same settings is asked about the same tokens. What both give has to be the same bit for bit: what is more than noise of
    the dtype explains fails, and what is less is `unverified`. Where vLLM has checksums of its parameters they are compared
    too: these see no packed or cached copies, which the replay does. The engine goes on with its new weights.

    Raises MismatchError, with the parameters whose checksums differ, and UsageError for what is no checkpoint folder.
    """
    __tracebackhide__ = True
    comparison = check_updated_equals_cold(engine, weights, prompts=prompts, sampling=sampling)
    return require(comparison, f"a fresh engine of {Path(weights).name}")


def check_updated_equals_cold(
    engine: Engine, weights: str | Path, *, prompts: Sequence[Any], sampling: Any = None
) -> Comparison:
    """What `assert_updated_equals_cold` asserts, whatever its verdict."""
    if not isinstance(weights, (str, Path)) or is_adapter(Path(weights)):
        raise UsageError(
            "a fresh engine starts of a checkpoint folder: give one, and no tensors or adapter (merge_adapter writes one)"
        )
    engine.update_weights(weights)
    trace = engine.generate(prompts, sampling)
    warm, sums = engine.replay(trace), engine.weight_checksums()
    fresh = engine.beside(Path(weights).absolute() if Path(weights).is_dir() else weights)
    cold, own = fresh.replay(trace), fresh.weight_checksums()
    names = ("weight_versions", "newest_version")
    expected, actual = (t.with_(**dict.fromkeys(names)) for t in (cold, warm))
    evidence = Evidence(sides=("cold", "updated"))
    comparison = judge(expected, actual, default_tolerance(cold.dtype), "rl", evidence)
    apart = sorted(name for name in own if sums.get(name) != own[name])
    notes = list(comparison.notes)
    if own:
        told = (
            f"{len(apart)} of {len(own)} checksums differ, {apart[0]!r} first" if apart else f"all {len(own)} checksums agree"
        )
        notes.append(Note("checksums", f"vLLM's own checksums of the parameters: {told}"))
    comparison = _strictly(comparison)
    findings = comparison.findings
    if comparison.verdict == "fail" and not any(finding.cause for finding in findings):
        where = (
            f"parameters differ: {', '.join(apart[:4])}"
            if apart
            else "parameters agree: packed or cached copies of them, or keys and values"
        )
        findings = (Finding("weights", None, where, ("stale_weights", "stale_kv_cache", "weights_differ")),)
    return dataclasses.replace(comparison, findings=findings, notes=tuple(notes))


def _strictly(comparison: Comparison) -> Comparison:
    """Other bits of the same weights are no pass, however little an update feels them: beyond the dtype's noise they fail."""
    if comparison.verdict != "pass" or not comparison.metrics["n_changed"]:
        return comparison
    beyond = any(note.key == "beyond_dtype" for note in comparison.notes)
    rms = comparison.metrics["rms_diff"]
    if beyond:
        headline = f"The updated engine is not what a fresh one is: RMS {rms:.2g} nats, more than noise of its dtype explains"
        return dataclasses.replace(comparison, verdict="fail", headline=headline, findings=())
    headline = f"Not shown that the updated engine is what a fresh one is: not bit for bit the same, RMS {rms:.2g} nats"
    return dataclasses.replace(comparison, verdict="unverified", headline=headline)
