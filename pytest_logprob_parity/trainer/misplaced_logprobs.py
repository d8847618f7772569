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
#: Numbers nearer to each other than this (nats) are one value; so many tokens with one were given it.
_ONE_VALUE: Final = 1e-6
_GIVEN: Final = 5
#: A row is told from others by so many tokens; so many others may be alike, as samples of one prompt are.
_LONG, _ALIKE = 6, 4
#: So many sequences show where they are off from, and so many unsure tokens before that agree; a token that is another one is
#: that much less likely (nats).
_SEQUENCES, _AGREEING, _ANOTHER = 4, 8, -3.0
#: Two implementations in float32 are nearer to each other than this (RMS, nats).
_EXACT: Final = 1e-3


def misplaced(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """What the numbers of `actual` are, where they are not those of `expected` (the same tokens), up to `noise` (RMS, nats).

    `whose` numbers they are, for the sentence. None where nothing fits.
    """
    rows = list(_rows(expected, actual))
    off = [row for row, (e, a) in enumerate(rows) if len(e) >= _TOKENS and _rms(e - a) > _FAR / 2 * noise]
    kinds = (_one_value, _other_rows, _elsewhere, _permuted) if off else ()
    return next((found for kind in kinds if (found := kind(rows, off, noise, whose)) is not None), None)


def _rows(expected: Trace, actual: Trace) -> Iterator[tuple[Doubles, Doubles]]:
    """Both sides of each sequence, without tokens that one of them has no finite number for."""
    for sequence in range(expected.num_sequences):
        start, stop = expected.bounds(sequence)
        kept = expected.mask[start:stop] & np.isfinite(expected.logprobs[start:stop]) & np.isfinite(actual.logprobs[start:stop])
        e, a = (trace.logprobs[start:stop][kept].astype(np.float64) for trace in (expected, actual))
        yield e, a


def _rms(d: Doubles) -> float:
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0


def _same(e: Doubles, a: Doubles, own: Doubles, noise: float) -> bool:
    """Whether a is e, where it is not `own`, what it should be."""
    return _rms(own - a) > _FAR / 2 * noise and _rms(e - a) <= noise


def _one_value(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    if np.mean([np.ptp(rows[row][1]) < _ONE_VALUE for row in off]) < _MOST:
        return None
    text = f"{whose} has one number for all tokens of a sequence ({len(off):,} sequences)"
    if all(np.abs(rows[row][1]).max() < _ONE_VALUE for row in off):
        text += ": 0, as of a temperature near 0 where the likeliest tokens were taken, or a filler"
        return Finding(layer="semantic", cause=None, evidence=text, candidates=("wrong_values", "temperature"))
    return Finding(layer="semantic", cause="wrong_values", evidence=text)


def _other_rows(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    """Rows that changed places: two at least, each off, with numbers that no third row has."""
    telling = [row for row in off if len(rows[row][0]) >= _LONG and rows[row][1].std() > _FAR * noise]

    def partners(row: int) -> list[int]:
        own, a = rows[row]
        found = []
        for other in telling:
            n = min(len(rows[other][0]), len(a))
            if other != row and n >= _LONG and _same(rows[other][0][:n], a[:n], own[:n], noise):
                found.append(other)
        return found

    def different(found: list[int]) -> int:
        """How many of these rows have other numbers than those before them: samples of one prompt may be one text."""
        kinds: list[int] = []
        for row in found:
            e = rows[row][0]
            if not any(len(rows[k][0]) == len(e) and _rms(rows[k][0] - e) <= noise for k in kinds):
                kinds.append(row)
        return len(kinds)

    fits = [partners(row) for row in telling]
    if len(telling) < 2 or np.mean([0 < different(found) <= _ALIKE for found in fits]) < _MOST:
        return None
    text = f"{whose} has other sequences' numbers in {len(telling):,} of {len(rows):,}: rows are in another order"
    return Finding(layer="semantic", cause="wrong_token", evidence=text)


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
    return Finding(layer="semantic", cause="shifted_positions", evidence=text)


def _permuted(rows: Any, off: list[int], noise: float, whose: str) -> Finding | None:
    """Rows whose numbers are their own in another order; named only where noise is so small that no other row's would fit."""
    if np.mean([_same(np.sort(rows[row][0]), np.sort(rows[row][1]), rows[row][0], noise) for row in off]) < _MOST:
        return None
    text = f"{whose} has the numbers of its sequence in another order ({len(off):,} sequences)"
    if noise > _EXACT or len(off) < 2:
        return Finding(
            layer="semantic",
            cause=None,
            evidence=f"{text}, or others of the same sizes",
            candidates=("wrong_token", "weights_differ"),
        )
    return Finding(layer="semantic", cause="wrong_token", evidence=text)


def few_off(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """What a part of the tokens is, where the others agree up to `noise`: other weights move all that are unsure.

    `wrong_values` where they have one number; else candidates.
    """
    rows = list(_rows(expected, actual))
    if not rows:
        return None
    if found := _whole_rows(rows, noise):
        return found
    e, a = (np.concatenate([row[side] for row in rows]) for side in (0, 1))
    if not len(e):
        return None
    last = np.zeros(len(e), bool)
    last[np.cumsum([len(row) for row, _ in rows if len(row)]) - 1] = True
    apart = np.abs(a - e)
    far, unsure = apart > _FAR * noise, e < _UNSURE
    agree = unsure & (apart <= noise)
    if (
        not far.any()
        or not agree.any()
        or np.count_nonzero(agree) < (1 - _MOVED) * np.count_nonzero(unsure)
        or _rms(apart[~far]) > noise
    ):
        return None
    where = ", each the last of its sequence" if last[far].all() else ""
    count = f"{np.count_nonzero(far):,} of {len(far):,} tokens are off{where}, and the others agree up to noise"
    if np.ptp(a[far]) < _ONE_VALUE and np.count_nonzero(far) >= _GIVEN:
        return Finding(layer="semantic", cause="wrong_values", evidence=f"{count}: {whose} has {a[far][0]:.4g} for each")
    text = f"{count}: other weights would move all that are unsure, unless they came in between"
    return Finding(layer="semantic", cause=None, evidence=text, candidates=("wrong_token", "wrong_values", "stale_weights"))


def _whole_rows(rows: list[tuple[Doubles, Doubles]], noise: float) -> Finding | None:
    """Candidates where each sequence is off as a whole or not at all: what stands before its tokens, or its row."""
    telling = [(a - e, e < _UNSURE) for e, a in rows if np.count_nonzero(e < _UNSURE) >= _TOKENS]
    off = sum(bool(np.mean(np.abs(d)[unsure] > noise) > _MOST) for d, unsure in telling)
    agree = sum(_rms(d) <= noise for d, _ in telling)
    if not off or agree < 2 or off + agree < len(telling):
        return None
    text = f"{off:,} of {len(rows):,} sequences are off as a whole, and the others agree up to noise"
    return Finding(
        layer="trainer",
        cause=None,
        evidence=text,
        candidates=("prompt", "attention_mask", "packing", "wrong_token", "stale_weights"),
    )


def off_from_a_token_on(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """Candidates where sequences agree up to a token and no longer from there on: the prompt was seen as it is, and something
    in the completion was not. `wrong_token` comes first where that token itself is unlikely: another one may stand there.
    """
    agreeing, firsts, places, after = 0, list[float](), list[int](), list[bool]()
    for e, a in _rows(expected, actual):
        unsure = e < _UNSURE
        if not (far := np.abs(a - e) > _FAR * noise).any():
            continue
        first = int(np.argmax(far))
        agreeing += int(np.count_nonzero(unsure[:first]))
        places.append(first)
        firsts.append(float(a[first] - e[first]))
        after += (np.abs(a - e) > noise)[first:][unsure[first:]].tolist()
    enough = len(places) >= _SEQUENCES and agreeing >= _AGREEING and bool(after)
    if not enough or np.mean(np.array(places) > 1) < _MOST or np.mean(after) < _MOST:
        return None
    apart, text = float(np.median(firsts)), f"{len(places):,} sequences agree up to a token and are off from there on"
    if apart < _ANOTHER:
        text += f", which is {-apart:.2g} nats less likely to {whose}: another token may stand there"
        return Finding(
            layer="trainer",
            cause=None,
            evidence=text,
            candidates=("wrong_token", "attention_mask", "stale_weights"),
            values={"first": apart},
        )
    text += ": the prompt was seen as it is, and something in the completion was not"
    return Finding(
        layer="trainer",
        cause=None,
        evidence=text,
        candidates=("attention_mask", "wrong_token", "stale_weights"),
        values={"first": apart},
    )
