"""Judge two traces: measure, find causes, ask whether it is different, decide; with everything that a check knows."""

from __future__ import annotations

import numpy as np

from ..grammar import counted
from ..notes import Note
from ..trace import Trace
from .comparison_notes import beside_the_verdict, not_compared, without_floor
from .decision import Found, decide
from .difference import Difference
from .evidence import Evidence
from .find_causes import Causes, find_causes
from .findings import Finding
from .free_generation.judge import judge_free_run
from .headline import Headline
from .is_different import is_different
from .measurement import Measurement, measure, policy_metrics
from .result import Comparison
from .tally import TALLY
from .tolerance import Tolerance
from .vocabulary import Level, Verdict
from .worst_tokens import worst_tokens


def judge(expected: Trace, actual: Trace, limits: Tolerance, level: Level, evidence: Evidence) -> Comparison:
    """What `compare` does, with everything that a check knows."""
    TALLY.made += 1
    causes = find_causes(measure(expected, actual, limits, evidence))
    measured = causes.measured
    problem, free_finding = _judge_free_generation(causes, evidence)
    findings = [*causes.findings, *([] if free_finding is None else [free_finding])]
    difference = _difference(causes, findings, level, evidence)
    verdict, headline = decide(
        Found(
            measured=measured,
            findings=findings,
            record=causes.record.headline,
            free_problem=problem,
            difference=difference,
            level=level,
            evidence=evidence,
        )
    )
    return Comparison(
        verdict=verdict,
        headline=headline,
        metrics=measured.numbers,
        findings=(*findings, *_noise(measured, verdict)),
        gates=measured.gates,
        worst=worst_tokens(expected, actual, measured.rows),
        expected=expected,
        actual=actual,
        policy_metrics=policy_metrics(expected, evidence.policy_logprobs, measured.rows),
        free_run=evidence.free_run,
        notes=(
            *causes.notes,
            *_free_generation_note(free_finding, evidence),
            *not_compared(measured),
            *without_floor(measured, evidence.floor, level),
            *beside_the_verdict(measured, verdict, level),
        ),
        level=level,
        setup=evidence.setup,
        objective=limits.objective,
        difference=difference,
        sides=evidence.sides,
        shown=measured.shown if measured.gates else None,
    )


def _judge_free_generation(causes: Causes, evidence: Evidence) -> tuple[Headline | None, Finding | None]:
    """The headline where free generation decides, and its finding: for logprobs that have been found to agree."""
    measured, floor = causes.measured, evidence.floor
    if measured.failed or causes.findings:
        return None, None
    sampled = floor.mean_abs if floor is not None else 0.0
    noise = max(sampled if np.isfinite(sampled) else 0.0, measured.numbers["mean_abs_diff"])
    return judge_free_run(
        evidence.free_run,
        measured.expected,
        exact=measured.exact and evidence.setup == "same" and evidence.same_schedule,
        same_stream=evidence.same_stream and (evidence.same_schedule or noise > 0),
        mean_abs_diff=noise,
    )


def _free_generation_note(finding: Finding | None, evidence: Evidence) -> list[Note]:
    """What came of free generation where it is no finding."""
    if finding is not None or evidence.free_run is None or evidence.free_run.same:
        return []
    return [Note("free_generation", f"free generation: {evidence.free_run}")]


def _difference(causes: Causes, findings: list[Finding], level: Level, evidence: Evidence) -> Difference:
    """Whether the two sides are different; not known where nothing was compared."""
    measured = causes.measured
    decided = bool(measured.failed or findings)
    if not measured.compared and not decided:
        return Difference(different=None, reason="nothing was compared", key="nothing_compared")
    exact = measured.exact and not causes.record.new
    return is_different(measured.expected, exact=exact, decided=decided, level=level, evidence=evidence)


def _noise(measured: Measurement, verdict: Verdict) -> list[Finding]:
    """What passes and is not bit for bit the same: its size as the gates measure it, and the tokens that are far off."""
    if verdict != "pass" or measured.exact or measured.beyond_dtype:
        return []
    rms = measured.numbers["rms_diff"]
    off = next((g for g in measured.gates if g.key == "outlier_tokens" and g.value), None)
    over = f"over {counted(int(measured.numbers['n_tokens']), 'tokens')}"
    beside = "" if off is None else f", and {counted(round(off.value), off.unit)} {off.name} (largest: {off.worst:.3g} nats)"
    return [
        Finding(
            layer="noise",
            cause="numerical_noise",
            evidence=f"RMS difference {rms:.2g} nats {over}{beside}: within tolerance",
            values={"rms": rms},
        )
    ]
