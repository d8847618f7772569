"""`logprob-parity matrix`: goldens of one engine version, checked in many others."""

from __future__ import annotations

import argparse
from pathlib import Path

from .json_output import to_text
from .verb import Verbs, add_verb, say, tell


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "matrix",
        "check goldens of one engine version in many others",
        "Each cell of the plan runs in its own environment, which is made on first use (by uv where it is installed, else by "
        "pip) and kept. Cells that have answers from an earlier run do not run again. Writes matrix.json and matrix.md.",
        run=run,
        status={0: "every cell passed", 1: "a cell failed, is unverified or did not run"},
    )
    verb.add_argument("plan", type=Path, help="matrix.toml: cells, environments, samplings, prompts")
    verb.add_argument("--out", type=Path, default=Path("parity-matrix"), help="answers and reports (default: %(default)s)")
    verb.add_argument("--environments", type=Path, help="where environments are kept (default: the user's cache)")
    verb.add_argument("--executor", choices=("local", "ray"), default="local", help="where cells run (default: %(default)s)")
    verb.add_argument("--ray-address", help="address of the Ray cluster (default: a cluster on this machine)")
    verb.add_argument("--cores", type=_from_1, help="number of cores that all cells share (default: all)")
    verb.add_argument("--update-golden", action="store_true", help="record the reference's goldens again")


def _from_1(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def run(given: argparse.Namespace) -> int:
    """Exit status 1 where a cell failed, is unverified or did not run."""
    from ..matrix.environments import default_home
    from ..matrix.executors import Executor, LocalExecutor, RayExecutor
    from ..matrix.plan import load_plan
    from ..matrix.run import run_matrix
    from ..matrix.table import page

    plan = load_plan(given.plan)
    executor: Executor = RayExecutor(given.ray_address) if given.executor == "ray" else LocalExecutor(given.cores)
    home, out = given.environments or default_home(), given.out.absolute()
    rows = run_matrix(plan, executor, out, home.absolute(), tell, update=given.update_golden)
    text = "\n".join(page(rows, plan.reference))
    (out / "matrix.json").write_text(to_text("matrix", {"rows": [row.to_json() for row in rows]}), "utf-8")
    (out / "matrix.md").write_text(text + "\n", "utf-8")
    say(text)
    return 0 if rows and all(row.verdict == "pass" for row in rows) else 1
