"""Does an engine that took new weights give the same logprobs as a fresh engine of these weights?"""

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
from ..spec.server_settings import SERVER

if TYPE_CHECKING:
    from ..engines.engine import Engine


def assert_updated_equals_cold(
    engine: Engine, weights: str | Path, *, prompts: Sequence[Any], sampling: Any = None
) -> Comparison:  # fmt: skip
    """Assert that `engine`, updated to `weights`, gives the logprobs of a fresh engine of them; returns the comparison.

    `weights` is a checkpoint folder. The engine takes it while no request runs, and generates from `prompts` under `sampling`.
    A fresh engine with the same settings replays the same tokens. The logprobs must be bit-identical: a difference beyond the
    noise of the dtype fails, a smaller one is `unverified`. Where vLLM has checksums of its parameters, these are compared
    too; they do not cover packed or cached copies, which the replay does. The engine keeps its new weights. A server batches
    requests in an order of its own, so there a smaller difference passes if all checksums agree.

    Raises MismatchError, with the parameters whose checksums differ, and UsageError where `weights` is not a checkpoint folder.
    """
    __tracebackhide__ = True
    comparison = check_updated_equals_cold(engine, weights, prompts=prompts, sampling=sampling)
    return require(comparison, f"a fresh engine of {Path(weights).name}")


def check_updated_equals_cold(
    engine: Engine, weights: str | Path, *, prompts: Sequence[Any], sampling: Any = None
) -> Comparison:
    """The comparison that `assert_updated_equals_cold` makes, whatever its verdict."""
    if not isinstance(weights, (str, Path)) or is_adapter(Path(weights)):
        raise UsageError(
            "a fresh engine starts from a checkpoint folder: give one, not tensors or an adapter (merge_adapter writes one)"
        )
    engine.update_weights(weights)
    trace = engine.generate(prompts, sampling)
    warm, sums = engine.replay(trace), engine.weight_checksums()
    fresh = engine.beside(Path(weights).absolute() if Path(weights).is_dir() else weights)
    cold, own = fresh.replay(trace), fresh.weight_checksums()
    names = ("weight_versions", "engine_versions", "newest_version")
    expected, actual = (t.with_(**dict.fromkeys(names)) for t in (cold, warm))
    evidence = Evidence(sides=("cold", "updated"))
    comparison = judge(expected, actual, default_tolerance(cold.dtype), "rl", evidence)
    apart = sorted(name for name in own if sums.get(name) != own[name])
    notes = list(comparison.notes)
    if own:
        result = (
            f"{len(apart)} of {len(own)} checksums differ, {apart[0]!r} first" if apart else f"all {len(own)} checksums agree"
        )
        notes.append(Note("checksums", f"vLLM's own checksums of the parameters: {result}"))
    comparison = _strictly(comparison, has_equal_parameters=engine.spec.engine == SERVER and bool(own) and not apart)
    findings = comparison.findings
    if comparison.verdict == "fail" and not any(finding.cause for finding in findings):
        where = (
            f"parameters differ: {', '.join(apart[:4])}"
            if apart
            else "the parameters agree: packed or cached copies of them, or keys and values, may be old"
        )
        findings = (
            Finding(
                layer="weights", cause=None, evidence=where, candidates=("stale_weights", "stale_kv_cache", "weights_differ")
            ),
        )
    return dataclasses.replace(comparison, findings=findings, notes=tuple(notes))


def _strictly(comparison: Comparison, *, has_equal_parameters: bool) -> Comparison:
    """The comparison with the verdict for one set of weights: a difference beyond the noise of the dtype fails, a smaller one
    is unverified, or passes for a server that `has_equal_parameters`.
    """
    if comparison.verdict != "pass" or not comparison.metrics["n_changed"]:
        return comparison
    beyond = any(note.key == "beyond_dtype" for note in comparison.notes)
    rms = comparison.metrics["rms_diff"]
    if beyond:
        headline = f"The updated engine differs from a fresh one: RMS {rms:.2g} nats, more than the noise of its dtype explains"
        return dataclasses.replace(comparison, verdict="fail", headline=headline, findings=())
    if has_equal_parameters:
        return comparison
    headline = f"Inconclusive: the updated engine is not bit-identical to a fresh one, RMS {rms:.2g} nats"
    return dataclasses.replace(comparison, verdict="unverified", headline=headline)
