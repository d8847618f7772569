"""Support flips: golden tokens that truncation excludes on the other side. How many are allowed, and how deep they lay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..golden.reference import Reference
from ..trace import Trace
from .alignment import Alignment
from .tolerance import Tolerance, counts_allowed


@dataclass(frozen=True, kw_only=True, slots=True)
class SupportFlips:
    """`count` tokens excluded on one side only, `allowed` of them by the golden's own rate; more than `unexplained` are more
    than noise explains. `deep` says how many each sequence has far from the edge, where it has any.
    """

    count: int
    allowed: int
    unexplained: int
    deep: Mapping[int, int] = field(default_factory=dict)


def support_flips(
    expected: Trace,
    actual: Trace,
    rows: Alignment,
    flipped: npt.NDArray[np.bool_],
    limits: Tolerance,
    reference: Reference | None = None,
) -> SupportFlips:
    """Judge the flipped ones of the aligned tokens. Without truncation on either side none is allowed.

    Two builds flip as often as both flip against a reference, so what the golden flips against its own counts twice.
    """
    count = int(np.count_nonzero(flipped))
    if not (expected.sampling.truncates or actual.sampling.truncates):
        return SupportFlips(count=count, allowed=0, unexplained=0)
    allowed = int(np.ceil(limits.support_flips * rows.tokens - 1e-9))
    unexplained = allowed
    if "support_flips" not in limits.explicit:
        share = 1.0 if reference is None else reference.share_of(expected)
        seen = 0
        if reference is not None and share:
            seen = int(np.count_nonzero(np.isneginf(reference.logprobs) & np.isfinite(expected.logprobs)))
            # the reference says how often this model's noise flips
            allowed = min(allowed, max(2 * _flips_at_most(seen, share), 1 + rows.tokens // 1000))
        allowed, unexplained = counts_allowed(allowed, round(2 * seen / share) if share else 0, covered=share or 1.0)
    if not count or not expected.sampling.truncates:
        return SupportFlips(count=count, allowed=allowed, unexplained=unexplained)
    places = np.arange(expected.num_tokens)[rows.expected][flipped]
    lost = places[np.isfinite(expected.logprobs[places])]
    deep = lost[depth(expected, lost, limits) > 1]
    sequences = expected.sequence_of_token[deep]
    return SupportFlips(count=count, allowed=allowed, unexplained=unexplained, deep=Counter(sequences.tolist()))


def _flips_at_most(seen: int, share: float) -> int:
    """How many of all tokens flip where `seen` of a share of them do: beside these, the others up to a Poisson mean's bound."""
    from scipy.special import gammaincinv

    return seen + int(np.ceil(float(gammaincinv(seen + 1, 0.95)) * (1 - share) / share))


def depth(trace: Trace, places: npt.NDArray[Any], limits: Tolerance) -> npt.NDArray[np.float64]:
    """How far inside the support these tokens of a truncated trace lay, as a multiple of what noise explains.

    A token is excluded by crossing the nearest of the edges, so the nearest one counts. Top-p's edge is in probability
    mass: p minus the mass of all likelier tokens (limit `support_depth`). The edges of top-k and min-p are in nats:
    the token's logprob minus that of the last one kept, or of the threshold (limit `near_tie`).
    """
    sampling = trace.sampling
    chosen = trace.logprobs[places].astype(np.float64)
    top = trace.top_logprobs[places].astype(np.float64)
    depths = [np.full(len(places), np.inf)]
    if sampling.top_p < 1:
        depths.append((sampling.top_p - _mass_above(trace, places, chosen, top)) / limits.support_depth)
    if sampling.top_k > 0 and trace.top_k >= sampling.top_k:
        depths.append((chosen - top[:, sampling.top_k - 1]) / limits.near_tie)
    elif sampling.top_k > 0:
        depths.append(np.zeros(len(places)))  # the edge was not recorded
    if sampling.min_p > 0 and trace.top_k:
        depths.append((chosen - top[:, 0] - np.log(sampling.min_p)) / limits.near_tie)
    nearest: npt.NDArray[np.float64] = np.min(depths, axis=0)
    return nearest


def _mass_above(trace: Trace, places: npt.NDArray[Any], chosen: npt.NDArray[Any], top: npt.NDArray[Any]) -> Any:
    """The mass (0 to 1, before truncation) of the tokens likelier than the chosen one; an upper bound where it is not known.

    The recorded logprobs are of the truncated distribution; the mass that it kept is known where the trace has
    logprobs without truncation too, and is otherwise taken for 1.
    """
    kept = np.ones(len(places))
    if trace.untruncated_logprobs is not None:
        kept = np.exp(np.minimum(trace.untruncated_logprobs[places].astype(np.float64) - chosen, 0))
    likelier = top > chosen[:, None]
    within = np.exp(np.where(likelier, top, -np.inf)).sum(axis=1)
    outside_top_k = likelier.all(axis=1) if top.shape[1] else np.ones(len(places), bool)
    most = 1 - np.exp(chosen)
    if top.shape[1]:  # those between the list and the chosen token are no likelier than the last that is listed
        ranks = trace.ranks[places].astype(np.float64)
        between = np.where(ranks > 0, np.maximum(ranks - 1 - top.shape[1], 0) * np.exp(top[:, -1]), np.inf)
        most = np.minimum(most, within + between)
    return kept * np.where(outside_top_k, most, within)
