"""What was found, and the verdict on it: `fail`, `unverified` or `pass`, with the one line that says why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..trace import Trace
from .alignment import Alignment
from .intervals import MIN_SEQUENCES
from .result import Difference, Finding, FreeRun, Gate, in_words
from .signatures.semantics import different_meaning

#: Below this share of the golden's tokens compared, a comparison proves too little to pass.
COVERAGE: Final = 0.95
#: Causes that make the two columns other quantities, not the same one off by something.
_OTHER_MEANING: Final = frozenset({"raw_vs_processed", "temperature", "truncation", "penalties", "shifted_positions"})
_NOT_SHOWN: Final = "Not shown to be a regression, and not shown to be none"


@dataclass(frozen=True)
class Found:
    """Everything that a verdict rests on. `sequences` counts the distinct ones, `exact` is every bit the same; `record` says
    how the actual side's record contradicts itself, "" where it does not.
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
    level: str
    setup: str
    has_floor: bool
    whose_limits: str
    sequences: int
    exact: bool
    sides: tuple[str, str]
    record: str = ""


def decide(found: Found) -> tuple[str, str]:
    """The verdict and its headline. What is wrong fails first; what is not shown comes next; the rest passes."""
    if not found.rows.tokens:
        return "unverified", "Nothing was compared: the two traces have no tokens in common"
    if reason := _failure(found):
        return "fail", reason
    if reason := _not_shown(found):
        return "unverified", reason
    count = int(found.numbers["n_tokens"])
    if found.exact:
        return "pass", f"{count} logprobs agree bit for bit"
    if found.has_floor:
        return "pass", f"{count} logprobs agree within tolerance"
    defaults = f"{found.whose_limits}'s defaults, " if found.whose_limits else ""
    return "pass", f"{count} logprobs agree within tolerance ({defaults}no noise floor)"


def _failure(found: Found) -> str:
    """Why it fails; empty where it does not."""
    numbers, tokens = found.numbers, found.rows.tokens
    if found.record and not different_meaning(found.expected, found.actual):
        return found.record
    if any(f.cause in _OTHER_MEANING for f in found.findings):
        if different_meaning(found.expected, found.actual):
            here, there = (in_words(side) for side in found.sides)
            claim = f"{found.expected.distribution()} {here}, {found.actual.distribution()} {there}"
            return f"The logprobs do not mean the same: {claim}"
        why = next(f.evidence for f in found.findings if f.cause in _OTHER_MEANING)
        return f"The logprobs do not mean what their label says: {why}"
    if numbers["n_nan"]:
        return f"{int(numbers['n_nan'])} of {tokens} logprobs are NaN or +inf"
    if found.failed:
        worst = max(found.failed, key=lambda g: g.value / g.limit if g.limit else float("inf"))
        return f"Logprobs are not close: {worst.name} {worst.value:.3g} {worst.unit} ({worst.limit:.3g} allowed)"
    if found.free_problem:
        return found.free_problem
    missing = found.rows.wanted - tokens
    if found.level == "bitwise" and missing and not found.actual.replay.startswith("window"):
        return f"{missing} of the golden's {found.rows.wanted} tokens did not come back, so they are not the same bit for bit"
    if numbers["n_tokens"] and found.level == "bitwise" and not found.exact:
        return f"{int(numbers['n_changed'])} of {tokens} logprobs are not the same bit for bit"
    if found.level == "bitwise" and found.free_run is not None and not found.free_run.same:
        return f"The free run did not come back token for token: {found.free_run}"
    if numbers["n_tokens"] and found.level == "noise" and found.difference.different:
        return f"The logprobs differ beyond shape noise: {found.difference.reason}"
    return ""


def _not_shown(found: Found) -> str:
    """Why a comparison in which nothing failed does not show that all is well; empty where it does."""
    numbers = found.numbers
    if not numbers["n_tokens"]:
        return "Nothing was compared: no token has a finite logprob on both sides"
    if numbers["n_excluded"] > numbers["n_tokens"]:
        return f"Most tokens, {int(numbers['n_excluded'])}, are excluded on both sides: {_NOT_SHOWN.lower()}"
    if numbers["coverage"] < COVERAGE and not found.actual.replay.startswith("window"):
        return (
            f"Only {numbers['coverage']:.1%} of the tokens could be compared ({COVERAGE:.0%} needed): "
            f"{found.rows.diverged_sequences} sequences diverge, {found.rows.missing_sequences} are missing, "
            f"{int(numbers['n_missing'])} tokens have no logprob in the golden"
        )
    if found.level == "noise" and not found.exact and found.difference.different is None:
        return f"Not shown to be a regression: {found.difference.reason}"
    if found.exact and (found.setup != "compatible" or found.level == "bitwise"):
        return ""  # there is no effect whose size could be unsure; another engine has to show it on enough sequences
    if found.sequences < MIN_SEQUENCES:
        return (
            f"{_NOT_SHOWN}: {found.sequences} distinct sequences speak for no other prompts, {MIN_SEQUENCES} are needed: "
            f"record {MIN_SEQUENCES - found.sequences} more"
        )
    unsure = [g for g in found.gates if not g.sure]
    if unsure:
        gate = max(unsure, key=lambda g: (g.bound or 0) / g.limit if g.limit else float("inf"))
        return (
            f"{_NOT_SHOWN}: {gate.name} is {gate.value:.3g} {gate.unit}, on other prompts it may be {gate.bound:.3g} "
            f"({gate.limit:.3g} allowed): record more sequences"
        )
    return ""
