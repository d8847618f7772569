"""What the plugin adds to the start of pytest, in a folder with one trivial test, where nothing uses the plugin."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import report_extra, time_in_turns

ROUNDS = 25
BAR_MS = 30


def pytest_run(folder: Path, *arguments: str) -> Callable[[], object]:
    command = [sys.executable, "-m", "pytest", *arguments]
    return lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_nothing.py").write_text("def test_nothing():\n    pass\n", "utf-8")
        for arguments in (("--collect-only", "-q"), ("--collect-only",), ("--version",), ("-q",)):
            with_plugin, without = pytest_run(folder, *arguments), pytest_run(folder, *arguments, "-p", "no:logprob_parity")
            times = time_in_turns(with_plugin, without, rounds=ROUNDS)
            report_extra(f"pytest {' '.join(arguments)}: with the plugin - without", *times, BAR_MS)


if __name__ == "__main__":
    main()
