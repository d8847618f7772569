"""A real RL run in four arms: GSPO on arithmetic, rollouts by vLLM, weight updates in flight, and a parity gate before step 1.

python examples/rl-run/run.py [--steps 40] [--arms NAME ...] [--out FOLDER]

The arms differ in how the engine reports and keeps what it has computed, and in nothing else: problems, seeds, trainer and
updates are the same. A gate that fails is told, and the arm trains all the same: that is what the figures show. Writes
metrics.json and the figures to --out.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from trainer import Trainer

from pytest_logprob_parity import (
    Comparison,
    EngineSpec,
    MismatchError,
    Sampling,
    Trace,
    TransformersScorer,
    assert_trainer_parity,
    assert_weight_update,
    write_probe,
)
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.trainer.frameworks import framework
from pytest_logprob_parity.trainer.frameworks.base import Pairs

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models"))
from arith import Problem, make_answer, make_problem, reward  # noqa: E402

MODEL = str(ROOT / "models" / "tiny-arith")
TEMPERATURE = 0.7
PROBLEMS, PROMPTS, GROUP, TOKENS = 128, 8, 8, 48
#: A request has written this many tokens when the weights of the next step arrive.
AT_TOKEN = 12

#: vLLM's V1 as PipelineRL first met it, but for async scheduling: beside it there is no token to update the weights at.
FIRST = {"dtype": "bfloat16", "profile": "pipelinerl-v1-first", "async_scheduling": False}
ARMS: dict[str, dict[str, Any]] = {
    "reference": {"dtype": "float32", "profile": "pipelinerl"},
    "first V1 run": FIRST,
    "processed only": {**FIRST, "logprobs_mode": "processed_logprobs"},
    "all fixed": {"dtype": "bfloat16", "profile": "pipelinerl"},
}


def spec_of(arm: str) -> EngineSpec:
    """The engine of an arm."""
    return EngineSpec(MODEL, enforce_eager=True, **ARMS[arm])


def gate(engine: Engine, probe: Path, problems: int = 25) -> Iterator[tuple[str, Comparison]]:
    """What has to hold before a step is taken: each check's name, and its comparison, whatever it says.

    The update that is tried is to `probe` (see write_probe), whose keys and values are told from the model's in bfloat16.
    """
    prompts = [_messages(problem) for problem in _problems("gate", problems)]
    sampling = Sampling(temperature=TEMPERATURE, max_tokens=TOKENS, n=GROUP, seed=1)
    plain = Sampling(max_tokens=TOKENS, seed=2)  # T=1, where raw logprobs mean the same: an update can be seen in both modes
    steps = {"before": MODEL, "after": probe}

    rollouts = engine.generate(prompts, sampling)
    yield "the trainer agrees with the rollouts", _judged(assert_trainer_parity, rollouts, TransformersScorer(MODEL))
    running = engine.update_weights(probe, at_token=AT_TOKEN, prompts=prompts, sampling=plain)
    yield "running requests go on with the new weights", _judged(assert_weight_update, running, **steps)
    fresh = engine.generate(prompts, plain)
    yield "fresh requests are the new weights' alone", _judged(assert_weight_update, fresh, **steps, clear_cache=True)


def _judged(check: Callable[..., Comparison], *arguments: Any, **more: Any) -> Comparison:
    try:
        return check(*arguments, **more)
    except MismatchError as error:
        return error.comparison


def train(engine: Engine, steps: int) -> Iterator[dict[str, float]]:
    """The metrics of each step: of rollouts under whose requests the weights of the step before arrived."""
    trainer, tokenizer = Trainer(MODEL, TEMPERATURE), engine.tokenizer
    problems, rng = _problems("train", PROBLEMS), random.Random("order")
    batch = rng.sample(problems, PROMPTS)
    rollouts: Trace | None = engine.generate(*_request(batch, 0))
    for step in range(1, steps + 1):
        assert rollouts is not None
        rewards = _rewards(rollouts, batch, tokenizer)
        seen = trainer.step(rollouts, rewards)
        told = framework("pipelinerl").metrics(Pairs.of(rollouts, rollouts.with_(logprobs=seen.logprobs)))
        lag = rollouts.lag()
        yield {
            "step": step, "reward": float(np.mean(rewards)), "entropy": seen.entropy, "clipped": seen.clipped,
            "lag": 0.0 if lag is None else float(lag.mean()), **told,
        }  # fmt: skip
        batch = rng.sample(problems, PROMPTS)
        prompts, sampling = _request(batch, step)
        rollouts = engine.update_weights(trainer.weights(), at_token=AT_TOKEN, prompts=prompts, sampling=sampling)


def _request(batch: list[Problem], step: int) -> tuple[list[Any], Sampling]:
    sampling = Sampling(temperature=TEMPERATURE, max_tokens=TOKENS, n=GROUP, seed=1 + step * PROMPTS * GROUP)
    return [_messages(problem) for problem in batch], sampling


def _rewards(rollouts: Trace, batch: list[Problem], tokenizer: Any) -> list[float]:
    texts = [tokenizer.decode(rollouts.completion(i), skip_special_tokens=True) for i in range(rollouts.num_sequences)]
    return [reward(batch[int(group)], text) for group, text in zip(rollouts.group, texts, strict=True)]


def _problems(seed: str, count: int) -> list[Problem]:
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(count)]


def _messages(problem: Problem) -> list[dict[str, str]]:
    """A question behind two that are answered: the same two for all, as few-shot prompts have them."""
    rng = random.Random("examples")
    turns = []
    for example in _problems("shown", 2):
        turns += [{"role": "user", "content": example.question}, {"role": "assistant", "content": make_answer(example, rng)}]
    return [*turns, {"role": "user", "content": problem.question}]


def accuracy(engine: Engine) -> float:
    """The share of 200 fresh problems that greedy decoding solves."""
    problems = _problems("fresh", 200)
    trace = engine.generate([_messages(p) for p in problems], Sampling(temperature=0.0, max_tokens=TOKENS))
    return float(np.mean(_rewards(trace, problems, engine.tokenizer)))


def run_arm(pool: Pool, arm: str, steps: int, probe: Path) -> dict[str, Any]:
    """Gate and training of one arm."""
    began = time.monotonic()
    print(f"== {arm}", flush=True)
    checks = []
    for name, comparison in gate(pool.engine(spec_of(arm)), probe):
        causes = [str(finding) for finding in comparison.findings]
        checks.append({"check": name, "verdict": comparison.verdict, "headline": comparison.headline, "findings": causes})
        print(f"  {comparison.verdict:10} {name}: {comparison.headline}")
        print("".join(f"             {cause}\n" for cause in causes), end="", flush=True)
    engine = pool.engine(spec_of(arm))  # with the checkpoint's weights again
    before, rows = accuracy(engine), []
    for row in train(engine, steps):
        rows.append(row)
        if row["step"] % 10 == 0:
            shown = ("reward", "rl/kl_new_old", "rl/ratio_new_old", "clipped", "rl/ess", "entropy", "lag")
            print(
                f"  step {row['step']:3.0f}  " + "  ".join(f"{k.removeprefix('rl/')} {row[k]:.4g}" for k in shown), flush=True
            )
    after, seconds = accuracy(engine), time.monotonic() - began
    print(f"  greedy accuracy on fresh problems {before:.3f} -> {after:.3f}; {seconds:.0f} s", flush=True)
    return {"gate": checks, "steps": rows, "accuracy": [before, after], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("build/rl-run"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = {}
    with Pool() as pool, tempfile.TemporaryDirectory() as place:
        probe = write_probe(MODEL, Path(place) / "probe")
        for arm in args.arms:
            results[arm] = run_arm(pool, arm, args.steps, probe)
            (args.out / "metrics.json").write_text(json.dumps(results, indent=1), "utf-8")
    from figures import draw

    draw(results, args.out)


if __name__ == "__main__":
    main()
