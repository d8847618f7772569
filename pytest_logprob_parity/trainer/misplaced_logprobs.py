"""Numbers that are not those of their own tokens: of other rows, of other places in a row, one value for all, or few tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ..comparison.result import Finding
from ..trace import Trace

Doubles = npt.NDArray[np.float64]
#: Expected and actual numbers of each sequence.
_Rows = Sequence[tuple[Doubles, Doubles]]

#: Share of the rows that must fit.
_MOST: Final = 0.9
#: A row needs this many tokens to be judged. A piece of a row has this many tokens, and this share of the pieces must fit:
#: some lie across a border.
_TOKENS, _PIECE, _PIECES = 4, 4, 0.75
#: The largest shift, in places, that is looked for.
_PLACES: Final = 64
#: A number differs where it is this many times the noise from the expected one.
_FAR: Final = 10.0
#: A token is uncertain below this logprob (nats). Other weights move more than this share of the uncertain tokens.
_UNCERTAIN, _MOVED = -0.1, 0.5
#: Numbers that differ by less than this (nats) are one value. This many tokens must have it.
_ONE_VALUE: Final = 1e-6
_GIVEN: Final = 5
#: A row needs this many tokens to be recognised. This many other rows may be alike, as samples of one prompt are.
_LONG, _ALIKE = 6, 4
#: This many sequences must begin to differ at a token, with this many uncertain tokens in all that agree before. Where another
#: token stands there, it is this much less likely (nats).
_SEQUENCES, _AGREEING, _ANOTHER = 4, 8, -3.0
#: Two implementations in float32 differ by less than this (RMS, nats).
_EXACT: Final = 1e-3


def misplaced(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """Where the numbers of `actual` belong, if not to their own tokens: found among those of `expected`, the same tokens, up to
    `noise` (RMS, nats). `whose` numbers they are, for the sentence. None where nothing fits.
    """
    rows = list(_rows(expected, actual))
    off = [row for row, (e, a) in enumerate(rows) if len(e) >= _TOKENS and _rms(e - a) > _FAR / 2 * noise]
    kinds = (_one_value, _other_rows, _elsewhere, _permuted) if off else ()
    return next((found for kind in kinds if (found := kind(rows, off, noise, whose)) is not None), None)


def _rows(expected: Trace, actual: Trace) -> Iterator[tuple[Doubles, Doubles]]:
    """Expected and actual numbers of each sequence, without the tokens where one of them is not finite."""
    for sequence in range(expected.num_sequences):
        start, stop = expected.bounds(sequence)
        kept = expected.mask[start:stop] & np.isfinite(expected.logprobs[start:stop]) & np.isfinite(actual.logprobs[start:stop])
        e, a = (trace.logprobs[start:stop][kept].astype(np.float64) for trace in (expected, actual))
        yield e, a


def _rms(d: Doubles) -> float:
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0


def _same(expected: Doubles, actual: Doubles, own: Doubles, noise: float) -> bool:
    """Whether `actual` is `expected`, where it is not `own`, which it should be."""
    return _rms(own - actual) > _FAR / 2 * noise and _rms(expected - actual) <= noise


def _one_value(rows: _Rows, off: list[int], noise: float, whose: str) -> Finding | None:
    if np.mean([np.ptp(rows[row][1]) < _ONE_VALUE for row in off]) < _MOST:
        return None
    text = f"{whose} has one number for all tokens of a sequence ({len(off):,} sequences)"
    if all(np.abs(rows[row][1]).max() < _ONE_VALUE for row in off):
        text += ": 0. It fills in for missing logprobs, or a temperature near 0 made the most likely tokens certain"
        return Finding(layer="semantic", cause=None, evidence=text, candidates=("wrong_values", "temperature"))
    return Finding(layer="semantic", cause="wrong_values", evidence=text)


def _other_rows(rows: _Rows, off: list[int], noise: float, whose: str) -> Finding | None:
    """Rows in another order: at least two, each with the numbers of few other rows."""
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
        """How many of these rows differ from each other: samples of one prompt may be the same text."""
        kinds: list[int] = []
        for row in found:
            e = rows[row][0]
            if not any(len(rows[k][0]) == len(e) and _rms(rows[k][0] - e) <= noise for k in kinds):
                kinds.append(row)
        return len(kinds)

    fits = [partners(row) for row in telling]
    if len(telling) < 2 or np.mean([0 < different(found) <= _ALIKE for found in fits]) < _MOST:
        return None
    text = (
        f"{whose} has the numbers of other sequences in {len(telling):,} of {len(rows):,} sequences: the rows are in another "
        "order"
    )
    return Finding(layer="semantic", cause="wrong_token", evidence=text)


def _elsewhere(rows: _Rows, off: list[int], noise: float, whose: str) -> Finding | None:
    """Pieces of rows with the numbers of places near them, in their row or the next one."""
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
    text = f"{whose} has the numbers of tokens {where} places away ({of:,} pieces of {_PIECE} tokens)"
    return Finding(layer="semantic", cause="shifted_positions", evidence=text)


def _permuted(rows: _Rows, off: list[int], noise: float, whose: str) -> Finding | None:
    """Rows with their own numbers in another order. Named only where the noise is too small for another row to fit."""
    if np.mean([_same(np.sort(rows[row][0]), np.sort(rows[row][1]), rows[row][0], noise) for row in off]) < _MOST:
        return None
    text = f"{whose} has the numbers of its sequence in another order ({len(off):,} sequences)"
    if noise > _EXACT or len(off) < 2:
        return Finding(
            layer="semantic",
            cause=None,
            evidence=f"{text}, or other numbers of the same size",
            candidates=("wrong_token", "weights_differ"),
        )
    return Finding(layer="semantic", cause="wrong_token", evidence=text)


def few_off(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """Candidates where some tokens differ and the others agree up to `noise`: other weights would move all uncertain tokens.
    `wrong_values` where the tokens that differ have one number.
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
    far, uncertain = apart > _FAR * noise, e < _UNCERTAIN
    agree = uncertain & (apart <= noise)
    if (
        not far.any()
        or not agree.any()
        or np.count_nonzero(agree) < (1 - _MOVED) * np.count_nonzero(uncertain)
        or _rms(apart[~far]) > noise
    ):
        return None
    where = ", each the last of its sequence" if last[far].all() else ""
    count = f"{np.count_nonzero(far):,} of {len(far):,} tokens differ{where}, and the others agree up to noise"
    if np.ptp(a[far]) < _ONE_VALUE and np.count_nonzero(far) >= _GIVEN:
        return Finding(
            layer="semantic", cause="wrong_values", evidence=f"{count}: {whose} has {a[far][0]:.4g} for each of them"
        )
    text = f"{count}. Other weights would move all uncertain tokens, unless they were loaded in between"
    return Finding(layer="semantic", cause=None, evidence=text, candidates=("wrong_token", "wrong_values", "stale_weights"))


def _whole_rows(rows: _Rows, noise: float) -> Finding | None:
    """Candidates where each sequence differs as a whole or not at all: its prompt, or its row."""
    telling = [(a - e, e < _UNCERTAIN) for e, a in rows if np.count_nonzero(e < _UNCERTAIN) >= _TOKENS]
    off = sum(bool(np.mean(np.abs(d)[uncertain] > noise) > _MOST) for d, uncertain in telling)
    agree = sum(_rms(d) <= noise for d, _ in telling)
    if not off or agree < 2 or off + agree < len(telling):
        return None
    text = f"{off:,} of {len(rows):,} sequences differ as a whole, and the others agree up to noise"
    return Finding(
        layer="trainer",
        cause=None,
        evidence=text,
        candidates=("prompt", "attention_mask", "packing", "wrong_token", "stale_weights"),
    )


def off_from_a_token_on(expected: Trace, actual: Trace, noise: float, *, whose: str) -> Finding | None:
    """Candidates where the sequences agree up to a token and differ from there on: the prompt is right, and something in the
    completion is not. `wrong_token` is first where that token itself is unlikely: another token may stand there.
    """
    agreeing, firsts, places, after = 0, list[float](), list[int](), list[bool]()
    for e, a in _rows(expected, actual):
        uncertain = e < _UNCERTAIN
        if not (far := np.abs(a - e) > _FAR * noise).any():
            continue
        first = int(np.argmax(far))
        agreeing += int(np.count_nonzero(uncertain[:first]))
        places.append(first)
        firsts.append(float(a[first] - e[first]))
        after += (np.abs(a - e) > noise)[first:][uncertain[first:]].tolist()
    enough = len(places) >= _SEQUENCES and agreeing >= _AGREEING and bool(after)
    if not enough or np.mean(np.array(places) > 1) < _MOST or np.mean(after) < _MOST:
        return None
    apart, text = float(np.median(firsts)), f"{len(places):,} sequences agree up to one token and differ from there on"
    values = {"pattern": "from_a_token_on", "first": apart}
    if apart < _ANOTHER:
        text += f". This token is {-apart:.2g} nats less likely to {whose}: another token may stand there"
        return Finding(
            layer="trainer",
            cause=None,
            evidence=text,
            candidates=("wrong_token", "attention_mask", "stale_weights"),
            values=values,
        )
    text += ": the prompt is right, and something in the completion is not"
    return Finding(
        layer="trainer", cause=None, evidence=text, candidates=("attention_mask", "wrong_token", "stale_weights"), values=values
    )
