"""Shared by the benchmarks: two things timed in turns in one run, their ratio against a bar, and what they are fed."""

from __future__ import annotations

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytest_logprob_parity.spec import EngineSpec, Sampling
from pytest_logprob_parity.trace import Trace, offsets_of

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "models"))

from arith import make_messages, make_problem  # noqa: E402

SPEC = EngineSpec("models/tiny-arith", dtype="bfloat16")
SAMPLING = Sampling(temperature=0.7, max_tokens=64, n=4, seed=1, logprobs=5)


def arith_prompts(count: int = 16) -> list[list[dict[str, str]]]:
    """Word problems for the tiny models, as message lists."""
    rng = random.Random(0)
    return [[{"role": "user", "content": make_problem(rng).question}] for _ in range(count)]


def long_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Conversations of several word problems, cut to their last `length` token ids: long enough that shapes move numbers."""
    rng = random.Random(0)
    prompts = []
    for _ in range(count):
        messages = make_messages(rng, 8)[:-1]  # the last answer is the engine's to write
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False)[-length:])
    assert {len(prompt) for prompt in prompts} == {length}
    return prompts


def share_the_machine() -> None:
    """Let threads that wait for each other sleep, unless told otherwise: on cores with other work, spinning costs tenfold.

    Bits do not depend on it. Has to come before anything imports torch, which reads these.
    """
    for name, value in (("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "0"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 2)))


def time_in_turns(
    works: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmups: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each work in each round; a round runs them one after the other.

    None pays for another's garbage: it is collected before the clock starts.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-warmups, rounds):
        for name, work in works.items():
            gc.collect()
            began = clock()
            result = work()
            seconds = clock() - began
            del result
            if turn >= 0:
                times[name].append(seconds)
    return times


def report_ratio(name: str, a: Sequence[float], b: Sequence[float], bar: float) -> None:
    """The median of the rounds' ratios a/b against the bar, with its quartiles and the ratio of the fastest runs."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        f"{name}: ratio {ratio:.3f} (bar {bar:g}): a={statistics.median(a):.3f} s b={statistics.median(b):.3f} s, "
        f"quartiles {low:.3f} to {high:.3f}, fastest {min(a) / min(b):.3f}, {len(ratios)} rounds: {_verdict(ratio, bar)}",
        flush=True,
    )


def report_number(name: str, ratio: float, bar: float, detail: str) -> None:
    """A ratio that was counted, not timed."""
    print(f"{name}: ratio {ratio:.3f} (bar {bar:g}): {detail}: {_verdict(ratio, bar)}", flush=True)


def report_extra(name: str, a: Sequence[float], b: Sequence[float], bar: float) -> None:
    """The median of the rounds' differences a - b in milliseconds against the bar, with its quartiles."""
    extra = [1000 * (x - y) for x, y in zip(a, b, strict=True)]
    low, median, high = statistics.quantiles(extra, n=4, method="inclusive")
    print(
        f"{name}: {median:.1f} ms more (bar {bar:g}): a={1000 * statistics.median(a):.0f} ms "
        f"b={1000 * statistics.median(b):.0f} ms, quartiles {low:.1f} to {high:.1f}, "
        f"fastest {1000 * (min(a) - min(b)):.1f}, {len(extra)} rounds: {_verdict(median, bar)}",
        flush=True,
    )


def _verdict(value: float, bar: float) -> str:
    return "meets" if value <= bar else "misses"


def synthetic_trace(sequences: int = 5000, length: int = 200, k: int = 20, group: int = 8) -> Trace:
    """A trace of `sequences` x `length` tokens with top-`k`: random logits, the likeliest k of them normalised."""
    rng = np.random.default_rng(0)
    tokens = sequences * length
    top = -np.sort(rng.exponential(1.0, (tokens, k)).astype(np.float32), axis=1)
    top -= np.log(np.exp(top).sum(axis=1, keepdims=True)) + np.float32(0.05)  # about 5 % of the mass lies outside
    ids = rng.integers(0, 150_000, (tokens, k), dtype=np.int32)
    ranks = np.minimum(rng.geometric(0.6, tokens), k).astype(np.int32)
    rows = np.arange(tokens)
    prompts = [rng.integers(0, 150_000, 100) for _ in range(sequences // group)]
    return Trace.from_arrays(
        prompt_token_ids=np.concatenate(prompts),
        prompt_offsets=offsets_of(prompts),
        token_ids=ids[rows, ranks - 1],
        sequence_offsets=np.arange(sequences + 1) * length,
        logprobs=top[rows, ranks - 1],
        ranks=ranks,
        top_token_ids=ids,
        top_logprobs=top,
        finish_reasons=np.full(sequences, 2),
        group=np.arange(sequences) // group,
        seeds=np.arange(sequences),
        sampling=Sampling(temperature=0.7, max_tokens=length, n=group, logprobs=k),
        engine="vllm",
        engine_version="0.32.0",
        dtype="bfloat16",
    )


def moved(trace: Trace, sigma: float) -> Trace:
    """The same tokens with every logprob off by N(0, sigma) nats."""
    rng = np.random.default_rng(1)

    def move(column: Any) -> Any:
        return column + rng.normal(0, sigma, column.shape).astype(np.float32)

    return trace.with_(logprobs=move(trace.logprobs), top_logprobs=move(trace.top_logprobs))
