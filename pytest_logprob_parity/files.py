"""Two files compared: a golden and a trace that lie on the disk, without an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .belonging import Checked
from .comparison.alignment import align
from .comparison.tolerance import default_tolerance, make_tolerance, with_floor
from .comparison.verdict import Evidence, judge
from .errors import IncomparableError
from .fingerprint import differences, setup_class
from .golden import Golden
from .suspects import suspects


def compare_files(expected_path: Path, actual_path: Path, level: str = "rl") -> Checked:
    """What `logprob-parity diff` compares. Raises GoldenError for a file, IncomparableError for two without a common prompt."""
    expected, actual = Golden.load(expected_path), Golden.load(actual_path)
    if align(expected.trace, actual.trace).missing_sequences == expected.trace.num_sequences:
        raise IncomparableError(f"{actual_path} belongs to other prompts than {expected_path}: they have none in common")
    return compare_goldens(expected, actual, level)


def compare_goldens(expected: Golden, actual: Golden, level: str = "rl") -> Checked:
    """Two goldens in hand; limits are the expected side's, and those that it was recorded with."""
    limits = with_floor(default_tolerance(expected.trace.dtype, (expected.trace.path, actual.trace.path)), expected.floor)
    both = expected.fingerprint and actual.fingerprint
    apart = differences(expected.fingerprint, actual.fingerprint) if both else []
    if expected.trace.sampling != actual.trace.sampling:
        apart.append(("sampling", expected.trace.sampling.processing(), actual.trace.sampling.processing()))
    policy = actual.trace.untruncated_logprobs
    setup = setup_class(expected.fingerprint if both else {}, apart)
    evidence = Evidence(expected.floor, setup=setup, policy_logprobs=policy)
    comparison = judge(expected.trace, actual.trace, make_tolerance(limits, expected.tolerance), level, evidence)
    if both and comparison.verdict == "fail" and not comparison.findings:  # as a check of an engine says it
        comparison = dataclasses.replace(comparison, findings=tuple(suspects(apart)))
    return Checked(expected, comparison, apart, actual.fingerprint, policy)
