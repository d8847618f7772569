"""From numbers to a verdict: what differs, whether it is allowed, and which layer it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from ..errors import UsageError
from ..trace import Trace
from . import metrics as m
from .alignment import Alignment, align
from .free_run import FreeRun
from .result import Comparison, Finding, Gate, TokenDiff
from .tolerance import Tolerance, default_tolerance, make_tolerance

#: Below this share of the golden's tokens compared, a comparison proves too little to pass.
COVERAGE: Final = 0.95
_WORST: Final = 8


def compare(
    *,
    expected: Trace,
    actual: Trace,
    tolerance: Tolerance | Mapping[str, Any] | None = None,
    policy_logprobs: Any = None,
    free_run: FreeRun | None = None,
    same_setup: bool = False,
) -> Comparison:
    """Compare two traces over their identical tokens; d = actual - expected.

    `tolerance` changes the defaults for the golden's dtype and the two paths. `policy_logprobs` [N] are the actual
    side's logprobs without truncation, beside `expected.untruncated_logprobs`. `same_setup` says that engine, version,
    configuration and hardware are the golden's: where logprobs agree bit for bit the free run must come back as it was.

    Where the two sides mean different things, and the numbers bear that out, nothing is subtracted: the metrics of
    differences are NaN and a finding says so.

    Raises UsageError for a tolerance that does not exist.
    """
    if not isinstance(expected, Trace) or not isinstance(actual, Trace):
        raise UsageError(f"compare() takes two Traces, not {type(expected).__name__} and {type(actual).__name__}")
    limits = make_tolerance(default_tolerance(expected.dtype, (expected.path, actual.path)), tolerance)
    rows = align(expected, actual)
    e, a = expected.logprobs[rows.expected], actual.logprobs[rows.actual]
    finite = np.isfinite(e) & np.isfinite(a)
    flipped = np.isneginf(e) != np.isneginf(a)
    flipped &= ~(np.isnan(e) | np.isnan(a))
    broken = (np.isnan(a) & ~np.isnan(e)) | np.isposinf(a) | np.isposinf(e)
    every = bool(finite.all())
    d = np.subtract(a, e, dtype=np.float64) if every else (a[finite].astype(np.float64) - e[finite])
    numbers = {
        "n_tokens": float(len(d)),
        "n_sequences": float(expected.num_sequences - rows.missing_sequences),
        "coverage": len(d) / rows.wanted if rows.wanted else 0.0,
        "n_nan": float(np.count_nonzero(broken)),
        "n_missing": float(np.count_nonzero(np.isnan(e))),
        "n_changed": float(np.count_nonzero(e != a)),
        "support_flips": float(np.count_nonzero(flipped)),
        "diverged_sequences": float(rows.diverged_sequences),
        "missing_sequences": float(rows.missing_sequences),
        **m.difference_metrics(d),
        **m.top_k_metrics(expected, actual, rows),
    }
    gates = _gates(d, rows, expected, every, finite, numbers, limits, truncates=actual.sampling.truncates)
    notes: list[str] = []
    findings: list[Finding] = []
    claim = _different_meaning(expected, actual)
    failed = [g for g in gates if not g.ok]
    if claim is not None and (failed or not len(d)):
        findings.append(_semantic_finding(claim, expected, actual, rows))
        numbers |= dict.fromkeys(m.DIFFERENCE_METRICS, float("nan"))  # differences of two meanings mean nothing
        gates = ()
    elif claim is not None:
        notes.append(
            f"the labels say {expected.distribution()} against {actual.distribution()}, the numbers agree: a label is wrong"
        )
    elif failed and (hidden := _hidden_temperature(expected, actual, rows)) is not None:
        findings.append(hidden)
    if numbers["n_nan"]:
        findings.insert(
            0,
            Finding("path", None, f"{int(numbers['n_nan'])} logprobs are NaN or +inf", ("engine_build", "kv_cache_dtype")),
        )
    exact = numbers["max_abs_diff"] == 0 and not numbers["support_flips"]
    free_problem, free_finding = _judge_free_run(free_run, expected, failed, same_setup=same_setup and exact)
    if free_finding is not None:
        findings.append(free_finding)
    elif free_run is not None and not free_run.same:
        notes.append(f"free run: {free_run}")
    verdict, headline = _verdict(expected, actual, numbers, failed, findings, rows, free_problem)
    if verdict == "pass" and numbers["max_abs_diff"] > 0:
        findings.append(Finding("noise", "numerical_noise", f"RMS {numbers['rms_diff']:.2g} nats, within tolerance"))
    return Comparison(
        verdict=verdict,
        headline=headline,
        metrics=numbers,
        findings=tuple(findings),
        gates=gates,
        worst=_worst(expected, actual, rows, e, a),
        expected=expected,
        actual=actual,
        policy_metrics=_policy_metrics(expected, policy_logprobs, rows),
        free_run=free_run,
        notes=tuple(notes),
    )


def _gates(
    d: m.Doubles, rows: Alignment, expected: Trace, every: bool, finite: Any, numbers: Mapping[str, float],
    limits: Tolerance, *, truncates: bool,
) -> tuple[Gate, ...]:  # fmt: skip
    allowed_flips = np.ceil(limits.support_flips * rows.tokens) if truncates or expected.sampling.truncates else 0
    gates = [
        Gate("NaN or +inf", numbers["n_nan"], 0, "tokens"),
        Gate("support flips", numbers["support_flips"], float(allowed_flips), "tokens"),
    ]
    if not len(d):
        return tuple(gates)
    if numbers["max_abs_diff"] == 0:
        rms, outliers, bad_sequences = 0.0, 0, 0
    else:
        sequences = m.sequence_numbers(expected, rows.expected)
        by_sequence = m.sequence_rms(d, sequences if every else sequences[finite])
        rms = m.winsorized_rms(d, limits.winsorize)
        outliers = int(np.count_nonzero(np.abs(d) > limits.outlier))
        bad_sequences = int(np.count_nonzero(by_sequence > limits.sequence_rms))
    return (
        *gates,
        Gate("|mean difference|", abs(numbers["mean_diff"]), limits.mean_diff, "nats"),
        Gate("RMS difference (winsorised)", rms, limits.rms_diff, "nats"),
        Gate("policy ratio outside 1 +- 0.2", numbers["share_outside_clip"], limits.clip_share, "of tokens"),
        Gate(f"tokens off by more than {limits.outlier:g}", outliers, limits.outlier_budget(len(d)), "tokens"),
        Gate(
            f"sequences of RMS above {limits.sequence_rms:g}", bad_sequences,
            limits.sequence_budget(expected.num_sequences), "sequences",
        ),
    )  # fmt: skip


def _verdict(
    expected: Trace, actual: Trace, numbers: Mapping[str, float], failed: list[Gate], findings: list[Finding],
    rows: Alignment, free_problem: str,
) -> tuple[str, str]:  # fmt: skip
    """The verdict and the one line that says why."""
    if not rows.tokens:
        return "unverified", "Nothing was compared: the two traces have no tokens in common"
    if any(f.layer == "semantic" for f in findings):
        return "fail", (
            f"The logprobs do not mean the same: {expected.distribution()} in the golden, {actual.distribution()} now"
            if _different_meaning(expected, actual)
            else f"The logprobs do not mean what their label says: {findings[0].evidence}"
        )
    if numbers["n_nan"]:
        return "fail", f"{int(numbers['n_nan'])} of {rows.tokens} logprobs are NaN or +inf"
    if not numbers["n_tokens"] and not failed:
        return "unverified", "Nothing was compared: no token has a logprob on both sides"
    if failed:
        worst = max(failed, key=lambda g: g.value / g.limit if g.limit else float("inf"))
        return (
            "fail",
            f"Logprobs are not close: {worst.name} {worst.value:.3g} {worst.unit} ({worst.limit:.3g} allowed)",
        )
    if free_problem:
        return "fail", free_problem
    if numbers["coverage"] < COVERAGE and not actual.replay.startswith("window"):
        return "unverified", (
            f"Only {numbers['coverage']:.1%} of the tokens could be compared ({COVERAGE:.0%} needed): "
            f"{rows.diverged_sequences} sequences diverge, {rows.missing_sequences} are missing, "
            f"{int(numbers['n_missing'])} tokens have no logprob in the golden"
        )
    exact = "bit for bit" if numbers["max_abs_diff"] == 0 and not numbers["support_flips"] else "within tolerance"
    return "pass", f"{int(numbers['n_tokens'])} logprobs agree {exact}"


def _different_meaning(expected: Trace, actual: Trace) -> str | None:
    """The cause's name where the labels of the two sides say that their numbers mean different things."""
    if expected.distribution() == actual.distribution():
        return None
    if expected.logprobs_mode != actual.logprobs_mode:
        return "raw_vs_processed"
    one, other = expected.sampling, actual.sampling
    if one.temperature != other.temperature:
        return "temperature"
    return "truncation" if (one.top_p, one.top_k, one.min_p) != (other.top_p, other.top_k, other.min_p) else "penalties"


def _semantic_finding(cause: str, expected: Trace, actual: Trace, rows: Alignment) -> Finding:
    evidence = f"{expected.distribution()} against {actual.distribution()}"
    ratio, spread, positions = m.top_gap_ratio(expected, actual, rows)
    if positions and np.isfinite(ratio):
        evidence += (
            f"; the gap between the two likeliest tokens is {ratio:.3f} +- {spread:.3f} times as wide in the golden"
            f" ({positions} positions)"
        )
    return Finding("semantic", cause, evidence)


def _hidden_temperature(expected: Trace, actual: Trace, rows: Alignment) -> Finding | None:
    """Equal labels whose numbers are apart by the recorded temperature: one side is raw, whatever it is called."""
    temperature = expected.sampling.temperature
    if expected.sampling.greedy or abs(temperature - 1) < 0.02:
        return None
    ratio, spread, positions = m.top_gap_ratio(expected, actual, rows)
    for scale, text in (
        (1 / temperature, "applied to the golden and not to this run"),
        (temperature, "applied to this run and not to the golden"),
    ):
        if abs(ratio / scale - 1) < 0.02 and spread < 0.05 * scale:
            return Finding(
                "semantic", "raw_vs_processed", f"temperature {temperature:g} was {text} ({positions} positions agree)"
            )
    return None


def _judge_free_run(
    free_run: FreeRun | None, expected: Trace, failed: list[Gate], *, same_setup: bool
) -> tuple[str, Finding | None]:
    """The headline where the free run decides, and its finding. Where logprobs differ, it is their consequence."""
    if free_run is None or free_run.same or failed:
        return "", None
    if same_setup:
        finding = Finding("sampling", "seed_stream", f"logprobs of the golden's tokens agree bit for bit, and {free_run}")
        return f"The engine writes other tokens although its logprobs agree bit for bit: {free_run}", finding
    if free_run.stops_changed:
        finding = Finding("sampling", None, f"tokens agree, and {free_run}", ("engine_build", "seed_stream"))
        return f"The engine stops elsewhere although it writes the same tokens: {free_run}", finding
    far = [d for d in free_run.divergences if np.isfinite(d.gap) and not d.near_tie]
    if expected.sampling.greedy and far:
        finding = Finding("sampling", "seed_stream", f"greedy decoding left the likeliest token: {far[0]}")
        return f"Greedy decoding no longer takes the likeliest token: {far[0]}", finding
    return "", None


def _policy_metrics(expected: Trace, policy_logprobs: Any, rows: Alignment) -> dict[str, float]:
    if policy_logprobs is None or expected.untruncated_logprobs is None:
        return {}
    e, a = expected.untruncated_logprobs[rows.expected], np.asarray(policy_logprobs)[rows.actual]
    finite = np.isfinite(e) & np.isfinite(a)
    return m.difference_metrics(a[finite].astype(np.float64) - e[finite])


def _worst(expected: Trace, actual: Trace, rows: Alignment, e: Any, a: Any) -> tuple[TokenDiff, ...]:
    """The tokens that are furthest off, NaN and excluded ones first; none where nothing differs."""
    if not rows.tokens:
        return ()
    with np.errstate(invalid="ignore"):
        size = np.abs(a - e)
    size = np.where(np.isnan(e), -1, np.where(np.isnan(size), np.inf, size))
    size[(e == a)] = 0
    count = min(_WORST, len(size))
    order = np.argpartition(size, len(size) - count)[len(size) - count :]
    order = order[np.lexsort((order, -size[order]))]
    order = order[size[order] > 0]
    places = np.arange(expected.num_tokens)[rows.expected][order]
    others = np.arange(actual.num_tokens)[rows.actual][order]
    diffs = []
    for place, other in zip(places.tolist(), others.tolist(), strict=True):
        sequence = int(np.searchsorted(expected.sequence_offsets, place, side="right")) - 1
        token_id = int(expected.token_ids[place])
        diffs.append(
            TokenDiff(
                sequence=sequence,
                group=int(expected.group[sequence]),
                sample=int(expected.sample[sequence]),
                position=place - int(expected.sequence_offsets[sequence]),
                token_id=token_id,
                text=expected.text(token_id),
                expected=float(expected.logprobs[place]),
                actual=float(actual.logprobs[other]),
                expected_rank=int(expected.ranks[place]),
                actual_rank=int(actual.ranks[other]),
            )
        )
    return tuple(diffs)
