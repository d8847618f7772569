"""Find the release that changed the logprobs: a binary search over an index's releases, each in its own environment."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ..check.check import judge_answers
from ..check.context import Context
from ..comparison.result import Comparison
from ..comparison.vocabulary import Verdict
from ..errors import EngineError, GoldenError, UsageError
from ..golden import Golden
from ..progress import doing
from .environments import Environment
from .executors import Job, answered, run_job, today
from .installer import DiskFullError
from .worker import load_answers

_NAME: Final = "golden"


@dataclass(frozen=True, slots=True)
class Tried:
    """One release: the comparison of the golden's check in it, or the `problem` for which it did not run."""

    version: str
    comparison: Comparison | None
    problem: str = ""

    @property
    def verdict(self) -> Verdict | Literal["not run"]:
        """The verdict, or `not run`."""
        return "not run" if self.comparison is None else self.comparison.verdict

    @property
    def decided(self) -> bool:
        """Whether its check passed or failed: it did run, and is not unverified."""
        return self.verdict in ("pass", "fail")

    def __str__(self) -> str:
        if self.comparison is None:
            return f"{self.version}: did not run: {self.problem}"
        causes = ", ".join(dict.fromkeys(f.cause or "/".join(f.candidates) for f in self.comparison.findings))
        return f"{self.version}: {self.verdict}" + (f" ({causes})" if causes and not self.comparison.passed else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """The two releases between which the outcome changed, `before` the older one, and all releases `tried`, in order.

    `skipped` lists releases between the two that did not run or are unverified: the outcome may have changed in one of them.
    """

    before: Tried
    after: Tried
    tried: tuple[Tried, ...]
    skipped: tuple[str, ...]


def try_release(
    golden_path: Path, spec: Mapping[str, Any], root: Path, environment: Environment, version: str, out: Path, home: Path,
    notify: Callable[[str], None],
) -> Tried:  # fmt: skip
    """Check a golden in one release, unless an earlier run did; its answers are kept in `out`. Raises DiskFullError."""
    question = {
        **today(spec, root, environment), "root": str(root),
        "model": spec["model"], "spec": {k: v for k, v in spec.items() if k != "model"},
        "prompts": [], "repeats": 0, "record": {}, "check": [_NAME], "environment": environment.digest,
    }  # fmt: skip
    files = {"job.json": json.dumps(question, sort_keys=True).encode(), f"{_NAME}.golden.safetensors": golden_path.read_bytes()}
    folder = out / version
    job = Job(name=version, environment=environment, files=files, variables={}, cpus=2, gpus=0, minutes=20)
    if not answered(job, folder):
        for old in folder.glob("*") if folder.is_dir() else ():
            old.unlink()
        why = run_job(job, folder, home, notify)
        if why:
            return Tried(version, None, why)
    try:
        answers = load_answers(folder, _NAME)
        comparison, _ = judge_answers(Golden.load(golden_path), answers, None, "rl", Context())
    except GoldenError as error:
        return Tried(version, None, str(error))
    return Tried(version, comparison)


def bisect(
    versions: Sequence[str], attempt: Callable[[str], Tried], notify: Callable[[str], None], cause: str = ""
) -> Switch:  # fmt: skip
    """The two neighbouring releases of `versions` (oldest first) between which the outcome changes.

    The outcome is whether the golden passes, or with `cause` whether that is among its findings. Where a release does not
    run, or its check is unverified, the nearest other one is tried. Raises UsageError where both ends have the same outcome,
    EngineError where one of them does not run or is unverified, and where there is no disk left.
    """
    outcome_of = functools.partial(_has, cause=cause) if cause else _passes
    tried: dict[str, Tried] = {}

    def ask(version: str) -> Tried:
        if version not in tried:
            try:
                with doing(f"release {version}, {len(tried) + 1} of about {2 + math.ceil(math.log2(len(versions)))}"):
                    tried[version] = attempt(version)
            except DiskFullError as error:
                raise EngineError(f"the search stopped at {Tried(version, None, str(error))}") from None
            notify(str(tried[version]))
        return tried[version]

    ends = [ask(versions[0]), ask(versions[-1])]
    for end in ends:
        if not end.decided:
            raise EngineError(f"--good and --bad both need a check that passes or fails: {end}")
    if outcome_of(ends[0]) == outcome_of(ends[1]):
        raise UsageError(f"--good and --bad have the same outcome, so no release changed it: {ends[0]}, and {ends[1]}")
    low, high = 0, len(versions) - 1
    while high - low > 1:
        middle = (low + high) // 2
        for place in sorted(range(low + 1, high), key=lambda n: abs(n - middle)):
            outcome = ask(versions[place])
            if outcome.decided:
                break
        else:
            break  # no release between the two is decided
        if outcome_of(outcome) == outcome_of(ends[0]):
            low = place
        else:
            high = place
    order = {version: n for n, version in enumerate(versions)}
    return Switch(
        before=tried[versions[low]],
        after=tried[versions[high]],
        tried=tuple(sorted(tried.values(), key=lambda t: order[t.version])),
        skipped=tuple(versions[low + 1 : high]),
    )


def _has(tried: Tried, cause: str) -> bool:
    return tried.comparison is not None and any(finding.cause == cause for finding in tried.comparison.findings)


def _passes(tried: Tried) -> bool:
    return tried.comparison is not None and tried.comparison.passed
