"""The main job, without pytest: record a golden from an engine, or hold an engine against one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from . import fingerprint
from .comparison.free_run import compare_free_run
from .comparison.result import Comparison, MismatchError
from .comparison.tolerance import Tolerance, default_tolerance, make_tolerance, parse_tolerance
from .comparison.verdict import compare
from .errors import EngineError, GoldenError, IncomparableError, UsageError
from .golden import Golden, describe
from .message import failure_message
from .pool import Engine
from .prompts import check_prompts, tokenize
from .replay import REPLAYS, can_regenerate
from .spec import Sampling
from .suspects import suspects
from .trace import Trace

DEFAULT_REPLAY: Final = ("decode", "regenerate")


@dataclasses.dataclass(frozen=True)
class Context:
    """What a check is told by whoever runs it: where it belongs, what to show people, and standing settings."""

    node_id: str = ""
    name: str = ""
    shown_path: str = ""
    accept: str = "check_golden(..., update=True)"
    tolerance_lines: tuple[str, ...] = ()
    max_megabytes: float | None = None


def check_golden(
    path: str | Path,
    engine: Engine | Trace,
    *,
    prompts: Sequence[Any] | None = None,
    sampling: Any = None,
    update: bool = False,
    replay: Sequence[str] = DEFAULT_REPLAY,
    tolerance: Tolerance | Mapping[str, Any] | None = None,
    context: Context | None = None,
) -> Comparison:
    """Hold an engine against the golden at `path`, or with `update` make it one.

    The engine is asked for its logprobs of the golden's tokens by every path in `replay`. A Trace in place of the
    engine is the candidate itself, or with `update` the golden's source. Without `prompts` and `sampling` the golden's
    own are used.

    Raises ParityError: GoldenError, IncomparableError, UsageError, EngineError; MismatchError for the verdicts `fail`
    and `unverified`.
    """
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
    if update:
        return _record(path, engine, given, asked, replay, context)
    golden = _load(path, context)
    _check_belongs(golden, engine, given, asked, context)
    if isinstance(engine, Trace):
        differences: list[tuple[str, Any, Any]] = []
        comparison = _compare_trace(golden, engine, tolerance, context)
    else:
        comparison, differences = _compare_engine(golden, engine, replay, tolerance, context)
    if not comparison.passed:
        message = failure_message(
            comparison,
            golden=context.shown_path,
            about=describe(golden),
            differences=differences,
            accept=context.accept,
        )
        raise MismatchError(message, comparison)
    return comparison


# -- recording --------------------------------------------------------------------------------------------------------


def _record(
    path: Path, engine: Engine | Trace, given: list[Any] | None, sampling: Sampling | None, replay: Sequence[str],
    context: Context,
) -> Comparison:  # fmt: skip
    if path.is_dir():
        raise GoldenError(f"{context.shown_path}: a directory stands where the golden should be; move it away")
    prints: Mapping[str, Any] = {}
    digest = ""
    if isinstance(engine, Trace):
        trace = engine
        _check_belongs(Golden(trace), engine, given, sampling, context)
    else:
        if given is None:
            raise UsageError("recording needs prompts=")
        _check_can_replay(engine, replay, sampling or Sampling())
        trace = engine.generate(given, sampling or Sampling())
        digest = _digest(given)
        if trace.sampling.truncates and trace.logprobs_mode == "processed_logprobs" and "decode" in replay:
            free = engine.replay(trace.with_(sampling=trace.sampling.untruncated()))
            trace = trace.with_(untruncated_logprobs=free.logprobs)
        prints = engine.fingerprint()
    itself = compare(expected=trace, actual=trace)
    if not itself.passed:
        raise UsageError(f"{context.shown_path}: not recorded: it could never pass: {itself.headline}")
    golden = Golden(trace, prints, digest, context.node_id, context.name)
    golden.save(path, context.max_megabytes)
    written = Golden.load(path)
    comparison = compare(expected=written.trace, actual=trace, policy_logprobs=trace.untruncated_logprobs)
    return dataclasses.replace(comparison, recorded=True)


def _check_can_replay(engine: Engine, replay: Sequence[str], sampling: Sampling) -> None:
    """Refuse to record what no replay could check later."""
    forcing = engine.config.forcing
    if "prefill" in replay and engine.config.logprobs_mode == "processed_logprobs" and not sampling.raw_is_processed:
        raise UsageError(f"not recorded: replay 'prefill' gives raw logprobs, {sampling.processing()} other ones; use 'decode'")
    if "window" in replay and (sampling.presence_penalty or sampling.frequency_penalty):
        raise UsageError("not recorded: replay 'window' cannot follow presence and frequency penalties")
    if "decode" in replay and forcing not in ("sampler", "native"):
        raise EngineError(f"not recorded: its golden could not be replayed: {forcing}")


# -- checking ---------------------------------------------------------------------------------------------------------


def _load(path: Path, context: Context) -> Golden:
    if not path.exists():
        error = GoldenError(f"no golden at {context.shown_path}; record it: {context.accept}")
        error.replaceable = True
        raise error
    return Golden.load(path)


def _check_belongs(
    golden: Golden, engine: Engine | Trace, given: list[Any] | None, sampling: Sampling | None, context: Context
) -> None:
    """Everything that can be known before an engine starts. Raises IncomparableError."""
    recorded = golden.trace.sampling
    again = f"Record it again ({context.accept}), or restore the test"
    if sampling is not None and sampling != recorded:
        name = next(f.name for f in dataclasses.fields(Sampling) if getattr(sampling, f.name) != getattr(recorded, f.name))
        raise IncomparableError(
            f"{context.shown_path} was recorded with {name}={getattr(recorded, name)!r}, the test now samples with "
            f"{name}={getattr(sampling, name)!r}. {again}"
        )
    if given is not None and _digest(given) != golden.prompts_digest:
        _check_prompt_tokens(golden.trace, engine, given, context, again)
    if isinstance(engine, Engine) and golden.fingerprint:
        now = engine.model_fingerprint()
        for part in ("model", "tokenizer"):
            if golden.fingerprint.get(part) != now[part]:
                raise IncomparableError(
                    f"{context.shown_path} was recorded with another {part}: {golden.fingerprint.get('name')} "
                    f"({golden.fingerprint.get(part)}), now {now['name']} ({now[part]}). {again}"
                )


def _check_prompt_tokens(trace: Trace, engine: Engine | Trace, given: list[Any], context: Context, again: str) -> None:
    if isinstance(engine, Trace) and any(not isinstance(p, list) or not isinstance(p[0], int) for p in given):
        return  # nobody here can tokenize; the alignment sees the prompts' tokens
    tokenized = tokenize(given, None if isinstance(engine, Trace) else engine.tokenizer)
    now = [p.token_ids for p in tokenized]
    then = [tuple(trace.prompt_token_ids[a:b].tolist()) for a, b in _pairs(trace.prompt_offsets.tolist())]
    if now == then:
        return
    if len(now) != len(then):
        what = f"it has {len(then)}, the test {len(now)}"
    else:
        index = next(i for i, (a, b) in enumerate(zip(now, then, strict=True)) if a != b)
        text = "".join(trace.text(t) for t in then[index])
        what = f"prompts[{index}] is {given[index]!r:.60}, the golden's is {text!r:.60}"
    raise IncomparableError(f"{context.shown_path} belongs to other prompts: {what}. {again}")


def _compare_trace(golden: Golden, candidate: Trace, tolerance: Any, context: Context) -> Comparison:
    limits = _limits(golden.trace, candidate.path, tolerance, context)
    policy = candidate.untruncated_logprobs
    return compare(expected=golden.trace, actual=candidate, tolerance=limits, policy_logprobs=policy)


def _compare_engine(
    golden: Golden, engine: Engine, replay: Sequence[str], tolerance: Any, context: Context
) -> tuple[Comparison, list[tuple[str, Any, Any]]]:
    trace = golden.trace
    if "prefill" in replay and trace.distribution() != "raw":
        raise UsageError(
            f"replay 'prefill' gives raw logprobs, this golden's are {trace.distribution()}: they cannot be compared."
            " Use 'decode'"
        )
    paths = [p for p in replay if p != "regenerate" or can_regenerate(trace)]
    if not paths:
        raise UsageError("replay 'regenerate' alone: the golden does not know its seeds; use 'decode'")
    replayed = engine.replay_all(trace, paths)
    differences = fingerprint.differences(golden.fingerprint, engine.fingerprint()) if golden.fingerprint else []
    limits = {p: _limits(trace, t.path, tolerance, context) for p, t in replayed.items()}
    free = None
    if "regenerate" in replayed:
        free = compare_free_run(trace, replayed["regenerate"], limits["regenerate"].near_tie)
    judged = []
    for path in [p for p in paths if p != "regenerate"] or ["regenerate"]:
        comparison = compare(
            expected=trace,
            actual=replayed[path],
            tolerance=limits[path],
            policy_logprobs=_policy_replay(trace, engine) if path == "decode" else None,
            free_run=free,
            same_setup=bool(golden.fingerprint) and not differences,
        )
        if comparison.verdict == "fail" and not comparison.findings:
            comparison = dataclasses.replace(comparison, findings=tuple(suspects(differences)))
        judged.append(comparison)
    return min(judged, key=lambda c: ("fail", "unverified", "pass").index(c.verdict)), differences


def _policy_replay(trace: Trace, engine: Engine) -> Any:
    """The engine's logprobs of the golden's tokens without truncation, where the golden has its own."""
    comparable = engine.config.logprobs_mode == trace.logprobs_mode
    if trace.untruncated_logprobs is None or not comparable:
        return None
    return engine.replay(trace.with_(sampling=trace.sampling.untruncated())).logprobs


def _limits(trace: Trace, path: str, tolerance: Any, context: Context) -> Tolerance:
    paths = (trace.path, path)
    base = default_tolerance(trace.dtype, paths)
    return make_tolerance(make_tolerance(base, parse_tolerance(context.tolerance_lines, trace.dtype, paths)), tolerance)


def _digest(given: list[Any] | None) -> str:
    return "" if given is None else fingerprint.digest_of(given)


def _pairs(offsets: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets))
