"""Judges the answers of an engine as a check does, and computes apart from that how much the fault matters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..check.ask import Answers
from ..check.check import judge_answers
from ..check.context import Context
from ..comparison.result import Comparison, Finding
from ..comparison.tolerance import default_tolerance
from ..diagnosis.reference_evaluation import read_against, weigh
from ..errors import ParityError
from ..golden import Golden
from ..trace import Trace
from .engine_under_test import first_line
from .fault import Fault, Outcome, Row
from .truth import Objective, TrueEffect, growth, true_effect

#: Added to the fingerprint of an engine with a fault: a check then takes it for another build, which it judges by sizes. On an
#: engine whose fingerprint is the golden's any other bit fails, whatever it does.
_ANOTHER_BUILD: Final[Mapping[str, Any]] = {"selftest": "judged as another build"}


def judge_fault(fault: Fault, golden: Golden, clean: Trace, answers: Answers, objective: Objective) -> Row:
    """The row of a fault: the verdict on `answers`, and the true effect against `clean`, the engine without the fault."""
    actual = answers.replays["decode"]
    effect = effect_of(fault, golden, clean, actual, objective)
    outcome: Outcome
    try:
        comparison = verdict_of(golden, answers, objective, unchanged=fault.unchanged)
        outcome, said = comparison.verdict, comparison.headline
        cause = "" if outcome != "fail" else named_cause(findings_of(golden, comparison))
    except ParityError as error:
        outcome, said, cause = "error", first_line(error), ""
    return Row(
        fault=fault.name, size=fault.size, kind=fault.kind, outcome=outcome, rms=rms_of(clean, actual),
        multiple=effect.multiple, quantity=effect.largest.name, cause=cause, said=said,
    )  # fmt: skip


def verdict_of(golden: Golden, answers: Answers, objective: Objective, *, unchanged: bool) -> Comparison:
    """What a check says of the answers: of an engine that nobody changed, or as of another build."""
    if not unchanged:
        answers = dataclasses.replace(answers, fingerprint={**answers.fingerprint, **_ANOTHER_BUILD})
    comparison, _ = judge_answers(golden, answers, None, "rl", Context(objective=objective))
    return comparison


def findings_of(golden: Golden, comparison: Comparison) -> list[Finding]:
    """The findings of the check, with what the golden's reference adds to them."""
    if golden.reference is None:
        return list(comparison.findings)
    reference = comparison.expected.with_(logprobs=golden.reference.logprobs)
    outlier = default_tolerance(golden.trace.dtype).outlier
    return weigh(comparison.findings, read_against(comparison.expected, comparison.actual, reference, outlier))


def named_cause(findings: list[Finding]) -> str:
    """The cause that stands first, or where it has no name, the first candidate of each finding with its layer."""
    if not findings:
        return ""
    unnamed = [f"{finding.layer}: {finding.candidates[0]}" for finding in findings if finding.candidates]
    return findings[0].cause or f"perhaps {'; '.join(unnamed)}"


def effect_of(fault: Fault, golden: Golden, clean: Trace, actual: Trace, objective: Objective) -> TrueEffect:
    """The true effect of a fault on an update: of the change, and where the engine computes anew, of what it adds to the
    engine's distance from the model in float32.
    """
    before, after = clean.logprobs.astype(np.float64), actual.logprobs.astype(np.float64)
    before[~clean.mask] = np.nan  # nothing is compared there
    offsets, experts = clean.sequence_offsets, bool(golden.routed)
    if fault.recomputes and golden.reference is not None:
        model = golden.reference.logprobs.astype(np.float64)
        return growth(model, before, after, offsets, objective, experts=experts)
    return true_effect(before, after, offsets, objective, depth=np.zeros(len(before)), experts=experts)


def rms_of(clean: Trace, actual: Trace) -> float | None:
    """The RMS of the change in nats over the tokens that have a number on both sides."""
    rows = clean.mask & np.isfinite(clean.logprobs) & np.isfinite(actual.logprobs)
    if not rows.any():
        return None
    d = actual.logprobs[rows].astype(np.float64) - clean.logprobs[rows].astype(np.float64)
    return math.sqrt(float(np.mean(d**2)))
