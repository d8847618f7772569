"""The user's engine with its golden: asked as a check asks it, given other weights and its own back, started in other ways."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..check.ask import Answers, ask
from ..checkpoint.rewrite import rewrite_checkpoint
from ..checkpoint.weight_update import tied_heads
from ..engines.engine import Engine
from ..engines.pool import Pool
from ..errors import EngineError, ParityError, UsageError
from ..golden import Golden
from ..spec import EngineSpec
from ..trace import ReplayPath, Trace
from .checkpoint_tensors import CheckpointTensors


class NotPossibleError(Exception):
    """This engine, version, hardware or golden does not allow a fault; the text says why."""


class EngineUnderTest:
    """The engine of `spec` in `pool`, and the golden at `path` that it is held against.

    `clean` is what the engine says of the golden's tokens without any fault.
    """

    def __init__(self, pool: Pool, spec: EngineSpec, path: Path) -> None:
        self.pool = pool
        self.spec = spec
        self.path = path
        self.golden = Golden.load(path)
        self.engine = pool.engine(spec)
        self.answers = ask(self.engine, self.golden, ("decode",))
        self.clean: Trace = self.answers.replays["decode"]
        self._checkpoint: CheckpointTensors | None = None
        self._takes_weights: bool | None = None

    @property
    def checkpoint(self) -> CheckpointTensors:
        """The tensors of the model's checkpoint."""
        if self._checkpoint is None:
            self._checkpoint = CheckpointTensors.load(self.engine.folder)
        return self._checkpoint

    def with_column(self, **columns: Any) -> Answers:
        """What the engine answers where some columns of its report are others."""
        return self._answers({"decode": self.clean.with_(**columns)})

    def replayed(self, asked: Trace) -> Answers:
        """What the engine says of `asked`, reported as the answer about the golden's tokens."""
        answer = self.engine.replay(asked)
        return self.with_column(
            logprobs=answer.logprobs, ranks=answer.ranks, top_token_ids=answer.top_token_ids, top_logprobs=answer.top_logprobs
        )

    def asked_again(self, paths: Sequence[ReplayPath] = ("decode",)) -> Answers:
        """What the running engine answers now."""
        return self._unversioned(ask(self.engine, self.golden, paths))

    @contextlib.contextmanager
    def started(self, **settings: Any) -> Iterator[Engine]:
        """An engine of the same spec with other settings. Raises NotPossibleError where it does not start."""
        spec = self.spec.replace(**settings)
        engine = self.pool.engine(spec)
        try:
            _ = engine.config
        except ParityError as error:
            raise NotPossibleError(first_line(error)) from error
        yield engine  # it stays for the next fault with these settings; the pool shuts it down for another

    def ask_started(self, engine: Engine) -> Answers:
        """What another engine answers about the golden, as a check asks it."""
        return self._unversioned(ask(engine, self.golden, ("decode",)))

    # -- weights -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def with_weights(self, changed: Mapping[str, Any]) -> Iterator[Answers]:
        """The answers of an engine in which the named tensors are others, and all else is as it was.

        The running engine takes them where that is faithful, or else one is started from a changed checkpoint.
        """
        if not self._start_needed(changed):
            self.engine.update_weights({**self.checkpoint.tensors, **changed}, clear_cache=True)
            try:
                answers = self._planted(self.engine)
                if not self._is_clean(answers):
                    yield answers
                    return
            finally:
                self.engine.update_weights(self.engine.folder, clear_cache=True)
        with self._started_from(changed) as engine:  # also where the running engine took the weights and did not use them
            yield self._planted(engine)

    def takes_weights(self) -> bool:
        """Whether the running engine takes its own weights again and answers bit for bit as before; tried once.

        Engines were seen that pack weights a second time when they are loaded again.
        """
        if self._takes_weights is None:
            try:
                self.engine.update_weights(self.engine.folder, clear_cache=True)
                self._takes_weights = self._is_clean(ask(self.engine, self.golden, ("decode",)))
            except (EngineError, UsageError):
                self._takes_weights = False
            if not self._takes_weights:
                self.restart()
        return self._takes_weights

    def restart(self) -> None:
        """Start the engine anew, with the weights of its checkpoint."""
        self.pool.discard(self.spec)
        self.engine = self.pool.engine(self.spec)

    def _start_needed(self, changed: Mapping[str, Any]) -> bool:
        """Whether the running engine would not use these tensors: vLLM on CPUs keeps a packed copy of an LM head tied to
        the embedding, and a weight update does not reach it.
        """
        vocabulary = self.checkpoint.vocabulary
        tied = len(vocabulary) == 1 or bool(tied_heads(self.engine.folder))
        packed = tied and "cuda" not in self.answers.fingerprint["hardware"]
        return (packed and bool(set(changed) & set(vocabulary))) or not self.takes_weights()

    def _is_clean(self, answers: Answers) -> bool:
        """Whether these logprobs are bit for bit those of the engine without a fault."""
        return bool(np.array_equal(answers.replays["decode"].logprobs, self.clean.logprobs, equal_nan=True))

    @contextlib.contextmanager
    def _started_from(self, changed: Mapping[str, Any]) -> Iterator[Engine]:
        """An engine started from a copy of the checkpoint that has the changed tensors."""
        with tempfile.TemporaryDirectory(prefix="logprob-parity-selftest-") as place:
            out = Path(place) / self.engine.folder.name
            rewrite_checkpoint(self.engine.folder, out, lambda name, tensor: changed.get(name, tensor), "selftest")
            with self.started(model=str(out), tokenizer=self.spec.tokenizer or str(self.engine.folder)) as engine:
                try:
                    yield engine
                finally:
                    self.pool.discard(engine.spec)

    def _planted(self, engine: Engine) -> Answers:
        """What an engine with a fault in its memory answers; its fingerprint is that of the engine without the fault."""
        answers = ask(engine, self.golden, ("decode",))
        return self._unversioned(answers, self.answers.fingerprint)

    @staticmethod
    def _unversioned(answers: Answers, fingerprint: Mapping[str, Any] | None = None) -> Answers:
        """The answers of an engine that does not know that its weights were changed."""
        replays = {path: trace.with_(weight_versions=None) for path, trace in answers.replays.items()}
        return dataclasses.replace(answers, replays=replays, fingerprint=fingerprint or answers.fingerprint)

    def _answers(self, replays: Mapping[Any, Trace]) -> Answers:
        return Answers(replays=replays, fingerprint=self.answers.fingerprint)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
