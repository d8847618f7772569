"""What a person reads when a check fails: headline, how many of how many, the worst tokens, what differs, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..golden.setup import Setup
from ..grammar import counted
from ..trace import Trace
from ..trace.labels import logprobs_in_words
from ..visible_text import visible_line
from .gate import OUTLIERS
from .objectives import objective_of
from .result import Comparison, MismatchError
from .sides import SIDES, names_of
from .token_diff import TokenDiff
from .vocabulary import Level, Verdict

_LABEL: Final = 13
_SHOWN_DIFFERENCES: Final = 12
_SHOWN_TEXT: Final = 48
_SETUPS: Final[Mapping[Setup, str]] = {
    "same": "same: the golden's engine, version, settings, hardware and libraries; bit-identical logprobs are expected",
    "compatible": "compatible: same model and prompts, another engine or setting (see differs); equal bits are not expected",
    "unknown": "unknown: at least one side has no fingerprint, so the setups cannot be compared",
}
_LEVELS: Final[Mapping[Level, str]] = {
    "bitwise": "bitwise: fails if any bit differs",
    "noise": "noise: fails if a difference is larger than the noise floor",
    "rl": "rl: fails if a difference matters for an RL update",
}


#: What stands before the command that accepts a change.
_INTENDED: Final = "(only if the change is intended) "
#: What stands beside a number that does not pass.
_MARKS: Final[Mapping[Verdict, str]] = {"pass": "", "fail": "  <-- exceeds", "unverified": "  <-- inconclusive"}


def require(comparison: Comparison, against: str) -> Comparison:
    """The comparison, where it passes; `against` says what it was held against. Raises MismatchError for any other verdict."""
    __tracebackhide__ = True
    if not comparison.passed:
        message = failure_message(comparison, golden=against, about=[], differences=[], accept="")
        raise MismatchError(message, comparison)
    return comparison


def failure_message(
    comparison: Comparison,
    *,
    golden: str,
    about: Sequence[str],
    differences: Sequence[tuple[str, Any, Any]],
    accept: str,
    beside: str = "",
) -> str:
    """The whole message, complete without -vv.

    `expected` names the file, `about` describes it, `differences` are those of the fingerprints, `accept` is the command
    that makes the new numbers the golden, `beside` the one that makes them a golden beside it, for this machine; empty where
    there is none.
    """
    sides = comparison.sides
    blocks = [
        _fields(
            (sides[0], [golden, *about]),
            (sides[1], [side(comparison.actual)]),
            ("setup", [_SETUPS[comparison.setup]] if sides == SIDES else []),
            ("level", [_LEVELS[comparison.level] + (f"; {_objective(comparison)}" if comparison.level == "rl" else "")]),
        ),
        "\n".join(_numbers(comparison)),
        "\n".join(_worst_tokens(comparison)),
        _fields(
            ("findings", [str(f) for f in comparison.findings]),
            ("different?", [] if comparison.difference.decided else [str(comparison.difference)]),
            ("generation", [] if comparison.free_run is None else [str(comparison.free_run)]),
            ("logged", [] if comparison.logged is None else list(comparison.logged.lines)),
            ("differs", _difference_lines(differences, sides) if differences or comparison.setup == "same" else []),
            ("note", [note for note in comparison.notes if note.key != "free_generation"]),
        ),
        _fields(("to accept", [f"{_INTENDED}{accept}"] if accept else []), ("or beside it", [beside] if beside else [])),
    ]
    return "\n\n".join([f"{comparison.verdict}: {comparison.headline}", *filter(None, blocks)])


def side(trace: Trace) -> str:
    """Who said the numbers of a trace, which ones, and by which replay."""
    logprobs = logprobs_in_words(trace.logprobs_mode, trace.path, trace.replay, trace.forcing)
    return visible_line(f"{trace.engine} {trace.engine_version}".rstrip() + f", {trace.dtype}, {logprobs}")


def _objective(comparison: Comparison) -> str:
    """The objective, with what it computes."""
    objective = objective_of(comparison.objective)
    return f"objective {objective.name}: {objective.title}"


def _fields(*rows: tuple[str, list[str]]) -> str:
    lines = []
    for label, values in rows:
        for number, value in enumerate(values):
            lines.append(f"{label if number == 0 else '':<{_LABEL}}{value}")
    return "\n".join(lines)


def _not_subtracted(comparison: Comparison) -> bool:
    return not comparison.expected.means_as(comparison.actual)


def _numbers(comparison: Comparison) -> list[str]:
    numbers, sides = comparison.metrics, comparison.sides
    total = int(numbers["n_tokens"])
    if _not_subtracted(comparison):
        return [
            f"{int(numbers['n_changed']):,} of {total:,} logprobs differ. The two sides have different meanings, so no"
            " metric is computed from their differences."
        ]
    if not total:
        return []
    share = f"{numbers['coverage']:.1%} of the {sides[0]}"
    changed = int(numbers["n_changed"])
    lines = [f"compared     {counted(total, 'tokens')} of {counted(int(numbers['n_sequences']), 'sequences')} ({share})"]
    lines[0] += f", {changed:,} of them differ{'s' * (changed == 1)}"
    if comparison.worst:
        lines.append(f"greatest     |d| {numbers['max_abs_diff']:.3g} nats {_place(comparison.worst[0])}")
    lines += _table(comparison)
    lines.append(_shown("shown, not judged (d, KL and entropy in nats): ", numbers))
    if comparison.policy_metrics:
        lines.append(_shown("without truncation (d and KL in nats): ", comparison.policy_metrics))
    return lines


def _table(comparison: Comparison) -> list[str]:
    """What decides, a line each: from the golden to this run, and, where there is a reference, how far both are from it."""
    gates, sides = comparison.gates, comparison.sides
    lines = [f"  {f'{sides[0]} to {sides[1]}':<44}{'measured':>10}{'from':>10}{'to':>10}{'limit':>10}"]
    for gate in gates:
        name, unit = (f"{gate.unit} {gate.name}", "") if gate.key in OUTLIERS else (gate.name, f" {gate.unit}")
        low, high = ("", "") if gate.low == gate.high else (f"{max(gate.low, 0):.3g}", f"{gate.high:.3g}")
        mark = "" if gate.errors is not None else _MARKS[gate.outcome]
        lines.append(f"  {name:<44}{gate.value:>10.3g}{low:>10}{high:>10}{gate.limit:>10.3g}{unit}{mark}".rstrip())
    with_errors = [gate for gate in gates if gate.errors is not None]
    if with_errors:
        lines.append(f"  {'distance to the reference':<44}{sides[0]:>10}{sides[1]:>10}{'to':>10}{'limit':>10}")
    for gate in with_errors:
        errors = gate.errors
        assert errors is not None
        row = "".join(f"{x:>10.3g}" for x in (errors.expected, errors.actual, errors.high, errors.limit))
        lines.append(f"  {gate.name:<44}{row} {gate.unit}{_MARKS[gate.outcome]}")
    return lines


def _place(token: TokenDiff) -> str:
    where = (
        f"sequence {token.sequence} (prompt {token.group}, sample {token.sample}), position {token.position}: {token.text!r}"
    )
    return f"at {where}" if math.isfinite(token.diff) else f"beside tokens that one side excludes, first at {where}"


def _shown(label: str, numbers: Any) -> str:
    names = (
        ("mean d", "mean_diff"), ("mean |d|", "mean_abs_diff"), ("p50 |d|", "p50_abs_diff"), ("p99 |d|", "p99_abs_diff"),
        ("KL k1", "k1"), ("k3", "k3"), ("mean ratio", "mean_ratio"), ("max ratio", "max_ratio"), ("ESS", "ess"),
        ("top-1 agreement", "top1_agreement"),
    )  # fmt: skip
    parts = [f"{text} {numbers[key]:.4g}" for text, key in names if key in numbers and math.isfinite(numbers[key])]
    if "entropy_expected" in numbers:
        parts.append(
            f"entropy {numbers['entropy_expected']:.4g} -> {numbers['entropy_actual']:.4g} nats"
            f" (top-k covers {numbers['entropy_mass_expected']:.1%})"
        )
    return label + ", ".join(parts)


def _worst_tokens(comparison: Comparison) -> list[str]:
    if not comparison.worst:
        return []
    subtracted, sides = not _not_subtracted(comparison), comparison.sides
    head = f"{'sequence':>8} {'position':>8}  {f'{sides[0]} (rank)':>16} {f'{sides[1]} (rank)':>16}"
    lines = [
        "The tokens where the two sides are furthest apart come first; positions count from 0 in the completion:",
        head + (f" {'d':>9}" if subtracted else "") + "  token and the text before it",
    ]
    for token in comparison.worst:
        expected = f"{token.expected:.4f} ({token.expected_rank or '?'})"
        actual = "excluded" if math.isinf(token.actual) else f"{token.actual:.4f} ({token.actual_rank or '?'})"
        line = f"{token.sequence:>8} {token.position:>8}  {expected:>16} {actual:>16}"
        if subtracted:
            line += f" {token.diff:>+9.3g}"
        lines.append(f"{line}  {token.text!r} after {_before(comparison.expected, token)!r}")
    return lines


def _before(trace: Trace, token: TokenDiff) -> str:
    """The text before a token, its end only; of the prompt where the completion has just begun."""
    ids = trace.prompt(token.sequence) + trace.completion(token.sequence)[: token.position]
    text = "".join(trace.text(i) for i in ids[-_SHOWN_TEXT:])
    return text if len(text) <= _SHOWN_TEXT else "..." + text[-_SHOWN_TEXT:]


def _difference_lines(differences: Sequence[tuple[str, Any, Any]], sides: tuple[str, str]) -> list[str]:
    names = names_of(sides)
    lines = [
        visible_line(f"{name}: {expected!r} in {names.expected}, {actual!r} in {names.actual}")
        for name, expected, actual in differences[:_SHOWN_DIFFERENCES]
    ]
    if len(differences) > _SHOWN_DIFFERENCES:
        lines.append(f"and {len(differences) - _SHOWN_DIFFERENCES} more")
    return lines or ["nothing: the fingerprints have the same engine, version, configuration, hardware and libraries"]
