"""How far a token is below the likeliest of its position, as far as a trace shows that."""

from __future__ import annotations

from typing import Final

import numpy as np

from ...trace import FloatArray, Trace

#: vLLM's rank of a token counts all that are as likely or likelier, so the likeliest of an exact tie has this rank.
_RANK_OF_A_TIE: Final = 2
#: The probabilities of a top-k that add up to more than this bound no other token's.
_MOST_MASS: Final = 1 - 1e-6


def below_the_largest(trace: Trace) -> FloatArray:
    """How far (nats) each token's logprob [N] is below the largest of its position; 0 for the likeliest, and for exact ties.

    From the top-k. A position without one goes by its rank: rank 2 may be an exact tie and counts as 0, a larger one as inf.
    """
    below = np.where(trace.ranks > _RANK_OF_A_TIE, np.float32(np.inf), np.float32(0))
    if not trace.top_k:
        return below
    largest = np.where(trace.top_token_ids >= 0, trace.top_logprobs, -np.inf).max(axis=1)
    known = np.isfinite(largest) & ~np.isnan(trace.logprobs)
    with np.errstate(invalid="ignore"):
        return np.where(known, np.maximum(largest - trace.logprobs, 0), below).astype(np.float32)


def gap_to(trace: Trace, row: int, other: int) -> float:
    """How much (nats) the token of `row` is likelier than token `other`: at least, where the top-k does not list that one.

    Sampled tokens: the gap between the two likeliest. NaN without a top-k, and where raw logprobs hide what was compared.
    """
    listed = trace.top_token_ids[row] >= 0
    top = trace.top_logprobs[row][listed].astype(np.float64)
    if not trace.sampling.greedy:
        return float(top[0] - top[1]) if len(top) > 1 else float("nan")
    if not np.isfinite(top).any() or not shows_the_argmax(trace):
        return float("nan")
    same = trace.top_token_ids[row][listed] == other
    if same.any():
        return float(top.max() - top[same][0])
    mass = float(np.exp(top).sum())
    rest = np.log1p(-mass) if mass < _MOST_MASS else np.inf  # a distribution that lists all, or none: no bound
    return float(top.max() - min(top[np.isfinite(top)].min(), rest))


def shows_the_argmax(trace: Trace) -> bool:
    """Whether the largest logprob of a position is that of the token which greedy decoding takes: raw logprobs are of before
    the penalties.
    """
    return trace.logprobs_mode == "processed_logprobs" or trace.sampling.raw_is_processed
