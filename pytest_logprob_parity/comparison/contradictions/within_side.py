"""One side against itself: what its chosen logprobs and ranks say, against what its own top-k says of the same token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from .contradiction import Key
from .side_columns import Bools, Columns, Doubles, largest_noise, rounding, where

#: Probabilities of a position may add up to so much more than 1, and a logprob be so much above 0: rounding.
_ROUNDING: Final = 0.02
#: So many positions, and this share of all, are no chance.
_ENOUGH, _MOST = 5, 0.5


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Check:
    """What one check says of one side: the tokens [n] that it `flagged`, among `of`, and the sentence around the count.

    `certain` says that noise explains not all of them, `decides` that a comparison may fail for them.
    """

    key: Key
    flagged: Bools
    of: int
    text: str
    certain: bool = True
    decides: bool = True

    @property
    def count(self) -> int:
        """How many."""
        return int(np.count_nonzero(self.flagged))


def checks(side: Columns, other: Columns) -> Iterator[Check]:
    """The contradictions of `side` with itself; `other` is there for the noise of its dtype."""
    whose, noise = side.name, largest_noise(side.trace, other.trace)
    yield _above_zero(side, noise, whose)
    if side.trace.top_k:
        empty, what = _no_distribution(side)
        text = f"{{count}} of {{of}} positions of {whose} have a top-k that is not a distribution: {what}"
        yield Check(key="no_distribution", flagged=empty, of=len(empty), text=text)
        yield _mass(side, noise, whose)
        yield _chosen(side, ~empty, noise, whose)
        yield _above_the_largest(side, ~empty, noise, whose)
        yield _ranks(side, ~empty, noise, whose)


def _beyond(size: Doubles, noise: float, of: int) -> bool:
    """Whether contradictions of this size [n] (nats) are more than noise in one of the columns: any that is large, or most."""
    most = max(_ENOUGH, _MOST * of)
    return bool(np.any(size > noise) or np.count_nonzero(size > noise / 2) >= most)


def _no_distribution(side: Columns) -> tuple[Bools, str]:
    """Positions [n] whose top-k is all -inf, holds NaN, or is one constant as at most other positions; and in words."""
    known = side.has & ~np.isnan(side.chosen)
    with np.errstate(invalid="ignore"):
        broken = known & np.isnan(side.top).any(axis=1)
    nothing = known & ~broken & np.isneginf(side.largest)
    flat = known & (side.used.sum(axis=1) > 1) & np.isfinite(side.largest) & (side.largest == side.last)
    constant = np.zeros(len(known), bool)
    if np.count_nonzero(flat) >= max(_ENOUGH, _MOST * np.count_nonzero(known)):
        values, counts = np.unique(side.largest[flat], return_counts=True)
        if counts.max() >= max(_ENOUGH, _MOST * np.count_nonzero(known)):
            constant = flat & (side.largest == values[counts.argmax()])
    in_words = [
        text
        for flagged, text in (
            (broken, "NaN"),
            (nothing, "all values are -inf"),
            (constant, f"all values are {float(side.largest[constant][0]) if constant.any() else 0:g}"),
        )
        if flagged.any()
    ]
    return np.asarray(broken | nothing | constant), " or ".join(in_words)


def _above_zero(side: Columns, noise: float, whose: str) -> Check:
    largest = np.fmax(side.chosen, side.largest)
    size = np.where(np.isfinite(largest), largest, 0.0)  # +inf and NaN are reported as such
    text = f"{{count}} of {{of}} positions of {whose} have logprobs above 0"
    return Check(key="above_zero", flagged=size > _ROUNDING, of=len(size), text=text, certain=_beyond(size, noise, len(size)))


def _mass(side: Columns, noise: float, whose: str) -> Check:
    total = np.exp(np.minimum(side.top, 0)).sum(axis=1, dtype=np.float64)
    flagged = (total > 1 + _ROUNDING) & (side.largest <= _ROUNDING)
    most = float(total[flagged].max()) if flagged.any() else 0.0
    text = f"the probabilities of the top-k add up to more than 1 at {{count}} of {{of}} positions of {whose} (to {most:.3g})"
    size = np.where(flagged, np.log(np.maximum(total, 1)), 0.0)
    return Check(key="mass_above_one", flagged=flagged, of=len(flagged), text=text, certain=_beyond(size, noise, len(flagged)))


def _chosen(side: Columns, usable: Bools, noise: float, whose: str) -> Check:
    """A chosen logprob and the same token's entry in the top-k are one number."""
    known = side.listed & usable & ~np.isnan(side.chosen)
    with np.errstate(invalid="ignore"):
        off = np.where(known & (side.chosen != side.own), np.abs(side.chosen - side.own), 0.0)
        off = np.where(off > rounding(side.own), off, 0.0)
    of = int(np.count_nonzero(known))
    text = f"{{count}} of {{of}} chosen logprobs of {whose} differ from what its own top-k lists for the same token"
    return Check(key="chosen_and_top_k", flagged=off > 0, of=of, text=text, certain=_beyond(off, noise, of))


def _above_the_largest(side: Columns, usable: Bools, noise: float, whose: str) -> Check:
    known = side.has & usable & ~side.listed & np.isfinite(side.chosen)
    over = np.where(known, side.chosen - np.where(known, side.largest, 0.0), 0.0)
    over = np.where(over > rounding(side.largest), over, 0.0)
    of = int(np.count_nonzero(known))
    text = f"{{count}} of {{of}} chosen logprobs of {whose} are larger than the largest of a top-k that does not list the token"
    return Check(key="above_the_largest", flagged=over > 0, of=of, text=text, certain=_beyond(over, noise, of))


def _ranks(side: Columns, usable: Bools, noise: float, whose: str) -> Check:
    """A rank is at least 1 + how many the top-k lists as likelier, and at most how many it lists as likely or likelier (vLLM
    counts those too), unless the chosen token is as likely as the last one: then others may stand outside.

    vLLM miscounts on CPUs without AVX-512 (measured, 0.32.0: half of what it should count, at 1 to 100 % of the tokens; never
    too many): ranks that are too small are reported, and decide nothing.
    """
    known = side.has & usable & (side.ranks > 0) & ~np.isnan(side.chosen)
    said = np.where(side.listed, side.own, side.chosen)[:, None]
    slack = noise / 2
    with np.errstate(invalid="ignore"):
        likelier = (side.top > said + slack).sum(axis=1)
        as_likely = (side.used & (side.top >= said - slack)).sum(axis=1)
        inside = side.listed & (side.own > side.last + slack)
    small, large = known & (side.ranks < 1 + likelier), known & inside & (side.ranks > as_likely)
    decides = bool(large.any())
    text = f"{{count}} of {{of}} ranks of {whose} contradict the order of its own top-k"
    return Check(key="rank_and_top_k", flagged=small | large, of=int(np.count_nonzero(known)), text=text, decides=decides)


def in_words(check: Check, side: Columns) -> str:
    """The check in words, with where its tokens stand."""
    return f"{check.text.format(count=f'{check.count:,}', of=f'{check.of:,}')} ({where(side, check.flagged)})"
