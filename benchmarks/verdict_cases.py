"""Lists the cases that `same_verdicts.py` has two checkouts answer: goldens, changes of their traces, scripts and engines."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from changed_traces import CHANGES


def goldens_below(folder: Path) -> list[str]:
    """The goldens and traces of a checkout, as paths below it; its models' weights are none."""
    listed = subprocess.run(["git", "ls-files", "*.safetensors"], cwd=folder, capture_output=True, text=True, check=True)
    return sorted(path for path in listed.stdout.split() if not path.startswith("models/"))


def options(rng: random.Random) -> dict[str, Any]:
    """A level, an objective and a tolerance for one case."""
    return {
        "level": rng.choice(["rl", "rl", "noise", "bitwise"]),
        "objective": rng.choice(["token", "sequence", "truncated", "unclipped"]),
        "tolerance": rng.choice([None] * 6 + ["fp8", "int8", {"rms_diff": 0.2}, {"outlier": 1.0, "mean_diff": 0.1}]),
        "bare": rng.choice([None, None, True]),
    }


def cases_of_pairs(goldens: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each golden shown, and held against itself and every other one."""
    rng = random.Random(1)
    for golden in goldens:
        yield {"kind": "show", "golden": golden}
        for actual in goldens:
            pair = {"golden": golden, "actual": actual}
            yield {"kind": "diff", **pair, "level": rng.choice([None, "bitwise", "noise"])}
            yield from ({"kind": kind, **pair, **options(rng)} for kind in ("check", "compare", "helpers"))


def cases_of_changes(goldens: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each golden against every change of its trace and some mixtures of changes, and with other settings."""
    rng = random.Random(2)
    for golden in goldens:
        mixtures = [rng.sample(sorted(CHANGES), rng.choice([2, 2, 3])) for _ in range(60)]
        for changes in [*([name] for name in CHANGES), *mixtures]:
            told = {"golden": golden, "changes": changes, "seed": rng.randrange(10**6)}
            trained = {
                "scorer": rng.choice([None, None, "rollouts", "trainer"]),
                "trainer_dtype": rng.choice(["float32", "bfloat16", "float16", "unknown"]),
                "metrics": rng.choice([None, "trl", "verl", "openrlhf", "nemo-rl", "nemo-aligner", "pipelinerl"]),
            }
            kind = rng.choice(["compare", "helpers", "diff"])
            yield {"kind": "check", **told, **options(rng)}
            yield {"kind": kind, **told, **options(rng)}
            yield {"kind": "trainer", **told, **options(rng), **trained}
    for golden in goldens[::4]:
        for setting in range(150):
            changes = rng.choice([["noise 0.2"], ["mean 0.05"], ["the same"], ["noise 0.01"]])
            yield {"kind": "diff", "golden": golden, "changes": changes, "seed": setting, "setting": setting}


def all_cases(goldens: Sequence[str], more: Sequence[Path], engines: Sequence[str], every: int) -> list[dict[str, Any]]:
    """The cases of the goldens, of further folders, and of engines."""
    files = sorted(str(path) for folder in more for path in folder.rglob("*.safetensors"))
    scripts = sorted(str(path) for folder in more for path in folder.rglob("*.py"))
    return [
        *cases_of_pairs([*goldens, *files]),
        *(list(cases_of_changes([*goldens, *files]))[::every] if every else []),
        *({"kind": "script", "golden": path} for path in scripts),
        *({"kind": "engine", "engine": kind} for kind in engines),
    ]
