"""Record a golden on a real vLLM engine, check it, and check it under vLLM's own defaults: that one has to fail.

python examples/demo.py        # or: make demo, which sets everything up first
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "demo" / "quickstart"


class Run:
    """One pytest run on the copy of the quickstart: starts at once, and is shown when asked."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments],
            cwd=WORK,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def show(self, title: str, on_line: Callable[[], None] = lambda: None) -> tuple[int, str]:
        """Print what it prints, and call `on_line` after each line; its exit status and output."""
        print(f"\n== {title}\n$ pytest {' '.join(self._arguments)}", flush=True)
        lines = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print("  " + line, end="", flush=True)
            lines.append(line)
            on_line()
        status = self._process.wait()
        print(f"  (exit status {status}, {time.monotonic() - self._began:.0f} s after its start)")
        return status, "".join(lines)


def main() -> int:
    """Return 0 where all three runs ended as they should."""
    shutil.rmtree(WORK.parent, ignore_errors=True)
    shutil.copytree(
        ROOT / "examples" / "quickstart", WORK, ignore=shutil.ignore_patterns("golden", "__pycache__", "parity-obtained")
    )
    (WORK.parent.parent / "models").unlink(missing_ok=True)
    (WORK.parent.parent / "models").symlink_to(ROOT / "models")  # the quickstart names ../../models/tiny-arith
    # Compiling takes 20 s, and a golden to accept another 10: nobody accepts what fails here.
    defaults = ("--parity-set=profile=serving", "--parity-set=enforce_eager=True", "-o", "parity_obtained=trace")
    checks: list[Run] = []

    def start_checks() -> None:
        """Side by side, as soon as the golden is there: most of a start is one thread importing."""
        if not checks and any(WORK.glob("golden/**/*.safetensors")):
            checks.extend((Run(), Run(*defaults)))

    recorded, _ = Run("--update-golden").show("record: what this engine says today is the golden", start_checks)
    if not checks:
        return 1
    same, other = checks
    checked, _ = same.show("check: the same engine in a new process")
    failed, output = other.show("check under vLLM's own defaults, not compiled: this has to fail")
    expected = recorded == 0 and checked == 0 and failed == 1 and "raw_vs_processed" in output
    print(
        "\nAs it should be: recorded, checked, and the change of defaults was caught and named (raw_vs_processed)."
        if expected
        else "\nNot as it should be: see above."
    )
    return 0 if expected else 1


if __name__ == "__main__":
    raise SystemExit(main())
