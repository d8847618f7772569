"""The main job, without pytest: hold an engine against its golden (or record it; see recording.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..checkpoint.prompts import check_prompts
from ..comparison.compare import check_level
from ..comparison.declared_gap import with_gap
from ..comparison.evidence import Evidence
from ..comparison.free_generation.compare import compare_free_run
from ..comparison.judge import judge
from ..comparison.message import failure_message
from ..comparison.objectives import DEFAULT_OBJECTIVE, objective_of
from ..comparison.result import Comparison, MismatchError
from ..comparison.suspected_causes import adapter_finding, suspect_settings, suspects
from ..comparison.tolerance import Tolerance, default_tolerance, make_tolerance, parse_tolerance, with_floor, with_reference
from ..comparison.vocabulary import Level, Verdict
from ..engines.engine import Engine
from ..engines.replay import REPLAYS, can_regenerate
from ..errors import GoldenError, UsageError
from ..golden import Golden, describe, fingerprint, is_there
from ..golden.noise_floor import REPEATS
from ..notes import Note
from ..spec import Sampling
from ..trace import ReplayPath, Trace, TracePath
from .ask import Answers, ask
from .compatibility import check_belongs, renamed, temperature_notes
from .context import Checked, Context
from .prefill_fallback import as_unforced
from .record import record
from .variants import name_of, of_other_kinds

DEFAULT_REPLAY: Final[tuple[ReplayPath, ...]] = ("decode", "regenerate")


def check_golden(
    path: str | Path,
    engine: Engine | Trace,
    *,
    prompts: Sequence[Any] | None = None,
    sampling: Any = None,
    update: bool = False,
    replay: Sequence[ReplayPath] = DEFAULT_REPLAY,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    level: Level = "rl",
    objective: str = DEFAULT_OBJECTIVE,
    repeats: int = REPEATS,
    context: Context | None = None,
) -> Comparison:
    """Hold an engine against the golden at `path`, or with `update` make it one.

    The engine is asked for its logprobs of the golden's tokens by every path in `replay`. A Trace in place of the
    engine is the candidate itself, or with `update` the golden's source. Without `prompts` and `sampling` the golden's
    own are used. `tolerance` changes limits, or declares a gap that is there on purpose (`"fp8"`, `"int8"`). `level` says
    what fails: `bitwise`, `noise` or `rl`, and `objective` what matters to an update: `token`, `sequence`, `truncated` or
    `unclipped` (see `compare`). `repeats` is how often recording replays its tokens in other
    batch shapes, for the noise floor; 0 records none.

    Raises ParityError: GoldenError, IncomparableError, UsageError, EngineError; MismatchError for the verdicts `fail`
    and `unverified`.
    """
    __tracebackhide__ = True
    path = Path(path)
    context = context or Context()
    context = dataclasses.replace(context, shown_path=context.shown_path or str(path))
    if isinstance(replay, str) or not replay or any(r not in REPLAYS for r in replay):
        raise UsageError(f"replay={replay!r}: give one or more of {', '.join(REPLAYS)}, as a tuple")
    make_tolerance(default_tolerance("float32"), tolerance)
    given = None if prompts is None else check_prompts(prompts)
    asked = None if sampling is None else Sampling.of(sampling)
    if not isinstance(engine, (Engine, Trace)):
        raise UsageError(f"check takes an engine or a Trace, not {type(engine).__name__}")
    level = check_level(level)
    context = dataclasses.replace(context, objective=objective_of(objective).name)
    if not update:
        return _check(path, engine, given, asked, replay, tolerance, level, context)
    return record(path, engine, given, asked, replay, tolerance, repeats, context)


def _check(
    path: Path, engine: Engine | Trace, given: list[Any] | None, asked: Sampling | None, replay: Sequence[ReplayPath],
    tolerance: Any, level: Level, context: Context,
) -> Comparison:  # fmt: skip
    """Hold an engine, or a trace, against the golden there is. Raises as `check_golden` does."""
    __tracebackhide__ = True
    if not is_there(path):
        instead = renamed(engine, given, asked, context)
        error = GoldenError(f"no golden at {context.shown_path}; record it: {context.accept}{instead}")
        error.replaceable = True
        raise error
    golden = Golden.load(path)
    if context.node_id and isinstance(engine, Trace):
        _check_is_another(golden, engine)
    check_belongs(golden, engine, given, asked, context)
    notes = temperature_notes(asked, golden.trace.engine)
    checked = _compare(golden, engine, replay, tolerance, level, context)
    checked = dataclasses.replace(checked, comparison=_annotated(checked.comparison, golden, notes, context))
    comparison = checked.comparison
    if context.observe is not None:
        context.observe(dataclasses.replace(checked, limits=_limits(golden, comparison.actual.path, tolerance, context)))
    if not comparison.passed:
        raise MismatchError(_message(checked, context), comparison)
    return comparison


def _annotated(comparison: Comparison, golden: Golden, notes: Sequence[Note], context: Context) -> Comparison:
    """The comparison with what there is to say beside it: recorded limits, `notes`, a framework's metrics."""
    if golden.tolerance:
        kept = ", ".join(f"{name} {value:g}" for name, value in sorted(golden.tolerance.items()))
        note = Note(
            "recorded_limits", f"limits recorded with the golden: {kept}; recording it again without tolerance= drops them"
        )
        comparison = dataclasses.replace(comparison, notes=(*comparison.notes, note))
    comparison = dataclasses.replace(comparison, notes=(*comparison.notes, *notes))
    if context.metrics:
        from ..trainer.frameworks import with_metrics

        comparison = with_metrics(comparison, context.metrics)
    return comparison


def _message(checked: Checked, context: Context) -> str:
    return failure_message(
        checked.comparison,
        golden=context.shown_path,
        about=describe(checked.golden),
        differences=checked.differences,
        accept=context.accept,
        beside=_beside(checked, context),
    )


def _check_is_another(golden: Golden, trace: Trace) -> None:
    """Raise UsageError for the golden itself in place of a candidate: a test would be green for ever, whatever runs."""
    if trace.source == golden.digest and np.array_equal(trace.logprobs, golden.trace.logprobs, equal_nan=True):
        raise UsageError("the trace was read from the golden's own file: nothing would be compared; hand over a new one")


def _beside(checked: Checked, context: Context) -> str:
    """The command that records a golden for another machine beside the one there is; "" on the golden's own."""
    other = any(name == "hardware.device" for name, _, _ in checked.differences)
    if not other or context.beside is None or of_other_kinds(checked.golden.fingerprint, checked.fingerprint):
        return ""  # --update-golden records beside it by itself
    return context.beside(name_of(checked.fingerprint))


# -- checking ---------------------------------------------------------------------------------------------------------


def _compare(
    golden: Golden, engine: Engine | Trace, replay: Sequence[ReplayPath], tolerance: Any, level: Level, context: Context
) -> Checked:
    """Hold an engine, or a trace in hand, against a golden that belongs to it."""
    if not isinstance(engine, Trace):
        return _compare_engine(golden, engine, replay, tolerance, level, context)
    limits = _limits(golden, engine.path, tolerance, context)
    evidence = Evidence(
        floor=golden.floor, reference=golden.reference, routed=golden.routed, policy_logprobs=engine.untruncated_logprobs
    )
    return Checked(golden=golden, comparison=with_gap(judge(golden.trace, engine, limits, level, evidence), tolerance))


def _compare_engine(
    golden: Golden, engine: Engine, replay: Sequence[ReplayPath], tolerance: Any, level: Level, context: Context
) -> Checked:
    trace = golden.trace
    if "prefill" in replay and not trace.is_raw:
        raise UsageError(
            f"replay 'prefill' gives raw logprobs, this golden's are {trace.distribution()}: they cannot be compared."
            " Use 'decode'"
        )
    if not [p for p in replay if p != "regenerate" or can_regenerate(trace)]:
        raise UsageError("replay 'regenerate' alone: the golden does not know its seeds; use 'decode'")
    answers = ask(engine, golden, replay)
    comparison, differences = judge_answers(golden, answers, tolerance, level, context)
    return Checked(
        golden=golden,
        comparison=comparison,
        differences=differences,
        fingerprint=answers.fingerprint,
        policy_logprobs=answers.policy_logprobs,
    )


def judge_answers(
    golden: Golden, answers: Answers, tolerance: Any, level: Level, context: Context
) -> tuple[Comparison, list[tuple[str, Any, Any]]]:
    """The verdict on what an engine answered, the worst of its paths, and where its fingerprint is not the golden's."""
    trace, replays = golden.trace, answers.replays
    differences = fingerprint.differences(golden.fingerprint, answers.fingerprint) if golden.fingerprint else []
    setup = fingerprint.setup_class(golden.fingerprint, differences)
    limits = {p: _limits(golden, t.path, tolerance, context) for p, t in replays.items()}
    free = None
    if "regenerate" in replays:
        of_now = default_tolerance(replays["regenerate"].dtype).near_tie  # a gap moves by the noise of both sides
        free = compare_free_run(trace, replays["regenerate"], max(limits["regenerate"].near_tie, of_now))
    judged = []
    scheduled = fingerprint.keeps_schedule(answers.fingerprint)
    paths: list[ReplayPath] = [p for p in replays if p != "regenerate"] or ["regenerate"]
    for path in paths:
        evidence = Evidence(
            floor=golden.floor,
            reference=golden.reference,
            routed=golden.routed,
            draw=answers.draw if path == "decode" and (scheduled or level == "noise") else None,
            setup=setup,
            same_stream=bool(golden.fingerprint) and not any(fingerprint.moves_the_stream(*d) for d in differences),
            same_schedule=scheduled,
            free_run=free,
            policy_logprobs=answers.policy_logprobs if path == "decode" else None,
        )
        comparison = judge(trace, replays[path], limits[path], level, evidence)
        comparison = _with_suspects(comparison, differences, answers.fingerprint, replays[path])
        judged.append(with_gap(comparison, tolerance, answers.fingerprint.get("config", {})))
    worst_first: tuple[Verdict, ...] = ("fail", "unverified", "pass")
    worst = min(judged, key=lambda c: worst_first.index(c.verdict))
    comparison = dataclasses.replace(worst, notes=(*worst.notes, *answers.remarks))
    return as_unforced(comparison, trace, answers.unforced) if answers.unforced else comparison, differences


def _with_suspects(
    comparison: Comparison, differences: Sequence[tuple[str, Any, Any]], fingerprint: Mapping[str, Any], replayed: Trace
) -> Comparison:
    """The comparison with what the differences of the fingerprints make suspect; an adapter of another content always."""
    other = adapter_finding(differences)
    if comparison.verdict == "fail":
        updated = replayed.weight_versions is not None
        findings = comparison.findings or tuple(suspects(differences, fingerprint, updated=updated))
        if comparison.findings and not any(finding.cause for finding in findings):
            findings = (*findings, *suspect_settings(differences, name=False))
        if other is not None and other not in findings:
            findings = (*findings, other)
        return dataclasses.replace(comparison, findings=findings)
    if other is not None and comparison.verdict == "unverified":
        return dataclasses.replace(comparison, findings=(*comparison.findings, other))
    if other is not None:
        note = Note("another_adapter", f"another adapter: {other.evidence}")
        headline = f"{comparison.headline}; {note}"
        return dataclasses.replace(comparison, headline=headline, notes=(*comparison.notes, note))
    return comparison


def _limits(golden: Golden, path: TracePath, tolerance: Any, context: Context) -> Tolerance:
    """The limits of a golden: those of its dtype, its noise floor, the ini file, its recording, the call; the last wins."""
    trace = golden.trace
    paths = (trace.path, path)
    limits = with_floor(default_tolerance(trace.dtype, paths, context.objective), golden.floor)
    limits = with_reference(limits, trace.logprobs, golden.reference)
    for change in (parse_tolerance(context.tolerance_lines, trace.dtype, paths), golden.tolerance, tolerance):
        limits = make_tolerance(limits, change)
    return limits
