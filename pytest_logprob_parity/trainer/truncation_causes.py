"""Differences that a truncation makes: the rollouts' label lacks one, or the trainer computes over all tokens."""

from __future__ import annotations

from typing import Final

import numpy as np

from ..comparison.result import Finding
from ..trace import Trace

#: Positions that are enough to show a truncation.
_ENOUGH: Final = 50
#: Where a truncation made the differences, more than this share of them has one sign, and none is below this (nats): the
#: truncated support has more than a twentieth of the probability.
_ALMOST_ALL: Final = 0.99
_KEPT: Final = -3.0


def lost_truncation(trace: Trace, scored: Trace) -> Finding | None:
    """Candidates, `truncation` first, where the rollouts' label lacks a truncation that their numbers show: their top-k
    excludes tokens, or no token is more likely to the trainer, as where the truncated support was renormalised.
    """
    if trace.sampling.truncates:
        return ignored_kept_sets(trace, scored)
    excluded = (np.isneginf(trace.top_logprobs) & (trace.top_token_ids >= 0)).any(axis=1) & trace.mask
    positions = int(np.count_nonzero(excluded))
    why = f"their own top-k excludes tokens at {positions:,} positions" if positions >= _ENOUGH else _lowered(trace, scored)
    if not why:
        return None
    text = f"{why}: the rollouts are of a truncated distribution (top-p, top-k, min-p), and their label has no truncation"
    return Finding(
        layer="semantic",
        cause=None,
        evidence=text,
        candidates=("truncation", "penalties", "weights_differ"),
        values={"excluding": positions},
    )


def ignored_kept_sets(trace: Trace, trainer: Trace) -> Finding | None:
    """Candidates, `truncation` first, where the rollouts have kept sets, and no token is more likely to the trainer: as where
    its distributions are over all tokens.
    """
    if trace.kept_counts is None or not (why := _lowered(trace, trainer)):
        return None
    text = f"{why}: the trainer may compute over all tokens, not over those that truncation kept"
    return Finding(
        layer="semantic", cause=None, evidence=text, candidates=("truncation", "temperature", "weights_differ")
    )  # fmt: skip


def _lowered(trace: Trace, trainer: Trace) -> str:
    """How far the trainer's logprobs are below the rollouts', in words; "" unless nearly all that differ are below."""
    d = (trainer.logprobs.astype(np.float64) - trace.logprobs)[trace.mask]
    if trace.kept_counts is None:
        d = d[trace.logprobs[trace.mask] != 0]  # 0 may be a filler; with kept sets it is a set of one token
    d = d[np.isfinite(d)]
    apart = d[np.abs(d) > np.sqrt(np.mean(d**2)) / 2] if len(d) else d
    if len(apart) < _ENOUGH or np.mean(apart < 0) <= _ALMOST_ALL or apart.min() <= _KEPT:
        return ""
    return f"no token is more likely to the trainer, {len(apart):,} are less likely by {-apart.mean():.2g} nats on average"
