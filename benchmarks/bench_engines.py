"""Engines started against distinct specs: 20 tests over 3 specs, interleaved in file order, in a project of their own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import REPO, report_number

SPECS = (
    {"model": "models/tiny-arith", "dtype": "bfloat16"},
    {"model": "models/tiny-arith", "dtype": "float32"},
    {"model": "models/tiny-arith-step2", "dtype": "bfloat16"},
)
TESTS = 20
STARTED = "logprob-parity: started"
TEST = """
@pytest.mark.logprob_parity(**{spec!r})
def test_{number}(parity_engine, golden_trace):
    sampling = {{"temperature": 0.7, "max_tokens": 8, "seed": {number}}}
    golden_trace.check(parity_engine, prompts=["What is {number} + 1?"], sampling=sampling)
"""


def make_project(folder: Path) -> None:
    """Two files, so that every spec comes back in the second one."""
    (folder / "models").symlink_to(REPO / "models")
    (folder / "pytest.ini").write_text("[pytest]\n", "utf-8")
    for part in range(2):
        numbers = range(part, TESTS, 2)
        tests = [TEST.format(spec=SPECS[number % len(SPECS)], number=number) for number in numbers]
        (folder / f"test_part{part}.py").write_text("import pytest\n" + "".join(tests), "utf-8")


def run_pytest(folder: Path, *arguments: str) -> list[str]:
    """The lines that pytest printed. Raises CalledProcessError, after showing them, where a test failed."""
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout)
    done.check_returncode()
    return done.stdout.splitlines()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_project(folder)
        for what, arguments in (("recording", ["--update-golden"]), ("checking", [])):
            lines = run_pytest(folder, *arguments)
            started = [line[line.index(STARTED) :] for line in lines if STARTED in line]  # it may stand behind pytest's dots
            print("\n".join([*started, *lines[-2:]]))
            detail = f"{len(started)} started, {len(SPECS)} distinct, {TESTS} tests"
            report_number(f"engines started / distinct specs, {what}", len(started) / len(SPECS), 1, detail)


if __name__ == "__main__":
    main()
