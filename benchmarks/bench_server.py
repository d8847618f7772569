"""The check of a golden of 50 x 64 tokens against a warm server: what `pytest` takes beyond what it takes to start at all.

Each run is a process of its own, as in the edit-test loop; `pytest` on a file with one empty test is the start.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from common import REPO, share_the_machine

ROUNDS = 5
BAR = 5.0
TEST = """
import sys
sys.path.insert(0, {benchmarks!r})
import pytest
from common import arith_prompts

@pytest.mark.logprob_parity(model={model!r}, dtype={dtype!r})
def test_rollouts(parity_engine, golden_trace):
    golden_trace.check(
        parity_engine, prompts=arith_prompts(50),
        sampling=dict(temperature=0.7, top_p=0.9, max_tokens=64, min_tokens=64, seed=1),
    )
"""


def serve(model: str, dtype: str) -> tuple[subprocess.Popen[str], str]:
    """A warm server, and its address."""
    command = [sys.executable, "-m", "pytest_logprob_parity.cli", "serve", model, "--dtype", dtype, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    url = next(line.split()[-1] for line in process.stdout if "it will listen at" in line)
    threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop the server
    began = time.monotonic()
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            assert process.poll() is None, "the server did not start"
            time.sleep(0.1)
            continue
        print(f"the server listens after {time.monotonic() - began:.1f} s")
        return process, url


def run(folder: Path, *arguments: str) -> tuple[float, str]:
    """Seconds of one pytest process, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - began, done.stdout


def bench(dtype: str) -> None:
    model = str(REPO / "models" / "tiny-arith")
    process, url = serve(model, dtype)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "test_it.py").write_text(
                TEST.format(benchmarks=str(REPO / "benchmarks"), model=model, dtype=dtype), "utf-8"
            )
            (folder / "test_nothing.py").write_text("def test_nothing(): pass\n", "utf-8")
            at = f"--parity-server={url}"
            seconds, _ = run(folder, "test_it.py", "--update-golden", at)
            print(f"{dtype}: recording with its noise floor {seconds:.1f} s")
            checks, starts, text = [], [], ""
            for _ in range(ROUNDS):
                starts.append(run(folder, "test_nothing.py")[0])
                seconds, text = run(folder, "test_it.py", at)
                checks.append(seconds)
            said = next(line.strip() for line in text.splitlines() if line.startswith("  pass"))
            extra = [check - start for check, start in zip(checks, starts, strict=True)]
            verdict = "meets" if statistics.median(extra) < BAR else "misses"
            print(
                f"{dtype}: check of 50 x 64 tokens {statistics.median(extra):.2f} s beyond pytest's start (bar {BAR:g}): "
                f"{statistics.median(checks):.2f} s, start {statistics.median(starts):.2f} s, slowest {max(extra):.2f} s, "
                f"{ROUNDS} rounds: {verdict}"
            )
            print(f"  {said}")
            print(f"  {json.loads(urllib.request.urlopen(f'{url}/logprob_parity/config').read())['hardware']}", flush=True)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main() -> None:
    share_the_machine()
    for dtype in ("bfloat16", "float32"):
        bench(dtype)


if __name__ == "__main__":
    main()
