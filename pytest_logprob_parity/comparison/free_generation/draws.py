"""Are two runs draws of one distribution? Their likelihood, and how many of their completions are distinct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ...trace import Segment, Trace

_PERMUTATIONS: Final = 19_999


def fewer_distinct(expected: Trace, segments: Sequence[Segment], actual: Trace) -> float:
    """How often so few different completions come out by chance: one-sided p of a permutation test within prompts.

    Under chance alone golden and free generation are two samples of one distribution: labels are permuted within each prompt.
    """
    prompts: dict[tuple[int, int], list[list[bytes]]] = {}
    for i, s in enumerate(segments):
        of_expected, of_actual = prompts.setdefault((int(expected.group[s.sequence]), s.turn), [[], []])
        start, stop = actual.bounds(i)
        of_expected.append(expected.token_ids[s.start : s.stop].tobytes())
        of_actual.append(actual.token_ids[start:stop].tobytes())
    seen = sum(len(set(of_actual)) for _, of_actual in prompts.values())
    if seen >= sum(len(set(of_expected)) for of_expected, _ in prompts.values()):
        return 1.0
    rng = np.random.default_rng(0)
    totals = np.zeros(_PERMUTATIONS, np.int64)
    for of_expected, of_actual in prompts.values():
        _, names = np.unique(np.array([*of_expected, *of_actual], object), return_inverse=True)
        size = int(names.max()) + 1
        order = rng.random((_PERMUTATIONS, len(names))).argsort(axis=1)[:, : len(of_actual)]
        drawn = np.zeros((_PERMUTATIONS, size), bool)
        drawn[np.arange(_PERMUTATIONS)[:, None], names[order]] = True
        totals += drawn.sum(axis=1)
    return float((1 + np.count_nonzero(totals <= seen)) / (1 + _PERMUTATIONS))


def likelihood_shift(expected: Trace, segments: Sequence[Segment], actual: Trace) -> tuple[float, float]:
    """Mean over turns of the change of the mean logprob a token, and its two-sided p of a paired t-test."""
    if expected.distribution() != actual.distribution():
        return 0.0, 1.0
    pairs = [(expected.logprobs[s.start : s.stop], actual.logprobs[slice(*actual.bounds(i))]) for i, s in enumerate(segments)]
    changes = np.array([float(a.mean() - e.mean()) for e, a in pairs if len(a) and len(e)])
    changes = changes[np.isfinite(changes)]
    spread = float(changes.std(ddof=1)) if len(changes) > 1 else 0.0
    if spread == 0:
        return 0.0, 1.0
    from scipy.special import stdtr

    mean = float(changes.mean())
    return mean, 2 * float(stdtr(len(changes) - 1, -abs(mean) / spread * len(changes) ** 0.5))
