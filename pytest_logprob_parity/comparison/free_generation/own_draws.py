"""Were tokens drawn from the distributions that an engine reports for them? A test over all positions, without a second run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...trace import BoolArray, Trace
from .argmax import below_the_largest, shows_the_argmax


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnDraws:
    """What tokens say of how they were drawn, over `tokens` positions.

    `shift` (nats): the mean logprob of the tokens minus its expectation, which is minus the entropy where the top-k lists all
    tokens. `z`: the shift in standard errors, `p_value` its two-sided p. `excluded`: tokens that have no probability.
    `not_likeliest`: under greedy decoding, tokens that are further below the largest logprob than noise explains.
    """

    tokens: int
    shift: float
    z: float
    p_value: float
    excluded: int
    not_likeliest: int = 0

    def __str__(self) -> str:
        if self.excluded:
            return f"{self.excluded:,} of {self.tokens:,} tokens have no probability"
        if self.not_likeliest:
            return f"{self.not_likeliest:,} of {self.tokens:,} tokens are not the likeliest, under greedy decoding"
        return (
            f"the tokens are {abs(self.shift):.2g} nats {'less' if self.shift < 0 else 'more'} likely on average than their "
            f"distributions expect (z = {self.z:+.1f}, p = {self.p_value:.1g}, {self.tokens:,} tokens)"
        )


def own_draws(trace: Trace, near_tie: float) -> OwnDraws | None:
    """Hold the tokens of `trace` against its top-k; None where this is not of what they were drawn from (raw logprobs).

    Each position's token is scored by its logprob, a token that is not listed by that of the last one listed. The scores minus
    their expectations have mean 0 whatever came before, so their sum over its standard error is a standard normal variable.
    """
    if not trace.top_k or not shows_the_argmax(trace):
        return None
    used = trace.mask & ~np.isnan(trace.logprobs)
    excluded = int(np.count_nonzero(used & np.isneginf(trace.logprobs)))
    tokens = int(np.count_nonzero(used))
    if trace.sampling.greedy:
        others = int(np.count_nonzero(used & (below_the_largest(trace) > near_tie)))
        return OwnDraws(tokens=tokens, shift=0.0, z=0.0, p_value=1.0, excluded=excluded, not_likeliest=others)
    change, variance = _scores(trace, used & np.isfinite(trace.logprobs))
    total = float(np.sqrt(variance.sum()))
    if not total:
        return OwnDraws(tokens=tokens, shift=0.0, z=0.0, p_value=1.0, excluded=excluded)
    from scipy.special import ndtr

    z = float(change.sum()) / total
    return OwnDraws(
        tokens=tokens, shift=float(change.mean()), z=z, p_value=2 * float(ndtr(-abs(z))), excluded=excluded
    )  # fmt: skip


def _scores(
    trace: Trace, used: BoolArray
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Scores minus their expectations [n], and their variances [n]."""
    top = trace.top_logprobs[used].astype(np.float64)
    top = np.where((trace.top_token_ids[used] >= 0) & np.isfinite(top), top, -np.inf)
    listed = np.isfinite(top)
    last = np.where(listed, top, np.inf).min(axis=1, initial=0.0)
    among = (trace.top_token_ids[used] == trace.token_ids[used][:, None]).any(axis=1)
    chosen = np.where(among, trace.logprobs[used], last)
    p = np.where(listed, np.exp(np.minimum(top, 0)), 0.0)
    rest = np.maximum(1 - p.sum(axis=1), 0.0)
    scores = np.where(listed, top, 0.0)
    mean = (p * scores).sum(axis=1) + rest * last
    square = (p * scores**2).sum(axis=1) + rest * last**2
    return chosen - mean, np.maximum(square - mean**2, 0.0)
