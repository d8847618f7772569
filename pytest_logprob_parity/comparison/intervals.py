"""How sure: intervals clustered by prompt, and what a golden of so many prompts can show. Nothing is resampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..trace import Trace
from .shown import CONFIDENCE as CONFIDENCE
from .shown import POWER as POWER

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

#: One-sided: an effect fails only where noise between prompts explains it more rarely than once in 200, for a check has several
#: effects and a CI has many checks; it passes at the usual level.
FAIL_CONFIDENCE: Final = 0.995
PASS_CONFIDENCE: Final = 0.95
#: A golden with fewer distinct sequences is too small to generalise.
MIN_SEQUENCES: Final = 8


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and the two one-sided bounds that decide: `low` at FAIL_CONFIDENCE, `high` at PASS_CONFIDENCE."""

    estimate: float
    low: float
    high: float


def mean_interval(values: Doubles, clusters: Integers, weights: Doubles | None = None) -> Interval:
    """The mean of `values` [n], whose prompts are `clusters` [n]: a ratio of sums over prompts with a t-interval.

    The error is the jackknife's over prompts (Bell and McCaffrey, "Bias reduction in standard errors for linear regression
    with multi-stage samples", 2002, CR3), and t has the degrees of freedom of (sum w)^2 / sum w^2 prompts of equal weight, so
    that one long prompt among short ones counts as the few that it amounts to. Infinite bounds with one prompt.
    """
    count = int(clusters.max(initial=-1)) + 1
    sums = np.bincount(clusters, values, count)
    sizes = np.bincount(clusters, weights, count)
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    total = float(sizes.sum())
    estimate = float(sums.sum()) / total
    share = sizes / total
    effective = 1 / float(np.square(share).sum())
    if effective < 1.2:
        return Interval(estimate, -np.inf, np.inf)
    residuals = (sums - estimate * sizes) / total / (1 - share)
    error = float(np.sqrt((1 - 1 / len(sizes)) * np.square(residuals).sum()))
    degrees = max(effective - 1, 1.0)
    return Interval(
        estimate,
        estimate - t_quantile(FAIL_CONFIDENCE, degrees) * error,
        estimate + t_quantile(PASS_CONFIDENCE, degrees) * error,
    )


def prompt_numbers(trace: Trace) -> Integers:
    """A number for each sequence [S], the same for those whose prompts have equal tokens: 0, 1, ..."""
    groups: dict[bytes, int] = {}
    numbers = [
        groups.setdefault(trace.prompt_token_ids[a:b].tobytes(), len(groups))
        for a, b in zip(trace.prompt_offsets[:-1].tolist(), trace.prompt_offsets[1:].tolist(), strict=True)
    ]
    by_group = np.array([numbers[g] for g in trace.group.tolist()], np.int64)
    return np.unique(by_group, return_inverse=True)[1].astype(np.int64) if len(by_group) else by_group


def distinct_sequences(trace: Trace) -> Integers:
    """A number for each sequence [S], the same for those with equal prompts and equal tokens: they prove no more than one."""
    seen: dict[Any, int] = {}
    bounds = zip(trace.sequence_offsets[:-1].tolist(), trace.sequence_offsets[1:].tolist(), strict=True)
    keys = zip(prompt_numbers(trace).tolist(), bounds, strict=True)
    return np.array([seen.setdefault((prompt, trace.token_ids[a:b].tobytes()), len(seen)) for prompt, (a, b) in keys], np.int64)


def t_quantile(probability: float, degrees: float) -> float:
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


def detectable_share(prompts: int, allowed: int) -> float:
    """The share of prompts that a fault has to hit, so that more than `allowed` of `prompts` are hit with probability POWER.

    1 where no share does.
    """
    from scipy.special import betaincinv

    return 1.0 if allowed >= prompts else float(betaincinv(allowed + 1, prompts - allowed, POWER))
