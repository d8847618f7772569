"""Do both columns mean the same? What the labels claim, what the numbers bear out, and what they say instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from ...spec import Sampling
from ...trace import Trace
from ..alignment import Alignment
from ..findings import Cause, Finding, SemanticCause
from ..sides import Names
from .find_logits_processing_steps import logits_processing_steps, scale_of
from .logit_scale import ENOUGH
from .logits_processing_step import ProcessingStep, applied
from .misreported_logprobs import (
    Misreport,
    find_normaliser,
    find_rewritten,
    find_rows_elsewhere,
    find_shift,
    find_shifted_rows,
    find_underflow,
    misreport,
    no_logprobs,
)
from .position_pattern import find_position_pattern
from .positions import MOST, Positions, positions_of

_NAMES: Final = Names()


# -- what the labels say -----------------------------------------------------------------------------------------------


def different_meaning(expected: Trace, actual: Trace) -> SemanticCause | None:
    """The cause's name where the labels of the two sides say that their numbers mean different things."""
    if expected.means_as(actual):
        return None
    if expected.logprobs_mode != actual.logprobs_mode:
        return "raw_vs_processed"
    one, other = expected.sampling, actual.sampling
    if one.temperature != other.temperature:
        return "temperature"
    if (one.top_p, one.top_k, one.min_p) != (other.top_p, other.top_k, other.min_p):
        return "truncation"
    if one.logit_bias != other.logit_bias:
        return "logit_bias"
    bans = ((one.bad_words, one.allowed_token_ids), (other.bad_words, other.allowed_token_ids))
    return "banned_tokens" if bans[0] != bans[1] else "penalties"


def bears_out(expected: Trace, actual: Trace, rows: Alignment) -> bool:
    """Whether the top-k show that the two sides are apart by the temperatures that their labels name, however small."""
    slope = expected.applied_temperature / actual.applied_temperature
    if slope == 1:
        return False
    scale = scale_of(positions_of(expected, actual, rows))
    return (
        scale.positions >= ENOUGH and abs(scale.slope - 1) > 4 * scale.error and abs(scale.slope - slope) < abs(slope - 1) / 4
    )


def label_findings(
    cause: SemanticCause, expected: Trace, actual: Trace, rows: Alignment, names: Names = _NAMES
) -> list[Finding]:  # fmt: skip
    """The findings for labels that differ: what they claim, and step by step what the numbers say of it."""
    claim = f"{expected.distribution()} in {names.expected}, {actual.distribution()} in {names.actual}"
    of_steps = [step.finding for step in logits_processing_steps(positions_of(expected, actual, rows, names=names))]
    same = [finding for finding in of_steps if finding.cause == cause]
    if same:
        claim += f"; {same[0].evidence}"
    values = same[0].values if same else {}
    return [
        Finding(layer="semantic", cause=cause, evidence=claim, values=values),
        *(finding for finding in of_steps if finding.cause != cause),
    ]


# -- what the numbers say ----------------------------------------------------------------------------------------------


def semantic_findings(
    expected: Trace, actual: Trace, rows: Alignment, off: Sequence[int] | None = None, names: Names = _NAMES, most: int = MOST
) -> list[Finding]:  # fmt: skip
    """Semantic causes that equal labels hide, from the arithmetic that each leaves behind; nothing where there is none.

    `off` are the sequences that are far off, where those are the smaller part: what cannot be seen over all sequences is
    looked for in these. `names` are what the two sides are called; `most` positions are looked at.
    """
    for sequences in (None, off) if off is not None and len(off) else (None,):
        positions = positions_of(expected, actual, rows, sequences, names, most)
        reports = _reported(positions)
        found = [Finding(layer="semantic", cause=report.cause, evidence=report.text) for report in reports]
        if all(report.minor for report in reports):
            steps = list(logits_processing_steps(positions))
            found = [*_whole(steps, positions), *(step.finding for step in steps), *found]
            if not found and (by_place := find_position_pattern(positions)):
                found = [by_place]
            elif not found and (normaliser := find_normaliser(positions)):
                found = [
                    Finding(
                        layer="semantic",
                        cause=None,
                        evidence=normaliser.text,
                        candidates=_of_a_normaliser(positions.expected_trace.sampling),
                    )
                ]
        if found:
            where = "" if sequences is None else f"in {len(sequences)} of {expected.num_sequences} sequences: "
            return [dataclasses.replace(f, evidence=where + f.evidence) for f in found]
    return []


def _reported(positions: Positions) -> list[Misreport]:
    """Numbers that were reported wrongly."""
    for found in (
        no_logprobs(positions, "expected"),
        no_logprobs(positions, "actual"),
        find_rewritten(positions),
        find_underflow(positions),
    ):
        if found is not None:
            return [found]
    found_on = (misreport(positions, "actual"), misreport(positions, "expected"))
    reports = [report for report in found_on if report is not None]
    if elsewhere := find_shifted_rows(positions) or find_rows_elsewhere(positions):
        return [elsewhere]
    if all(report.minor for report in reports) and (shift := find_shift(positions)):
        return [shift, *reports]
    return reports


def _whole(steps: Sequence[ProcessingStep], positions: Positions) -> Iterator[Finding]:
    """Raw for processed: all that the recorded sampling asks for is on one side only."""
    recorded, names = _recorded(positions.expected_trace.sampling), positions.names
    for on_expected, text in ((True, f"{names.expected}'s logprobs are processed, {names.actual}'s are raw"),
                            (False, f"{names.actual}'s logprobs are processed, {names.expected}'s are raw")):  # fmt: skip
        found = {step.finding.cause for step in steps if step.on_expected == on_expected and step.recorded}
        other = any(
            s.on_expected != on_expected and s.finding.cause and not s.recorded for s in steps
        )  # it processes, otherwise
        penalties = sum(s.finding.cause == "penalties" for s in steps if s.on_expected == on_expected and s.recorded)
        if recorded <= {"logit_bias", "banned_tokens"}:
            continue  # these steps say so themselves
        if recorded == {"penalties"} and penalties < _penalties(positions.expected_trace.sampling):
            continue  # those that are left were applied
        if recorded and found == recorded and not other:
            twice = not on_expected and recorded in ({"temperature"}, {"penalties"})  # nothing tells it from a step taken twice
            said = ", ".join(
                applied(s.name, names, on_expected=s.on_expected, twice=twice and s.twice) for s in steps if s.recorded
            )
            if twice:
                yield Finding(
                    layer="semantic",
                    cause=None,
                    evidence=f"{text}, or it was applied twice: {said}",
                    candidates=("raw_vs_processed", *recorded),
                )
            else:
                values = [s.finding.values for s in steps if s.on_expected == on_expected and s.recorded]
                unlisted = values[0] if len(values) == 1 and "beyond_top_k" in values[0] else {}
                yield Finding(layer="semantic", cause="raw_vs_processed", evidence=f"{text}: {said}", values=unlisted)


def _penalties(sampling: Sampling) -> int:
    """How many penalties this sampling has."""
    return (sampling.repetition_penalty != 1) + (sampling.presence_penalty != 0) + (sampling.frequency_penalty != 0)


def _of_a_normaliser(sampling: Sampling) -> tuple[Cause, ...]:
    """What may give each position another normaliser; penalties move tokens that no top-k lists, too."""
    return (*(("penalties",) if sampling.penalizes else ()), "wrong_values", "weights_differ", "truncation", "engine_build")


def _recorded(sampling: Sampling) -> set[SemanticCause]:
    """The causes that the steps of this sampling can bring about."""
    steps: tuple[tuple[SemanticCause, bool], ...] = (
        ("temperature", not sampling.greedy and abs(sampling.temperature - 1) > 1e-6),
        ("truncation", sampling.truncates),
        ("penalties", sampling.penalizes),
        ("logit_bias", any(bias for _, bias in sampling.logit_bias)),
        ("banned_tokens", bool(sampling.bad_words or sampling.allowed_token_ids)),
    )
    return {name for name, taken in steps if taken}


def left_unexplained(expected: Trace, actual: Trace, rows: Alignment, most: float) -> str:
    """What a temperature leaves between tokens of one position, where that is more than `most` (nats): something else differs
    besides. Empty where it is not, where penalties would be part of it, and where no temperature is between the two sides.
    """
    positions = positions_of(expected, actual, rows)
    scale = scale_of(positions)
    if not scale.claimed or expected.sampling.edits_logits or any(_reported(positions)):
        return ""
    rest = positions.noise(scale.slope)
    if rest <= most:
        return ""
    text = f"the temperature leaves an RMS difference of {rest:.2g} nats between tokens of one position"
    return f"{text}, more than noise: weights or path differ, too"


def unsure_of(expected: Trace, actual: Trace, rows: Alignment) -> str:
    """What these two traces cannot tell apart, for want of tokens that both sides name; empty where they can."""
    usable = int(np.count_nonzero(positions_of(expected, actual, rows).common.sum(axis=1) >= 2))
    k = min(expected.top_k, actual.top_k)
    if usable < ENOUGH:
        more = "record logprobs=5" if k < 5 else f"record {ENOUGH - usable} more positions"
        return (
            f"top-{k}: both sides list two tokens at {usable} positions; {ENOUGH} are needed to distinguish a temperature, a "
            f"truncation, a penalty and other weights: {more}"
        )
    if k == 1:
        return (
            f"top-1: both sides list two tokens at {usable:,} positions, where another token was chosen: a truncation or a "
            "penalty may not be visible; record logprobs=5"
        )
    wanted = expected.sampling.top_k
    return (
        f"top-{k}: a truncation to top-k {wanted} is not visible, record logprobs={wanted + 1} or more" if wanted >= k else ""
    )
