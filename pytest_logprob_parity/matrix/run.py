"""Run a matrix: record the reference cell's missing goldens, replay them in all cells, and judge the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..check.check import judge_answers
from ..check.context import Context
from ..check.record import check_recorded
from ..checkpoint.digests import digest_of, find_model
from ..checkpoint.prompts import check_prompts, tokenize, tokenizer_of
from ..comparison.result import Finding
from ..comparison.vocabulary import Verdict
from ..errors import EngineError, ParityError
from ..golden import Golden
from ..progress import each
from .executors import Executor, Job, answered, today
from .goldens import SETTINGS, check_is_of_plan, settings_of
from .plan import Cell, Matrix, slug
from .worker import load_answers, load_recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One cell, dtype and sampling: the verdict, or `not run` with the reason as the headline.

    `metrics` are those of the comparison, `findings` name layer and cause; `version` is what the engine says of itself.
    """

    cell: str
    dtype: str
    sampling: str
    verdict: Verdict | Literal["not run"]
    headline: str
    version: str = ""
    distribution: str = ""
    findings: tuple[Finding, ...] = ()
    metrics: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values; numbers that are not finite are left out."""
        findings = [finding.to_json() for finding in self.findings]
        metrics = {k: v for k, v in (self.metrics or {}).items() if abs(v) < float("inf")}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "findings": findings, "metrics": metrics}


def run_matrix(
    matrix: Matrix, executor: Executor, out: Path, home: Path, notify: Callable[[str], None], *, update: bool = False
) -> list[Row]:
    """All rows, cell by cell. `out` keeps the answers; jobs that were answered in an earlier run are not run again.

    `update` records the goldens again. Raises ParityError where the reference cell records none.
    """
    reference = next(cell for cell in matrix.cells if cell.name == matrix.reference)
    prompts = _token_ids(matrix)
    goldens = _goldens(matrix, reference, prompts, executor, out, home, notify, update=update)
    jobs: dict[str, tuple[Job, Cell, str]] = {}
    for cell in matrix.cells:
        for dtype in matrix.dtypes:
            files = {f"{slug(name)}.golden.safetensors": goldens[dtype, name].read_bytes() for name in matrix.samplings}
            job = _job(matrix, cell, dtype, "check", prompts, files)
            jobs[job.name] = (job, cell, dtype)
    whys = _ask(executor, [job for job, _, _ in jobs.values()], out, home, notify)
    return [
        row for name, (_, cell, dtype) in jobs.items() for row in _judged(matrix, cell, dtype, goldens, out / name, whys[name])
    ]


def _goldens(
    matrix: Matrix, reference: Cell, prompts: list[list[int]], executor: Executor, out: Path, home: Path,
    notify: Callable[[str], None], *, update: bool,
) -> dict[tuple[str, str], Path]:  # fmt: skip
    places = {
        (dtype, name): matrix.goldens / f"{slug(reference.name)}-{dtype}-{slug(name)}.safetensors"
        for dtype in matrix.dtypes
        for name in matrix.samplings
    }
    missing = [dtype for dtype in matrix.dtypes if update or any(not places[dtype, n].exists() for n in matrix.samplings)]
    for (dtype, name), place in places.items():  # a damaged golden, or another plan's, ends the run here
        if dtype not in missing:
            check_is_of_plan(place, matrix, reference, name, prompts)
    jobs = {dtype: _job(matrix, reference, dtype, "record", prompts, {}) for dtype in missing}
    whys = _ask(executor, list(jobs.values()), out, home, notify)
    for dtype, job in jobs.items():
        if whys[job.name]:
            raise EngineError(f"the reference {reference.name} ({dtype}) recorded nothing: {whys[job.name]}")
        for name in matrix.samplings:
            try:
                golden, own = load_recorded(out / job.name, slug(name))
                check_recorded(golden, {}, "the golden of this cell", own)
            except ParityError as error:
                raise EngineError(f"the reference {reference.name} ({dtype}) recorded nothing: {error}") from None
            golden.save(places[dtype, name], also={SETTINGS: settings_of(reference)})
    return places


def _job(matrix: Matrix, cell: Cell, dtype: str, kind: str, prompts: list[list[int]], files: dict[str, bytes]) -> Job:
    names = list(matrix.samplings)
    settings = dict(cell.settings)
    question = {
        **today({"model": matrix.model, **settings}, matrix.root, cell.environment),
        "root": str(matrix.root),
        "model": matrix.model,
        "spec": {"dtype": dtype, **settings},
        "prompts": prompts if kind == "record" else [],
        "repeats": matrix.repeats,
        "record": {slug(n): matrix.samplings[n].to_json() for n in names} if kind == "record" else {},
        "check": [slug(n) for n in names] if kind == "check" else [],
        "goldens": digest_of([data.hex() for data in files.values()]),
        "environment": [cell.environment.digest, cell.environment.python],
        "variables": {**cell.environment.variables, **cell.variables},
    }
    files = {**files, "job.json": json.dumps(question, sort_keys=True).encode()}
    name = f"{kind}-{slug(cell.name)}-{dtype}"
    return Job(
        name=name,
        environment=cell.environment,
        files=files,
        variables=cell.variables,
        cpus=cell.cpus,
        gpus=cell.gpus,
        minutes=cell.minutes,
    )


def _ask(
    executor: Executor, jobs: Sequence[Job], out: Path, home: Path, notify: Callable[[str], None]
) -> dict[str, str]:  # fmt: skip
    """Why each job has no answers, by name, an empty text where it has; jobs that were answered before are not run again."""
    waiting = []
    for job in jobs:
        folder = out / job.name
        if answered(job, folder):
            notify(f"{job.name}: answered in an earlier run")
            continue
        for old in folder.glob("*") if folder.is_dir() else ():
            old.unlink()
        waiting.append(job)
    whys = {job.name: "" for job in jobs}
    answers = executor.run(waiting, out, home, notify) if waiting else iter(())
    first_with: dict[str, str] = {}
    for job, why in each("job", answers, len(waiting)):
        whys[job.name] = why
        first = first_with.setdefault(why, job.name) if why else job.name
        notify(f"{job.name}: {why or 'answered'}" if first == job.name else f"{job.name}: not run, as {first}")
    return whys


def _judged(
    matrix: Matrix, cell: Cell, dtype: str, goldens: dict[tuple[str, str], Path], folder: Path, why: str
) -> list[Row]:  # fmt: skip
    """The rows of one job: judged, or `not run` where `why` or its answers say that nothing can be judged."""
    return [_row(cell.name, dtype, name, goldens[dtype, name], folder, why) for name in matrix.samplings]


def _row(cell: str, dtype: str, sampling: str, golden: Path, folder: Path, why: str) -> Row:
    if why:
        return Row(cell=cell, dtype=dtype, sampling=sampling, verdict="not run", headline=why)
    try:
        answers = load_answers(folder, slug(sampling))
        comparison, _ = judge_answers(Golden.load(golden), answers, None, "rl", Context())
    except ParityError as error:
        return Row(cell=cell, dtype=dtype, sampling=sampling, verdict="not run", headline=str(error))
    actual = next(iter(answers.replays.values()))  # decode, or what stands in its place
    return Row(
        cell=cell,
        dtype=dtype,
        sampling=sampling,
        verdict=comparison.verdict,
        headline=comparison.headline,
        version=actual.engine_version,
        distribution=actual.distribution(),
        findings=comparison.findings,
        metrics=dict(comparison.metrics),
    )


def _token_ids(matrix: Matrix) -> list[list[int]]:
    """The prompts as token ids, so that every engine reads the same ones."""
    prompts = check_prompts(matrix.prompts)
    if all(isinstance(prompt, list) and isinstance(prompt[0], int) for prompt in prompts):
        return [list(prompt) for prompt in prompts]
    tokenizer = tokenizer_of(find_model(matrix.model, matrix.root))
    return [list(prompt.token_ids) for prompt in tokenize(prompts, tokenizer)]
