"""What a fault is: what it does, in which size, on which golden, and which tokens carry it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from pytest_logprob_parity.selftest.truth import Doubles
from pytest_logprob_parity.spec import Sampling
from pytest_logprob_parity.trace import BoolArray, Trace

from .site import Site

#: The goldens that faults are planted against: how they are sampled. `plain` is recorded in every dtype.
GOLDENS: Final[Mapping[str, Mapping[str, Any]]] = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "top-k": {"top_k": 5},
    "penalty": {"repetition_penalty": 1.1},
}

#: Where a fault sits. Those of `place` and `experts` hit part of what runs: some positions, prompts, token ids, experts.
Group = Literal["request", "report", "distribution", "model", "weights", "few", "free generation", "place", "experts"]
Where = Callable[[Trace, np.random.Generator], BoolArray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a fault is called. `semantic` ones have a cause that is proven whatever its size: they may fail where immaterial."""

    name: str
    size: str
    group: Group
    semantic: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault(Case):
    """One fault in one size. All that is set is planted together, in the engine's run and in the reference's.

    Planted in the engine:
    - `site` operates on the model; `settings` start another engine (the reference then gets `reference` instead)
    - `sampling` and `prompt` change the request
    - `shift` says by how many nats [N] the sampler reports each token of the golden wrongly
    - `free_run` changes the trace whose seeds and sampling the free generation takes; `unforced` frees one request in so many

    Written into the trace, after a run:
    - `reported` changes the column of logprobs
    - `where` says which tokens [N] carry the fault; the others keep the logprobs of the run without it. Both runs are real

    Faults of equal `run` share one run of the engine, whatever they are called.
    """

    golden: str = "plain"
    site: Callable[[Site], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[[Any], None] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    prompt: Callable[[list[int]], list[int]] | None = None
    shift: Callable[[Trace, np.random.Generator], Doubles] | None = None
    reported: Callable[[Doubles, Trace, np.random.Generator], Doubles] | None = None
    where: Where | None = None
    free_run: Callable[[Trace], Trace] | None = None
    unforced: int = 0
    run: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    @property
    def run_key(self) -> tuple[str, ...]:
        """Faults of equal keys need one run of the engine: they differ in `where` and `reported` alone."""
        planted = self.site is not None or self.prompt is not None or self.shift is not None
        inside = self.run or (f"{self.name}, {self.size}" if planted else "")
        return (inside, self.golden, str(sorted(self.settings.items())), str(sorted(self.sampling.items())))

    @property
    def case(self) -> Case:
        """Its name and size alone, which another process can be sent."""
        return Case(name=self.name, size=self.size, group=self.group, semantic=self.semantic)


def each(name: str, group: Group, sizes: Mapping[str, Mapping[str, Any]], **common: Any) -> Iterator[Fault]:
    """One fault in several sizes, each with what is its own."""
    for size, own in sizes.items():
        yield Fault(name=name, size=size, group=group, **{**common, **own})


def spread(name: str, group: Group, **common: Any) -> Iterator[Fault]:
    """The same fault, of one run, in all sequences, in twenty, and in two."""
    sizes = {"all": None, "20 sequences": sequences(20), "2 sequences": sequences(2)}
    run = name if "site" in common else ""
    for size, where in sizes.items():
        yield Fault(name=name, size=size, group=group, where=where, **{"run": run, **common})


def sampling_of(fault: Fault, sampling: Sampling) -> Sampling:
    """The sampling that the fault's run is asked with."""
    return dataclasses.replace(sampling, **fault.sampling)


# -- which tokens carry it ---------------------------------------------------------------------------------------------


def sequences(count: int) -> Where:
    """All tokens of so many sequences, drawn at random."""

    def where(trace: Trace, rng: np.random.Generator) -> BoolArray:
        hit = np.isin(np.arange(trace.num_sequences), rng.permutation(trace.num_sequences)[:count])
        return hit[trace.sequence_of_token]

    return where


def prompts(count: int) -> Where:
    """All tokens of all completions of so many prompts, drawn at random."""

    def where(trace: Trace, rng: np.random.Generator) -> BoolArray:
        hit = np.isin(trace.group, rng.permutation(trace.num_prompts)[:count])
        return hit[trace.sequence_of_token]

    return where


def tokens(count: int) -> Where:
    """So many single tokens, drawn at random."""
    return lambda trace, rng: np.isin(np.arange(trace.num_tokens), rng.permutation(trace.num_tokens)[:count])


def share(of: float) -> Where:
    """A share (0 to 1) of the tokens, drawn at random."""
    return lambda trace, rng: np.isin(
        np.arange(trace.num_tokens), rng.permutation(trace.num_tokens)[: round(of * trace.num_tokens)]
    )


def first_tokens(trace: Trace, _: np.random.Generator) -> BoolArray:
    """The first token of each completion, which the prefill of its prompt gives."""
    return np.isin(np.arange(trace.num_tokens), trace.sequence_offsets[:-1])


def last_tokens(trace: Trace, _: np.random.Generator) -> BoolArray:
    """The last token of each completion."""
    return np.isin(np.arange(trace.num_tokens), trace.sequence_offsets[1:] - 1)


# -- tokens that are reported wrongly ------------------------------------------------------------------------------------

#: Tokens that are nearly certain are left alone: the rest of their distribution could not take up the mass they lose.
_CERTAIN: Final = -0.05


def off(by: float, *, count: int = 0, of: float = 0.0, balanced: bool = False) -> Callable[..., Doubles]:
    """`count` tokens, or a share `of` them, whose logprob is off by `by` nats; half of them by -`by` where `balanced`.

    A logprob stays below 0: a positive shift hits only tokens that are unlikely enough.
    """

    def shift(trace: Trace, rng: np.random.Generator) -> Doubles:
        wanted = count or round(of * trace.num_tokens)
        halves = ((by, wanted - wanted // 2), (-by, wanted // 2)) if balanced else ((by, wanted),)
        column = np.zeros(trace.num_tokens)
        for nats, number in sorted(halves, reverse=True):  # the positive ones first: fewer tokens can take them
            able = np.flatnonzero((trace.logprobs < min(-nats, 0.0) + _CERTAIN) & (column == 0) & np.isfinite(trace.logprobs))
            column[rng.permutation(able)[:number]] = nats
        return column

    return shift
