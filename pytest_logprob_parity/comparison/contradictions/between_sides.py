"""Both sides against each other, where their chosen logprobs agree or are explained: top-k, ranks, accepted drafts, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from ...trace import Trace
from ..alignment import Alignment, partners_of
from ..findings import Cause
from ..sides import Names, Side
from .contradiction import Contradiction
from .side_columns import Bools, Columns, Doubles, where

_FINE: Final = ("float32", "float64")
_ENOUGH: Final = 5
_MOST: Final = 0.9
#: Chosen logprobs that are as near to each other (nats) agree, by whether a dtype is float32 or finer; and by how much the
#: probability of a likely token may then differ.
_AGREE: Final = {True: 0.01, False: 0.25}
_PROBABILITY: Final = {True: 0.05, False: 0.3}
#: The likeliest tokens of a top-k whose probabilities are compared.
_LIKELIEST: Final = 5
#: The share of positions where the top-k is another one that noise explains, and how many times the chosen tokens that are off.
_FEW, _AS_CHOSEN = 0.02, 3
#: Noise moves ranks by no more than this factor at most positions.
_FACTOR, _RANKS = 2.0, 0.5
#: A logprob below this (nats) is not that of a token which the engine was sure of.
_UNSURE, _RARE = -0.02, float(np.log(0.05))
#: Logprobs below the first (nats) tell two contexts apart; in one context they are this near (RMS, nats), by fineness.
_TELLING: Final = -0.2
_SAME_RMS: Final = {True: 0.01, False: 0.06}
#: Fewer sequences than this are searched for their partners once more.
_SEARCHED: Final = 5000


def _fine(*sides: Columns) -> bool:
    return all(side.trace.dtype in _FINE for side in sides)


def agree(expected: Columns, actual: Columns) -> Bools:
    """Positions [n] whose chosen logprobs agree within noise."""
    e, a = expected.chosen, actual.chosen
    with np.errstate(invalid="ignore"):
        return np.asarray((np.abs(a - e) <= _AGREE[_fine(expected, actual)]) | (np.isneginf(e) & np.isneginf(a)))


def _neighbours(expected: Columns) -> Iterator[tuple[int, str, Bools]]:
    """One step back and one ahead: by how much to roll, the neighbour's name, and the tokens [n] that have one."""
    follows = np.zeros(len(expected.rows), bool)
    follows[1:] = (np.diff(expected.rows) == 1) & (np.diff(expected.sequences) == 0)
    yield 1, "before", follows
    yield -1, "after", np.roll(follows, -1)


def chosen_shifted(expected: Columns, actual: Columns) -> bool:
    """Whether the chosen logprobs are nearer to those one position away than to those in their own place."""
    e, a = expected.chosen, actual.chosen
    for step, _, inside in _neighbours(expected):
        moved = np.roll(e, step)
        telling = inside & np.isfinite(e) & np.isfinite(a) & np.isfinite(moved)
        said, own, other = a[telling], e[telling], moved[telling]
        if len(said) and np.mean(np.abs(said - other)) < np.mean(np.abs(said - own)) / 2:
            return True
    return False


def shifted_top_k(expected: Columns, actual: Columns, wrong: Side) -> Contradiction | None:
    """A top-k that stands one position from where it belongs, beside chosen logprobs that do not, by its likeliest token."""
    if not expected.trace.top_k or not actual.trace.top_k:
        return None
    expected_first, actual_first = expected.ids[:, 0], actual.ids[:, 0]
    for step, name, inside in _neighbours(expected):
        moved = np.roll(expected_first, step)
        telling = inside & (moved != expected_first) & (moved >= 0) & (actual_first >= 0)
        count = int(np.count_nonzero(telling))
        if count >= _ENOUGH and np.mean(actual_first[telling] == moved[telling]) >= _MOST:
            side = name if wrong == "actual" else {"before": "after", "after": "before"}[name]
            off = expected if wrong == "expected" else actual
            text = (
                f"each top-k of {off.name} is that of the token {side} (seen at {count:,} positions), but the chosen logprobs "
                "are not shifted"
            )
            return Contradiction(
                layer="semantic",
                cause="shifted_positions",
                evidence=text,
                candidates=(),
                key="top_k_shifted",
                side=wrong,
                count=count,
                of=count,
            )
    return None


def other_top_k(expected: Columns, actual: Columns, agreed: Bools) -> Contradiction | None:
    """Likely tokens have other probabilities in the top-k, at positions whose chosen logprobs agree."""
    width = min(expected.trace.top_k, actual.trace.top_k)
    usable = agreed & expected.has & actual.has & ~np.isneginf(expected.chosen)
    count = int(np.count_nonzero(usable))
    if not width or not count:
        return None
    most = _PROBABILITY[_fine(expected, actual)]
    off = np.zeros(len(usable), bool)
    for one, other in ((expected, actual), (actual, expected)):
        off[usable] |= _furthest(one, other, usable, width) > most
    found, not_agreed = int(np.count_nonzero(off)), int(np.count_nonzero(~agreed))
    if found < max(_ENOUGH, _FEW * count, _AS_CHOSEN * not_agreed):
        return None
    text = (
        f"the top-k of {actual.name} gives likely tokens other probabilities than {expected.name}'s at {found:,} of {count:,} "
        f"positions where the chosen logprobs agree ({where(actual, off)})"
    )
    return Contradiction(
        layer="path",
        cause=None,
        evidence=text,
        candidates=("engine_build", "parallelism"),
        key="top_k_differs",
        count=found,
        of=count,
    )


def _furthest(one: Columns, other: Columns, usable: Bools, width: int) -> Doubles:
    """By how much [n] the probability of one side's likeliest tokens is another one on the other side, at least: a token
    that a full top-k does not list is no likelier than the last one.
    """
    ids, top = one.ids[usable, : min(width, _LIKELIEST)], one.top[usable, : min(width, _LIKELIEST)]
    others, values = other.ids[usable, :width], np.exp(np.minimum(other.top[usable, :width], 0))
    full = (others >= 0).all(axis=1)
    rest = np.where(full, values.min(axis=1), 0.0)
    furthest = np.zeros(len(ids))
    for column in range(ids.shape[1]):
        same = (others == ids[:, column, None]) & (others >= 0)
        listed = same.any(axis=1)
        p, q = np.exp(np.minimum(top[:, column], 0)), np.where(same, values, 0).max(axis=1)
        apart = np.where(listed, np.abs(p - q), np.maximum(p - rest, 0))
        furthest = np.maximum(furthest, np.where(ids[:, column] >= 0, apart, 0))
    return furthest


def other_ranks(expected: Columns, actual: Columns, agreed: Bools) -> Contradiction | None:
    """Ranks that are all off by one constant, or that have nothing to do with each other, beside logprobs that agree."""
    known = agreed & (expected.ranks > 0) & (actual.ranks > 0)
    count = int(np.count_nonzero(known))
    if count < 2 * _ENOUGH:
        return None
    expected_ranks, actual_ranks = expected.ranks[known].astype(np.float64), actual.ranks[known].astype(np.float64)
    values, how_often = np.unique(actual_ranks - expected_ranks, return_counts=True)
    constant, share = int(values[how_often.argmax()]), how_often.max() / count
    constant_off = bool(constant and share >= _MOST)
    if constant_off:
        found, how = int(how_often.max()), f"are {expected.name}'s rank {constant:+d}"
    else:
        far = np.maximum(actual_ranks / expected_ranks, expected_ranks / actual_ranks) > _FACTOR
        found, how = int(np.count_nonzero(far)), f"differ from {expected.name}'s by more than a factor of {_FACTOR:g}"
        if found < max(_ENOUGH, _RANKS * count):
            return None
    text = f"{found:,} of {count:,} ranks of {actual.name} {how}, but the chosen logprobs agree"
    fewer = not constant_off and bool((actual_ranks <= expected_ranks).all() or (expected_ranks <= actual_ranks).all())
    if fewer:  # see within: half of what should be counted, on one side
        text += "; the ranks of one side are too small, as vLLM's are on CPUs without AVX-512"
    return Contradiction(
        layer="path",
        cause=None,
        evidence=text,
        candidates=("engine_build", "parallelism"),
        key="ranks_differ",
        count=found,
        of=count,
        new=not fewer,
    )


def probability_one(expected: Columns, actual: Columns) -> Contradiction | None:
    """0.0 for tokens that the other side is not sure of, and of which some are not even its likeliest: no truncation leaves
    those alone. Engines report accepted draft tokens so.
    """
    e, a = expected.chosen, actual.chosen
    with np.errstate(invalid="ignore"):
        alone = np.isfinite(actual.top).sum(axis=1) <= 1  # itself, or no top-k at all
        sure = (a == 0) & alone
        found = sure & (e < _UNSURE)
        noise = _AGREE[_fine(expected, actual)]
        not_likeliest = found & ((expected.has & (expected.largest > e + noise)) | (~expected.has & (e < _RARE)))
    count, others, of = (int(np.count_nonzero(x)) for x in (found, not_likeliest, np.isfinite(a)))
    if others < 2:
        return None
    text = (
        f"{count:,} of {of:,} logprobs of {actual.name} are 0.0, probability 1, and {others:,} of these tokens are not "
        f"the likeliest of {expected.name}"
    )
    rest = ~sure & np.isfinite(a)
    with np.errstate(invalid="ignore"):
        agree = np.abs(a - e)[rest] <= noise
    if np.any(rest & ~actual.first_of_turn) and np.mean(agree) > _MOST:  # those that were not accepted have their own numbers
        text += ": engines report accepted draft tokens like this, and logprobs that were lost and replaced by 0 look the same"
    else:
        text += f": all but {where(actual, rest)}" if rest.any() else ": all of them"
        text += "; engines report accepted draft tokens and forced tokens like this"
    candidates: tuple[Cause, ...] = ("speculative_decoding", "wrong_values", "engine_build")
    return Contradiction(
        layer="path", cause=None, evidence=text, candidates=candidates, key="probability_one", count=count, of=of
    )


def no_logprob(expected: Columns, actual: Columns) -> Contradiction | None:
    """The first token of every turn has no logprob: whatever reads the engine's answer loses it; no kernel gives such NaN."""
    missing = np.isnan(actual.chosen) & ~np.isnan(expected.chosen)
    count, first = int(np.count_nonzero(missing)), actual.first_of_turn
    turns = int(np.count_nonzero(first))
    if count < 2 or not np.all(first[missing]) or count < _MOST * turns:
        return None
    text = (
        f"{count:,} of {len(missing):,} tokens of {actual.name} have no logprob: {where(actual, missing)}. The "
        "computation does not give such NaN: the engine gave no number, or the code that reads its answers lost it"
    )
    return Contradiction(
        layer="path", cause=None, evidence=text, candidates=("engine_build",), key="no_logprob", count=count, of=len(missing)
    )


def shifted_tokens(expected: Trace, actual: Trace, rows: Alignment, names: Names) -> Iterator[Contradiction]:
    """Sequences with one token more, or fewer, whose other tokens and logprobs are the golden's: nobody computed those after
    another history.
    """
    if not rows.diverged_sequences or expected.num_sequences > _SEARCHED:
        return
    counts = {"twice": 0, "more": 0, "missing": 0}
    for sequence, partner in enumerate(partners_of(expected, actual)):
        if partner is not None and (kind := _shift_of(expected, expected.bounds(sequence), actual, actual.bounds(partner))):
            counts[kind] += 1
    for kind, count in counts.items():
        if count:
            what = {"twice": "a token is repeated", "more": "there is an extra token", "missing": "a token is missing"}[kind]
            text = (
                f"in {count:,} of {expected.num_sequences:,} sequences of {names.actual} {what}; the tokens after it are "
                f"those of {names.expected}, with its logprobs"
            )
            yield Contradiction(
                layer="semantic",
                cause="shifted_positions",
                evidence=text,
                candidates=(),
                key="tokens_shifted",
                count=count,
                of=expected.num_sequences,
            )


def _shift_of(expected: Trace, expected_bounds: tuple[int, int], actual: Trace, actual_bounds: tuple[int, int]) -> str:
    e, a = expected.token_ids[slice(*expected_bounds)], actual.token_ids[slice(*actual_bounds)]
    common = min(len(e), len(a))
    differs = np.flatnonzero(e[:common] != a[:common])
    if not len(differs):
        return ""
    place = int(differs[0])
    for more, fewer, kind in ((1, 0, "more"), (0, 1, "missing")):
        rest = min(len(a) - place - more, len(e) - place - fewer)
        one = slice(expected_bounds[0] + place + fewer, expected_bounds[0] + place + fewer + rest)
        other = slice(actual_bounds[0] + place + more, actual_bounds[0] + place + more + rest)
        if rest < _ENOUGH or not np.array_equal(expected.token_ids[one], actual.token_ids[other]):
            continue
        left, right = expected.logprobs[one].astype(np.float64), actual.logprobs[other].astype(np.float64)
        telling = np.isfinite(left) & np.isfinite(right) & (left < _TELLING)
        fine = expected.dtype in _FINE and actual.dtype in _FINE
        if np.count_nonzero(telling) >= _ENOUGH and np.mean((left - right)[telling] ** 2) <= _SAME_RMS[fine] ** 2:
            return "twice" if kind == "more" and place and a[place] == a[place - 1] else kind
    return ""
