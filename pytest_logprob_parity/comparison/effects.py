"""Does it matter? What the objective feels of the differences, and whether the golden's own noise explains it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ..trace import Trace
from . import metrics as m
from .intervals import Interval, detectable_share, mean_interval, poisson_quantile, share_bound
from .objectives import Objective, k3_of, objective_of
from .result import Errors, Gate, GateKey, Shown, Verdict
from .support import SupportFlips
from .tolerance import Tolerance

Integers = npt.NDArray[np.int64]

#: A clean build's distance to the reference may be so many times (as k3, or as a share) the golden's and still pass; beyond
#: the second figure noise explains it no longer, and between the two it may be either. Measured by benchmarks/bench_clean.py.
_PASS_ROOM: Final = 0.4
_FAIL_ROOM: Final = 2.0
#: Without a reference: half of what the dtype's noise is as k3 may pass, and up to twice that may still be noise.
_PASS_NOISE: Final = 0.5
_FAIL_NOISE: Final = 2.0
#: A mean over n tokens of independent noise stays within so many of its standard errors.
_MEAN_ERRORS: Final = 3.0
#: Where noise alone puts more than this share outside the clip, nobody can tell a fault by that share.
_HIDES: Final = 0.5
#: An outlier token is so many times the RMS of the golden's errors; no noise explains one of so many times their largest.
_OUTLIER_RMS: Final = 8.0
_UNEXPLAINED: Final = 4.0
#: A sequence is an outlier beyond so many times the largest RMS that one has in the golden's errors; the second figure is what
#: no noise explains.
_SEQUENCE, _SEQUENCE_UNEXPLAINED = 1.5, 3.0
#: What no noise explains where the golden's errors are not known, in nats: a token and a sequence. Half precision has more at
#: low temperatures, for noise of logits is divided by it.
_TOKEN_NATS: Final = {"float32": 1.0, "float16": 2.0, "bfloat16": 6.0}
_SEQUENCE_NATS: Final = {"float32": 0.2, "float16": 0.3, "bfloat16": 0.6}
#: The tail of fewer errors than this is not known from them.
_TAIL: Final = 1500


@dataclass(frozen=True, eq=False)
class Differences:
    """The n tokens that have a finite logprob on both sides, in order.

    `d` is actual - expected, `sequences` and `prompts` the number of each token's sequence and distinct prompt, `golden_error`
    and `error` what expected and actual are from the reference (NaN where there is none). Nats.
    """

    d: m.Doubles
    sequences: Integers
    prompts: Integers
    golden_error: m.Doubles
    error: m.Doubles

    @property
    def clusters(self) -> Integers:
        """What the intervals count: prompts, or the sequences where there is one prompt."""
        return self.prompts if self.prompts.max(initial=0) > 0 else self.sequences

    def by_sequence(self) -> Differences:
        """One row for each sequence: the means of its tokens."""
        names, rows = np.unique(self.sequences, return_inverse=True)
        counts = np.bincount(rows)

        def mean(values: m.Doubles) -> m.Doubles:
            return np.asarray(np.bincount(rows, values) / counts, np.float64)

        first = np.unique(rows, return_index=True)[1]
        return Differences(mean(self.d), names, self.prompts[first], mean(self.golden_error), mean(self.error))


@dataclass(frozen=True)
class Setting:
    """What is known of the noise: dtype, how much the temperature enlarges it, whether tokens are routed to experts."""

    dtype: str
    enlarged: float
    routed: bool | None

    def nats(self, by_dtype: dict[str, float]) -> float:
        """What is listed for this dtype, enlarged by the temperature where the dtype is half precision."""
        known = {"float64": "float32"}.get(self.dtype, self.dtype)
        known = known if known in by_dtype else "bfloat16"
        return by_dtype[known] * (1.0 if known == "float32" else self.enlarged)

    @property
    def half(self) -> bool:
        """Whether the dtype is one of half precision."""
        return self.dtype not in ("float32", "float64")


def setting_of(expected: Trace, routed: bool | None) -> Setting:
    """Noise of logits is divided by the temperature, where that is below 1 and the logprobs are processed by it."""
    temperature = expected.sampling.temperature
    low = expected.logprobs_mode == "processed_logprobs" and 0 < temperature < 1
    return Setting(expected.dtype, 1 / temperature if low else 1.0, routed)


def gates_of(
    rows: Differences, nan: int, flips: SupportFlips, limits: Tolerance, setting: Setting, sequences: int
) -> tuple[Gate, ...]:
    """All that decides: NaN, nucleus flips, the effects that the objective feels, outlier tokens and sequences.

    `sequences` is how many the golden has.
    """
    gates = [
        Gate("nan", nan, 0, 0, nan, nan, "tokens"),
        Gate("nucleus_flips", flips.count, flips.allowed, flips.unexplained, flips.count, flips.count, "tokens"),
    ]
    if not len(rows.d):
        return tuple(gates)
    return (*gates, *_effects(rows, limits, setting), *_outliers(rows, flips, limits, setting, sequences))


# -- effects ------------------------------------------------------------------------------------------------------------


def _effects(rows: Differences, limits: Tolerance, setting: Setting) -> list[Gate]:
    objective = objective_of(limits.objective)
    units = rows.by_sequence() if objective.by_sequence else rows
    noise = limits.noise_rms * (setting.enlarged if setting.half else 1.0)
    k3 = noise**2 / 2
    gates = [
        _mean_gate(units, len(rows.d), limits, noise),
        _gate("k3", rows, k3_of, limits, (_PASS_NOISE * limits.noise_rms**2 / 2, _FAIL_NOISE * k3), "nats"),
        _gate(
            "clip_share", units, objective.outside, limits, _clip_noise(units, rows, objective, noise, setting), "of the ratios"
        ),
    ]
    if objective.weight_variance is not None:
        room = (_PASS_NOISE * limits.noise_rms**2, 2 * _FAIL_NOISE * k3)
        gates.append(_gate("weight_variance", rows, objective.spread_of_weights, limits, room, ""))
    return gates


def _gate(
    key: GateKey, rows: Differences, felt: Callable[[m.Doubles], m.Doubles], limits: Tolerance, room: tuple[float, float], unit: str
) -> Gate:  # fmt: skip
    """The gate of the mean of `felt(d)`. `room` is what the dtype's noise adds to the limits of passing and failing."""
    limit = getattr(limits, key)
    direct = mean_interval(felt(rows.d), rows.clusters)
    if key in limits.explicit:
        return Gate(key, direct.estimate, limit, limit, direct.low, direct.high, unit)
    known = np.isfinite(rows.error) & np.isfinite(rows.golden_error)
    if not known.any():
        hidden = room[1] > _HIDES and key == "clip_share"
        return Gate(key, direct.estimate, limit + room[0], limit + room[1], direct.low, direct.high, unit, hidden=hidden)
    mine, golden, clusters = felt(rows.error[known]), felt(rows.golden_error[known]), rows.clusters[known]
    of_golden = float(golden.mean())
    errors = Errors(
        golden=of_golden,
        actual=float(mine.mean()),
        limit=limit + (1 + _PASS_ROOM) * of_golden,
        fail_limit=limit + (1 + _FAIL_ROOM) * of_golden,
        low=mean_interval(mine - (1 + _FAIL_ROOM) * golden, clusters).low + (1 + _FAIL_ROOM) * of_golden,
        high=mean_interval(mine - (1 + _PASS_ROOM) * golden, clusters).high + (1 + _PASS_ROOM) * of_golden,
    )
    return Gate(
        key, direct.estimate, limit, limit + (2 + _FAIL_ROOM) * of_golden, direct.low, direct.high, unit, errors=errors,
        hidden=key == "clip_share" and of_golden > _HIDES,
    )  # fmt: skip


def _mean_gate(units: Differences, tokens: int, limits: Tolerance, noise: float) -> Gate:
    """|mean d|: what noise of its size makes of a mean over so many tokens is added to the limit."""
    signed = mean_interval(units.d, units.clusters)
    direct = _absolute(signed)
    limit = limits.mean_diff
    if "mean_diff" in limits.explicit:
        return Gate("mean_diff", direct.estimate, limit, limit, direct.low, direct.high, "nats")
    known = np.isfinite(units.error) & np.isfinite(units.golden_error)
    room = _MEAN_ERRORS * noise / tokens**0.5
    if not known.any():
        return Gate("mean_diff", direct.estimate, limit + room, limit + 2 * room, direct.low, direct.high, "nats")
    mine, golden, clusters = units.error[known], units.golden_error[known], units.clusters[known]
    own, of_golden = float(mine.mean()), float(golden.mean())
    room = _MEAN_ERRORS * float(np.sqrt(2 * np.mean(golden**2) / len(golden)))
    grown = mean_interval(np.copysign(1.0, own) * mine - np.copysign(1.0, of_golden) * golden, clusters)
    errors = Errors(
        golden=abs(of_golden),
        actual=abs(own),
        limit=limit + room + abs(of_golden),
        fail_limit=limit + 2 * room + abs(of_golden),
        low=grown.low + abs(of_golden),
        high=grown.high + abs(of_golden),
    )
    return Gate(
        "mean_diff", direct.estimate, limit + room, limit + 2 * room, direct.low, direct.high, "nats", errors=errors
    )  # fmt: skip


def _absolute(signed: Interval) -> Interval:
    """The interval of |x| from that of x."""
    size = abs(signed.estimate)
    return Interval(size, max(size - (signed.estimate - signed.low), 0.0), size + (signed.high - signed.estimate))


def _clip_noise(
    units: Differences, rows: Differences, objective: Objective, noise: float, setting: Setting
) -> tuple[float, float]:  # fmt: skip
    """What noise of this RMS adds to the share outside the clip: a normal's tails, and heavier ones in half precision."""
    from scipy.special import erfc

    scale = noise / (len(rows.d) / len(units.d)) ** 0.5
    nearest = float(min(abs(np.log(edge)) for edge in objective.clip))
    normal = float(erfc(nearest / scale / 2**0.5)) if scale > 0 else 0.0
    tails = (0.005, 0.03 * setting.enlarged) if setting.half and not objective.by_sequence else (0.0, 0.0)
    return normal + tails[0], min(normal + tails[1], 1.0)


# -- outliers -----------------------------------------------------------------------------------------------------------


def _outliers(rows: Differences, flips: SupportFlips, limits: Tolerance, setting: Setting, sequences: int) -> list[Gate]:
    """Sequences with an outlier token, and sequences that are off as a whole: errors where they are known, differences else."""
    known = np.isfinite(rows.error) & np.isfinite(rows.golden_error)
    golden = np.where(known, rows.golden_error, 0.0)
    off = np.where(known, rows.error, rows.d)
    token, token_unexplained, sequence, sequence_unexplained = _thresholds(rows, golden, known, limits, setting)
    names, places = np.unique(rows.sequences, return_inverse=True)
    largest, largest_golden = np.zeros(len(names)), np.zeros(len(names))
    np.maximum.at(largest, places, np.abs(off))
    np.maximum.at(largest_golden, places, np.abs(golden))
    with_token = int(np.count_nonzero(largest > token)) + flips.deep
    explained = int(np.count_nonzero(largest_golden > token))
    spread, spread_golden = (m.sequence_rms(x, places, np.inf) for x in (off, golden))
    off_as_a_whole, explained_wholes = (int(np.count_nonzero(x > sequence)) for x in (spread, spread_golden))
    allowed = limits.outliers(len(rows.d)) + explained
    allowed_wholes = sequences // 200 + explained_wholes
    gates = []
    counted: tuple[tuple[GateKey, int, int, float, float, float, float], ...] = (
        ("outlier_tokens", with_token, allowed, explained + 1.0, token, float(largest.max()), token_unexplained),
        ("outlier_sequences", off_as_a_whole, allowed_wholes, explained_wholes + 0.5, sequence, float(spread.max()),
         sequence_unexplained),
    )  # fmt: skip
    for key, count, few, noise, threshold, worst, unexplained in counted:
        many = max(few, poisson_quantile(0.9995, 2 * noise + len(rows.d) / 5000)) if setting.half else few
        if {"outlier_tokens": "outlier", "outlier_sequences": "sequence_rms"}[key] in limits.explicit:
            many = few
        # a tie in a router moves a token by nats, in the golden's own errors too: size alone proves no fault there
        beyond: Verdict | None = None if worst <= unexplained else "unverified" if setting.routed else "fail"
        gates.append(Gate(key, count, few, many, count, count, "sequences", threshold=threshold, worst=worst,
                          unexplained=unexplained, beyond=beyond))  # fmt: skip
    return gates


def _thresholds(
    rows: Differences, golden: m.Doubles, known: npt.NDArray[np.bool_], limits: Tolerance, setting: Setting
) -> tuple[float, float, float, float]:  # fmt: skip
    """Beyond how many nats a token is an outlier, and is explained by no noise; the same for the RMS of a sequence."""
    token, sequence = limits.outlier, limits.sequence_rms
    if setting.half:
        token = token if "outlier" in limits.explicit else token * setting.enlarged
        sequence = sequence if "sequence_rms" in limits.explicit else sequence * setting.enlarged
    token_unexplained, sequence_unexplained = setting.nats(_TOKEN_NATS), setting.nats(_SEQUENCE_NATS)
    if known.any() and setting.half:
        rms = float(np.sqrt(np.mean(golden[known] ** 2)))
        largest = float(np.abs(golden).max())
        places = np.unique(rows.sequences, return_inverse=True)[1]
        wholes = float(m.sequence_rms(golden, places, np.inf).max())
        few = np.count_nonzero(known) < _TAIL
        token = max(limits.outlier, _OUTLIER_RMS * rms)
        sequence = max(limits.sequence_rms, _SEQUENCE * wholes)
        token_unexplained = max(2.0, _UNEXPLAINED * largest, 2 * setting.enlarged if few else 0.0)
        sequence_unexplained = max(0.3, _SEQUENCE_UNEXPLAINED * wholes, 0.3 * setting.enlarged if few else 0.0)
    if "outlier" in limits.explicit:
        token, token_unexplained = limits.outlier, max(_UNEXPLAINED * limits.outlier, token_unexplained)
    if "sequence_rms" in limits.explicit:
        sequence, sequence_unexplained = limits.sequence_rms, max(2 * limits.sequence_rms, sequence_unexplained)
    return token, max(token_unexplained, token), sequence, max(sequence_unexplained, sequence)


# -- what it shows ------------------------------------------------------------------------------------------------------


def what_it_shows(rows: Differences, gates: tuple[Gate, ...]) -> Shown | None:
    """What a comparison says of other prompts: an exact binomial bound over distinct prompts, whatever their noise."""
    gate = next((g for g in gates if g.key == "outlier_sequences"), None)
    if gate is None:
        return None
    known = np.isfinite(rows.error) & np.isfinite(rows.golden_error)
    off = np.where(known, rows.error, rows.d)
    names, first, places = np.unique(rows.sequences, return_index=True, return_inverse=True)
    spread = m.sequence_rms(off, places, np.inf)
    prompts = rows.prompts[first]
    bad = len(np.unique(prompts[spread > gate.threshold]))
    count = len(np.unique(prompts))
    return Shown(
        prompts=count,
        sequences=len(names),
        threshold=gate.threshold,
        bad_prompts=bad,
        share=share_bound(bad, count),
        reach=detectable_share(count, int(gate.limit)),
        tokens_allowed=int(next(g.limit for g in gates if g.key == "outlier_tokens")),
        sequences_allowed=int(gate.limit),
    )
