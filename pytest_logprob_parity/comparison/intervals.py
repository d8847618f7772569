"""How sure: bounds clustered by sequence, and what a golden of this size can show. Nothing is resampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..trace import Trace

#: Bounds hold with this probability, each.
CONFIDENCE: Final = 0.95
#: A shift is called detectable where it is found with this probability.
POWER: Final = 0.9
#: A golden with fewer distinct sequences speaks for no others.
MIN_SEQUENCES: Final = 8


@dataclass(frozen=True)
class Bound:
    """An estimate and its one-sided upper confidence bound."""

    estimate: float
    upper: float


@dataclass(frozen=True, eq=False)
class Clusters:
    """Sums over each distinct sequence: how many tokens, of their d and of its square, each d cut off at a limit.

    Tokens of a sequence depend on each other (design effect 6 for squares in bfloat16): sequences are what is counted.
    """

    tokens: npt.NDArray[np.float64]
    sums: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls, d: npt.NDArray[np.float64], sequences: npt.NDArray[np.int64], names: npt.NDArray[np.int64], cut: float
    ) -> Clusters:
        """From differences d [n], the sequence of each, the cluster that each sequence belongs to, and where to cut."""
        count = int(names.max(initial=-1)) + 1
        clipped = np.clip(d, -cut, cut)
        columns: list[npt.NDArray[np.float64]] = []
        for weights in (np.ones(len(d)), clipped, clipped * clipped):
            by_sequence = np.bincount(sequences, weights, len(names))
            columns.append(np.bincount(names, by_sequence, count).astype(np.float64))
        kept = columns[0] > 0
        return cls(*(column[kept] for column in columns))

    @property
    def count(self) -> int:
        """How many distinct sequences have tokens."""
        return len(self.tokens)

    def mean(self, count: int | None = None) -> Bound:
        """|mean d|, winsorised: plain t over sequences, as a ratio of sums (coverage 0.93 to 0.97 from 8 to 200 sequences).

        With `count` the bound that so many sequences like these would give.
        """
        estimate = float(self.sums.sum() / self.tokens.sum())
        error = self._error(self.sums - estimate * self.tokens, count)
        return Bound(abs(estimate), abs(estimate) + self._t(count) * error if error else abs(estimate))

    def rms(self, count: int | None = None) -> Bound:
        """Winsorised RMS: t on the log mean square by the delta method.

        It covers 0.88 to 0.93 from 8 to 200 sequences of differing scales; where few tokens carry nearly everything it
        covers less below 50 sequences (0.60 at 8): what such tokens do is for the budgets to judge.
        """
        estimate = float(self.squares.sum() / self.tokens.sum())
        if estimate == 0:
            return Bound(0.0, 0.0)
        error = self._error(self.squares - estimate * self.tokens, count) / estimate
        factor = float(np.exp(min(self._t(count) * error, 300.0))) if error else 1.0
        return Bound(estimate**0.5, (estimate * factor) ** 0.5)

    def _error(self, residuals: npt.NDArray[np.float64], count: int | None) -> float:
        """Standard error of a ratio of sums over clusters; infinite for one cluster, which says nothing of others."""
        if self.count < 2:
            return float("inf")
        scale = self.count / (self.count - 1) * self.count / (count or self.count)
        return float(np.sqrt(scale * np.square(residuals).sum()) / self.tokens.sum())

    def _t(self, count: int | None) -> float:
        return t_quantile(CONFIDENCE, max((count or self.count) - 1, 1))


def distinct_sequences(trace: Trace) -> npt.NDArray[np.int64]:
    """A number for each sequence [S], the same for those with equal prompts and equal tokens: they prove no more than one."""
    seen: dict[Any, int] = {}
    groups: dict[bytes, int] = {}
    prompts = [
        groups.setdefault(trace.prompt_token_ids[a:b].tobytes(), len(groups))
        for a, b in zip(trace.prompt_offsets[:-1].tolist(), trace.prompt_offsets[1:].tolist(), strict=True)
    ]
    keys = zip(trace.group.tolist(), trace.sequence_offsets[:-1].tolist(), trace.sequence_offsets[1:].tolist(), strict=True)
    return np.array([seen.setdefault((prompts[g], trace.token_ids[a:b].tobytes()), len(seen)) for g, a, b in keys], np.int64)


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def share_bound(events: int, of: int) -> float:
    """One-sided upper Clopper-Pearson bound of a share, from `events` seen among `of`."""
    from scipy.special import betaincinv

    return 1.0 if events >= of else float(betaincinv(events + 1, of - events, CONFIDENCE))


def poisson_quantile(probability: float, mean: float) -> int:
    """The smallest count that a Poisson variable of this mean stays at or under with this probability."""
    from scipy.special import pdtr

    count = 0
    while pdtr(count, mean) < probability:
        count += 1
    return count


def detectable_share(of: int, budget: int) -> float:
    """The share of bad sequences at which more than `budget` among `of` are bad with probability POWER; 1 where never."""
    from scipy.special import betaincinv

    return 1.0 if budget >= of else float(betaincinv(budget + 1, of - budget, POWER))
