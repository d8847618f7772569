"""Are the trainer's logits a function of the right logits? A soft cap and a scale are; other weights are not."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..comparison.result import Finding
from ..trace import Trace
from .scorer import GivesLogits, Scorer
from .scoring import spread
from .trainer_faults import furthest_off

Doubles = npt.NDArray[np.float64]

#: How many sequences are scored, how many of their tokens are used (half to fit, half to test), and how many are needed.
_SEQUENCES, _TOKENS, _FEWEST = 8, 160, 40
#: The logits of a position are counted in this many bins. The function is piecewise linear between this many knots.
_BINS, _KNOTS = 2048, 9
#: A bend of the function by one nat costs as much as a token that differs by this (nats).
_STRAIGHT: Final = 1e-3
#: The function explains the numbers where it leaves less than this share of the RMS difference. Other weights leave nearly all.
_LEAVES: Final = 0.15


def explaining_logit_function(rollouts: Trace, scored: Trace, column: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """Candidates, `logits` first, where a function of the scorer's logits explains most of the difference to the column.

    The function is piecewise linear. It is fitted to half of the tokens by least squares (log p = f(x_t) - log sum exp f(x))
    and tested on the other half. None for a scorer that does not give logits.
    """
    from scipy.optimize import least_squares

    if not isinstance(scorer, GivesLogits):
        return None
    few = [*furthest_off(rollouts, scored, column, noise)[: _SEQUENCES // 2], *spread(rollouts, _SEQUENCES // 2)]
    chosen, values, counts, numbers = _logits_of(rollouts, column, scorer, list(dict.fromkeys(few)))
    if len(numbers) < _FEWEST or not np.isfinite(values).all():  # no such function where tokens are excluded
        return None
    temperature = rollouts.sampling.applied_temperature
    chosen, values = chosen / temperature, values / temperature
    knots = np.linspace(values.min(), values.max(), _KNOTS)
    inside = [_hats(x, knots) for x in (chosen, values)]

    def logprobs(function: Doubles, of: Any) -> tuple[Doubles, Doubles]:
        """Logprobs [n] of the tokens `of`, and their derivatives [n, knots]."""
        with np.errstate(divide="ignore"):
            weighted = inside[1][of] @ function + np.log(counts[of])
        largest = weighted.max(axis=1, keepdims=True)
        p = np.exp(weighted - largest)
        total = p.sum(axis=1, keepdims=True)
        slopes = inside[0][of] - np.einsum("nb,nbk->nk", p / total, inside[1][of])
        return inside[0][of] @ function - (np.log(total) + largest)[:, 0], slopes

    fit, rest = np.arange(len(numbers)) % 2 == 0, np.arange(len(numbers)) % 2 == 1
    bends = _STRAIGHT * np.diff(np.eye(_KNOTS), 2, axis=0)  # where no token lies, the line goes on
    found = least_squares(
        lambda f: np.concatenate([logprobs(f, fit)[0] - numbers[fit], bends @ f]),
        np.zeros(_KNOTS),
        jac=lambda f: np.concatenate([logprobs(f, fit)[1], bends]),
        max_nfev=100,
    )
    before, left = (_rms(logprobs(function, rest)[0] - numbers[rest]) for function in (knots, found.x))
    if left > _LEAVES * before:
        return None
    text = (
        f"a function of the scorer's logits gives these numbers up to RMS {left:.2g} nats (without it: {before:.2g}): a soft "
        "cap or a scale, on one side only or with another value"
    )
    return Finding(
        layer="trainer",
        cause=None,
        evidence=text,
        candidates=("logits", "temperature", "head_precision"),
        values={"left": left, "off": before},
    )


def _logits_of(
    rollouts: Trace, column: Trace, scorer: GivesLogits, sequences: list[int]
) -> tuple[Doubles, Doubles, Doubles, Doubles]:
    """For some tokens: the token's logit [n], the means [n, bins] and counts [n, bins] of all logits in bins, and the column's
    number [n].
    """
    import torch

    found: list[tuple[float, Doubles, Doubles, float]] = []
    for sequence in sequences:
        start, stop = rollouts.bounds(sequence)
        ids = torch.tensor([[*rollouts.prompt(sequence), *rollouts.completion(sequence)]])
        logits = scorer.logits(ids, torch.ones_like(ids))[0][0, ids.shape[1] - 1 - (stop - start) :].double().cpu()
        of_sequence = column.logprobs[start:stop].astype(np.float64)
        for n in np.flatnonzero(rollouts.mask[start:stop] & np.isfinite(of_sequence)):
            row = logits[n]
            edges = torch.linspace(float(row.min()), float(row.max()), _BINS + 1, dtype=torch.float64)
            bins = (torch.bucketize(row, edges) - 1).clamp(0, _BINS - 1)
            counts = torch.bincount(bins, minlength=_BINS).double()
            sums = torch.bincount(bins, row, minlength=_BINS)
            means = torch.where(counts > 0, sums / counts.clamp(min=1), edges[:-1])
            found.append((float(row[rollouts.token_ids[start + n]]), means.numpy(), counts.numpy(), of_sequence[n]))
    found = found[:: max(len(found) // _TOKENS, 1)]
    chosen, values, counted, numbers = (np.array(part) for part in zip(*found, strict=True)) if found else (np.empty(0),) * 4
    return chosen, values, counted, numbers


def _hats(x: Doubles, knots: Doubles) -> Doubles:
    """Weights [..., knots] of the values at the knots in a piecewise linear function at x [...]."""
    at = np.clip((x - knots[0]) / (knots[1] - knots[0]), 0, len(knots) - 1)
    low = np.minimum(at.astype(np.int64), len(knots) - 2)
    weights = np.zeros((*x.shape, len(knots)))
    np.put_along_axis(weights, low[..., None], (1 - (at - low))[..., None], -1)
    np.put_along_axis(weights, low[..., None] + 1, (at - low)[..., None], -1)
    return weights


def _rms(d: Doubles) -> float:
    return float(np.sqrt(np.mean(d**2)))
