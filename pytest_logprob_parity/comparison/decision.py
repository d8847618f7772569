"""What was found, and the verdict on it: `fail`, `unverified` or `pass`, with the one line that says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..grammar import counted
from .difference import Difference
from .evidence import Evidence
from .findings import Finding
from .gate_sentences import BETWEEN, NOT_SHOWN, failed_line, unverified_line
from .headline import Headline
from .intervals import MIN_SEQUENCES
from .measurement import Measurement
from .signatures.semantics import different_meaning
from .vocabulary import Level, Verdict

#: Below this share of the golden's tokens compared, a comparison proves too little to pass.
COVERAGE: Final = 0.95
#: Causes that make the two columns other quantities, not the same one off by something.
_OTHER_MEANING: Final = frozenset({"raw_vs_processed", "temperature", "truncation", "penalties", "shifted_positions"})
#: A scale of the logits is no noise where it is off by so much, and by so many of its standard errors: a temperature, a head or
#: a norm, whichever of them.
_SCALED: Final = 0.01
_ERRORS: Final = 10


def proves(finding: Finding, *, unsure: bool, beyond: bool) -> bool:
    """Whether a finding shows what no noise does, and so fails although no size did: other quantities, a scale of the logits.

    What has other reasons too counts only where the gates are `unsure` of the sizes, or these are `beyond` float32's noise: a
    scale, and one constant a position (a normaliser summed otherwise, a padded vocabulary). Tokens that are excluded prove
    nothing: a golden excludes none of its own, so noise at the edge of the nucleus looks like this; flips have their own limit.
    """
    if "excluded" in finding.values:
        return False
    if "beyond_top_k" in finding.values:
        return unsure
    return finding.cause in _OTHER_MEANING or ((unsure or beyond) and _scaled(finding))


def _scaled(finding: Finding) -> bool:
    slope, error = (float(finding.values.get(name, 1.0)) for name in ("slope", "error"))
    return finding.cause is None and abs(slope - 1) > max(_SCALED, _ERRORS * error)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Found:
    """Everything that a verdict rests on.

    `record` says how the actual side's record contradicts itself, "" where it does not; `free_problem` what is wrong with free
    generation, None where nothing is.
    """

    measured: Measurement
    findings: Sequence[Finding]
    record: str
    free_problem: Headline | None
    difference: Difference
    level: Level
    evidence: Evidence

    @property
    def labels_differ(self) -> bool:
        """Whether the labels of the two sides say that their columns mean different things."""
        return different_meaning(self.measured.expected, self.measured.actual) is not None

    @property
    def reproduces(self) -> bool:
        """Whether recording got every bit back, from requests that ran in equal batches."""
        floor = self.evidence.floor
        return floor is not None and floor.reproduces and self.evidence.same_schedule


def decide(found: Found) -> tuple[Verdict, Headline]:
    """The verdict and its headline. What is wrong fails first; what is not shown comes next; the rest passes."""
    measured = found.measured
    if not measured.rows.tokens:
        return "unverified", Headline("nothing_compared", "Nothing was compared: the two traces have no tokens in common")
    if reason := _failure(found):
        return "fail", reason
    if reason := _not_shown(found):
        return "unverified", reason
    count = int(measured.numbers["n_tokens"])
    things = "1 logprob agrees" if count == 1 else f"{count} logprobs agree"
    if measured.exact:
        return "pass", Headline("bit_identical", f"{things} bit for bit")
    if found.evidence.floor is not None:
        return "pass", Headline("within_tolerance", f"{things} within tolerance")
    return "pass", Headline("within_tolerance", f"{things} within tolerance (no noise floor)")


def _failure(found: Found) -> Headline | None:
    """Why it fails; None where it does not."""
    reasons = (_other_meaning, _not_close, _other_experts, _generates_otherwise, _not_bit_identical, _beyond_noise)
    return next((headline for reason in reasons if (headline := reason(found))), None)


def _other_meaning(found: Found) -> Headline | None:
    """The record contradicts itself, or the two columns are other quantities."""
    expected, actual = found.measured.expected, found.measured.actual
    if found.record and not found.labels_differ:
        return Headline("contradiction", found.record)
    proven = [f for f in found.findings if f.cause in _OTHER_MEANING]
    if proven and found.labels_differ:
        names = found.measured.names
        claim = f"{expected.distribution()} in {names.expected}, {actual.distribution()} in {names.actual}"
        return Headline("other_meanings", f"The logprobs of the two sides have different meanings: {claim}")
    if not proven:
        return None
    return Headline("wrong_label", f"The logprobs do not mean what their label says: {proven[0].evidence}")


def _not_close(found: Found) -> Headline | None:
    """Logprobs are no numbers, a gate fails, or the logits have another scale."""
    measured = found.measured
    if measured.numbers["n_nan"]:
        count = int(measured.numbers["n_nan"])
        return Headline("nan", f"{count} of {measured.rows.tokens} logprobs are NaN or +inf")
    if measured.failed:
        worst = max(measured.failed, key=lambda gate: gate.excess)
        return Headline("not_close", f"Logprobs are not close: {failed_line(worst, measured.names)}")
    scaled = [f for f in found.findings if _scaled(f)]
    return Headline("another_scale", f"Logprobs are not close: {scaled[0].evidence}") if scaled else None


def _other_experts(found: Found) -> Headline | None:
    """One side uses another number of experts, or experts that its own routers do not choose."""
    proven = [f for f in found.findings if f.cause == "expert_routing" and "proof" in f.values]
    return Headline("other_experts", f"Logprobs are of other experts: {proven[0].evidence}") if proven else None


def _generates_otherwise(found: Found) -> Headline | None:
    """What is wrong with free generation."""
    return found.free_problem


def _not_bit_identical(found: Found) -> Headline | None:
    """Bits differ where none may: on the engine that recorded them, or at level bitwise."""
    measured, numbers = found.measured, found.measured.numbers
    tokens, wanted, changed = measured.rows.tokens, measured.rows.wanted, int(numbers["n_changed"])
    if found.evidence.setup == "same" and found.reproduces and changed:
        text = "logprobs are not bit-identical, although they were when recorded: the engine is the same"
        return Headline("bits_not_reproduced", f"{changed} of {tokens} {text}")
    if found.level != "bitwise":
        return None
    if tokens < wanted and measured.actual.replay != "window":
        whose = f"{measured.names.expected}'s {wanted} tokens"
        text = f"are missing in {measured.names.actual}, so the two sides are not bit-identical"
        return Headline("tokens_missing", f"{wanted - tokens} of {whose} {text}")
    if numbers["n_tokens"] and not measured.exact:
        return Headline("not_bit_identical", f"{changed} of {tokens} logprobs are not bit-identical")
    free_run = found.evidence.free_run
    if free_run is not None and not free_run.same:
        return Headline("other_tokens", f"Free generation did not give the golden's tokens: {free_run}")
    return None


def _beyond_noise(found: Found) -> Headline | None:
    """At level noise: the two sides are different."""
    differs = found.measured.numbers["n_tokens"] and found.level == "noise" and found.difference.different
    return Headline("beyond_noise", f"The logprobs differ: {found.difference.reason}") if differs else None


def _not_shown(found: Found) -> Headline | None:
    """Why a comparison in which nothing failed does not show that all is well; None where it does."""
    measured = found.measured
    if reason := _too_few_tokens(measured):
        return reason
    if found.level == "noise" and not measured.exact and found.difference.different is None:
        return Headline("difference_unknown", f"{NOT_SHOWN}: {found.difference.reason}")
    if measured.exact and (found.evidence.setup != "compatible" or found.level == "bitwise"):
        return None  # there is no effect whose size could be unsure; another engine has to show it on enough sequences
    if (count := measured.distinct_sequences) < MIN_SEQUENCES:
        few = "1 distinct sequence is" if count == 1 else f"{count} distinct sequences are"
        text = f"{few} too few to generalise to other prompts, {MIN_SEQUENCES} are needed: record more prompts"
        return Headline("few_sequences", f"{NOT_SHOWN}: {text}")
    return _unsure_gate(measured)


def _too_few_tokens(measured: Measurement) -> Headline | None:
    """Why the tokens that were compared are too few to show anything; None where they are not."""
    numbers = measured.numbers
    if not numbers["n_tokens"]:
        return Headline("nothing_compared", "Nothing was compared: no token has a finite logprob on both sides")
    if numbers["n_excluded"] > numbers["n_tokens"]:
        text = f"Truncation excludes most tokens ({int(numbers['n_excluded'])}) on both sides: {NOT_SHOWN.lower()}"
        return Headline("mostly_excluded", text)
    if numbers["coverage"] >= COVERAGE or measured.actual.replay == "window":
        return None
    return Headline(
        "low_coverage",
        f"Only {numbers['coverage']:.1%} of the tokens could be compared ({COVERAGE:.0%} needed): "
        f"{counted(measured.rows.diverged_sequences, 'sequences')} diverge, {measured.rows.missing_sequences} are missing, "
        f"{int(numbers['n_missing'])} tokens have no logprob in {measured.names.expected}",
    )


def _unsure_gate(measured: Measurement) -> Headline | None:
    """The gate that is furthest from passing, of those that neither pass nor fail; None where all pass."""
    unsure = [g for g in measured.gates if not g.sure]
    if not unsure:
        return None
    worst = max(unsure, key=lambda g: (g.hidden, g.excess))
    more = "" if any(g.hidden or g.beyond for g in unsure) else f": {BETWEEN if worst.between else 'record more prompts'}"
    return Headline("unsure", f"{NOT_SHOWN}: {unverified_line(worst, measured.names)}{more}")
