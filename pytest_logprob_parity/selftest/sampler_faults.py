"""Faults of the sampler: a real engine is asked with other sampling, or decodes its tokens late, under the golden's label."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .engine_under_test import NotPossibleError
from .fault import Fault

if TYPE_CHECKING:
    from ..check.ask import Answers
    from ..spec import Sampling
    from .engine_under_test import EngineUnderTest


def sampler_faults(sampling: Sampling) -> list[Fault]:
    """The faults of an engine that samples otherwise than the golden's `sampling` says, or whose tokens come late."""
    return [*_temperature(sampling), *_truncation(sampling), *_penalties(sampling), _tokens_late()]


def _temperature(sampling: Sampling) -> Iterator[Fault]:
    if sampling.greedy:
        yield _impossible("temperature off", "+5 %", "the golden is greedy: its temperature plays no part")
        return
    t = sampling.temperature
    yield _other("temperature off", "+5 %", temperature=1.05 * t)
    yield _other("temperature off", "+0.1 %", temperature=1.001 * t)
    if t == 1:
        yield _impossible("temperature applied twice", "T=1", "at T=1 applying it twice changes nothing")
    else:
        yield _other("temperature applied twice", f"T={t:g} twice", temperature=t * t)


def _truncation(sampling: Sampling) -> Iterator[Fault]:
    if sampling.greedy:
        yield _impossible("top-p applied", "0.9", "the golden is greedy: truncation plays no part")
    elif sampling.top_p < 1:
        yield _other("top-p not applied", f"{sampling.top_p:g}", top_p=1.0)
        yield _other("top-p applied twice", f"as {sampling.top_p**2:.3g}", top_p=sampling.top_p**2)
    else:
        yield _other("top-p that nobody asked for", "0.9", top_p=0.9)
    if not sampling.greedy and sampling.top_k > 0:
        yield _other("top-k not applied", f"{sampling.top_k}", top_k=0)


def _penalties(sampling: Sampling) -> Iterator[Fault]:
    if sampling.penalizes:
        yield _other("penalties dropped", "all", repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
    else:
        yield _other("a penalty that nobody asked for", "repetition 1.1", repetition_penalty=1.1)


def _other(name: str, size: str, **changes: Any) -> Fault:
    """The engine samples with some parameters changed, and reports under the golden's label."""

    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        trace = under_test.golden.trace
        yield under_test.replayed(trace.with_(sampling=dataclasses.replace(trace.sampling, **changes)))

    return Fault(name=name, size=size, kind="sampler", plant=plant)


def _tokens_late() -> Fault:
    """The engine decodes each token one step late: it reports the logprobs of the token before."""

    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        trace = under_test.golden.trace
        late = np.roll(trace.token_ids, 1)
        first = trace.sequence_offsets[:-1]
        late[first] = trace.token_ids[first]
        yield under_test.replayed(trace.with_(token_ids=late))

    return Fault(name="tokens one step late", size="all", kind="sampler", plant=plant)


def _impossible(name: str, size: str, reason: str) -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        raise NotPossibleError(reason)
        yield  # a generator, so that it can be a context

    return Fault(name=name, size=size, kind="sampler", plant=plant)
