"""OMP_WAIT_POLICY=PASSIVE beside OpenMP's own: seconds of one check of 48 tokens a sequence, on a machine of our own and on one
with a busy loop for each core; and whether the logprobs keep their bits.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from typing import IO, cast

from common import REPO, arith_prompts, report_number, report_ratio, time_in_turns

ROUNDS = 9
TOKENS = 48
#: On a quiet machine sleeping threads may cost this much more.
QUIET_BAR = 1.25
#: On a busy one they must take less.
BUSY_BAR = 0.5


class Child:
    """An engine in a process with a wait policy of its own; `check()` replays its first trace once."""

    def __init__(self, policy: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if policy:
            environment["OMP_WAIT_POLICY"] = policy
        self._process = subprocess.Popen(
            [sys.executable, __file__, "child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.digests = {self._answer()}

    def check(self) -> None:
        stdin = cast("IO[str]", self._process.stdin)
        stdin.write("check\n")
        stdin.flush()
        self.digests.add(self._answer())

    def close(self) -> None:
        cast("IO[str]", self._process.stdin).close()
        self._process.wait()

    def _answer(self) -> str:
        for line in cast("IO[str]", self._process.stdout):
            if line.startswith("{"):
                return str(json.loads(line)["digest"])
        raise RuntimeError(f"the child ended with {self._process.wait()}")


def child() -> None:
    """Generate once, then replay for every line that comes; prints a digest of the logprobs each time."""
    from pytest_logprob_parity import EngineSpec, Sampling, open_engine

    with open_engine(EngineSpec(str(REPO / "models" / "tiny-arith"), dtype="bfloat16")) as engine:
        trace = engine.generate(arith_prompts(8), Sampling(temperature=0.7, max_tokens=TOKENS, ignore_eos=True, seed=1))
        told = trace
        while True:
            print(json.dumps({"digest": hashlib.sha256(told.logprobs.tobytes()).hexdigest()}), flush=True)
            if not sys.stdin.readline():
                return
            told = engine.replay(trace)


def main() -> None:
    children = {"passive": Child("PASSIVE"), "default": Child("")}
    for name, loops, bar in (("quiet", 0, QUIET_BAR), ("busy", os.cpu_count() or 1, BUSY_BAR)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            time.sleep(1)
            times = time_in_turns({key: one.check for key, one in children.items()}, rounds=ROUNDS, warmups=1)
        finally:
            for loop in busy:
                loop.kill()
                loop.wait()
        report_ratio(
            f"a check of {TOKENS} tokens, {name} machine: passive / OpenMP's own", times["passive"], times["default"], bar
        )
    for one in children.values():
        one.close()
    digests = set().union(*(one.digests for one in children.values()))
    report_number("logprobs under either policy: other bits", len(digests) - 1, 0, "digests of all replays, beyond the first")


if __name__ == "__main__":
    child() if sys.argv[1:] == ["child"] else main()
