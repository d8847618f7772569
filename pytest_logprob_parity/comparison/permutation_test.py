"""The block permutation test: may a replay in sampled batch compositions be one of the golden's repeats?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

#: A difference beyond the noise of batch composition is claimed at this level.
ALPHA: Final = 0.01
#: Fewer blocks than this allow too few relabelings.
MIN_BLOCKS: Final = 8
_DRAWS: Final = 9_999


@dataclass(frozen=True, kw_only=True, slots=True)
class PermutationTest:
    """The p-value of "this replay is one of the repeats", and those of the three statistics that it combines."""

    p_value: float
    p_bias: float
    p_spread: float
    p_rank: float
    repeats: int
    blocks: int

    def __str__(self) -> str:
        return f"p = {self.p_value:.2g} (block permutation test, {self.repeats} repeats, {self.blocks} blocks)"


def block_permutation_test(
    repeats: npt.NDArray[Any], candidate: npt.NDArray[Any], blocks: npt.NDArray[Any], *, draws: int = _DRAWS, seed: int = 0
) -> PermutationTest | None:
    """Test whether `candidate` [N] is exchangeable with `repeats` [R, N] within each of `blocks` [N] (a number a token).

    Valid where every block of every replay, candidate included, drew its batch composition from one distribution: noise is
    a function of it, and whole runs of one composition, not their sequences, are exchangeable. With x the R + 1 replays and
    x̄ their mean a token, each block and replay has b = sum(x - x̄), q = sum((x - x̄)^2) and the rank of q; labels are
    permuted within blocks. Bias (|sum b|) is two-sided, spread (sum q) and rank upper-sided; the three are combined by
    Westfall and Young's min-p ("Resampling-Based Multiple Testing", 1993). Every p is (1 + #{>=}) / (draws + 1).

    Tokens that are not finite in every replay take no part. None where fewer than MIN_BLOCKS blocks have tokens.
    """
    replays = np.vstack([repeats, candidate[None]])
    used = np.isfinite(replays).all(axis=0)
    names, numbers = np.unique(blocks[used], return_inverse=True)
    if len(names) < MIN_BLOCKS:
        return None
    x = replays[:, used].astype(np.float64)
    x -= x.mean(axis=0)
    bias = np.stack([np.bincount(numbers, row, len(names)) for row in x])
    spread = np.stack([np.bincount(numbers, row * row, len(names)) for row in x])
    rank = (spread[:, None] > spread[None]).sum(axis=1) + 0.5 * (spread[:, None] == spread[None]).sum(axis=1)
    labels = np.random.default_rng(seed).integers(0, len(x), (draws + 1, len(names)))
    labels[0] = len(x) - 1  # as it was
    columns = np.arange(len(names))
    p = np.stack(
        [
            _upper_p(np.abs(bias[labels, columns].sum(axis=1))),
            _upper_p(spread[labels, columns].sum(axis=1)),
            _upper_p(rank[labels, columns].sum(axis=1)),
        ]
    )
    smallest = p.min(axis=0)
    p_value = float(np.mean(smallest <= smallest[0]))
    p_bias, p_spread, p_rank = p[:, 0].tolist()
    return PermutationTest(
        p_value=p_value, p_bias=p_bias, p_spread=p_spread, p_rank=p_rank, repeats=len(x) - 1, blocks=len(names)
    )


def _upper_p(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """For each value the share of all that are as large: ties count, those that rounding set apart among them."""
    largest = float(values.max())
    rounded = np.round(values / largest, 12) if largest > 0 else values
    ordered = np.sort(rounded)
    return (len(values) - np.searchsorted(ordered, rounded, side="left")) / len(values)
