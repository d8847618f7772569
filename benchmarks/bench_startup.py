"""What the plugin adds to the start of pytest, in a folder with one trivial test, where nothing uses the plugin."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import report_extra, time_in_turns

ROUNDS = 25
BAR_MS = 30


def pytest_run(folder: Path, *arguments: str) -> Callable[[], object]:
    """Bytecode is kept, as it is wherever nobody forbids it: the warm-up rounds write it, for both sides."""
    command = [sys.executable, "-m", "pytest", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return lambda: subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def children_cpu() -> float:
    """CPU seconds of the processes run so far: waiting for other work on the machine is not in them."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n", "utf-8")
        for arguments in (("--collect-only", "-q"), ("--collect-only",), ("--version",)):
            works = {
                "with": pytest_run(folder, *arguments),
                "without": pytest_run(folder, *arguments, "-p", "no:logprob_parity"),
            }
            for unit, clock in (("wall", time.perf_counter), ("CPU", children_cpu)):
                times = time_in_turns(works, rounds=ROUNDS, clock=clock)
                title = f"pytest {' '.join(arguments)}, {unit} time: with the plugin - without"
                report_extra(title, times["with"], times["without"], BAR_MS)


if __name__ == "__main__":
    main()
