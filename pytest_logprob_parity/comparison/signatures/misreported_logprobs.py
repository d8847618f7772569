"""Was the right number reported? What a side says of the chosen token, held against what its own top-k says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ...trace import Trace
from ..findings import SemanticCause
from ..sides import Side
from .logit_scale import ENOUGH
from .positions import Doubles, Positions

#: A chosen logprob and the same token's entry in the top-k are one number; float32 may round it on the way.
_SAME: Final = 1e-4
#: So many of the tokens must fit an explanation.
_MOST: Final = 0.9
_ENOUGH: Final = 5
#: A smaller share of the tokens is few; a number that is nearer than this (nats) was rounded.
_FEW, _ROUNDING = 0.01, 0.02
#: A number this large tells a factor from a constant, and so many of them do; how exact a factor or a constant is, and at
#: which share of the numbers.
_LARGE: Final = 0.1
_ENOUGH_LARGE: Final = 20
_EXACT, _ALL_BUT_FEW = 1e-4, 0.99
#: A factor that is as near to 1, or a constant to 0, rewrites nothing.
_CHANGED: Final = 1e-3
#: A sequence tells with so many places that it is another one's; samples of one prompt may be alike, and no more of them.
_PLACES, _PARTNERS = 3, 4
#: Numbers nearer to each other than this (nats) are one value.
_ONE_VALUE: Final = 1e-6
#: Logarithms of the smallest probabilities that are not 0 (2^-24 and its half, 2^-149), and how far beyond them a token may be.
_SMALLEST: Final = {"float16": -17.0, "float32": -103.6}
_NEAR_SMALLEST: Final = 2.0
#: What a factor means.
_LOGARITHMS: Final = {1.443: ", as log2 is of the natural logarithm", 0.434: ", as log10 is of the natural logarithm"}
#: Neighbours nearer to each other than this (nats) do not tell a shift from noise.
_TELLING: Final = 0.05


@dataclass(frozen=True, slots=True)
class Misreport:
    """A side whose chosen logprobs are not those of its own top-k: `text` says how, with its numbers.

    `minor` ones, of a few tokens or of the size of rounding, leave room for another cause.
    """

    cause: SemanticCause
    text: str
    minor: bool = False


def misreport(positions: Positions, side: Side) -> Misreport | None:
    """How one side's chosen logprobs contradict its own top-k; None where they do not, or where it has none."""
    trace, rows, whose = positions.side(side)
    if not trace.top_k:
        return None
    mine = trace.top_token_ids[rows] == trace.token_ids[rows][:, None]
    listed = np.where(mine, trace.top_logprobs[rows], np.nan).astype(np.float64)
    own = np.where(mine.any(axis=1), np.nanmax(np.where(mine, listed, -np.inf), axis=1), np.nan)
    said = trace.logprobs[rows].astype(np.float64)
    known = np.isfinite(own) & ~np.isnan(said)
    with np.errstate(invalid="ignore"):
        wrong = known & (np.abs(said - own) > _SAME * np.maximum(1, np.abs(own)))
    count, of = int(np.count_nonzero(wrong)), int(np.count_nonzero(known))
    if not count:
        return None
    cause, how = _explain(trace, rows, said, own, known)
    with np.errstate(invalid="ignore"):
        minor = (count < _ENOUGH and count < _FEW * of) or float(np.median(np.abs(said - own)[wrong])) < _ROUNDING
    text = f"{whose} reports another number than its own top-k for {count:,} of {of:,} chosen tokens: {how}"
    return Misreport(cause, text, minor)


def no_logprobs(positions: Positions, side: Side) -> Misreport | None:
    """A side whose numbers are no logprobs: some are above 0, or the probabilities of a position add up to more than 1."""
    trace, rows, name = positions.side(side)
    whose, of = f"{name}'s", len(rows)
    chosen, top = trace.logprobs[rows].astype(np.float64), trace.top_logprobs[rows].astype(np.float64)
    above = int(np.count_nonzero(np.nan_to_num(np.column_stack([chosen, top]), nan=0.0, posinf=0.0).max(axis=1) > _ROUNDING))
    if above >= _ENOUGH:
        text = f"{whose} logprobs are above 0 at {above:,} of {of:,} positions: these are probabilities, or the sign is wrong"
        return Misreport("wrong_values", text)
    total = np.where(trace.top_token_ids[rows] >= 0, np.exp(np.minimum(np.nan_to_num(top, nan=-np.inf), 0)), 0).sum(axis=1)
    beyond = int(np.count_nonzero(total > 1 + _ROUNDING))
    if trace.top_k and beyond >= _ENOUGH:
        text = (
            f"{whose} probabilities of one position add up to more than 1 at {beyond:,} of {of:,}, to {total.max():.3g} at most"
        )
        return Misreport("wrong_values", text)
    return None


def find_underflow(positions: Positions) -> Misreport | None:
    """-inf exactly where the other side is below what a probability can be in float16 or float32: a logarithm of one."""
    chosen, other = positions.actual[:, 0], positions.expected[:, 0]
    excluded, kept = np.isneginf(chosen) & np.isfinite(other), np.isfinite(chosen) & np.isfinite(other)
    if np.count_nonzero(excluded) < _ENOUGH:
        return None
    most, least = float(other[excluded].max()), float(other[kept].min(initial=0.0))
    for dtype, smallest in _SMALLEST.items():
        if abs(most - smallest) < _NEAR_SMALLEST and least > most - _ROUNDING:
            count, names = np.count_nonzero(excluded), positions.names
            text = (
                f"{names.actual} has -inf for the {count:,} tokens that {names.expected} has below {most:.3g}, and for no "
                f"other: the logarithm of a probability in {dtype}, which is 0 there"
            )
            return Misreport("wrong_values", text)
    return None


def find_rewritten(positions: Positions) -> Misreport | None:
    """All numbers of one side times a factor, or plus a constant: no distribution comes out of another so, for each position
    has a normaliser of its own.
    """
    names = positions.names
    x, y = positions.expected[positions.common], positions.actual[positions.common]
    if np.count_nonzero(np.abs(x) > _LARGE) < _ENOUGH_LARGE:
        return None
    factor, constant = float((x * y).sum() / (x * x).sum()), float(np.median(y - x))
    if np.count_nonzero(_all_listed(positions, constant)) < _ENOUGH:
        constant = 0.0  # of distributions that are flat, a truncation keeps the same mass everywhere
    for size, change, text in (
        (factor - 1, y - factor * x, f"{factor:.4g} times {names.expected}'s{_LOGARITHMS.get(round(factor, 3), '')}"),
        (constant, y - x - constant, f"{names.expected}'s {constant:+.4g}"),
    ):
        if size == factor - 1 and abs(factor) < _EXACT:
            continue  # one number for all is reported elsewhere, and what is certain at a temperature near 0
        exact = np.mean(np.abs(change) <= _EXACT * np.maximum(1, np.abs(y))) >= _ALL_BUT_FEW
        if exact and abs(size) > _CHANGED and np.sqrt(np.mean((y - x) ** 2)) > _ROUNDING:
            return Misreport(
                "wrong_values", f"every logprob of {names.actual} is {text}: no distribution is normalised like that"
            )
    return None


def _all_listed(positions: Positions, constant: float) -> Any:
    """Positions [n] that differ by this constant and list, on the side that is raised, nearly all of the probability."""
    raised = positions.expected if constant < 0 else positions.actual
    total = np.exp(np.where(np.isfinite(raised), np.minimum(raised, 0), -np.inf)).sum(axis=1)
    off = np.where(positions.common, np.abs(positions.off_line(1.0) - constant), 0.0).max(axis=1)
    return (total > 1 - _ROUNDING) & (off <= _EXACT * max(1, abs(constant))) & positions.common.any(axis=1)


def find_shift(positions: Positions) -> Misreport | None:
    """Numbers that stand one position from where they belong: both sides agree once one of them is moved.

    Over chosen logprobs alone, so that it is seen without a top-k.
    """
    finite = positions.common[:, 0]
    expected, actual = (np.where(finite, side[:, 0], np.nan) for side in (positions.expected, positions.actual))
    owner = positions.sequences
    apart = np.abs(actual - expected)
    for name, shift in (("before", 1), ("after", -1)):
        moved = np.roll(expected, shift)
        inside = (np.roll(owner, shift) == owner) & (np.roll(positions.expected_rows, shift) + shift == positions.expected_rows)
        inside &= np.isfinite(moved) & finite
        telling = inside & (np.abs(moved - expected) > _TELLING)
        if np.count_nonzero(telling) < _ENOUGH:
            continue
        fits = np.abs(actual - moved)[telling] <= 0.1 * np.abs(moved - expected)[telling]
        if np.mean(fits) >= _MOST and np.median(apart[telling]) > _TELLING:
            of = int(np.count_nonzero(telling))
            text = f"each logprob is the one that {positions.names.expected} has for the token {name} ({of:,} positions)"
            return Misreport("shifted_positions", text)
    return None


def find_shifted_rows(positions: Positions) -> Misreport | None:
    """A whole top-k that stands one position from where it belongs, by its likeliest token."""
    if not positions.expected_trace.top_k or not positions.actual_trace.top_k:
        return None
    expected = positions.expected_trace.top_token_ids[positions.expected_rows, 0]
    actual = positions.actual_trace.top_token_ids[positions.actual_rows, 0]
    for name, shift in (("before", 1), ("after", -1)):
        moved = np.roll(expected, shift)
        beside = np.roll(positions.expected_rows, shift) + shift == positions.expected_rows
        telling = beside & (np.roll(positions.sequences, shift) == positions.sequences) & (moved != expected)
        if np.count_nonzero(telling) >= _ENOUGH and np.mean((actual == moved)[telling]) >= _MOST:
            of = int(np.count_nonzero(telling))
            text = f"each top-k is the one that {positions.names.expected} has for the token {name} ({of:,} positions)"
            return Misreport("shifted_positions", text)
    return None


def find_rows_elsewhere(positions: Positions) -> Misreport | None:
    """Sequences whose top-k are those of one other sequence, place by place: rows of a batch that were mixed up.

    By all tokens of the list and the number of its likeliest one; where many others fit as well, answers are alike and nothing
    is told.
    """
    if positions.expected_trace.top_k < 2 or positions.actual_trace.top_k != positions.expected_trace.top_k:
        return None
    place = positions.expected_rows - positions.expected_trace.sequence_offsets[positions.sequences]
    sides = ((positions.expected_trace, positions.expected_rows), (positions.actual_trace, positions.actual_rows))
    (ids, numbers), (actual_ids, actual_numbers) = (
        (np.sort(trace.top_token_ids[rows], axis=1), trace.top_logprobs[rows, 0].astype(np.float64)) for trace, rows in sides
    )
    own = (ids == actual_ids).all(axis=1) & (np.abs(numbers - actual_numbers) <= _TELLING)
    at = {(int(s), int(t)): row for row, (s, t) in enumerate(zip(positions.sequences, place, strict=True))}
    by_place: dict[tuple[int, bytes], list[int]] = {}
    for row, (t, listed) in enumerate(zip(place.tolist(), ids, strict=True)):
        by_place.setdefault((t, listed.tobytes()), []).append(row)
    found, of = 0, 0
    for sequence in np.unique(positions.sequences[~own]).tolist():
        rows = np.flatnonzero((positions.sequences == sequence) & ~own)
        if len(rows) < _PLACES:
            continue
        of += 1
        first = by_place.get((int(place[rows[0]]), actual_ids[rows[0]].tobytes()), [])
        partners = [
            int(positions.sequences[row])
            for row in first
            if positions.sequences[row] != sequence
            and _fits(int(positions.sequences[row]), rows, at, place, ids, actual_ids, numbers, actual_numbers)
        ]
        found += 0 < len(partners) <= _PARTNERS
    if of < 2 or found < _MOST * of:
        return None
    return Misreport("wrong_token", f"the top-k of {found:,} sequences are those of another sequence, place by place")


def _fits(partner: int, rows: Any, at: Any, place: Any, ids: Any, actual_ids: Any, numbers: Any, actual_numbers: Any) -> bool:
    """Whether nearly all these rows are what another sequence has at the same place."""
    partners = [at.get((partner, int(place[row]))) for row in rows]
    same = [
        other is not None
        and bool((ids[other] == actual_ids[row]).all())
        and abs(numbers[other] - actual_numbers[row]) <= _TELLING
        for row, other in zip(rows, partners, strict=True)
    ]
    return bool(np.mean(same) >= _MOST)


def find_normaliser(positions: Positions) -> Misreport | None:
    """Between the listed tokens of a position nothing differs, and each position has a constant of its own: another normaliser,
    or other logits of tokens that no list has.
    """
    two = positions.of(positions.common.sum(axis=1) >= 2)
    if len(two.expected_rows) < ENOUGH:
        return None
    off = two.off_line(1.0)
    constants = np.nanmean(off, axis=1)
    size, left = float(np.sqrt(np.mean(constants**2))), float(np.sqrt(np.nanmean((off - constants[:, None]) ** 2)))
    if size < _ROUNDING or left > 0.05 * size:
        return None
    text = (
        f"each position differs by one constant (RMS {size:.2g} nats), its tokens do not differ otherwise ({left:.1g} nats): "
        f"{positions.names.actual} normalises over other tokens, processes logprobs instead of logits, or differs in tokens "
        "that no top-k lists"
    )
    return Misreport("wrong_values", text)


def _explain(trace: Trace, rows: Any, said: Doubles, own: Doubles, known: Any) -> tuple[SemanticCause, str]:
    excluded = known & np.isneginf(said)
    if excluded.any():
        return "wrong_values", f"-inf for {int(np.count_nonzero(excluded)):,} that its top-k keeps"
    first = trace.top_logprobs[rows, 0].astype(np.float64)
    with np.errstate(invalid="ignore"):
        wrong = known & (np.abs(said - own) > _SAME * np.maximum(1, np.abs(own)))
    if np.count_nonzero(wrong) < _ENOUGH:
        return "wrong_values", f"off by {np.median(np.abs(said - own)[wrong]):.3g} nats (median)"

    def fits(values: Any, where: Any = None, slack: float = 1e-3) -> bool:
        of = wrong if where is None else wrong & where
        with np.errstate(invalid="ignore"):
            near = np.isfinite(said) & (np.abs(said - values) <= slack * np.maximum(1, np.abs(said)))
        return bool(np.count_nonzero(of) >= _ENOUGH and np.mean(near[of]) >= _MOST)

    if np.ptp(said[wrong]) < _ONE_VALUE:
        value = f"{said[wrong][0] + 0.0:.3g}"
        if (
            (own[wrong] < said[wrong]).all()
            and said[wrong][0] < -_LARGE
            and not (known & ~wrong & (own < said[wrong][0])).any()
        ):
            return "wrong_values", f"clipped at {value}"
        starts = np.isin(rows, trace.sequence_offsets[:-1])[wrong].all()
        return (
            "wrong_values",
            f"{value} for each, {'and each is the first of its sequence' if starts else 'whatever the token'}",
        )
    if fits(first):
        return "wrong_token", "that of the likeliest token (a dict was read in its order)"
    for name, shift in (("the token before", 1), ("the token after", -1)):
        moved = np.roll(own, shift)
        if fits(moved, np.isfinite(moved)):
            return "shifted_positions", f"that of {name}"
    ratio = np.median(said[wrong] / np.where(own == 0, np.nan, own)[wrong])
    if fits(own / np.log(2)):
        return "wrong_values", "log2 in place of the natural logarithm"
    if np.max(np.abs(said - own)[wrong]) < _ROUNDING * max(1.0, float(np.max(np.abs(own[wrong])))):
        return "wrong_values", f"rounded, by {np.median(np.abs(said - own)[wrong]):.2g} nats (median)"
    if np.isfinite(ratio) and fits(own * ratio):
        return "wrong_values", f"{ratio:.3f} times it"
    floor = said.min()
    if fits(np.maximum(own, floor)):
        return "wrong_values", f"clipped at {floor:.3g}"
    return _by_sequence(trace, rows, said, own, wrong)


def _by_sequence(trace: Trace, rows: Any, said: Doubles, own: Doubles, wrong: Any) -> tuple[SemanticCause, str]:
    """What a whole sequence gives away: one value for all tokens, or those of another sequence; else only that it differs."""
    owner = trace.sequence_of_token[rows]
    of = np.unique(owner[wrong])
    constant = [np.ptp(said[owner == s]) < _ONE_VALUE for s in of]
    if np.mean(constant) > _MOST:
        return "wrong_values", "one value for all tokens of a sequence"
    ordered = np.sort(own[np.isfinite(own)])
    values = said[wrong]
    near = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    gap = np.minimum(np.abs(ordered[near] - values), np.abs(ordered[np.maximum(near - 1, 0)] - values))
    elsewhere = bool(np.mean(gap <= 1e-5 * np.maximum(1, np.abs(values))) > _MOST)
    if elsewhere and values.std() and own[wrong].std() and np.corrcoef(values, own[wrong])[0, 1] < 0.9:
        return "wrong_token", "those of other tokens, elsewhere in the trace"
    spread = np.abs(said - own)[wrong]
    return "wrong_values", f"off by {np.median(spread):.3g} nats (median)"
