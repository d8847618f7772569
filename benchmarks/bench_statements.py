"""Is what a pass says true? Its two statements about other prompts, held against simulated populations of prompts.

`compare` itself judges goldens of 8 to 400 sequences drawn from populations with shifts by prompt, heavy tails and rare faults.
Stated: with 95 % confidence at most so many of the prompts have a sequence off by so much; and a fault that hits so many of the
prompts is seen (no pass) with 90 % confidence. Each has to hold in no fewer than the stated share of the draws less 0.02.

python benchmarks/bench_statements.py [DRAWS]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from common import report_number

from pytest_logprob_parity import Trace, compare
from pytest_logprob_parity.comparison.intervals import CONFIDENCE, POWER

TOKENS = 24
#: Prompts, and samples of each.
SIZES = ((8, 1), (24, 1), (60, 1), (200, 1), (400, 1), (4, 4), (8, 8), (12, 16), (8, 50), (25, 8), (2, 8), (1, 64))
Rng = np.random.Generator
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """Prompts whose sequences differ by `draw(rng, prompts, samples)` [prompts, samples, tokens] (nats)."""

    name: str
    draw: Callable[[Rng, int, int], Doubles]


def normal(rng: Rng, prompts: int, samples: int, scale: float = 0.02) -> Doubles:
    return rng.normal(0, scale, (prompts, samples, TOKENS))


def lognormal(sigma: float, scale: float) -> Callable[[Rng, int, int], Doubles]:
    def draw(rng: Rng, prompts: int, samples: int) -> Doubles:
        return normal(rng, prompts, samples, scale) * rng.lognormal(-(sigma**2) / 2, sigma, (prompts, 1, 1))

    return draw


def shifted(sd: float) -> Callable[[Rng, int, int], Doubles]:
    return lambda rng, prompts, samples: normal(rng, prompts, samples) + rng.normal(0, sd, (prompts, 1, 1))


def rare(share: float, size: float) -> Callable[[Rng, int, int], Doubles]:
    """A fault of RMS `size` in whole prompts."""

    def draw(rng: Rng, prompts: int, samples: int) -> Doubles:
        hit = rng.random((prompts, 1, 1)) < share
        return normal(rng, prompts, samples) + np.where(hit, rng.normal(0, size, (prompts, samples, TOKENS)), 0)

    return draw


POPULATIONS = (
    Population("noise alone", normal),
    Population("shift by prompt, sd 0.05", shifted(0.05)),
    Population("shift by prompt, sd 0.15", shifted(0.15)),
    Population("lognormal 0.5", lognormal(0.5, 0.1)),
    Population("lognormal 1.0", lognormal(1.0, 0.1)),
    Population("rare fault, 2 % of prompts", rare(0.02, 0.6)),
    Population("rare fault, 10 % of prompts", rare(0.10, 0.6)),
    Population("rare fault, 30 % of prompts", rare(0.30, 0.6)),
)


def golden_of(rng: Rng, prompts: int, samples: int) -> Trace:
    count = prompts * samples
    return Trace.from_arrays(
        prompt_token_ids=np.arange(prompts, dtype=np.int32), prompt_offsets=np.arange(prompts + 1),
        group=np.repeat(np.arange(prompts), samples), token_ids=rng.integers(0, 300, count * TOKENS).astype(np.int32),
        sequence_offsets=np.arange(0, count * TOKENS + 1, TOKENS),
        logprobs=(-rng.exponential(0.7, count * TOKENS) - 3).astype(np.float32), dtype="bfloat16",
    )  # fmt: skip


def bad_share(draw: Callable[[Rng, int, int], Doubles], samples: int, threshold: float) -> float:
    """The population's share of prompts with a sequence whose RMS, its largest token left out, is above `threshold`."""
    d2 = draw(np.random.default_rng(99), 20_000 if samples < 20 else 4_000, samples) ** 2
    rest = (d2.sum(-1) - d2.max(-1)) / TOKENS
    return float(np.mean(np.sqrt(rest).max(-1) > threshold))


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng = np.random.default_rng(0)
    worst_bound = worst_power = 1.0
    print(f"{'population':30s} prompts samples  share of prompts: true, bound holds in   fault at the stated reach: seen in")
    for prompts, samples in SIZES:
        for population in POPULATIONS:
            golden = golden_of(rng, prompts, samples)
            held = seen = 0
            truth = reach = float("nan")
            for _ in range(draws):
                d = population.draw(rng, prompts, samples)
                result = compare(
                    expected=golden, actual=golden.with_(logprobs=(golden.logprobs + d.ravel()).astype(np.float32))
                )
                assert result.shown is not None
                if np.isnan(truth):
                    truth = bad_share(population.draw, samples, result.shown.threshold)
                held += result.shown.share >= truth
                reach = result.shown.reach
                if population.name == "noise alone" and reach < 1:
                    hit = rng.random((prompts, 1, 1)) < reach
                    fault = np.where(hit, 1.25 * result.shown.threshold * rng.choice((-1.0, 1.0), d.shape), 0)
                    faulty = golden.with_(logprobs=(golden.logprobs + (d + fault).ravel()).astype(np.float32))
                    seen += compare(expected=golden, actual=faulty).verdict != "pass"
            worst_bound = min(worst_bound, held / draws)
            told = ""
            if population.name == "noise alone" and reach < 1:
                worst_power = min(worst_power, seen / draws)
                told = f"{reach:.1%}: {seen / draws:.3f}"
            print(
                f"{population.name:30s} {prompts:7d} {samples:7d}  {truth:16.3f} {held / draws:16.3f}   {told:>30s}", flush=True
            )
    report_number("stated confidence of the bound less what comes out", CONFIDENCE - worst_bound, 0.02, f"{worst_bound:.3f}")
    report_number("stated power less what comes out", POWER - worst_power, 0.02, f"{worst_power:.3f}")


if __name__ == "__main__":
    main()
