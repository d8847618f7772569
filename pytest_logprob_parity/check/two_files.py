"""Two files compared: a golden and a trace that lie on the disk, without an engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..comparison.alignment import align
from ..comparison.evidence import Evidence
from ..comparison.judge import judge
from ..comparison.suspected_causes import suspects
from ..comparison.tolerance import Tolerance, default_tolerance, make_tolerance, with_floor, with_reference
from ..comparison.vocabulary import Level
from ..errors import IncomparableError
from ..golden import Golden
from ..golden.fingerprint import differences, setup_class
from ..notes import Note
from .context import Checked
from .obtained import Obtained, is_obtained, read


def compare_files(expected_path: Path, actual_path: Path, level: Level | None = None) -> Checked:
    """What `logprob-parity diff` compares. Raises GoldenError for a file, IncomparableError for two without a common prompt.

    A trace that a failing check left is held against its golden as that run did it: by its limits, and without `level` at its
    level, which a note says. Other traces have the golden's limits, and level `rl`.
    """
    expected, actual = Golden.load(expected_path), Golden.load(actual_path)
    if align(expected.trace, actual.trace).missing_sequences == expected.trace.num_sequences:
        raise IncomparableError(f"{actual_path} belongs to other prompts than {expected_path}: they have none in common")
    told = read(actual_path) if is_obtained(actual_path) else None
    if told is None or told.golden_digest != expected.digest:
        return compare_goldens(expected, actual, level or "rl")
    checked = compare_goldens(expected, actual, level or told.level, told.limits)
    if not (changed := _changed(limits_of(expected, actual), told, level)):
        return checked
    note = Note("as_in_its_run", f"as in the run that left it: {', '.join(changed)}")
    comparison = dataclasses.replace(checked.comparison, notes=(*checked.comparison.notes, note))
    return dataclasses.replace(checked, comparison=comparison)


def _changed(limits: Tolerance, told: Obtained, level: Level | None) -> list[str]:
    """What of a run's level and limits is not as two files alone would have it."""
    then, usual = (told.limits or limits), limits.limits()
    changed = [f"{name} {value:g} (usually {usual[name]:g})" for name, value in then.limits().items() if value != usual[name]]
    changed += [f"objective {then.objective}"] * (then.objective != limits.objective)
    return [f"level {told.level}"] * (level is None and told.level != "rl") + changed


def compare_goldens(expected: Golden, actual: Golden, level: Level = "rl", limits: Tolerance | None = None) -> Checked:
    """Two goldens in hand; without `limits` they are the expected side's, and those that it was recorded with."""
    both = expected.fingerprint and actual.fingerprint
    apart = differences(expected.fingerprint, actual.fingerprint) if both else []
    if expected.trace.sampling != actual.trace.sampling:
        apart.append(("sampling", expected.trace.sampling.processing(), actual.trace.sampling.processing()))
    policy = actual.trace.untruncated_logprobs
    setup = setup_class(expected.fingerprint if both else {}, apart)
    evidence = Evidence(
        floor=expected.floor, reference=expected.reference, routed=expected.routed, setup=setup, policy_logprobs=policy
    )
    comparison = judge(expected.trace, actual.trace, limits or limits_of(expected, actual), level, evidence)
    if both and comparison.verdict == "fail" and not comparison.findings:  # as a check of an engine says it
        comparison = dataclasses.replace(comparison, findings=tuple(suspects(apart)))
    return Checked(
        golden=expected, comparison=comparison, differences=apart, fingerprint=actual.fingerprint, policy_logprobs=policy
    )


def limits_of(expected: Golden, actual: Golden) -> Tolerance:
    """The limits of a golden against another: of its dtype, its noise floor and reference, and those it was recorded with."""
    defaults = default_tolerance(expected.trace.dtype, (expected.trace.path, actual.trace.path))
    known = with_reference(with_floor(defaults, expected.floor), expected.trace.logprobs, expected.reference)
    return make_tolerance(known, expected.tolerance)
