"""The chain from trainer to engine: which link fails, and by how much?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..comparison.evidence import Evidence
from ..comparison.judge import judge
from ..comparison.result import Comparison, MismatchError
from ..comparison.tolerance import Tolerance, make_tolerance
from ..errors import UsageError
from ..trace import FloatArray, ReplayPath, Trace
from ..trace.batch_composition import BatchCompositions
from .agreement import without_top_k
from .limits import trainer_tolerance
from .scorer import Scorer
from .scoring import score


class Replays(Protocol):
    """What the chain needs of an engine: its logprobs of the rollouts' own tokens."""

    def replay(self, trace: Trace, path: ReplayPath = "decode") -> Trace:
        """The tokens of `trace` with this engine's logprobs by `path`."""
        ...

    def replay_in_batch_compositions(self, trace: Trace, compositions: BatchCompositions, number: int) -> FloatArray:
        """Logprobs [N] of the tokens, decoded in sampled batch compositions."""
        ...


#: Batch sizes of the trainer that are compared.
_SIZES: Final = (1, 8)


@dataclass(frozen=True, slots=True)
class Link:
    """One link of the chain: its name, and the comparison of its two ends."""

    name: str
    comparison: Comparison

    def __str__(self) -> str:
        numbers = self.comparison.metrics
        return (
            f"{self.name}: {self.comparison.verdict}, RMS {numbers['rms_diff']:.2g}, largest {numbers['max_abs_diff']:.2g} "
            f"nats, {int(numbers['n_changed']):,} of {int(numbers['n_tokens']):,} tokens differ"
        )


@dataclass(frozen=True, slots=True)
class Chain:
    """All links, from the trainer to the engine."""

    links: tuple[Link, ...]

    @property
    def broken(self) -> tuple[Link, ...]:
        """The links that fail."""
        return tuple(link for link in self.links if not link.comparison.passed)

    def __str__(self) -> str:
        return "\n".join(str(link) for link in self.links)


def trainer_chain(
    engine: Replays,
    scorer: Scorer,
    rollouts: Trace,
    tolerance: Tolerance | Mapping[str, Any] | None = None,
    *,
    batch_sizes: tuple[int, int] = _SIZES,
) -> Chain:
    """Compare each link of the chain from trainer to engine, on the rollouts' tokens.

    The links: trainer at one batch size = at another; trainer = engine prefill; engine prefill = engine decode; decode of one
    request at a time = decode of all at once. Each link has its own limits: those of the coarser dtype of its two ends, for
    decode compared with prefill.

    Prefill gives raw logprobs only. Where the rollouts were divided by a temperature, the trainer is compared twice: undivided
    with prefill, divided with decode. Raises UsageError for rollouts of a truncated distribution and for rollouts sampled under
    penalties, EngineError where the engine fails.
    """
    if not rollouts.is_raw and (rollouts.sampling.truncates or rollouts.sampling.edits_logits):
        raise UsageError(
            f"the chain compares with prefill, which gives raw logprobs, and these rollouts are {rollouts.distribution()}: "
            "sample without truncation and penalties"
        )
    small, large = (score(rollouts, scorer, batch_size=size) for size in batch_sizes)
    prefill, decode = engine.replay(rollouts, "prefill"), engine.replay(rollouts, "decode")
    alone = _one_at_a_time(engine, rollouts)
    by_prefill: tuple[tuple[str, tuple[str, str], Trace, Trace], ...] = (
        ("trainer = engine prefill", ("prefill", "trainer"), prefill, large),
        ("engine prefill = engine decode", ("decode", "prefill"), decode, prefill),
    )
    if not rollouts.is_raw:
        undivided = score(rollouts, scorer, batch_size=batch_sizes[1], temperature=1.0)
        by_prefill = (
            ("trainer, undivided = engine prefill", ("prefill", "trainer"), prefill, undivided),
            ("trainer = engine decode", ("decode", "trainer"), decode, large),
        )
    ends: tuple[tuple[str, tuple[str, str], Trace, Trace], ...] = (
        (f"trainer, batches of {batch_sizes[0]} = of {batch_sizes[1]}", ("small batches", "large batches"), small, large),
        *by_prefill,
        ("engine decode, one at a time = all at once", ("batched decode", "decode one at a time"), decode, alone),
    )
    links = (Link(name, _judge(expected, actual, sides, tolerance)) for name, sides, expected, actual in ends)
    return Chain(tuple(links))


def assert_trainer_chain(
    engine: Replays, scorer: Scorer, rollouts: Trace, tolerance: Tolerance | Mapping[str, Any] | None = None
) -> Chain:  # fmt: skip
    """Assert that every link of `trainer_chain` passes; returns the chain. Raises MismatchError with the links that fail."""
    __tracebackhide__ = True
    chain = trainer_chain(engine, scorer, rollouts, tolerance)
    if chain.broken:
        names = ", ".join(link.name for link in chain.broken)
        raise MismatchError(f"the chain breaks at: {names}\n\n{chain}", chain.broken[0].comparison)
    return chain


def _one_at_a_time(engine: Replays, rollouts: Trace) -> Trace:
    alone = BatchCompositions(batch_sizes=(1,), weights=(1.0,), alone=1.0, blocks=1)
    logprobs = engine.replay_in_batch_compositions(rollouts, alone, 0)
    return rollouts.with_(
        logprobs=logprobs, top_logprobs=rollouts.top_logprobs[:, :0], top_token_ids=rollouts.top_token_ids[:, :0]
    )


def _judge(expected: Trace, actual: Trace, sides: tuple[str, str], tolerance: Any) -> Comparison:
    limits = make_tolerance(trainer_tolerance(expected.dtype, actual.dtype), tolerance)
    return without_top_k(judge(_raw(expected), _raw(actual), limits, "rl", Evidence(sides=sides)))


def _raw(trace: Trace) -> Trace:
    """The trace labelled as raw logprobs, without a top-k: both ends of a link have the same distribution."""
    return dataclasses.replace(
        trace, logprobs_mode="raw_logprobs", top_logprobs=trace.top_logprobs[:, :0], top_token_ids=trace.top_token_ids[:, :0]
    )
