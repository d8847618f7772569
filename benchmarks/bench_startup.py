"""What the plugin adds to the start of pytest, in a folder with one trivial test, where nothing uses the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import report_extra, time_in_turns

ROUNDS = 41
BAR_MS = 30


def pytest_run(folder: Path, *arguments: str) -> Callable[[], object]:
    """Bytecode is kept, as it is wherever nobody forbids it: the warm-up rounds write it, for both sides."""
    command = [sys.executable, "-m", "pytest", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return lambda: subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n", "utf-8")
        for arguments in (("--collect-only", "-q"), ("--collect-only",), ("--version",)):
            works = {
                "with": pytest_run(folder, *arguments),
                "without": pytest_run(folder, *arguments, "-p", "no:logprob_parity"),
            }
            times = time_in_turns(works, rounds=ROUNDS)
            title = f"pytest {' '.join(arguments)}: with the plugin - without"
            report_extra(title, times["with"], times["without"], BAR_MS)


if __name__ == "__main__":
    main()
