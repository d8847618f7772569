"""What numbers are, where they are not their own tokens': other rows', of other places in the row, one value, few tokens'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..comparison.result import Finding
from ..trace import Trace

Doubles = npt.NDArray[np.float64]

#: So many of the rows, or of their pieces, have to fit.
_MOST: Final = 0.9
#: A row tells with so many tokens; a piece of a row has so many, and so many of them have to fit: some lie across a border.
_TOKENS, _PIECE, _PIECES = 4, 4, 0.75
#: Places by which numbers are looked for elsewhere.
_PLACES: Final = 64
#: A number tells where it is so many times the noise from what it should be.
_FAR: Final = 10.0
#: A token is unsure below this logprob; other weights move those, more than this share of them.
_UNSURE, _MOVED = -0.1, 0.5
#: Numbers nearer to each other than this (nats) are one value.
_ONE_VALUE: Final = 1e-6


def misplaced(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """What the numbers of `actual` are, where they are not those of `expected` (the same tokens), up to `noise` (RMS, nats).

    `whose` numbers they are, for the sentence. None where nothing fits.
    """
    rows = list(_rows(expected, actual))
    off = [row for row, (e, a) in enumerate(rows) if len(e) >= _TOKENS and _rms(e - a) > _FAR / 2 * noise]
    kinds = (_one_value, _other_rows, _elsewhere, _permuted) if off else ()
    return next((found for kind in kinds if (found := kind(rows, off, noise, whose)) is not None), None)


def _rows(expected: Trace, actual: Trace) -> Iterator[tuple[Doubles, Doubles]]:
    """Both sides of each sequence, without masked tokens; NaN is as far off as can be."""
    for sequence in range(expected.num_sequences):
        start, stop = expected.bounds(sequence)
        kept = expected.mask[start:stop] & np.isfinite(expected.logprobs[start:stop])
        e, a = (trace.logprobs[start:stop][kept].astype(np.float64) for trace in (expected, actual))
        yield e, np.nan_to_num(a, nan=1e3, posinf=1e3, neginf=-1e3)


def _rms(d: Doubles) -> float:
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0


def _same(e: Doubles, a: Doubles, own: Doubles, noise: float) -> bool:
    """Whether a is e, where it is not `own`, what it should be."""
    return _rms(own - a) > _FAR / 2 * noise and _rms(e - a) <= noise


def _one_value(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    if np.mean([np.ptp(rows[row][1]) < _ONE_VALUE for row in off]) < _MOST:
        return None
    text = f"{whose} has one number for all tokens of a sequence ({len(off):,} sequences)"
    return Finding("semantic", "wrong_values", text)


def _other_rows(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    def fits(row: int) -> bool:
        own, a = rows[row]
        for other, (e, _) in enumerate(rows):
            n = min(len(e), len(a))
            if other != row and n >= _TOKENS and _same(e[:n], a[:n], own[:n], noise):
                return True
        return False

    if np.mean([fits(row) for row in off]) < _MOST:
        return None
    text = f"{whose} has other sequences' numbers in {len(off):,} of {len(rows):,}: rows are in another order"
    return Finding("semantic", "wrong_token", text)


def _elsewhere(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    """Pieces of rows whose numbers are those of other places near them, in their row or the next one."""
    expected, actual = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
    starts = np.concatenate([[0], np.cumsum([len(e) for e, _ in rows])])
    found, of = [], 0
    for row in off:
        for start in range(int(starts[row]), int(starts[row + 1]) - _PIECE + 1, _PIECE):
            own, a = expected[start : start + _PIECE], actual[start : start + _PIECE]
            if _rms(own - a) <= _FAR / 2 * noise or a.std() <= _FAR / 2 * noise:
                continue
            of += 1
            for by in sorted(range(-_PLACES, _PLACES + 1), key=abs):
                if 0 <= start + by <= len(expected) - _PIECE and _same(
                    expected[start + by : start + by + _PIECE], a, own, noise
                ):
                    found.append(by)
                    break
    if of < _TOKENS or len(found) < _PIECES * of:
        return None
    places = sorted(set(found))
    where = f"{places[0]:+d}" if len(places) == 1 else f"{places[0]:+d} to {places[-1]:+d}"
    text = f"{whose} has the numbers of tokens that stand {where} places away ({of:,} pieces of {_PIECE} tokens)"
    return Finding("semantic", "shifted_positions", text)


def _permuted(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    if np.mean([_same(np.sort(rows[row][0]), np.sort(rows[row][1]), rows[row][0], noise) for row in off]) < _MOST:
        return None
    text = f"{whose} has the numbers of its sequence in another order ({len(off):,} sequences)"
    return Finding("semantic", "wrong_token", text)


def few_off(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """What a part of the tokens is, where the others agree up to `noise`: other weights move all that are unsure.

    `wrong_values` where they have one number; else candidates.
    """
    rows = list(_rows(expected, actual))
    if not rows:
        return None
    e, a = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
    last = np.zeros(len(e), bool)
    last[np.cumsum([len(row) for row, _ in rows]) - 1] = True
    apart = np.abs(a - e)
    far, unsure = apart > _FAR * noise, e < _UNSURE
    agree = unsure & (apart <= noise)
    if not far.any() or np.count_nonzero(agree) < (1 - _MOVED) * np.count_nonzero(unsure) or _rms(apart[~far]) > noise:
        return None
    where = ", each the last of its sequence" if last[far].all() else ""
    count = f"{np.count_nonzero(far):,} of {len(far):,} tokens are off{where}, and the others agree up to noise"
    if np.ptp(a[far]) < _ONE_VALUE and np.count_nonzero(far) > 1:
        return Finding("semantic", "wrong_values", f"{count}: {whose} has {a[far][0]:.4g} for each")
    text = f"{count}: other weights would move all that are unsure, unless they came in between"
    return Finding("semantic", None, text, ("wrong_token", "wrong_values", "stale_weights"))
