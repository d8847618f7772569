"""A trainer that checks its own batches during training."""

from __future__ import annotations

import warnings

from ...comparison.result import Comparison, MismatchError
from ...errors import UsageError
from ...trace import Trace
from ..agreement import agreement, trainer_message
from . import limits_of, with_metrics


class Watching:
    """Checks the first batch, then every `every`-th, and the batch after an unverified one.

    `done` has the comparisons so far. Raises UsageError for an `every` below 1.
    """

    def __init__(self, framework: str, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"{framework}: watch(every={every!r}): must be a whole number, 1 or more")
        self.done: list[Comparison] = []
        self._framework, self._every, self._wait = framework, every, 0

    def due(self) -> bool:
        """Whether the next batch is to be checked."""
        self._wait -= 1
        return self._wait < 0

    def check(self, rollouts: Trace, *, tolerance: object = None, config: object = None, **settings: object) -> None:
        """Compare the two columns of a batch (see assert_trainer_parity). A failed check raises MismatchError, which stops the
        training; an unverified one is a warning.
        """
        compared = agreement(rollouts, tolerance=limits_of(tolerance), **settings)  # type: ignore[arg-type]
        comparison = with_metrics(compared, self._framework, config)
        self.done.append(comparison)
        self._wait = self._every - 1
        if comparison.verdict == "fail":
            raise MismatchError(trainer_message(comparison), comparison)
        if not comparison.passed:
            self.leave_out(f"{comparison.verdict}: {comparison.headline}")

    def leave_out(self, why: str) -> None:
        """Warn that a batch was not checked; the next one is."""
        self._wait = 0
        warnings.warn(f"{self._framework}: watch(): {why}", stacklevel=3)
