"""Compare two traces: measure, ask whether they mean the same, whether it is different, and have it decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..errors import UsageError
from ..golden.noise_floor import NoiseFloor
from ..golden.reference import Reference
from ..grammar import counted, is_or_are
from ..suggest import nearest
from ..trace import FloatArray, Trace
from . import metrics as m
from .alignment import Alignment, align
from .contradictions import examine, topk_judged
from .decision import Found, decide, proves
from .differences import Differences, setting_of
from .effects import gates_of, what_it_shows
from .free_run import judge_free_run
from .intervals import distinct_sequences, prompt_numbers
from .nucleus_flips import support_flips
from .objectives import DEFAULT_OBJECTIVE
from .permutation import ALPHA, block_permutation_test
from .precision_gaps import with_gap
from .result import (
    LEVELS,
    SIDES,
    TALLY,
    Comparison,
    Difference,
    Finding,
    FreeRun,
    Gate,
    Level,
    Names,
    Note,
    Setup,
    TokenDiff,
    names_of,
)
from .signatures.head import head_finding
from .signatures.positions import GLANCE, MOST, positions_of
from .signatures.semantics import bears_out, different_meaning, label_findings, left_unexplained, semantic_findings, unsure_of
from .tolerance import DTYPES, Tolerance, default_tolerance, make_tolerance, with_floor, with_reference

_WORST: Final = 8
#: Temperatures that differ by less than this share are told apart by the numbers alone.
_NEARLY: Final = 0.01
#: In float32 a larger RMS than so many times the noise of builds is no noise.
_BEYOND: Final = 10


@dataclass(frozen=True)
class Evidence:
    """What a check knows beyond two traces.

    `floor` and `reference` are the golden's, `routed` says whether its model routes tokens to experts; `draw` asks the engine
    for its logprobs [N] in batch compositions drawn as the floor's were; `setup` says how the fingerprints compare;
    `same_stream` that nothing which random numbers come from has changed; `same_schedule` that equal requests run in equal
    batches; `policy_logprobs` [N] are the engine's without truncation; `sides` is what the two are called.
    """

    floor: NoiseFloor | None = None
    reference: Reference | None = None
    routed: bool | None = None
    draw: Callable[[], FloatArray] | None = None
    setup: Setup = "unknown"
    same_stream: bool = False
    same_schedule: bool = True
    free_run: FreeRun | None = None
    policy_logprobs: Any = None
    sides: tuple[str, str] = SIDES


def compare(
    *,
    expected: Trace,
    actual: Trace,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    level: Level = "rl",
    objective: str = DEFAULT_OBJECTIVE,
    floor: NoiseFloor | None = None,
    reference: Reference | None = None,
) -> Comparison:
    """Compare two traces over their identical tokens; d = actual - expected.

    `tolerance` changes the defaults for the golden's dtype and the two paths, or declares a gap that is there on purpose
    (`"fp8"`, `"int8"`). `level` says what fails: `bitwise` any other bit, `noise` any difference beyond the noise of batch
    composition (which two traces in hand cannot show), `rl` what matters to an update of this `objective` (`token`,
    `sequence`, `truncated`, `unclipped`; see Objective). `floor` is the golden's noise floor, `reference` its reference
    column.

    Where the two sides mean different things, and the numbers bear that out, nothing is subtracted: the metrics of
    differences are NaN and a finding says so.

    Raises UsageError for a tolerance, level or objective that does not exist, and for a floor or reference of other tokens.
    """
    if not isinstance(expected, Trace) or not isinstance(actual, Trace):
        raise UsageError(f"compare() takes two Traces, not {type(expected).__name__} and {type(actual).__name__}")
    if reference is not None and len(reference.logprobs) != expected.num_tokens:
        raise UsageError(f"the reference has {len(reference.logprobs)} tokens, the expected trace {expected.num_tokens}")
    if floor is not None and floor.logprobs.shape[1] != expected.num_tokens:
        raise UsageError(f"the floor has {floor.logprobs.shape[1]} tokens, the expected trace {expected.num_tokens}")
    base = with_floor(default_tolerance(expected.dtype, (expected.path, actual.path), objective), floor)
    base = with_reference(base, expected.logprobs, reference)
    evidence = Evidence(floor, reference)
    return with_gap(judge(expected, actual, make_tolerance(base, tolerance), check_level(level), evidence), tolerance)


def check_level(level: str) -> Level:
    """`level`, if it is one. Raises UsageError."""
    if level not in LEVELS:
        raise UsageError(f"level={level!r}: known are {', '.join(LEVELS)}{nearest(str(level), LEVELS)}")
    return level


def judge(expected: Trace, actual: Trace, limits: Tolerance, level: Level, evidence: Evidence) -> Comparison:
    """What `compare` does, with everything that a check knows."""
    TALLY.made += 1
    rows = align(expected, actual)
    e, a = expected.logprobs[rows.expected], actual.logprobs[rows.actual]
    finite = np.isfinite(e) & np.isfinite(a)
    every = bool(finite.all())
    d = np.subtract(a, e, dtype=np.float64) if every else (a[finite].astype(np.float64) - e[finite])
    flipped = (np.isneginf(e) != np.isneginf(a)) & ~(np.isnan(e) | np.isnan(a))
    numbers = _numbers(expected, actual, rows, e, a, d, flipped)
    flips = support_flips(expected, actual, rows, flipped, limits, evidence.reference)
    sequences = m.sequence_numbers(expected, rows.expected)
    sequences = sequences if every else sequences[finite]
    differences = _differences(expected, e, a, d, finite, sequences, rows, evidence.reference)
    setting, names = setting_of(expected, evidence.routed, actual.dtype), names_of(evidence.sides)
    gates = gates_of(differences, int(numbers["n_nan"]), flips, limits, setting, expected.num_sequences)
    shown = what_it_shows(differences, gates)
    failed = [g for g in gates if not g.ok]
    exact = bool(len(d)) and not numbers["n_changed"]
    notes_of_tokens = _uncompared(expected, actual, rows, numbers, names)
    record = examine(expected, actual, rows, names)
    notes: list[Note]
    unsure = not all(gate.sure for gate in gates)
    borne_out = bool(failed) or not len(d) or (unsure and not _nearly_the_same(expected, actual))
    findings, notes = _meanings(expected, actual, rows, numbers, borne_out, names)
    beyond = setting.fine and numbers["rms_diff"] > _BEYOND * limits.noise_rms * setting.enlarged
    apart = beyond or unsure
    if findings:
        gates = ()
    elif not record.explains and (apart or (len(d) and not exact)):
        off = _far_off(d, sequences, limits) if apart or len(d) <= MOST else None
        most = MOST if apart else GLANCE
        findings += semantic_findings(expected, actual, rows, off, names, most)
        if not failed:  # a meaning that is proven fails at any size; what only may be one does not
            findings = [finding for finding in findings if proves(finding, unsure=unsure, beyond=beyond)]
        unnamed = bool(failed) and not any(finding.cause for finding in findings)
        if unnamed and (head := head_finding(positions_of(expected, actual, rows, names=names))):
            findings.append(head)
        notes += [Note("top_k", told)] if apart and (told := unsure_of(expected, actual, rows)) else []
    penalties = any(f.cause == "penalties" for f in findings)  # what they move is no remainder
    if (
        any(f.cause for f in findings)
        and not penalties
        and (rest := left_unexplained(expected, actual, rows, 2 * limits.fit_rms))
    ):
        notes.append(Note("left_unexplained", rest))
    findings += record.beside(findings)
    notes += record.notes
    if numbers["n_nan"] and not record.accounts_for(int(numbers["n_nan"])):
        of = np.unique(m.sequence_numbers(expected, rows.expected)[_broken(e, a)])
        broken = int(numbers["n_nan"])
        evidence_of = (
            f"{counted(broken, 'logprobs')} {is_or_are(broken)} NaN or +inf, in {len(of)} of {expected.num_sequences} sequences"
        )
        if len(of) < expected.num_sequences:
            evidence_of += ": other weights would make them in all"
        findings.insert(0, Finding("path", None, evidence_of, ("engine_build", "kv_cache_dtype")))
    problem, finding = "", None
    if not failed and not findings:
        same_bits = exact and evidence.setup == "same" and evidence.same_schedule
        drawn = evidence.floor.mean_abs if evidence.floor is not None else 0.0
        noise = max(drawn if np.isfinite(drawn) else 0.0, numbers["mean_abs_diff"])
        problem, finding = judge_free_run(
            evidence.free_run,
            expected,
            exact=same_bits,
            same_stream=evidence.same_stream and (evidence.same_schedule or noise > 0),
            mean_abs_diff=noise,
        )
    if finding is not None:
        findings.append(finding)
    elif evidence.free_run is not None and not evidence.free_run.same:
        notes.append(Note("free_generation", f"free generation: {evidence.free_run}"))
    if len(d) or failed or findings:
        difference = _is_different(expected, exact and not record.new, bool(failed or findings), level, evidence)
    else:
        difference = Difference(None, "nothing was compared")
    notes += notes_of_tokens
    unknown = evidence.floor is None and not differences.known.any()
    if level == "rl" and unknown and not exact and len(d) and evidence.sides == SIDES:
        known = expected.dtype if expected.dtype in DTYPES else f"bfloat16, for {expected.dtype!r} is no dtype we know"
        notes.append(Note("no_floor", f"no noise floor: what is noise is taken from the defaults of {known}"))
    verdict, headline = decide(
        Found(
            expected=expected,
            actual=actual,
            rows=rows,
            numbers=numbers,
            gates=gates,
            failed=failed,
            findings=findings,
            free_problem=problem,
            free_run=evidence.free_run,
            difference=difference,
            level=level,
            setup=evidence.setup,
            has_floor=evidence.floor is not None,
            reproduces=evidence.floor is not None and evidence.floor.reproduces and evidence.same_schedule,
            sequences=len(np.unique(distinct_sequences(expected)[np.unique(sequences)])) if len(d) else 0,
            exact=exact,
            sides=evidence.sides,
            record=record.headline,
        )
    )
    notes += [topk_judged(expected, actual)] if verdict == "pass" else []
    if verdict == "pass" and not exact and not beyond:
        findings.append(_noise(numbers, gates))
    if verdict != "fail" and beyond:
        text = f"RMS {numbers['rms_diff']:.2g} nats is more than noise in {setting.dtype} explains: something has changed"
        less = f", by less than objective {limits.objective} feels" if verdict == "pass" else ""
        notes.append(Note("beyond_dtype", text + less))
    if shown is not None and shown.prompts == 1 and level == "rl":
        notes.append(Note("one_prompt", "all sequences are of one prompt: the verdict speaks for that prompt alone"))
    return Comparison(
        verdict=verdict,
        headline=headline,
        metrics=numbers,
        findings=tuple(findings),
        gates=gates,
        worst=_worst(expected, actual, rows, e, a),
        expected=expected,
        actual=actual,
        policy_metrics=_policy_metrics(expected, evidence.policy_logprobs, rows),
        free_run=evidence.free_run,
        notes=tuple(notes),
        level=level,
        setup=evidence.setup,
        objective=limits.objective,
        difference=difference,
        sides=evidence.sides,
        shown=shown if gates else None,
    )


def _differences(
    expected: Trace, e: Any, a: Any, d: m.Doubles, finite: Any, sequences: Any, rows: Alignment, reference: Reference | None
) -> Differences:  # fmt: skip
    """The aligned tokens that have a finite logprob on both sides."""
    missing = np.full(len(d), np.nan)
    golden_error = error = missing
    if reference is not None:
        truth = reference.logprobs[rows.expected][finite]
        with np.errstate(invalid="ignore"):
            golden_error, error = (np.subtract(x[finite], truth, dtype=np.float64) for x in (e, a))
        unknown = ~np.isfinite(truth)
        golden_error[unknown] = error[unknown] = np.nan
    return Differences(d, sequences, prompt_numbers(expected)[sequences], golden_error, error)


def _broken(e: Any, a: Any) -> Any:
    """Numbers [n] that are none: NaN of this run, +inf of either side."""
    return np.isnan(a) | np.isposinf(a) | np.isposinf(e)


def _numbers(
    expected: Trace, actual: Trace, rows: Alignment, e: Any, a: Any, d: m.Doubles, flipped: Any
) -> dict[str, float]:  # fmt: skip
    broken = _broken(e, a)
    excluded, flips = np.count_nonzero(np.isneginf(e) & np.isneginf(a)), np.count_nonzero(flipped)
    return {
        "n_tokens": float(len(d)),
        "n_sequences": float(expected.num_sequences - rows.missing_sequences),
        "coverage": (len(d) + excluded + flips) / rows.wanted if rows.wanted else 0.0,
        "n_nan": float(np.count_nonzero(broken)),
        "n_missing": float(np.count_nonzero(np.isnan(e))),
        "n_excluded": float(excluded),
        "n_changed": float(np.count_nonzero((e != a) & ~np.isnan(e))),
        "support_flips": float(flips),
        "diverged_sequences": float(rows.diverged_sequences),
        "missing_sequences": float(rows.missing_sequences),
        **m.difference_metrics(d),
        **m.top_k_metrics(expected, actual, rows),
    }


def _uncompared(
    expected: Trace, actual: Trace, rows: Alignment, numbers: Mapping[str, float], names: Names
) -> list[Note]:  # fmt: skip
    """What was not compared although the golden has it, in words."""
    notes = []
    if rows.tokens < rows.wanted and actual.replay != "window":
        text = (
            f"{rows.wanted - rows.tokens:,} of {names.expected}'s {rows.wanted:,} tokens were not compared: "
            f"{counted(rows.missing_sequences, 'sequences')} are missing, {rows.diverged_sequences} go on with other tokens"
        )
        notes.append(Note("not_compared", text))
    if numbers["n_missing"]:
        count = int(numbers["n_missing"])
        verb = "has" if count == 1 else "have"
        notes.append(Note("no_logprob", f"{counted(count, 'tokens')} {verb} no logprob in {names.expected}"))
    if numbers["n_excluded"]:
        count = int(numbers["n_excluded"])
        text = f"{counted(count, 'tokens')} {is_or_are(count)} excluded on both sides: equal, and no number to compare"
        notes.append(Note("excluded", text))
    return notes


def _noise(numbers: Mapping[str, float], gates: Sequence[Gate]) -> Finding:
    """What passes and is not bit for bit the same: its size as the gates measure it, and the tokens that are far off."""
    off = next((g for g in gates if g.key == "outlier_tokens" and g.value), None)
    beside = "" if off is None else f", beside {counted(round(off.value), off.unit)} {off.name} nats (largest {off.worst:.3g})"
    text = f"RMS {numbers['rms_diff']:.2g} nats{beside}, within tolerance"
    return Finding("noise", "numerical_noise", text, values={"rms": numbers["rms_diff"]})


def _nearly_the_same(expected: Trace, actual: Trace) -> bool:
    """Whether the labels differ by a temperature alone, and by so little that unsure sizes do not bear it out."""
    apart = expected.applied_temperature / actual.applied_temperature - 1
    one, other = ({} if trace.is_raw else trace.sampling.steps() for trace in (expected, actual))
    for steps in (one, other):
        steps.pop("temperature", None)
    return abs(apart) < _NEARLY and one == other


def _meanings(
    expected: Trace, actual: Trace, rows: Alignment, numbers: dict[str, float], apart: bool, names: Names
) -> tuple[list[Finding], list[Note]]:  # fmt: skip
    """What labels that differ come to: a finding where the numbers bear them out, else a note; no finding where equal."""
    claim = different_meaning(expected, actual)
    if claim is None or not rows.tokens:
        return [], []
    if apart or bears_out(expected, actual, rows):
        numbers |= dict.fromkeys(m.DIFFERENCE_METRICS, float("nan"))  # differences of two meanings mean nothing
        return label_findings(claim, expected, actual, rows, names), []
    labels = f"{expected.distribution()} against {actual.distribution()}"
    exact = not numbers["n_changed"]
    what = "agree bit for bit: a label is wrong" if exact else "are too near to each other to tell these apart"
    return [], [Note("labels", f"the labels say {labels}, the numbers {what}")]


def _far_off(d: m.Doubles, sequences: Any, limits: Tolerance) -> list[int]:
    """The sequences that are far off, where these are the smaller part; empty where they are not."""
    names = np.unique(sequences)
    if not len(d):
        return []
    rms = m.sequence_rms(d, sequences, 2.5 * limits.sequence_rms)
    off = names[rms > max(limits.sequence_rms / 5, 3 * float(np.median(rms)))]
    return [int(name) for name in off] if 0 < len(off) < len(names) / 2 else []


def _is_different(expected: Trace, exact: bool, decided: bool, level: Level, evidence: Evidence) -> Difference:
    """Is it different? Bit for bit on the stored schedule; where the engine is another one, by the permutation test."""
    floor = evidence.floor
    if exact:
        return Difference(False, "bit for bit the same")
    if level == "bitwise":
        return Difference(True, "not bit for bit the same")
    if decided:
        return Difference(True, "see the headline", decided=True)
    scheduled = evidence.setup == "same" and evidence.same_schedule
    if scheduled and floor is not None and floor.reproduces and level != "noise":
        return Difference(True, "not bit-identical, although it was when recorded: the same engine on the same schedule")
    if floor is None:
        expected_side = names_of(evidence.sides).expected
        return Difference(None, f"not bit for bit the same, and {expected_side} has no noise floor to hold that against")
    if evidence.draw is None and not evidence.same_schedule:
        text = (
            "not bit for bit the same; a server's requests meet in batches of their own, not in the floor's: level 'noise' asks"
        )
        return Difference(None, f"{text} all the same")
    if evidence.draw is None:
        return Difference(None, "not bit for bit the same; only an engine can be asked again in the floor's shapes")
    if floor.changed == 0:
        return Difference(True, "beyond the noise of batch composition: other bits, where no drawn one moved any")
    blocks = expected.sequence_of_token % floor.shapes.blocks
    test = block_permutation_test(floor.logprobs, evidence.draw(), blocks)
    if test is None:
        return Difference(None, f"not bit for bit the same; too few sequences for {floor.shapes.blocks} blocks")
    beyond = test.p_value <= ALPHA
    return Difference(beyond, f"{'beyond' if beyond else 'within'} the noise of batch composition, {test}", test.p_value)


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
    diffs, sequences = [], expected.sequence_of_token
    for place, other in zip(places.tolist(), others.tolist(), strict=True):
        sequence = int(sequences[place])
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
