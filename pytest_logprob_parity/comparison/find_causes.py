"""What two measured traces show of causes: what their labels claim, what the numbers say, what the record contradicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from ..grammar import counted, is_or_are
from ..notes import Note
from ..trace import Trace
from . import metrics as m
from .contradictions import Record, examine
from .decision import proves
from .expert_routing import routing_finding, routing_note
from .findings import Finding
from .measurement import Measurement
from .signatures.lm_head import lm_head_finding
from .signatures.positions import GLANCE, MOST, positions_of
from .signatures.semantics import bears_out, different_meaning, label_findings, left_unexplained, semantic_findings, unsure_of

#: Temperatures that differ by less than this share are told apart by the numbers alone.
_NEARLY: Final = 0.01


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Causes:
    """The findings of two traces and the notes beside them; `measured` is without differences where these mean nothing.

    `record` are the contradictions within the two sides' records.
    """

    measured: Measurement
    findings: tuple[Finding, ...]
    notes: tuple[Note, ...]
    record: Record


def find_causes(measured: Measurement) -> Causes:
    """The causes that two traces show: labels, then the arithmetic of the numbers, then their records, then NaN."""
    record = examine(measured.expected, measured.actual, measured.rows, measured.names)
    findings, notes = _meanings(measured)
    if findings:
        measured = measured.without_differences()
    elif not record.explains:
        findings = _by_arithmetic(measured)
        findings += _by_experts(measured, findings)
        notes += _unsure(measured)
    notes += _left_unexplained(measured, findings)
    findings += record.beside(findings)
    notes += record.notes
    notes += routing_note(measured.expected, measured.actual, measured.routing, measured.names)
    if measured.numbers["n_nan"] and not record.accounts_for(int(measured.numbers["n_nan"])):
        findings.insert(0, _nan_finding(measured))
    return Causes(measured=measured, findings=tuple(findings), notes=tuple(notes), record=record)


def _meanings(measured: Measurement) -> tuple[list[Finding], list[Note]]:
    """What labels that differ come to: a finding where the numbers bear them out, else a note; no finding where equal."""
    expected, actual, rows = measured.expected, measured.actual, measured.rows
    claim = different_meaning(expected, actual)
    if claim is None or not rows.tokens:
        return [], []
    apart = bool(measured.failed) or not measured.compared or (measured.unsure and not _nearly_the_same(expected, actual))
    if apart or bears_out(expected, actual, rows):
        return label_findings(claim, expected, actual, rows, measured.names), []
    labels = f"{expected.distribution()} and {actual.distribution()}"
    exact = not measured.numbers["n_changed"]
    what = "are bit-identical: a label is wrong" if exact else "are too close to distinguish these"
    return [], [Note("labels", f"the labels say {labels}, but the numbers {what}")]


def _nearly_the_same(expected: Trace, actual: Trace) -> bool:
    """Whether the labels differ by a temperature alone, and by so little that unsure sizes do not bear it out."""
    apart = expected.applied_temperature / actual.applied_temperature - 1
    one, other = ({} if trace.is_raw else trace.sampling.steps() for trace in (expected, actual))
    for steps in (one, other):
        steps.pop("temperature", None)
    return abs(apart) < _NEARLY and one == other


def _by_arithmetic(measured: Measurement) -> list[Finding]:
    """Causes that equal labels hide, from the arithmetic that each leaves behind; and the LM head's precision."""
    apart = measured.beyond_dtype or measured.unsure
    if not apart and (not measured.compared or measured.exact):
        return []
    expected, actual, rows, names = measured.expected, measured.actual, measured.rows, measured.names
    off = _far_off(measured) if apart or len(measured.differences.d) <= MOST else None
    findings = semantic_findings(expected, actual, rows, off, names, MOST if apart else GLANCE)
    if not measured.failed:  # a meaning that is proven fails at any size; what only may be one does not
        findings = [f for f in findings if proves(f, unsure=measured.unsure, beyond=measured.beyond_dtype)]
    unnamed = bool(measured.failed) and not any(finding.cause for finding in findings)
    if unnamed and (head := lm_head_finding(positions_of(expected, actual, rows, names=names))):
        findings.append(head)
    return findings


def _by_experts(measured: Measurement, findings: list[Finding]) -> list[Finding]:
    """`expert_routing` where it explains a failure that nothing else does."""
    if not (measured.failed or measured.unsure) or any(finding.cause for finding in findings):
        return []
    found = routing_finding(measured.expected, measured.actual, measured.routing, measured.names)
    return [found] if found is not None and (measured.failed or "proof" in found.values) else []


def _far_off(measured: Measurement) -> list[int]:
    """The sequences that are far off, where these are the smaller part; empty where they are not."""
    d, sequences, limit = measured.differences.d, measured.differences.sequences, measured.limits.sequence_rms
    names = np.unique(sequences)
    if not len(d):
        return []
    rms = m.sequence_rms(d, sequences, 2.5 * limit)
    off = names[rms > max(limit / 5, 3 * float(np.median(rms)))]
    return [int(name) for name in off] if 0 < len(off) < len(names) / 2 else []


def _unsure(measured: Measurement) -> list[Note]:
    """What the top-k of these traces cannot tell apart, where there is something to tell."""
    if not (measured.beyond_dtype or measured.unsure):
        return []
    text = unsure_of(measured.expected, measured.actual, measured.rows)
    return [Note("top_k", text)] if text else []


def _left_unexplained(measured: Measurement, findings: list[Finding]) -> list[Note]:
    """What the named causes leave between tokens of one position; what penalties move is no remainder."""
    causes = {finding.cause for finding in findings if finding.cause}
    if not causes or "penalties" in causes:
        return []
    rest = left_unexplained(measured.expected, measured.actual, measured.rows, 2 * measured.limits.fit_rms)
    return [Note("left_unexplained", rest)] if rest else []


def _nan_finding(measured: Measurement) -> Finding:
    """Logprobs that are no number, and in how many of the sequences."""
    count, of, sequences = int(measured.numbers["n_nan"]), measured.broken_sequences, measured.expected.num_sequences
    text = f"{counted(count, 'logprobs')} {is_or_are(count)} NaN or +inf, in {of} of {sequences} sequences"
    if of < sequences:
        text += ": wrong weights would cause them in all sequences"
    return Finding(layer="path", cause=None, evidence=text, candidates=("engine_build", "kv_cache_dtype"))
