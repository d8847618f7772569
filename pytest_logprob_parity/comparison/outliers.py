"""Outlier tokens and sequences: which ones are noise that the golden's errors have too, and how many of the others may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from . import metrics as m
from .differences import Differences, Setting
from .objectives import k3_of
from .result import Gate, GateKey, Verdict
from .tolerance import Tolerance, budget

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


def outlier_gates(found: Outliers, tokens: int, limits: Tolerance, setting: Setting, sequences: int) -> list[Gate]:
    """The gates of sequences with an outlier token, and of sequences that are off as a whole."""
    gates = []
    # a declared gap has outliers of a size of its own
    nats = max(_ALLOWED_NATS * (setting.enlarged if setting.half else 1.0), _ALLOWED_TIMES * limits.outlier)
    few = limits.outliers(tokens) if found.largest <= nats or "outlier" in limits.explicit else 0
    counted: tuple[tuple[GateKey, str, int, int, int, float, float, float], ...] = (
        ("outlier_tokens", "outlier", found.new, found.gone, few, found.token,
         found.largest, found.token_unexplained),
        ("outlier_sequences", "sequence_rms", found.new_sequences, found.gone_sequences, sequences // 200, found.sequence,
         found.largest_rms, found.sequence_unexplained),
    )  # fmt: skip
    for key, limit, count, gone, few, threshold, worst, unexplained in counted:
        allowed, most = budget(few, gone, exact=setting.fine or limit in limits.explicit)
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
