"""Truncated support: the tokens that top-p, top-k or min-p kept on each side, their mass, and which limits that allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...trace import Trace
from ..sides import Side
from .positions import Bools, Doubles, Positions

#: Fewer positions than this prove no limit, and no missing normalisation.
ENOUGH: Final = 20
#: This share of positions may contradict a limit: kernels' noise moves tokens across it.
_STRAY: Final = 0.01
#: Bounds that cross by no more than this are one limit, blurred by noise.
_BLUR: Final = 0.01
_VOCABULARY: Final = 200_000
#: Kept tokens whose probabilities are further from 1 than this, on average, were not made a distribution again.
WHOLE: Final = 1e-3
#: Probabilities that add up to more than 1 by this were rounded.
_ROUNDED: Final = 1e-4
#: Mass that may be missing where what is listed is taken for all: it moves a logprob by as much.
_ALL: Final = 1e-5
#: A constant of a position stands out when it is so many times as large as what is left between its tokens (nats), and as
#: large as no other order of summation makes it.
_STANDS_OUT, _LEAST, _SUMMED = 20, 1e-6, 5e-4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Kept:
    """One side's kept tokens. `complete` bool [n]: truncation excluded something, and what it left is all listed.

    `counts` [n] tokens are left, `ties` [n] of them beside the least likely one and as likely, with `total` [n] probability.
    """

    complete: Bools
    counts: Any
    ties: Any
    total: Doubles

    @property
    def truncates(self) -> bool:
        """Whether this side excluded tokens at all."""
        return int(np.count_nonzero(self.complete)) >= ENOUGH

    @property
    def mean_total(self) -> float:
        """The mean probability among what is left; NaN without such sets."""
        return float(np.mean(self.total[self.complete])) if self.complete.any() else math.nan

    @property
    def renormalised(self) -> bool:
        """Whether what was left was made a distribution again."""
        missing = 1 - self.total[self.complete]
        rounded = np.count_nonzero(missing < -_ROUNDED) > _STRAY * len(missing)  # what is cut off never adds up to more than 1
        return bool(np.mean(np.abs(missing)) < WHOLE or np.count_nonzero(np.abs(missing) > WHOLE) < ENOUGH or rounded)

    def beyond(self, other: Kept) -> Bools:
        """Positions [n] at which more tokens are left than on the other side, tied ones left out: a tie at the edge of a kept
        set keeps all that are as likely, or one of them.
        """
        return np.asarray(self.counts - self.ties > other.counts)


def kept(positions: Positions, side: Side) -> Kept:
    """The kept tokens of one side, from its own top-k as far as the other one's goes: a side that lists
    fewer tokens shows fewer sets whole, and would pass for one that does not truncate.
    """
    trace, rows, _ = positions.side(side)
    return kept_of(trace, rows, min(positions.expected_trace.top_k, positions.actual_trace.top_k))


def listed_whole(trace: Trace) -> Bools:
    """Tokens [N] whose kept tokens the top-k lists whole: something it lists is excluded, or what it lists adds up to 1."""
    sets = kept_of(trace, np.arange(trace.num_tokens))
    return np.asarray(sets.complete | (sets.total > 1 - _ALL))


def kept_of(trace: Trace, rows: Any, k: int | None = None) -> Kept:
    """The kept tokens of these tokens of a trace, from its top-k or the first `k` of it."""
    ids, top, chosen = trace.top_token_ids[rows, :k], trace.top_logprobs[rows, :k].astype(np.float64), trace.logprobs[rows]
    left = np.isfinite(top) & (ids >= 0)
    listed = (ids == trace.token_ids[rows][:, None]).any(axis=1)
    apart = np.isfinite(chosen) & ~listed
    counts = left.sum(axis=1) + apart
    least = np.where(left, top, np.inf).min(axis=1, initial=np.inf)
    ties = np.maximum((left & (top == least[:, None])).sum(axis=1) - 1, 0)
    total = np.exp(np.where(left, np.minimum(top, 0), -np.inf)).sum(axis=1)
    total += np.where(apart, np.exp(np.minimum(chosen, 0)), 0)
    listed_out = (np.isneginf(top) & (ids >= 0)).any(axis=1)
    # A place that is not used says less: some engines give the chosen token a place of its own only where it needs one.
    whole = (ids < 0).any(axis=1) & (total > 1 - WHOLE)
    complete = (listed_out | whole) & (counts > 0) & ~apart if top.shape[1] else np.zeros(len(rows), bool)
    return Kept(complete=np.asarray(complete), counts=counts, ties=ties, total=np.asarray(total, np.float64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Which limits the kept tokens allow: `top_k`, or an interval each for `top_p` and `min_p`; None where they allow none.

    `mass` is the mean mass kept, over `positions`.
    """

    positions: int
    mass: float
    top_k: int | None
    top_p: tuple[float, float] | None
    min_p: tuple[float, float] | None


def before_truncation(logprobs: Doubles, power: float, listed: Doubles) -> tuple[Doubles, Doubles]:
    """Probabilities [n, m] under p^power of tokens whose `logprobs` without truncation are known, NaN where they are not.

    `listed` [n, k] are the logprobs of that side's own k likeliest tokens, not finite where a place is not used. The tail that
    it does not list is only bounded, so these are the least they can be; the second result [n] is by what factor
    they may be larger. With mass t below the last listed p, the sum of p^power over the tail is at most t p^(power - 1) for
    powers of 1 or more, and at most t^power V^(1 - power) for smaller ones (Hoelder), V the size of the vocabulary.
    """
    known = np.isfinite(logprobs)
    last = np.where(np.isfinite(listed), listed, 0.0).min(axis=1, initial=0.0)
    apart = np.where(known[:, :1] & (logprobs[:, :1] < last[:, None]), logprobs[:, :1], -np.inf)  # chosen, and not listed
    all_known = np.column_stack([np.where(np.isfinite(listed), listed, -np.inf), apart])
    rest = np.maximum(1 - np.exp(all_known).sum(axis=1), 0)
    tail = rest * np.exp((power - 1) * last) if power >= 1 else rest**power * _VOCABULARY ** (1 - power)
    whole = np.exp(power * all_known).sum(axis=1)
    stretch = np.ones(len(whole)) if power == 1 else (whole + tail) / whole
    return np.where(known, np.exp(power * np.where(known, logprobs, 0.0)) / (whole + tail)[:, None], np.nan), stretch


def fit_limits(inside: Bools, listed: Doubles, stretch: Doubles, noise: float = 0.0) -> Limits:
    """From kept tokens, and what `before_truncation` says of the tokens.

    `inside` bool [n, m]: the token is kept. Bounds, not point estimates, for a kept mass says only that p lies between it
    and the mass before the last token. A share of 1 % of the positions may stray; `noise` (nats) is what else moves the
    logprobs, and widens what is allowed.
    """
    known = np.isfinite(listed)
    listed = np.where(known, listed, 0.0)
    mass = np.where(inside, listed, 0.0).sum(axis=1)
    least = np.where(inside & known, listed, np.inf).min(axis=1)
    outside = np.maximum(np.where(~inside & known, listed, 0.0).max(axis=1), 0.0)
    most = np.where(inside, listed, 0.0).max(axis=1)
    counts = inside.sum(axis=1)
    low, high = (float(np.quantile(*of)) for of in ((mass - least, 1 - _STRAY), (np.minimum(mass * stretch, 1), _STRAY)))
    values, how_often = np.unique(counts, return_counts=True)
    common = int(values[how_often.argmax()])
    by_count = how_often.max() >= (1 - _STRAY) * len(counts)
    reached, floor = float(np.quantile(outside / most, 1 - _STRAY)), float(np.quantile(least / most, _STRAY))
    blur = math.exp(2 * noise)
    return Limits(
        positions=len(mass),
        mass=float(mass.mean()),
        top_k=common if by_count else None,
        top_p=(max(min(low, high) - noise, 0.0), min(max(low, high) + noise, 1.0)) if low - high <= _BLUR + noise else None,
        min_p=(min(reached, floor) / blur, min(max(reached, floor) * blur, 1.0))
        if reached <= floor * blur * (1 + _BLUR)
        else None,
    )


@dataclass(frozen=True, slots=True)
class Lift:
    """All tokens of a position are likelier by one constant: mass that is not listed was cut away. At `positions` positions
    the constant stands out; `mass` is what is kept there, on average.
    """

    positions: int
    mass: float


def lifted(free: Doubles, truncated: Doubles) -> Lift | None:
    """Whether `truncated` [n, m] is `free` [n, m] after a truncation that is wider than the tokens that are listed.

    It then excludes none of them, and raises all of a position by -log of the mass that it keeps: by no more than the mass
    that is not listed allows, and nowhere are they lowered. Noise does neither. None where that is not so.
    """
    common = np.isfinite(free) & np.isfinite(truncated)
    two = common.sum(axis=1) >= 2
    if not two.any():
        return None
    used = common[two]
    d = np.where(used, truncated[two], 0.0) - np.where(used, free[two], 0.0)
    constant = d.sum(axis=1) / used.sum(axis=1)
    spread = np.where(used, d, -np.inf).max(axis=1) - np.where(used, d, np.inf).min(axis=1)
    telling = np.abs(constant) > _STANDS_OUT * max(float(np.quantile(spread, 0.9)), _LEAST)
    if np.count_nonzero(telling) < ENOUGH or np.abs(constant[telling]).mean() < _SUMMED:
        return None
    unlisted = 1 - np.exp(np.where(np.isfinite(free), free, -np.inf)[two]).sum(axis=1)
    with np.errstate(over="ignore"):  # a constant far below 0 is no truncation, whatever it would cut
        cut = -np.expm1(-constant)
    fits = (constant > 0) & (cut <= unlisted + _STANDS_OUT * _LEAST)
    if np.mean(fits[telling]) < 1 - _STRAY:
        return None
    return Lift(int(np.count_nonzero(telling)), float(np.mean(1 - cut[telling])))
