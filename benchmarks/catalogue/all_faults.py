"""The catalogue: all faults of one model. Nothing here knows how a verdict comes about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pytest_logprob_parity.selftest.truth import Doubles
from pytest_logprob_parity.trace import Trace

from .anatomy import Anatomy, State
from .arithmetic_faults import model_faults
from .expert_faults import expert_faults
from .fault import Fault, each, sequences, spread, tokens
from .place_faults import place_faults
from .weight_faults import step_faults, weight_faults


def catalogue(anatomy: Anatomy, checkpoint: State, other_step: State, length: int, count: int) -> list[Fault]:
    """All faults for prompts of `length` tokens and completions of `count`.

    `other_step` is a later checkpoint of the same training, or {}: its faults are left out then.
    """
    faults = [
        *_requests(), *_reports(), *model_faults(anatomy), *weight_faults(anatomy, checkpoint), *_few(), *_free_generations(),
        *place_faults(anatomy, length, count), *expert_faults(anatomy, length, count),
    ]  # fmt: skip
    if other_step:
        faults += step_faults(other_step)
    return faults


# -- the request -------------------------------------------------------------------------------------------------------


def _requests() -> Iterator[Fault]:
    def sizes(field_name: str, *values: float) -> dict[str, dict[str, Any]]:
        return {f"{v:g}": {"sampling": {field_name: v}} for v in values}

    yield from each("temperature", "request", {
        f"{percent:+g} %": {"sampling": {"temperature": 0.7 * (1 + percent / 100)}} for percent in (30, 5, 2, 0.1)
    }, semantic=True)  # fmt: skip
    yield from spread("temperature applied twice", "request", sampling={"temperature": 0.49}, semantic=True)
    bfloat16, float32 = {"dtypes": ("bfloat16",), "semantic": True}, {"dtypes": ("float32",), "semantic": True}
    yield from each("top-p another", "request", sizes("top_p", 0.7, 0.88, 0.8999), golden="top-p", **bfloat16)
    yield from each("top-k another", "request", sizes("top_k", 3, 4, 6), golden="top-k", **bfloat16)
    yield from each("penalty left out", "request", sizes("repetition_penalty", 1.0, 1.05, 1.0999), golden="penalty", **float32)
    yield from each("presence penalty slipped in", "request", sizes("presence_penalty", 0.5, 0.05, 0.0005), semantic=True)
    yield from each("frequency penalty slipped in", "request", sizes("frequency_penalty", 0.2, 0.02, 0.0002), semantic=True)
    yield from each("min-p slipped in", "request", sizes("min_p", 0.2, 0.02, 1e-7), semantic=True)
    yield from each("top-k slipped in", "request", sizes("top_k", 2, 10, 300), semantic=True)
    yield from each("padding leaks in", "request", {
        f"{n} tokens": {"prompt": lambda ids, n=n: [0] * n + ids} for n in (16, 4, 1)
    })  # fmt: skip
    yield from each("prompt cut off", "request", {f"{n} tokens": {"prompt": lambda ids, n=n: ids[n:]} for n in (80, 8, 1)})


# -- the report: written into the trace ----------------------------------------------------------------------------------


_Report = Callable[[Doubles, Trace, np.random.Generator], Doubles]


def _column(change: Callable[[Doubles], Doubles]) -> _Report:
    return lambda logprobs, _, __: change(logprobs)


def _shifted(logprobs: Doubles, trace: Trace, _: Any) -> Doubles:
    shifted = np.roll(logprobs, 1)
    shifted[trace.sequence_offsets[:-1]] = logprobs[trace.sequence_offsets[:-1]]
    return shifted


def _swapped(logprobs: Doubles, trace: Trace, _: Any) -> Doubles:
    """Every sequence reports its neighbour's logprobs, as far as both go."""
    swapped: Doubles = logprobs.copy()
    for i in range(0, trace.num_sequences - 1, 2):
        (a, b), (c, d) = trace.bounds(i), trace.bounds(i + 1)
        n = min(b - a, d - c)
        swapped[a : a + n], swapped[c : c + n] = logprobs[c : c + n], logprobs[a : a + n]
    return swapped


def _sequence_mean(logprobs: Doubles, trace: Trace, _: Any) -> Doubles:
    means = [logprobs[a:b].mean() for a, b in map(trace.bounds, range(trace.num_sequences))]
    column: Doubles = np.array(means, np.float64)[trace.sequence_of_token]
    return column


def _likeliest(_: Doubles, trace: Trace, __: Any) -> Doubles:
    return trace.top_logprobs[:, 0].astype(np.float64)


def _rounded(bits: int) -> Callable[[Doubles], Doubles]:
    """Round to `bits` of mantissa: 10 is float16, 7 bfloat16, 3 e4m3."""

    def round_(x: Doubles) -> Doubles:
        mantissa, exponent = np.frexp(x)
        rounded: Doubles = np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)
        return rounded

    return round_


def _decimals(count: int) -> _Report:
    return _column(lambda x: np.asarray(np.round(x, count), np.float64))


def _clipped(at: float) -> _Report:
    return _column(lambda x: np.maximum(x, at))


def _lifted(by: float) -> _Report:
    return _column(lambda x: np.log(np.exp(x) + by))


def _reports() -> Iterator[Fault]:
    yield from spread("raw for processed, unlabelled", "report", sampling={"temperature": 1.0}, semantic=True)
    yield from each("raw for processed", "report", {
        "T=0.7": {}, "top-p": {"golden": "top-p", "dtypes": ("bfloat16",)},
        "penalty": {"golden": "penalty", "dtypes": ("float32",)},
    }, settings={"logprobs_mode": "raw_logprobs"}, semantic=True)  # fmt: skip
    yield from spread("positions shifted by one", "report", reported=_shifted, semantic=True)
    yield from spread("another token's logprob (dict order)", "report", reported=_likeliest)
    yield from spread("log2 in place of ln", "report", reported=_column(lambda x: x / np.log(2)))
    yield from spread("a neighbour's logprobs", "report", reported=_swapped)
    yield from spread("the sequence's mean for every token", "report", reported=_sequence_mean)
    yield from each("rounded logprobs", "report", {
        name: {"reported": _column(_rounded(bits))} for name, bits in (("e4m3", 3), ("bfloat16", 7), ("float16", 10))
    })  # fmt: skip
    yield from each("rounded to decimals", "report", {str(n): {"reported": _decimals(n)} for n in (1, 2, 5)})
    yield from each("clipped logprobs", "report", {f"at {v}": {"reported": _clipped(v)} for v in (-1, -4, -30)})
    yield from each("log(p + epsilon)", "report", {f"{v:g}": {"reported": _lifted(v)} for v in (1e-2, 1e-3, 1e-9)})
    yield from spread("NaN", "report", reported=_column(lambda x: np.full_like(x, np.nan)))


def _few() -> Iterator[Fault]:
    """Few tokens or few sequences of the report are wrong."""

    def off(by: float) -> _Report:
        return lambda logprobs, _, rng: logprobs + by * rng.choice([-1, 1], len(logprobs))

    yield from each("tokens corrupted", "few", {
        f"{n} tokens": {"where": tokens(n)} for n in (130, 13, 1)
    }, reported=off(3.0))  # fmt: skip
    yield from each("sequences wrong", "few", {
        f"{n} sequences": {"where": sequences(n)} for n in (20, 4, 1)
    }, reported=off(1.0))  # fmt: skip
    yield from each("one token wild", "few", {
        f"{by:g} nats": {"reported": off(by)} for by in (6.0, 1.0, 1e-3)
    }, where=tokens(1))  # fmt: skip


# -- free generation ---------------------------------------------------------------------------------------------------


def _free_generations() -> Iterator[Fault]:
    def seeds(share: float) -> Callable[[Trace], Trace]:
        return lambda t: t.with_(seeds=np.where(np.arange(len(t.seeds)) < share * len(t.seeds), t.seeds + 1000, t.seeds))

    def sampled(**changes: Any) -> Callable[[Trace], Trace]:
        return lambda t: t.with_(sampling=dataclasses.replace(t.sampling, **changes))

    def longer(by: int) -> Callable[[Trace], Trace]:
        return lambda t: t.with_(sampling=dataclasses.replace(t.sampling, max_tokens=max(t.sampling.max_tokens + by, 1)))

    bfloat16 = {"dtypes": ("bfloat16",)}
    yield from each("another seed stream", "free generation", {
        name: {"free_run": seeds(share)} for name, share in (("all", 1.0), ("1 in 10", 0.1), ("1 in 100", 0.01))
    }, **bfloat16)  # fmt: skip
    yield from each("greedy for sampled", "free generation", {
        name: {"free_run": sampled(temperature=t)} for name, t in (("T=0", 0.0), ("T=0.1", 0.1), ("T=0.6", 0.6))
    }, **bfloat16)  # fmt: skip
    yield from each("stops elsewhere", "free generation", {
        f"max_tokens {by:+d}": {"free_run": longer(by)} for by in (-8, -1, 1)
    }, **bfloat16)  # fmt: skip
    yield from each("a replay that did not force", "free generation", {
        "all": {"unforced": 1}, "1 request in 10": {"unforced": 10}, "1 request in 200": {"unforced": 200},
    })  # fmt: skip
