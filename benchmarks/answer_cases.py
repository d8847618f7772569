"""Reads cases, and prints what this checkout answers to each, a JSON line for each. Only `same_verdicts.py` runs this."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from changed_traces import changed

import pytest_logprob_parity as face
from pytest_logprob_parity import EngineSpec, Golden, MismatchError, Trace
from pytest_logprob_parity.cli import main

Case = Mapping[str, Any]
WORK = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


def told(comparison: Any) -> dict[str, Any]:
    """All that a comparison says: its JSON, with numbers as they are, and with its worst tokens."""
    free = comparison.free_run
    return {
        **comparison.to_json(),
        "metrics": dict(comparison.metrics),
        "policy_metrics": dict(comparison.policy_metrics),
        "numbers": [
            [gate.key, gate.value, gate.limit, gate.fail_limit, gate.low, gate.high, gate.threshold, gate.excess, gate.between,
             gate.hidden, gate.worst, gate.unexplained, gate.beyond]
            for gate in comparison.gates
        ],
        "worst": [list(dataclasses.astuple(token)) for token in comparison.worst],
        "p_value": comparison.difference.p_value,
        "sides": list(comparison.sides),
        "divergences": [] if free is None else [
            [d.sequence, d.turn, d.position, d.gap, d.near_tie] for d in (*free.divergences, *free.ends)
        ],
        "sizes": [[trace.num_sequences, trace.num_tokens, trace.top_k] for trace in (comparison.expected, comparison.actual)],
    }  # fmt: skip


@functools.lru_cache(maxsize=64)
def golden_at(path: str) -> Golden:
    """The golden or trace of a file, read once."""
    return Golden.load(Path(path))


def candidate(case: Case) -> Trace:
    """The trace that a case holds against its golden."""
    return changed(golden_at(case.get("actual") or case["golden"]).trace, case.get("changes", []), case.get("seed", 0))


def asked(case: Case, *names: str) -> dict[str, Any]:
    """The options of a case that are set."""
    return {name: case[name] for name in names if case.get(name) is not None}


def check(case: Case) -> dict[str, Any]:
    """What `check_golden` says of a candidate."""
    options = asked(case, "level", "objective", "tolerance", "prompts")
    return told(face.check_golden(case["golden"], candidate(case), **options))


def compare(case: Case) -> dict[str, Any]:
    """What `compare` says of two traces, with the golden's floor and reference."""
    golden = golden_at(case["golden"])
    options = asked(case, "level", "objective", "tolerance")
    if case.get("bare") is None:
        options |= {"floor": golden.floor, "reference": golden.reference}
    return told(face.compare(expected=golden.trace, actual=candidate(case), **options))


def helpers(case: Case) -> dict[str, Any]:
    """What the two assertion helpers say of two traces."""
    expected, actual, found = golden_at(case["golden"]).trace, candidate(case), {}
    try:
        face.assert_tokens_equal(expected=expected, actual=actual)
    except face.ParityError as error:
        found = {"tokens": type(error).__name__}
    options = asked(case, "objective", "tolerance")
    return told(face.assert_logprobs_close(expected=expected, actual=actual, **options)) | found


def scorer_of(trace: Trace, logprobs: Any) -> Any:
    """A scorer that knows the logprobs of a trace's tokens, and gives -1.0 for any other."""
    import torch

    known: dict[tuple[int, ...], list[float]] = {}
    for sequence in range(trace.num_sequences):
        prompt, (start, stop) = trace.prompt(sequence), trace.bounds(sequence)
        before = [-1.0] * (len(prompt) - 1)
        known[tuple(prompt + trace.completion(sequence))] = [*before, *logprobs[start:stop].tolist()]

    @face.scorer(dtype="float32", name="made up")
    def score(token_ids: Any, attention_mask: Any, temperature: float) -> Any:
        rows = []
        for ids, kept in zip(token_ids.tolist(), attention_mask.bool().tolist(), strict=True):
            numbers = known.get(tuple(i for i, keep in zip(ids, kept, strict=True) if keep), [])
            rows.append((numbers + [-1.0] * len(ids))[: len(ids) - 1])
        return torch.tensor(rows, dtype=torch.float32)

    return score


def trainer(case: Case) -> dict[str, Any]:
    """What `assert_trainer_parity` says of a changed column, beside the rollouts or beside their changed labels too."""
    golden, actual = golden_at(case["golden"]), candidate(case)
    trace = golden.trace if actual.num_tokens == golden.trace.num_tokens and case.get("bare") is None else actual
    sides = {"rollouts": trace.logprobs, "trainer": actual.logprobs}
    scorer = scorer_of(trace, sides[case["scorer"]]) if case.get("scorer") else None
    if case.get("scorer") != "trainer" or case.get("bare") is None:
        entropies = np.abs(actual.logprobs) if case["seed"] % 3 == 0 else None
        trace = trace.with_(trainer_logprobs=actual.logprobs, trainer_entropies=entropies)
    rollouts = dataclasses.replace(golden, trace=trace) if case["seed"] % 2 else trace
    return told(
        face.assert_trainer_parity(rollouts, scorer, **asked(case, "objective", "tolerance", "trainer_dtype", "metrics"))
    )


def command(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON, and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    text = out.getvalue()
    return {**(json.loads(text) if text else {}), "status": status, "message": err.getvalue().replace(str(WORK), "WORK")}


def show(case: Case) -> dict[str, Any]:
    """What `show --json` prints."""
    return {"show": command("show", "--json", case["golden"])}


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value of nested mappings, with its place."""
    if isinstance(value, Mapping):
        for name, item in sorted(value.items()):
            yield from leaves(item, (*place, name))
    else:
        yield place, value


def setting_changed(golden: Golden, number: int) -> Golden:
    """The golden with another value in its fingerprint: the one of this number, counted from 0 again after the last."""
    prints = json.loads(json.dumps(golden.fingerprint))
    if not (known := list(leaves(prints))):
        return golden
    (*parts, last), value = known[number % len(known)]
    others: dict[str, Any] = {"bool": not value, "int": 7, "float": 0.5, "list": ["other"], "NoneType": 3}
    inner = functools.reduce(lambda part, name: part[name], parts, prints)
    inner[last] = others.get(type(value).__name__, f"{value}.other")
    return dataclasses.replace(golden, fingerprint=prints)


def diff(case: Case) -> dict[str, Any]:
    """What `diff --json` prints of a golden and another one, or of the golden with a changed trace or fingerprint."""
    other = case.get("actual")
    if case.get("changes") or case.get("setting") is not None:
        golden = dataclasses.replace(golden_at(other or case["golden"]), trace=candidate(case))
        golden = setting_changed(golden, case["setting"]) if case.get("setting") is not None else golden
        other = WORK / "candidate.safetensors"
        golden.save(other)
    return command("diff", "--json", case["golden"], other, *(["--level", case["level"]] if case.get("level") else []))


def script(case: Case) -> dict[str, Any]:
    """Every comparison that a script makes through the face, and how the script ended; `moved` where an import failed."""
    found: list[dict[str, Any]] = []
    before = {name: getattr(face, name) for name in ("compare", "check_golden", "assert_trainer_parity")}

    def noted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except face.ParityError as error:
            found.append(told(error.comparison) if isinstance(error, MismatchError) else {"error": type(error).__name__})
            raise
        found.append(told(result))
        return result

    old, sys.argv, ended = (sys.argv, list(sys.path)), [case["golden"], "3"], "completed"
    try:
        for name, function in before.items():
            setattr(face, name, functools.partial(noted, function))
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(case["golden"], run_name="__main__")
    except ImportError:
        ended = "moved"
    except (Exception, SystemExit) as error:
        ended = type(error).__name__
    finally:
        sys.argv, sys.path[:] = old
        for name, function in before.items():
            setattr(face, name, function)
    return {"comparisons": found, "ended": ended}


#: What an engine is changed by: settings of its spec, and those of the check.
VARIATIONS: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    "the same": ({}, {}),
    "bitwise": ({}, {"level": "bitwise"}),
    "noise": ({}, {"level": "noise"}),
    "another dtype": ({"dtype": "bfloat16"}, {}),
    "another dtype, noise": ({"dtype": "bfloat16"}, {"level": "noise"}),
    "another dtype, sequence": ({"dtype": "float16"}, {"objective": "sequence"}),
    "other weights": ({"model": "models/tiny-arith-step2"}, {}),
    "raw": ({"logprobs_mode": "raw_logprobs"}, {}),
    "serving": ({"profile": "serving"}, {}),
    "another temperature": ({}, {"sampling": {"temperature": 0.9, "top_p": 0.9, "max_tokens": 24, "n": 2, "seed": 1}}),
    "prefill": ({}, {"replay": ("decode", "prefill")}),
    "regenerate alone": ({}, {"replay": ("regenerate",)}),
}


def contents(path: Path) -> dict[str, Any]:
    """A recorded golden: what `show --json` says, and a digest of the whole file and of each column."""
    columns = {name: hashlib.sha256(column.tobytes()).hexdigest() for name, column in Trace.load(path).to_columns().items()}
    golden = Golden.load(path)
    floor = "" if golden.floor is None else hashlib.sha256(golden.floor.logprobs.tobytes()).hexdigest()
    reference = "" if golden.reference is None else hashlib.sha256(golden.reference.logprobs.tobytes()).hexdigest()
    whole = {"file": hashlib.sha256(path.read_bytes()).hexdigest(), "floor": floor, "reference": reference}
    return {"columns": columns, **whole, "show": command("show", "--json", path)}


def engine(case: Case) -> dict[str, Any]:
    """A golden that an engine records, and what checks of it say under each variation."""
    path = WORK / f"{case['engine']}.safetensors"
    spec: dict[str, Any] = {"model": "models/tiny-arith", "engine": case["engine"], "dtype": "float32"}
    prompts = [f"What is {n} + 30?" for n in range(12, 20)]
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 24, "n": 2, "seed": 1}
    with face.Pool(Path.cwd(), lambda line: None) as pool:
        recorded = face.check_golden(path, pool.engine(EngineSpec(**spec)), prompts=prompts, sampling=sampling, update=True)
        answers = {"recorded": told(recorded), "golden": contents(path)}
        for name, (settings, options) in VARIATIONS.items():

            def ask(settings: Mapping[str, Any] = settings, options: Mapping[str, Any] = options) -> dict[str, Any]:
                return told(face.check_golden(path, pool.engine(EngineSpec(**{**spec, **settings})), **options))

            answers[name] = answered(ask)
    return answers


KINDS: Final[Mapping[str, Callable[[Case], dict[str, Any]]]] = {
    "check": check, "compare": compare, "helpers": helpers, "trainer": trainer, "show": show, "diff": diff, "script": script,
    "engine": engine,
}  # fmt: skip


def answered(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer; for what was raised its type, its comparison and its message."""
    try:
        return ask()
    except MismatchError as error:
        return told(error.comparison) | {"error": "MismatchError", "message": str(error)}
    except face.ParityError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}, which is no ParityError", "message": str(error)}


def lines(cases: list[Case]) -> Iterator[str]:
    """The answers, a line for each case."""
    for case in cases:
        yield json.dumps(answered(functools.partial(KINDS[case["kind"]], case)), default=lambda value: value.item())


if __name__ == "__main__":
    if not Path(str(face.__file__)).is_relative_to(Path.cwd()):
        raise SystemExit(f"the package comes from {face.__file__}, not from this tree")
    for line in lines(json.loads(Path(sys.argv[1]).read_text())):
        print("answer", line, flush=True)
