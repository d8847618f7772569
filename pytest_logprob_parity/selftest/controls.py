"""Negative controls: nothing is wrong, so every check has to pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..trace.batch_composition import BatchCompositions
from .engine_under_test import NotPossibleError
from .fault import Fault

if TYPE_CHECKING:
    from ..check.ask import Answers
    from .engine_under_test import EngineUnderTest


def first_controls() -> list[Fault]:
    """Controls on the engine as it has started."""
    return [_asked_again(), *(_batch_compositions(number) for number in (1, 2))]


def later_controls() -> list[Fault]:
    """Controls after the faults of the weights, and those that need a start."""
    return [_weights_loaded_again(), _restart("same settings"), _restart("max_num_seqs 3", max_num_seqs=3)]


def _asked_again() -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        yield under_test.asked_again()

    return Fault(name="nothing: asked again", size="same batches", kind="control", plant=plant, unchanged=True)


def _batch_compositions(number: int) -> Fault:
    """The same requests in sampled batch compositions, other ones than those of the noise floor."""

    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        floor = under_test.golden.floor
        shapes = BatchCompositions() if floor is None else floor.compositions
        drawn = (0 if floor is None else floor.repeats) + number
        logprobs = under_test.engine.replay_in_batch_compositions(under_test.golden.trace, shapes, drawn)
        clean = under_test.clean  # no top-k comes with these logprobs: that of another batch would contradict them
        yield under_test.with_column(
            logprobs=logprobs, top_logprobs=clean.top_logprobs[:, :0], top_token_ids=clean.top_token_ids[:, :0],
            ranks=0 * clean.ranks,
        )  # fmt: skip

    return Fault(name="nothing: other batch compositions", size=f"sample {number}", kind="control", plant=plant)


def _weights_loaded_again() -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        if not under_test.takes_weights():
            raise NotPossibleError("this engine does not take weights faithfully while it runs")
        yield under_test.asked_again()

    return Fault(name="nothing: weights loaded again", size="same weights", kind="control", plant=plant, unchanged=True)


def _restart(size: str, **settings: Any) -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        if settings:
            with under_test.started(**settings) as engine:
                yield under_test.ask_started(engine)
            return
        under_test.restart()
        yield under_test.asked_again(("decode", "regenerate"))

    return Fault(name="nothing: a restart", size=size, kind="control", plant=plant, unchanged=True)
