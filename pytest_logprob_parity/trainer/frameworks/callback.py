"""A trainer that checks its own batches while it trains."""

from __future__ import annotations

import warnings

from ...comparison.result import Comparison, MismatchError
from ...errors import UsageError
from ...trace import Trace
from ..agreement import agreement, trainer_message
from . import limits_of, with_metrics


class Watching:
    """The first batch, then every `every`-th is checked; the next one, too, where one had too little evidence to say.

    `done` are the comparisons so far. Raises UsageError for an `every` below 1.
    """

    def __init__(self, framework: str, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"{framework}: watch(every={every!r}): must be a whole number, 1 or more")
        self.done: list[Comparison] = []
        self._framework, self._every, self._wait = framework, every, 0

    def due(self) -> bool:
        """Whether the batch that comes now is to be checked."""
        self._wait -= 1
        return self._wait < 0

    def check(self, rollouts: Trace, *, tolerance: object = None, config: object = None, **settings: object) -> None:
        """Hold two columns in hand against each other (see assert_trainer_parity). A training is stopped by what fails, with
        MismatchError; what is unverified is a warning.
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
        """A warning of a batch that says nothing; the next one is checked."""
        self._wait = 0
        warnings.warn(f"{self._framework}: watch(): {why}", stacklevel=3)
