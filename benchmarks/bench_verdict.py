"""A verdict on 200 x 64 tokens, noise floor and permutation test included; and what a noise floor costs beside its recording.

The verdict is timed without an engine, on a made-up trace and floor. On the real engine the recording pass, the floor and
what a check asks of the engine are timed apart.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from common import REPO, SPEC, long_prompts, moved, report_number, share_the_machine, synthetic_trace, time_in_turns

from pytest_logprob_parity.check.check import check_golden
from pytest_logprob_parity.comparison.evidence import Evidence
from pytest_logprob_parity.comparison.judge import judge
from pytest_logprob_parity.comparison.tolerance import default_tolerance, with_floor
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.golden.noise_floor import REPEATS, NoiseFloor
from pytest_logprob_parity.spec import Sampling
from pytest_logprob_parity.trace.batch_composition import BatchCompositions

SEQUENCES, TOKENS, GROUP, PROMPT_LENGTH = 200, 64, 8, 160
SIGMA = 0.005
BAR_SECONDS = 2.0
ROUNDS, ENGINE_ROUNDS = 15, 3


def seconds(times: Sequence[float]) -> str:
    return f"{statistics.median(times):.3f} s (fastest {min(times):.3f}, slowest {max(times):.3f}, {len(times)} rounds)"


def bench_verdict(path: Path) -> None:
    trace = synthetic_trace(SEQUENCES, TOKENS, k=5, group=GROUP)
    rng = np.random.default_rng(2)
    repeats = trace.logprobs + rng.normal(0, SIGMA, (REPEATS, trace.num_tokens)).astype(np.float32)
    Golden(trace=trace, floor=NoiseFloor(repeats, BatchCompositions(), reproduces=True)).save(path)
    candidate = moved(trace, SIGMA)

    def verdict(golden: Golden) -> object:
        limits = with_floor(default_tolerance(trace.dtype), golden.floor)
        evidence = Evidence(floor=golden.floor, draw=lambda: candidate.logprobs, setup="compatible")
        return judge(golden.trace, candidate, limits, "noise", evidence)

    read = Golden.load(path)
    print(f"{trace.num_sequences} x {TOKENS} tokens, top-{trace.top_k}, {REPEATS} repeats, {path.stat().st_size / 1e6:.2f} MB; "
          f"{verdict(read).difference}")  # type: ignore[attr-defined]  # fmt: skip
    works = {
        "reading the golden": lambda: Golden.load(path),
        "the verdict": lambda: verdict(read),
        "both": lambda: verdict(Golden.load(path)),
    }
    times = time_in_turns(works, rounds=ROUNDS)
    for name, taken in times.items():
        print(f"  {name}: {seconds(taken)}")
    median = statistics.median(times["both"])
    report_number(f"reading and verdict / {BAR_SECONDS:g} s", median / BAR_SECONDS, 1, f"{median:.3f} s")


def bench_floor(engine: Engine, path: Path) -> None:
    sampling = Sampling(temperature=0.7, top_p=0.95, ignore_eos=True, max_tokens=TOKENS, n=GROUP, seed=1)
    prompts = long_prompts(engine.tokenizer, SEQUENCES // GROUP, PROMPT_LENGTH)

    def record(repeats: int) -> object:
        return check_golden(path, engine, prompts=prompts, sampling=sampling, update=True, repeats=repeats)

    record(0)  # the first call compiles kernels
    trace = Golden.load(path).trace
    print(f"real engine, {trace.dtype}: {trace.num_sequences} x {TOKENS} tokens, prompts of {PROMPT_LENGTH}")
    times = time_in_turns(
        {
            "the run alone": lambda: engine.generate(prompts, sampling),
            "recording without a floor": lambda: record(0),
            "decode replay": lambda: engine.replay(trace),
            "a replay in sampled batch compositions": lambda: engine.replay_in_batch_compositions(
                trace, BatchCompositions(), 0
            ),
            f"recording with a floor of {REPEATS}": lambda: record(REPEATS),
            "a check on the same engine": lambda: check_golden(path, engine),
        },
        rounds=ENGINE_ROUNDS,
        warmups=0,
    )
    for name, taken in times.items():
        print(f"  {name}: {seconds(taken)}")
    print(f"  {Golden.load(path).floor.describe()}")  # type: ignore[union-attr]
    show_ratios(times)


def show_ratios(times: Mapping[str, Sequence[float]]) -> None:
    """No bar: the floor is paid once, when recording."""
    plain = times["recording without a floor"]
    cost = [a - b for a, b in zip(times[f"recording with a floor of {REPEATS}"], plain, strict=True)]
    ratios = [a / b for a, b in zip(cost, plain, strict=True)]
    print(f"the noise floor beside the recording pass: ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to "
          f"{max(ratios):.1f}): {seconds(cost)}", flush=True)  # fmt: skip


def main() -> None:
    share_the_machine()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        bench_verdict(path)
        with Pool(REPO, print) as pool:
            bench_floor(pool.engine(SPEC), path)


if __name__ == "__main__":
    main()
