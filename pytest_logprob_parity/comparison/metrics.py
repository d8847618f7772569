"""Numbers over aligned tokens: differences, KL estimates, policy ratios, support flips, entropy, agreement."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..trace import Trace
from ..trace.kept import kept_hashes
from .alignment import Alignment

Doubles = npt.NDArray[np.float64]

#: PPO's clip: a policy ratio outside 1 +- this is counted.
CLIP: Final = 0.2
#: Log-ratios are cut off here: the squares of their exponentials still fit a double.
_MAX_LOG_RATIO: Final = 300.0
#: Rows at a time where a whole [tokens, k] column passes through the processor's cache.
_CHUNK: Final = 65_536


#: What difference_metrics gives.
DIFFERENCE_METRICS: Final = (
    "mean_diff", "mean_abs_diff", "rms_diff", "p50_abs_diff", "p99_abs_diff", "max_abs_diff", "k1", "k3",
    "mean_ratio", "max_ratio", "share_outside_clip", "ess",
)  # fmt: skip


def difference_metrics(d: Doubles) -> dict[str, float]:
    """Statistics of d = actual - expected (nats) over n finite differences; all NaN where n is 0.

    k1 = E[-d] and k3 = E[r - 1 - d] with r = exp(d) estimate KL(expected || actual) for samples from expected
    (Schulman, "Approximating KL Divergence", 2020). `ess` is (sum r)^2 / sum r^2 / n, from 0 to 1.
    """
    names = DIFFERENCE_METRICS
    if not len(d):
        return dict.fromkeys(names, float("nan"))
    absolute = np.abs(d)
    largest = float(absolute.max())
    if largest == 0:
        return dict.fromkeys(names, 0.0) | {"mean_ratio": 1.0, "max_ratio": 1.0, "ess": 1.0}
    ratio = np.exp(np.minimum(d, _MAX_LOG_RATIO))
    mean, mean_ratio, mean_square_ratio = float(d.mean()), float(ratio.mean()), float(np.dot(ratio, ratio)) / len(d)
    ranks = [(len(d) - 1) // 2, int(0.99 * (len(d) - 1))]
    p50, p99 = np.partition(absolute, ranks)[ranks]
    values = (
        mean,
        float(absolute.mean()),
        float(np.sqrt(np.dot(d, d) / len(d))),
        float(p50),
        float(p99),
        largest,
        -mean,
        mean_ratio - 1 - mean,
        mean_ratio,
        float(ratio.max()),
        float(np.count_nonzero(np.abs(ratio - 1) > CLIP)) / len(d),
        min(mean_ratio**2 / mean_square_ratio, 1.0) if mean_square_ratio else 0.0,  # every ratio underflows
    )
    return dict(zip(names, values, strict=True))


def sequence_rms(d: Doubles, sequences: npt.NDArray[np.int64], limit: float) -> Doubles:
    """RMS of d for each sequence that has tokens among `sequences` (the number of each d), every |d| cut off at `limit`.

    Its largest |d| counts as 0: single outliers are counted by the outlier limit of tokens.
    """
    squares = np.minimum(np.abs(d), limit) ** 2
    counts, sums = np.bincount(sequences), np.bincount(sequences, weights=squares)
    largest = np.zeros(len(counts))
    np.maximum.at(largest, sequences, squares)
    rest = np.maximum(sums - largest, 0)
    return np.sqrt(rest[counts > 0] / counts[counts > 0])


def sequence_numbers(trace: Trace, rows: Any) -> npt.NDArray[np.int64]:
    """The sequence number of each selected token."""
    numbers: npt.NDArray[np.int64] = trace.sequence_of_token[rows]
    return numbers


def top_k_metrics(expected: Trace, actual: Trace, rows: Alignment) -> dict[str, float]:
    """Top-1 agreement (0 to 1) and entropy of both sides (nats) from the top-k, with the mass that it covers.

    The entropy is that of the covered part, -sum p log p: a lower bound where `mass` is below 1. Empty without top-k.
    """
    if not expected.top_k or not actual.top_k or not rows.tokens:
        return {}
    first_e, first_a = expected.top_token_ids[:, 0][rows.expected], actual.top_token_ids[:, 0][rows.actual]
    known = (first_e >= 0) & (first_a >= 0)
    if not known.any():
        return {}
    result = {"top1_agreement": float(np.mean(first_e[known] == first_a[known]))}
    for side, trace, selected in (("expected", expected, rows.expected), ("actual", actual, rows.actual)):
        top = trace.top_logprobs if isinstance(selected, slice) else trace.top_logprobs[selected]
        entropy, mass = _entropy(top)
        result |= {f"entropy_{side}": entropy, f"entropy_mass_{side}": mass}
    return result


def kept_set_metrics(expected: Trace, actual: Trace, rows: Alignment) -> dict[str, float]:
    """The share of tokens (0 to 1) whose kept set differs, of those that have one on both sides. Empty where there are none."""
    if expected.kept_counts is None or actual.kept_counts is None:
        return {}
    sides = ((expected, rows.expected), (actual, rows.actual))
    counts = [np.asarray(trace.kept_counts)[of] for trace, of in sides]
    if not (both := (counts[0] > 0) & (counts[1] > 0)).any():
        return {}
    first, second = (kept_hashes(trace.kept_counts, trace.kept_token_ids)[of] for trace, of in sides)
    return {"kept_sets_differ": float(np.mean(((first != second) | (counts[0] != counts[1]))[both]))}


def _entropy(top: npt.NDArray[np.float32]) -> tuple[float, float]:
    total = mass = 0.0
    for start in range(0, len(top), _CHUNK):
        part = np.maximum(top[start : start + _CHUNK], np.float32(-100))  # -inf times 0 is 0 here, not NaN
        p = np.exp(part)
        mass += float(np.sum(p, dtype=np.float64))
        p *= part
        total -= float(np.sum(p, dtype=np.float64))
    return total / len(top), mass / len(top)
