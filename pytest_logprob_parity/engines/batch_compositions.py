"""Replays in drawn compositions: what the noise floor is recorded from, and what a candidate for it must go through too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..trace import FloatArray, Segment, Trace
from ..trace.batch_composition import BatchCompositions
from .backend import Backend
from .replay import by_turn, first_difference, forced_request


def replay_in_batch_compositions(backend: Backend, trace: Trace, compositions: BatchCompositions, number: int) -> FloatArray:
    """Forced decode of the tokens of `trace`, every block in a shape of its own: logprobs [N], NaN where masked.

    `number` tells the draws of one golden apart: the repeats of its floor are 0, 1, ...; equal numbers draw alike.
    Raises EngineError where the engine did not take the tokens.
    """
    rng = np.random.default_rng([compositions.seed, number])
    logprobs = np.full(trace.num_tokens, np.nan, np.float32)
    for segments in by_turn(list(trace.segments())):
        for block in range(compositions.blocks):
            members = [i for i, s in enumerate(segments) if s.sequence % compositions.blocks == block]
            others = [i for i, s in enumerate(segments) if s.sequence % compositions.blocks != block]
            waiting = [members[i] for i in rng.permutation(len(members))]
            while waiting:
                size = int(rng.choice(compositions.batch_sizes, p=compositions.weights))
                batch, waiting = waiting[:size], waiting[size:]
                _run_batch(backend, trace, segments, batch, _some(others, compositions, rng), logprobs, rng)
    return logprobs


def _some(others: Sequence[int], compositions: BatchCompositions, rng: np.random.Generator) -> list[int]:
    wanted = 0 if rng.random() < compositions.alone else int(rng.integers(1, compositions.fillers + 1))
    count = min(wanted, len(others))
    return [others[i] for i in rng.choice(len(others), count, replace=False)] if count else []


def _run_batch(
    backend: Backend, trace: Trace, segments: Sequence[Segment], batch: Sequence[int], fillers: Sequence[int],
    logprobs: npt.NDArray[np.float32], rng: np.random.Generator,
) -> None:  # fmt: skip
    """One call of the engine; the batch's logprobs are filled in, the fillers' are not."""
    together = [*batch, *fillers]
    order = [together[i] for i in rng.permutation(len(together))]
    wanted = set(batch)
    for i, completion in zip(order, backend.run([forced_request(trace, segments[i]) for i in order]), strict=True):
        segment = segments[i]
        expected = trace.token_ids[segment.start : segment.stop]
        if not np.array_equal(completion.token_ids, expected):
            raise EngineError(
                f"replay in sampled batch compositions did not force the tokens: sequence {segment.sequence} came back with "
                f"{first_difference(completion.token_ids, expected)} ({backend.config.forcing})"
            )
        if i in wanted:
            logprobs[segment.start : segment.stop] = completion.logprobs
