"""What was found, and the verdict on it: `fail`, `unverified` or `pass`, with the one line that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..golden.setup import Setup
from ..grammar import counted
from ..trace import Trace
from .alignment import Alignment
from .difference import Difference
from .findings import Finding
from .free_generation.result import FreeRun
from .gate import Gate
from .intervals import MIN_SEQUENCES
from .sentences import BETWEEN, NOT_SHOWN, failed_line, unverified_line
from .sides import Names, in_words, names_of
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
    nothing: a golden excludes none of its own, so noise at the edge of kept sets looks so, and flips have a budget.
    """
    if "excluded" in finding.values:
        return False
    if "beyond_top_k" in finding.values:
        return unsure
    return finding.cause in _OTHER_MEANING or ((unsure or beyond) and _scaled(finding))


def _scaled(finding: Finding) -> bool:
    slope, error = (float(finding.values.get(name, 1.0)) for name in ("slope", "error"))
    return finding.cause is None and abs(slope - 1) > max(_SCALED, _ERRORS * error)


@dataclass(frozen=True)
class Found:
    """Everything that a verdict rests on.

    `sequences` counts the distinct ones, `exact` is every bit the same, `reproduces` that recording got every bit back.
    `record` says how the actual side's record contradicts itself, "" where it does not.
    """

    expected: Trace
    actual: Trace
    rows: Alignment
    numbers: Mapping[str, float]
    gates: Sequence[Gate]
    failed: Sequence[Gate]
    findings: Sequence[Finding]
    free_problem: str
    free_run: FreeRun | None
    difference: Difference
    level: Level
    setup: Setup
    has_floor: bool
    reproduces: bool
    sequences: int
    exact: bool
    sides: tuple[str, str]
    record: str = ""

    @property
    def names(self) -> Names:
        """What sentences call the two sides."""
        return names_of(self.sides)


def decide(found: Found) -> tuple[Verdict, str]:
    """The verdict and its headline. What is wrong fails first; what is not shown comes next; the rest passes."""
    if not found.rows.tokens:
        return "unverified", "Nothing was compared: the two traces have no tokens in common"
    if reason := _failure(found):
        return "fail", reason
    if reason := _not_shown(found):
        return "unverified", reason
    count = int(found.numbers["n_tokens"])
    things = "1 logprob agrees" if count == 1 else f"{count} logprobs agree"
    if found.exact:
        return "pass", f"{things} bit for bit"
    if found.has_floor:
        return "pass", f"{things} within tolerance"
    return "pass", f"{things} within tolerance (no noise floor)"


def _failure(found: Found) -> str:
    """Why it fails; empty where it does not."""
    numbers, tokens = found.numbers, found.rows.tokens
    if found.record and not different_meaning(found.expected, found.actual):
        return found.record
    if proven := [f for f in found.findings if f.cause in _OTHER_MEANING]:
        if different_meaning(found.expected, found.actual):
            here, there = (in_words(side) for side in found.sides)
            claim = f"{found.expected.distribution()} {here}, {found.actual.distribution()} {there}"
            return f"The logprobs do not mean the same: {claim}"
        return f"The logprobs do not mean what their label says: {proven[0].evidence}"
    if numbers["n_nan"]:
        return f"{int(numbers['n_nan'])} of {tokens} logprobs are NaN or +inf"
    if found.failed:
        return f"Logprobs are not close: {failed_line(max(found.failed, key=lambda g: g.excess), found.names)}"
    if scaled := [f for f in found.findings if _scaled(f)]:
        return f"Logprobs are not close: {scaled[0].evidence}"
    if found.free_problem:
        return found.free_problem
    if found.setup == "same" and found.reproduces and numbers["n_changed"]:
        count = int(numbers["n_changed"])
        return f"{count} of {tokens} logprobs are not bit-identical, although they were when recorded: the engine is the same"
    missing = found.rows.wanted - tokens
    if found.level == "bitwise" and missing and found.actual.replay != "window":
        whose = f"{found.names.expected}'s {found.rows.wanted} tokens"
        return f"{missing} of {whose} did not come back, so they are not the same bit for bit"
    if numbers["n_tokens"] and found.level == "bitwise" and not found.exact:
        return f"{int(numbers['n_changed'])} of {tokens} logprobs are not the same bit for bit"
    if found.level == "bitwise" and found.free_run is not None and not found.free_run.same:
        return f"What was written freely did not come back token for token: {found.free_run}"
    if numbers["n_tokens"] and found.level == "noise" and found.difference.different:
        return f"The logprobs differ: {found.difference.reason}"
    return ""


def _not_shown(found: Found) -> str:
    """Why a comparison in which nothing failed does not show that all is well; empty where it does."""
    numbers = found.numbers
    if not numbers["n_tokens"]:
        return "Nothing was compared: no token has a finite logprob on both sides"
    if numbers["n_excluded"] > numbers["n_tokens"]:
        return f"Most tokens, {int(numbers['n_excluded'])}, are excluded on both sides: {NOT_SHOWN.lower()}"
    if numbers["coverage"] < COVERAGE and found.actual.replay != "window":
        return (
            f"Only {numbers['coverage']:.1%} of the tokens could be compared ({COVERAGE:.0%} needed): "
            f"{counted(found.rows.diverged_sequences, 'sequences')} diverge, {found.rows.missing_sequences} are missing, "
            f"{int(numbers['n_missing'])} tokens have no logprob in {found.names.expected}"
        )
    if found.level == "noise" and not found.exact and found.difference.different is None:
        return f"Not shown to be a regression: {found.difference.reason}"
    if found.exact and (found.setup != "compatible" or found.level == "bitwise"):
        return ""  # there is no effect whose size could be unsure; another engine has to show it on enough sequences
    if found.sequences < MIN_SEQUENCES:
        few = "1 distinct sequence is" if found.sequences == 1 else f"{found.sequences} distinct sequences are"
        return f"{NOT_SHOWN}: {few} too few to generalise to other prompts, {MIN_SEQUENCES} are needed: record more prompts"
    unsure = [g for g in found.gates if not g.sure]
    if unsure:
        worst = max(unsure, key=lambda g: (g.hidden, g.excess))
        more = "" if any(g.hidden or g.beyond for g in unsure) else f": {BETWEEN if worst.between else 'record more prompts'}"
        return f"{NOT_SHOWN}: {unverified_line(worst, found.names)}{more}"
    return ""
