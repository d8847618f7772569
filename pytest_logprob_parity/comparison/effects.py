"""Does it matter? The effects that an RL update feels, each with its limit, and what a pass has shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..trace import Trace
from . import metrics as m
from .intervals import CONFIDENCE, POWER, Clusters, detectable_share, distinct_sequences, share_bound
from .result import Gate
from .support import SupportFlips
from .tolerance import Tolerance


def gates_of(
    expected: Trace, d: m.Doubles, sequences: Any, numbers: Mapping[str, float], flips: SupportFlips, limits: Tolerance
) -> tuple[tuple[Gate, ...], Clusters | None]:
    """All gates over the differences d [n] and the sequence of each, and the sums by sequence that the bounds rest on."""
    gates = [
        Gate("NaN or +inf", numbers["n_nan"], 0, "tokens"),
        Gate("support flips", flips.count, flips.allowed, "tokens"),
        Gate("support flips deep inside", flips.deep, 0, "tokens"),
    ]
    if not len(d):
        return tuple(gates), None
    names = distinct_sequences(expected)
    if numbers["max_abs_diff"] == 0:
        counts = np.bincount(names, np.bincount(sequences, minlength=len(names)))
        zeros = np.zeros(int(np.count_nonzero(counts)))
        clusters = Clusters(counts[counts > 0].astype(np.float64), zeros, zeros)
        outliers, bad = 0, 0
    else:
        clusters = Clusters.of(d, sequences, names, limits.winsorize)
        outliers = int(np.count_nonzero(np.abs(d) > limits.outlier))
        cut = max(limits.winsorize, 2 * limits.sequence_rms)
        bad = int(np.count_nonzero(m.sequence_rms(d, sequences, cut) > limits.sequence_rms))
    mean, rms = clusters.mean(), clusters.rms()
    gates += [
        Gate("|mean difference|", mean.estimate, limits.mean_diff, "nats", mean.upper),
        Gate("RMS difference (winsorised)", rms.estimate, limits.rms_diff, "nats", rms.upper),
        # one wild token is for the outliers' budget to judge, in a small golden too
        Gate("policy ratio outside 1 +- 0.2", numbers["share_outside_clip"], max(limits.clip_share, 1 / len(d)), "of tokens"),
        Gate(f"tokens off by more than {limits.outlier:g}", outliers, limits.outlier_budget(len(d)), "tokens"),
        Gate(
            f"sequences of RMS above {limits.sequence_rms:g}",
            bad,
            limits.sequence_budget(expected.num_sequences),
            "sequences",
        ),
    ]
    return tuple(gates), clusters


def what_it_shows(clusters: Clusters, gates: Sequence[Gate], limits: Tolerance, tokens: int, sequences: int) -> tuple[str, ...]:
    """What this comparison has shown, and what it would have caught, in words."""
    if clusters.count < 2:
        return ()
    mean, rms = clusters.mean(), clusters.rms()
    bad = next((int(g.value) for g in gates if g.name.startswith("sequences of RMS")), 0)
    budget, outliers = limits.sequence_budget(sequences), limits.outlier_budget(tokens)
    reach = detectable_share(min(sequences, clusters.count), budget)
    return (
        f"shown ({CONFIDENCE:.0%} sure, {clusters.count} sequences): |mean d| up to {mean.upper:.2g} of {limits.mean_diff:g} "
        f"nats, RMS up to {rms.upper:.2g} of {limits.rms_diff:g}, up to {share_bound(bad, clusters.count):.1%} of sequences "
        f"off by an RMS above {limits.sequence_rms:.2g}",
        f"would have caught: a mean shift above {limits.mean_diff:g} nats, an RMS above {limits.rms_diff:g}, "
        f"{outliers + 1} tokens off by {limits.outlier:.2g}, {budget + 1} sequence{'s' if budget else ''} of an RMS above "
        f"{limits.sequence_rms:.2g} (mean and RMS with each d cut off at {limits.winsorize:g}); {POWER:.0%} sure where it hits "
        f"{reach:.1%} of rollouts",
    )
