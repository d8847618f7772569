"""Outlier tokens and sequences: which ones are noise that the golden's errors have too, and how many of the others may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from . import metrics as m
from .gate import Gate, GateKey
from .objectives import k3_of
from .token_differences import Differences, Setting
from .tolerance import Tolerance, counts_allowed
from .vocabulary import Verdict

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
#: Outliers of up to so many nats, a ratio of 7, are allowed for; larger ones only where the golden's errors are as large.
_ALLOWED_NATS: Final = 2.0
_ALLOWED_TIMES: Final = 1.5
#: A tie between experts moves a token by up to so many times what noise explains elsewhere, and a sequence without its largest.
_TIE: Final[dict[GateKey, float]] = {"outlier_tokens": 3.0, "outlier_sequences": 2.0}
#: Noise is drawn anew where the engine does not share this share of the golden's error.
_DRAWN: Final = 0.05
#: The tail of fewer errors than this is not known from them.
_TAIL: Final = 1500


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outliers:
    """Outlier tokens and sequences: errors where they are known, differences else. Limits are in nats.

    `noise` [n] marks the outliers of the golden's errors, and as many of now's, as far as these are one noise (see `_noise`).
    `new` counts the sequences with a token that is an outlier and was none in the golden's errors, or one half as large at
    most, `gone` those with one that was and is none: of noise there are as many of the one as of the other. `largest` is the
    error of the token that is furthest beyond what noise explains of it, `token_unexplained`, among those whose golden's is
    not as large; outliers of up to `bearable` may be noise. The same of sequences that are off as a whole.
    `covered` is the share of the tokens that have a reference, 1 where none has.
    """

    noise: npt.NDArray[np.bool_]
    covered: float
    new: int
    gone: int
    largest: float
    bearable: float
    token: float
    token_unexplained: float
    new_sequences: int
    gone_sequences: int
    largest_rms: float
    sequence: float
    sequence_unexplained: float


@dataclass(frozen=True, kw_only=True, slots=True)
class _Thresholds:
    """Beyond how many nats a token is an outlier, and is explained by no noise; the same for the RMS of a sequence."""

    token: float
    token_unexplained: float
    sequence: float
    sequence_unexplained: float


def outliers_of(rows: Differences, limits: Tolerance, setting: Setting, deep: Mapping[int, int]) -> Outliers:
    """Find the outliers of these rows, one at least; `deep` says how many of another kind a sequence has. Two make it one that
    is off as a whole.

    Where the reference covers a part of the sequences, the others are judged as without one: by their differences.
    """
    known = rows.known
    expected_error = np.where(known, rows.expected_error, 0.0)
    off = np.where(known, rows.actual_error, rows.d)
    names, places = np.unique(rows.sequences, return_inverse=True)
    covered = np.bincount(places, known) > 0
    actual_wholes, expected_wholes = (m.sequence_rms(x, places, np.inf) for x in (off, expected_error))
    without = _without_reference(limits, setting)
    with_ = _with_reference(expected_error[known], expected_wholes[covered], limits, setting) if known.any() else without
    if "sequence_rms" in limits.explicit:  # what a caller sets holds for differences, and noise excuses none of them
        actual_wholes, expected_wholes = m.sequence_rms(rows.d, places, np.inf), np.zeros_like(expected_wholes)
    if "outlier" in limits.explicit:
        off, expected_error = rows.d, np.zeros_like(expected_error)
    token, unexplained = (np.where(known, *pair) for pair in ((with_.token, without.token),
                          (with_.token_unexplained, without.token_unexplained)))  # fmt: skip
    sequence, sequence_unexplained = (np.where(covered, *pair) for pair in ((with_.sequence, without.sequence),
                                      (with_.sequence_unexplained, without.sequence_unexplained)))  # fmt: skip
    is_outlier, was_outlier = np.abs(off) > token, np.abs(expected_error) > token
    fresh = ~was_outlier | (np.abs(off) > _SAME_OUTLIER * np.abs(expected_error))
    worst, worst_unexplained = _furthest(np.abs(off)[fresh], unexplained[fresh], with_.token_unexplained)
    worst_rms, worst_rms_unexplained = _furthest(
        actual_wholes[expected_wholes <= sequence],
        sequence_unexplained[expected_wholes <= sequence],
        with_.sequence_unexplained,
    )
    bulk = rows.where(~(is_outlier | was_outlier))
    return Outliers(
        noise=_noise(was_outlier, is_outlier, expected_error, off),
        covered=float(known.mean()) or 1.0,
        new=len(deep.keys() | set(np.unique(rows.sequences[is_outlier & fresh]).tolist())),
        gone=len(np.unique(places[was_outlier & ~is_outlier])),
        largest=worst,
        bearable=_bearable(expected_error[known], bulk.fresh_noise, limits, setting),
        token=with_.token,
        token_unexplained=worst_unexplained,
        new_sequences=len(
            {i for i, n in deep.items() if n > 1} | {*names[(actual_wholes > sequence) & (expected_wholes <= sequence)]}
        ),
        gone_sequences=int(np.count_nonzero((expected_wholes > sequence) & (actual_wholes <= sequence))),
        largest_rms=worst_rms,
        sequence=with_.sequence,
        sequence_unexplained=worst_rms_unexplained,
    )


def _furthest(off: m.Doubles, unexplained: m.Doubles, otherwise: float) -> tuple[float, float]:
    """The one that is the largest multiple of what noise explains of it, and that; (0, `otherwise`) where there is none."""
    if not len(off):
        return 0.0, otherwise
    worst = int(np.argmax(off / unexplained))
    return float(off[worst]), float(unexplained[worst])


def _bearable(expected_error: m.Doubles, fresh: float, limits: Tolerance, setting: Setting) -> float:
    """Up to how many nats an outlier may be noise: a ratio of 7, more where the golden's errors have such, or, where they are
    not known, where the temperature enlarges them. `fresh` is the share of the golden's error that is drawn anew: an engine
    that computes as the golden did draws none.
    """
    declared = _ALLOWED_TIMES * limits.outlier  # a declared gap has outliers of a size of its own
    if not len(expected_error):
        return max(_ALLOWED_NATS * (setting.enlarged if setting.half else 1.0), declared)
    drawn = _SAME_OUTLIER * float(np.abs(expected_error).max()) if fresh > _DRAWN else 0.0
    return max(_ALLOWED_NATS, declared, drawn)


def _noise(
    was_outlier: npt.NDArray[np.bool_], is_outlier: npt.NDArray[np.bool_], expected_error: m.Doubles, off: m.Doubles
) -> npt.NDArray[np.bool_]:
    """The outliers [n] of both sides that are one noise: now's n-th largest is held against the golden's n-th largest, by its
    size, twice that of the golden's at most, and by how an update feels it (k3), four times as much at most. Together they are
    felt less than that: 1 + 3 / sqrt(n) times as much, for n of them scatter less than one.
    """
    actual, expected = np.flatnonzero(is_outlier), np.flatnonzero(was_outlier)
    beyond = np.zeros(len(was_outlier), bool)
    felt, own = k3_of(off[actual]), k3_of(expected_error[expected])
    for mine, its, times in ((felt, own, _AS_FELT), (np.abs(off[actual]), np.abs(expected_error[expected]), _SAME_OUTLIER)):
        order = np.argsort(-mine)
        paired = np.zeros(len(actual))
        paired[: min(len(its), len(actual))] = -np.sort(-its)[: len(actual)]
        beyond[actual[order]] |= mine[order] > times * paired
    excused = ~beyond[actual]
    if felt[excused].sum() > (1 + (_AS_FELT - 1) / max(int(excused.sum()), 1) ** 0.5) * own.sum():
        return np.zeros(len(was_outlier), bool)
    return np.asarray((was_outlier | is_outlier) & ~beyond)


def outlier_gates(found: Outliers, tokens: int, limits: Tolerance, setting: Setting, sequences: int) -> list[Gate]:
    """The gates of sequences with an outlier token, and of sequences that are off as a whole."""
    gates = []
    bearable = found.largest <= found.bearable or "outlier" in limits.explicit
    counted: tuple[tuple[GateKey, str, int, int, int, float, float, float], ...] = (
        ("outlier_tokens", "outlier", found.new, found.gone, limits.outliers(tokens), found.token,
         found.largest, found.token_unexplained),
        ("outlier_sequences", "sequence_rms", found.new_sequences, found.gone_sequences, sequences // 200, found.sequence,
         found.largest_rms, found.sequence_unexplained),
    )  # fmt: skip
    for key, limit, count, gone, few, threshold, worst, unexplained in counted:
        allowed, most = counts_allowed(
            few, round(gone / found.covered), covered=found.covered, exact=setting.fine or limit in limits.explicit
        )
        allowed, most = (allowed, most) if bearable or key != "outlier_tokens" else (0, 0 if setting.fine else most)
        # a tie in a router moves a token by nats, in the golden's own errors too: up to a size that proves no fault
        tie = setting.routed and worst <= _TIE[key] * unexplained
        beyond: Verdict | None = None if worst <= unexplained else "unverified" if tie else "fail"
        gates.append(
            Gate(
                key=key,
                value=count,
                limit=allowed,
                fail_limit=most,
                low=count,
                high=count,
                unit="sequences",
                threshold=threshold,
                worst=worst,
                unexplained=unexplained,
                beyond=beyond,
            )
        )
    return gates


def _without_reference(limits: Tolerance, setting: Setting) -> _Thresholds:
    enlarged = setting.enlarged if setting.half else 1.0
    return _by_hand(
        limits.outlier * enlarged,
        setting.nats(_TOKEN_NATS),
        limits.sequence_rms * enlarged,
        setting.nats(_SEQUENCE_NATS),
        limits,
    )


def _with_reference(errors: m.Doubles, expected_wholes: m.Doubles, limits: Tolerance, setting: Setting) -> _Thresholds:
    """By the golden's own errors [n], and their RMS by sequence."""
    without, errors = _without_reference(limits, setting), np.abs(errors)
    if setting.coarser_actual:
        return without
    if setting.fine:
        unexplained = max(_FINE_NATS, _FINE * float(errors.max()))
        return _by_hand(
            min(without.token, unexplained), unexplained, without.sequence, setting.nats(_SEQUENCE_NATS), limits
        )  # fmt: skip
    few = len(errors) < _TAIL
    return _by_hand(
        max(limits.outlier, _OUTLIER * float(np.quantile(errors, 0.95))),
        max(2.0, _UNEXPLAINED * float(errors.max()), 2 * setting.enlarged if few else 0.0),
        max(limits.sequence_rms, _SEQUENCE * float(expected_wholes.max())),
        max(0.3, _SEQUENCE_UNEXPLAINED * float(expected_wholes.max()), 0.3 * setting.enlarged if few else 0.0),
        limits,
    )


def _by_hand(
    token: float, token_unexplained: float, sequence: float, sequence_unexplained: float, limits: Tolerance
) -> _Thresholds:
    """These thresholds, where the caller has set none."""
    if "outlier" in limits.explicit:
        token, token_unexplained = limits.outlier, max(_UNEXPLAINED * limits.outlier, token_unexplained)
    if "sequence_rms" in limits.explicit:
        sequence, sequence_unexplained = limits.sequence_rms, max(2 * limits.sequence_rms, sequence_unexplained)
    return _Thresholds(
        token=token,
        token_unexplained=max(token_unexplained, token),
        sequence=sequence,
        sequence_unexplained=max(sequence_unexplained, sequence),
    )
