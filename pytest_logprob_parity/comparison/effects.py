"""Does it matter? What the objective feels of the differences, and whether the golden's own noise explains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ..trace import Trace
from . import metrics as m
from .intervals import Interval, detectable_share, mean_interval, share_bound
from .objectives import Objective, k3_of, objective_of
from .result import Errors, Gate, GateKey, Shown, Verdict
from .support import SupportFlips
from .tolerance import Tolerance

Integers = npt.NDArray[np.int64]

#: A clean build's distance to the reference may be larger than the golden's by so many times what of the golden's error it
#: does not share, and still pass; beyond the second figure noise explains it no longer, and between the two it may be either.
#: An engine that has the golden's noise and a fault besides gets no such room: the fault outgrows it at less than 2, and with
#: less than 1 a fault of twice the limit does not pass. Measured by benchmarks/bench_clean.py and the selftest.
_PASS_ROOM: Final = 0.6
_FAIL_ROOM: Final = 1.25
#: Without a reference: half of what the dtype's noise is as k3 may pass, and up to twice that may still be noise.
_PASS_NOISE: Final = 0.5
_FAIL_NOISE: Final = 2.0
#: A mean over n tokens of independent noise stays within so many of its standard errors.
_MEAN_ERRORS: Final = 3.0
#: Where noise alone puts more than this share outside the clip, nobody can tell a fault by that share.
_HIDES: Final = 0.5
#: An outlier token is so many times the 95th percentile of the golden's errors; no noise explains one of so many times their
#: largest.
_OUTLIER: Final = 4.0
_UNEXPLAINED: Final = 4.0
#: In float32 errors are rounding, of another order of magnitude than any fault.
_FINE_NATS, _FINE = 0.25, 30.0
#: An outlier that the golden's error has at the same token is the same one while it is no more than so many times as large.
_SAME_OUTLIER: Final = 2.0
#: What the golden's errors have too is noise while it is felt no more than so many times as much (as k3): twice as far off.
_AS_FELT: Final = 4.0
#: A sequence is an outlier beyond so many times the largest RMS that one has in the golden's errors; the second figure is what
#: no noise explains.
_SEQUENCE, _SEQUENCE_UNEXPLAINED = 1.5, 3.0
#: What no noise explains where the golden's errors are not known, in nats: a token and a sequence. Half precision has more at
#: low temperatures, for noise of logits is divided by it.
_TOKEN_NATS: Final = {"float32": 0.25, "float16": 2.0, "bfloat16": 6.0}
_SEQUENCE_NATS: Final = {"float32": 0.2, "float16": 0.3, "bfloat16": 0.6}
#: Outliers of up to so many nats, a ratio of 7, are allowed for; larger ones only where the golden's errors have as many.
_ALLOWED_NATS: Final = 2.0
_ALLOWED_TIMES: Final = 1.5
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

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Where there is a reference."""
        return np.asarray(np.isfinite(self.error) & np.isfinite(self.golden_error))

    @property
    def fresh_noise(self) -> float:
        """The share of the golden's error that is not the same now (0 to 1): d^2 over the sum of both errors' squares.

        Errors of two builds that have nothing in common give 1. An engine that computes as the golden did has the golden's
        error and whatever is wrong with it besides, and gives the share of that alone.
        """
        known = self.known
        both = float(np.square(self.error[known]).sum() + np.square(self.golden_error[known]).sum())
        return min(float(np.square(self.d[known]).sum()) / both, 1.0) if both else 0.0

    def where(self, kept: npt.NDArray[np.bool_]) -> Differences:
        """The rows that are kept."""
        return Differences(self.d[kept], self.sequences[kept], self.prompts[kept], self.golden_error[kept], self.error[kept])

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
    """What is known of the noise: the golden's dtype, how much the temperature enlarges it, whether tokens are routed to
    experts, and the dtype now.
    """

    dtype: str
    enlarged: float
    routed: bool | None
    now: str

    def nats(self, by_dtype: dict[str, float]) -> float:
        """What is listed for the coarser of both dtypes, enlarged by the temperature where it is one of half precision."""
        known = [{"float64": "float32"}.get(dtype, dtype) for dtype in (self.dtype, self.now)]
        listed = [by_dtype.get(dtype, by_dtype["bfloat16"]) for dtype in known]
        return max(listed) * (1.0 if set(known) == {"float32"} else self.enlarged)

    @property
    def fine(self) -> bool:
        """Whether the dtype is float32 or finer."""
        return self.dtype in ("float32", "float64")

    @property
    def coarser_now(self) -> bool:
        """Whether a golden in float32 is held against half precision: that is what it has to say, and no noise of its own."""
        return self.fine and self.now not in ("float32", "float64")

    @property
    def half(self) -> bool:
        """Whether the dtype is one of half precision, or not known."""
        return not self.fine


def setting_of(expected: Trace, routed: bool | None, now: str) -> Setting:
    """What is known of the noise of these tokens, where the dtype is `now` now.

    Noise of logits is divided by the temperature, where that is below 1 and the logprobs are processed by it.
    """
    temperature = expected.sampling.temperature
    low = expected.logprobs_mode == "processed_logprobs" and 0 < temperature < 1
    return Setting(expected.dtype, 1 / temperature if low else 1.0, routed, now)


def gates_of(
    rows: Differences, nan: int, flips: SupportFlips, limits: Tolerance, setting: Setting, sequences: int
) -> tuple[Gate, ...]:  # fmt: skip
    """All that decides: NaN, nucleus flips, the effects that the objective feels, outlier tokens and sequences.

    `sequences` is how many the golden has.
    """
    gates = [
        Gate("nan", nan, 0, 0, nan, nan, "tokens"),
        Gate("nucleus_flips", flips.count, flips.allowed, flips.unexplained, flips.count, flips.count, "tokens"),
    ]
    if not len(rows.d):
        return tuple(gates)
    outliers = outliers_of(rows, limits, setting, flips.deep)
    # what the golden's own errors have too is noise, told by its number: an average of exponentials would hang on one token
    bulk = rows.where(~outliers.noise)
    return (*gates, *_effects(bulk, limits, setting), *_outlier_gates(rows, outliers, flips, limits, setting, sequences))


# -- effects ------------------------------------------------------------------------------------------------------------


def _effects(rows: Differences, limits: Tolerance, setting: Setting) -> list[Gate]:
    if not len(rows.d):
        return []
    objective = objective_of(limits.objective)
    units = rows.by_sequence() if objective.by_sequence else rows
    noise = limits.noise_rms * (setting.enlarged if setting.half else 1.0)
    k3 = noise**2 / 2
    fresh = rows.fresh_noise
    gates = [
        _mean_gate(units, len(rows.d), limits, noise, fresh),
        _gate("k3", rows, k3_of, limits, (_PASS_NOISE * limits.noise_rms**2 / 2, _FAIL_NOISE * k3), fresh, "nats"),
        _gate("clip_share", units, objective.outside, limits, _clip_noise(units, rows, objective, noise, setting), fresh, ""),
    ]
    if objective.weight_variance is not None:
        room = (_PASS_NOISE * limits.noise_rms**2, 2 * _FAIL_NOISE * k3)
        gates.append(_gate("weight_variance", rows, objective.spread_of_weights, limits, room, fresh, ""))
    return gates


def _gate(
    key: GateKey, rows: Differences, felt: Callable[[m.Doubles], m.Doubles], limits: Tolerance, room: tuple[float, float],
    fresh: float, unit: str,
) -> Gate:  # fmt: skip
    """The gate of the mean of `felt(d)`.

    `room` is what the dtype's noise adds to the limits of passing and failing where there is no reference; `fresh` the share of
    the golden's error that is drawn anew.
    """
    limit = getattr(limits, key)
    direct = mean_interval(felt(rows.d), rows.clusters)
    if key in limits.explicit:  # what is above 0 at all is above it on all prompts
        low = direct.low if limit else max(direct.low, direct.estimate)
        return Gate(key, direct.estimate, limit, limit, low, direct.high, unit)
    known = rows.known
    if not known.any():
        hidden = room[1] > _HIDES and key == "clip_share"
        passing = limit if hidden else limit + room[0]
        return Gate(key, direct.estimate, passing, limit + room[1], direct.low, direct.high, unit, hidden=hidden)
    golden_error = rows.golden_error[known]
    mine, golden = felt(rows.error[known]), felt(golden_error)
    own = float(golden.mean())
    # where the reference says nothing: d, less what two builds with errors like the golden's make of it
    unshared = fresh * float(felt(np.roll(golden_error, len(golden_error) // 2) - golden_error).mean())
    growth = felt(rows.d) - unshared
    growth[known] = mine - golden
    grown, least = (mean_interval(growth - room * unshared * ~known, rows.clusters) for room in (0.0, _FAIL_ROOM))

    def with_room(room: float) -> float:
        """The golden's own where its error's square is larger by the room: a share of tails grows faster than that."""
        more = 1 + room * fresh
        return float(felt(golden_error * more**0.5).mean()) if key == "clip_share" else own * more

    errors = Errors(
        golden=own,
        actual=float(mine.mean()),
        limit=limit + with_room(_PASS_ROOM),
        fail_limit=limit + with_room(_FAIL_ROOM),
        low=own + least.low,
        high=own + grown.high,
    )
    return Gate(
        key, direct.estimate, limit, limit + (2 + _FAIL_ROOM) * own, direct.low, direct.high, unit, errors=errors,
        hidden=key == "clip_share" and own > _HIDES,
    )  # fmt: skip


def _mean_gate(units: Differences, tokens: int, limits: Tolerance, noise: float, fresh: float) -> Gate:
    """|mean d|: what noise of its size makes of a mean over so many tokens is added to the limit."""
    direct = _absolute(mean_interval(units.d, units.clusters))
    limit = limits.mean_diff
    if "mean_diff" in limits.explicit:
        return Gate("mean_diff", direct.estimate, limit, limit, direct.low, direct.high, "nats")
    known = units.known
    room = _MEAN_ERRORS * noise / tokens**0.5
    if not known.any():
        return Gate("mean_diff", direct.estimate, limit + room, limit + 2 * room, direct.low, direct.high, "nats")
    golden = units.golden_error[known]
    of_golden = float(golden.mean())
    size, spread = np.mean(golden**2), units.d[known].std()  # noise that both share moves no mean
    golden = np.where(known, units.golden_error, of_golden)
    mine = golden + units.d
    own = float(mine.mean())
    room = _MEAN_ERRORS * min(float(np.sqrt(2 * fresh * size)), float(spread)) / np.count_nonzero(known) ** 0.5
    grown = mean_interval(np.copysign(1.0, own) * mine - np.copysign(1.0, of_golden) * golden, units.clusters)
    errors = Errors(
        golden=abs(of_golden),
        actual=abs(own),
        limit=limit + room + abs(of_golden),
        fail_limit=limit + 2 * room + abs(of_golden),
        low=grown.low + abs(of_golden),
        high=grown.high + abs(of_golden),
    )
    return Gate("mean_diff", direct.estimate, limit + room, limit + 2 * room, direct.low, direct.high, "nats", errors=errors)


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


@dataclass(frozen=True, eq=False)
class Outliers:
    """Outlier tokens and sequences: errors where they are known, differences else. Limits are in nats.

    `noise` [n] marks the outliers of the golden's errors, and as many of now's, while an update feels them no more than
    _AS_FELT times as much (as k3). `new` counts the sequences with a token that is an outlier and was none in the golden's
    errors, or one half as large at most, `gone` those with one that was and is none: of noise there are as many of the one as
    of the other. `largest` is the largest error of a token whose golden's is not as large. The same of sequences that are off
    as a whole.
    """

    noise: npt.NDArray[np.bool_]
    new: int
    gone: int
    largest: float
    token: float
    token_unexplained: float
    new_sequences: int
    gone_sequences: int
    largest_rms: float
    sequence: float
    sequence_unexplained: float


def outliers_of(rows: Differences, limits: Tolerance, setting: Setting, deep: Mapping[int, int]) -> Outliers:
    """Find the outliers of these rows, one at least; `deep` says how many of another kind a sequence has. Two make it one that
    is off as a whole.
    """
    known = rows.known
    golden = np.where(known, rows.golden_error, 0.0)
    off = np.where(known, rows.error, rows.d)
    names, places = np.unique(rows.sequences, return_inverse=True)
    wholes_now, wholes = (m.sequence_rms(x, places, np.inf) for x in (off, golden))
    token, token_unexplained, sequence, sequence_unexplained = _thresholds(golden, known, wholes, limits, setting)
    if "sequence_rms" in limits.explicit:  # what a caller sets holds for differences, and noise excuses none of them
        wholes_now, wholes = m.sequence_rms(rows.d, places, np.inf), np.zeros_like(wholes)
    if "outlier" in limits.explicit:
        off, golden = rows.d, np.zeros_like(golden)
    is_now, was = np.abs(off) > token, np.abs(golden) > token
    fresh = ~was | (np.abs(off) > _SAME_OUTLIER * np.abs(golden))
    return Outliers(
        noise=_noise(was, is_now, golden, off),
        new=len(deep.keys() | set(np.unique(rows.sequences[is_now & fresh]).tolist())),
        gone=len(np.unique(places[was & ~is_now])),
        largest=float(np.abs(off[fresh]).max(initial=0.0)),
        token=token,
        token_unexplained=token_unexplained,
        new_sequences=len({i for i, n in deep.items() if n > 1} | {*names[(wholes_now > sequence) & (wholes <= sequence)]}),
        gone_sequences=int(np.count_nonzero((wholes > sequence) & (wholes_now <= sequence))),
        largest_rms=float(wholes_now[wholes <= sequence].max(initial=0.0)),
        sequence=sequence,
        sequence_unexplained=sequence_unexplained,
    )


def _noise(
    was: npt.NDArray[np.bool_], is_now: npt.NDArray[np.bool_], golden: m.Doubles, off: m.Doubles
) -> npt.NDArray[np.bool_]:
    """The outliers [n] of both sides that are one noise: now's n-th largest is held against the golden's n-th largest."""
    now = np.flatnonzero(is_now)
    felt = k3_of(off[now])
    order = np.argsort(-felt)
    own = -np.sort(-k3_of(golden[was]))
    paired = np.zeros(len(now))
    paired[: min(len(own), len(now))] = own[: len(now)]
    beyond = np.zeros(len(was), bool)
    beyond[now[order]] = felt[order] > _AS_FELT * paired
    return np.asarray((was | is_now) & ~beyond)


def _outlier_gates(
    rows: Differences, found: Outliers, flips: SupportFlips, limits: Tolerance, setting: Setting, sequences: int
) -> list[Gate]:  # fmt: skip
    """The gates of sequences with an outlier token, and of sequences that are off as a whole."""
    gates = []
    # a declared gap has outliers of a size of its own
    nats = max(_ALLOWED_NATS * (setting.enlarged if setting.half else 1.0), _ALLOWED_TIMES * limits.outlier)
    few = limits.outliers(len(rows.d)) if found.largest <= nats or "outlier" in limits.explicit else 0
    counted: tuple[tuple[GateKey, str, int, int, int, float, float, float], ...] = (
        ("outlier_tokens", "outlier", found.new, found.gone, few, found.token,
         found.largest, found.token_unexplained),
        ("outlier_sequences", "sequence_rms", found.new_sequences, found.gone_sequences, sequences // 200, found.sequence,
         found.largest_rms, found.sequence_unexplained),
    )  # fmt: skip
    for key, limit, count, gone, few, threshold, worst, unexplained in counted:
        spread = (2 * gone) ** 0.5
        allowed = few + int(1.5 * gone + 2 * spread)
        most = few + int(2.5 * gone + 4 * spread) + 3 if setting.half and limit not in limits.explicit else allowed
        # a tie in a router moves a token by nats, in the golden's own errors too: size alone proves no fault there
        beyond: Verdict | None = None if worst <= unexplained else "unverified" if setting.routed else "fail"
        gates.append(Gate(key, count, allowed, most, count, count, "sequences", threshold=threshold, worst=worst,
                          unexplained=unexplained, beyond=beyond))  # fmt: skip
    return gates


def _thresholds(
    golden: m.Doubles, known: npt.NDArray[np.bool_], wholes: m.Doubles, limits: Tolerance, setting: Setting
) -> tuple[float, float, float, float]:  # fmt: skip
    """Beyond how many nats a token is an outlier, and is explained by no noise; the same for the RMS of a sequence."""
    enlarged = setting.enlarged if setting.half else 1.0
    token, sequence = limits.outlier * enlarged, limits.sequence_rms * enlarged
    token_unexplained, sequence_unexplained = setting.nats(_TOKEN_NATS), setting.nats(_SEQUENCE_NATS)
    if known.any() and setting.fine and not setting.coarser_now:
        token_unexplained = max(_FINE_NATS, _FINE * float(np.abs(golden[known]).max()))
        token = min(token, token_unexplained)
    if known.any() and setting.half:
        errors = np.abs(golden[known])
        few = len(errors) < _TAIL
        token = max(limits.outlier, _OUTLIER * float(np.quantile(errors, 0.95)))
        sequence = max(limits.sequence_rms, _SEQUENCE * float(wholes.max()))
        token_unexplained = max(2.0, _UNEXPLAINED * float(errors.max()), 2 * enlarged if few else 0.0)
        sequence_unexplained = max(0.3, _SEQUENCE_UNEXPLAINED * float(wholes.max()), 0.3 * enlarged if few else 0.0)
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
    off = np.where(rows.known, rows.error, rows.d)
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
