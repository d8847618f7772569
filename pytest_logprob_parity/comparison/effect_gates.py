"""Does it matter? How much the differences matter to the objective, and whether the golden's own noise explains them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from . import metrics as m
from .gate import Errors, Gate, GateKey
from .intervals import Interval, mean_interval
from .objectives import Objective, k3_of, objective_of
from .token_differences import Differences, Setting
from .tolerance import Tolerance

#: A clean build's distance to the reference may be larger than the golden's by so many times what of the golden's error it
#: does not share, and still pass; beyond the second figure noise explains it no longer, and between the two it may be either.
#: An engine that has the golden's noise and a fault besides gets no such addition: the fault outgrows it at less than 2, and
#: with less than 1 a fault of twice the limit does not pass. Measured by bench_clean.py and bench_catalogue.py.
_PASS_ADDED: Final = 0.6
_FAIL_ADDED: Final = 1.25
#: Without a reference: half of what the dtype's noise is as k3 may pass, and up to twice that may still be noise.
_PASS_NOISE: Final = 0.5
_FAIL_NOISE: Final = 2.0
#: A mean over n tokens of independent noise stays within so many of its standard errors.
_MEAN_ERRORS: Final = 3.0
#: Where noise alone puts more than this share outside the clip, nobody can tell a fault by that share.
_HIDES: Final = 0.5


def effect_gates(rows: Differences, limits: Tolerance, setting: Setting) -> list[Gate]:
    """The gates of what matters to the objective; none where there are no differences."""
    if not len(rows.d):
        return []
    objective = objective_of(limits.objective)
    units = rows.by_sequence() if objective.by_sequence else rows
    enlarged = setting.enlarged if setting.half else 1.0
    noise = _Noise(passes=limits.noise_rms, may_be=limits.noise_rms * enlarged, enlarged=enlarged, fresh=rows.fresh_noise)
    passes, may_be = _PASS_NOISE * noise.passes**2 / 2, _FAIL_NOISE * noise.may_be**2 / 2
    gates = [
        _mean_gate(units, len(rows.d), limits, noise),
        _gate("k3", rows, k3_of, limits, (passes, may_be), noise, "nats"),
        _gate("clip_share", units, objective.outside, limits, _clip_noise(units, rows, objective, noise, setting), noise, ""),
    ]
    if objective.weight_variance is not None:
        added = 2 * passes, 2 * may_be
        gates.append(_gate("weight_variance", rows, objective.spread_of_weights, limits, added, noise, ""))
    return gates


@dataclass(frozen=True, kw_only=True, slots=True)
class _Noise:
    """The RMS (nats) of noise that passes, and that may be noise: below T=1 more may be, and no more passes.

    `fresh` is the share of the golden's error that is drawn anew.
    """

    passes: float
    may_be: float
    enlarged: float
    fresh: float


def _gate(
    key: GateKey, rows: Differences, felt: Callable[[m.Doubles], m.Doubles], limits: Tolerance, added: tuple[float, float],
    noise: _Noise, unit: str,
) -> Gate:  # fmt: skip
    """The gate of the mean of `felt(d)`. `added` is what the dtype's noise adds to the limits of passing and failing where
    there is no reference.
    """
    limit = getattr(limits, key)
    direct = mean_interval(felt(rows.d), rows.clusters)
    if key in limits.explicit:  # what is above 0 at all is above it on all prompts
        low = direct.low if limit else max(direct.low, direct.estimate)
        return Gate(key=key, value=direct.estimate, limit=limit, fail_limit=limit, low=low, high=direct.high, unit=unit)
    known = rows.known
    if not known.any():
        hidden = added[1] > _HIDES and key == "clip_share"
        passing = limit if hidden else limit + added[0]
        return Gate(
            key=key,
            value=direct.estimate,
            limit=passing,
            fail_limit=limit + added[1],
            low=direct.low,
            high=direct.high,
            unit=unit,
            hidden=hidden,
        )
    errors = _errors(key, rows, felt, limit, added[1], noise)
    own = errors.expected
    return Gate(
        key=key,
        value=direct.estimate,
        limit=limit,
        fail_limit=limit + (2 + _FAIL_ADDED) * own,
        low=direct.low,
        high=direct.high,
        unit=unit,
        errors=errors,
        hidden=key == "clip_share" and own > _HIDES,
    )


def _errors(
    key: GateKey, rows: Differences, felt: Callable[[m.Doubles], m.Doubles], limit: float, may_be_noise: float, noise: _Noise
) -> Errors:  # fmt: skip
    """How far both sides are from the reference, felt by the objective; by differences where the reference says nothing."""
    known = rows.known
    expected_error = rows.expected_error[known]
    of_actual, of_expected = felt(rows.actual_error[known]), felt(expected_error)
    own = float(of_expected.mean())
    # where the reference says nothing: d, less what two builds with errors like the golden's make of it
    two_builds = felt(np.roll(expected_error, len(expected_error) // 2) - expected_error)
    drawn = mean_interval(two_builds, rows.clusters[known])
    growth, beyond = felt(rows.d), felt(rows.d)
    # the covered ones are a sample: by its lower bound for passing, by its upper one for failing, and no less than may be noise
    # without a reference
    growth[~known] -= noise.fresh * max(2 * drawn.estimate - drawn.high, 0.0)
    beyond[~known] -= max((1 + _FAIL_ADDED) * noise.fresh * drawn.high, may_be_noise)
    growth[known] = beyond[known] = of_actual - of_expected
    grown, least = mean_interval(growth, rows.clusters), mean_interval(beyond, rows.clusters)

    def with_noise(added: float) -> float:
        """The golden's own where its error's square is larger by `added`: a share of tails grows faster than that."""
        more = 1 + added * noise.fresh
        return float(felt(expected_error * more**0.5).mean()) if key == "clip_share" else own * more

    return Errors(
        expected=own,
        actual=float(of_actual.mean()),
        limit=limit + with_noise(_PASS_ADDED),
        fail_limit=limit + with_noise(_FAIL_ADDED),
        low=own + least.low,
        high=own + grown.high,
    )


def _mean_gate(units: Differences, tokens: int, limits: Tolerance, noise: _Noise) -> Gate:
    """|mean d|: what noise of its size makes of a mean over so many tokens is added to the limit."""
    direct = _absolute(mean_interval(units.d, units.clusters))
    limit = limits.mean_diff
    if "mean_diff" in limits.explicit:
        return Gate(
            key="mean_diff", value=direct.estimate, limit=limit, fail_limit=limit, low=direct.low, high=direct.high, unit="nats"
        )
    known = units.known
    passes, may_be = (_MEAN_ERRORS * of / tokens**0.5 for of in (noise.passes, noise.may_be))
    if not known.any():
        return Gate(
            key="mean_diff",
            value=direct.estimate,
            limit=limit + passes,
            fail_limit=limit + 2 * may_be,
            low=direct.low,
            high=direct.high,
            unit="nats",
        )
    of_expected = units.expected_error[known]
    mean_expected = float(of_expected.mean())
    size, spread = np.mean(of_expected**2), units.d[known].std()  # noise that both share moves no mean
    of_expected = np.where(known, units.expected_error, mean_expected)
    of_actual = of_expected + units.d
    mean_actual = float(of_actual.mean())
    added = _MEAN_ERRORS * min(float(np.sqrt(2 * noise.fresh * size)), float(spread)) / np.count_nonzero(known) ** 0.5
    grown = mean_interval(
        np.copysign(1.0, mean_actual) * of_actual - np.copysign(1.0, mean_expected) * of_expected, units.clusters
    )
    errors = Errors(
        expected=abs(mean_expected),
        actual=abs(mean_actual),
        limit=limit + added + abs(mean_expected),
        fail_limit=limit + 2 * added + abs(mean_expected),
        low=grown.low + abs(mean_expected),
        high=grown.high + abs(mean_expected),
    )
    return Gate(
        key="mean_diff",
        value=direct.estimate,
        limit=limit + added,
        fail_limit=limit + 2 * added,
        low=direct.low,
        high=direct.high,
        unit="nats",
        errors=errors,
    )


def _absolute(signed: Interval) -> Interval:
    """The interval of |x| from that of x."""
    size = abs(signed.estimate)
    return Interval(size, max(size - (signed.estimate - signed.low), 0.0), size + (signed.high - signed.estimate))


def _clip_noise(
    units: Differences, rows: Differences, objective: Objective, noise: _Noise, setting: Setting
) -> tuple[float, float]:  # fmt: skip
    """What noise of this RMS adds to the share outside the clip: a normal's tails, and heavier ones in half precision."""
    from scipy.special import erfc

    tokens = len(rows.d) / len(units.d)
    nearest = float(min(abs(np.log(edge)) for edge in objective.clip))
    passes, may_be = (
        float(erfc(nearest / (of / tokens**0.5) / 2**0.5)) if of > 0 else 0.0 for of in (noise.passes, noise.may_be)
    )
    tails = (0.005, 0.03 * noise.enlarged) if setting.half and not objective.by_sequence else (0.0, 0.0)
    return passes + tails[0], min(may_be + tails[1], 1.0)
