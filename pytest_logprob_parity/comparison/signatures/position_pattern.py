"""Which places are off, and which are not: what that alone tells, whatever the numbers are."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..findings import Finding
from .positions import Bools, Doubles, Positions

#: Positions tell where the likeliest token has less than this logprob: what is certain is off under no fault.
_UNSURE: Final = -0.05
#: So many telling positions in each part; those that are off are so many times as far off as the others, and by so much (nats).
_ENOUGH, _TIMES, _LEAST = 5, 10.0, 0.02
#: Of the others, the size that nearly all stay below; how likely it may be that all that are off fall there by chance.
_NEARLY_ALL, _CHANCE = 0.99, 1e-4
#: What a token that one side leaves out takes from the others, held against what is measured: relative error, and nats.
_SHARE, _EXACT = 0.05, 0.002


def find_position_pattern(positions: Positions) -> Finding | None:
    """A finding where exactly the first tokens of the turns are off, or exactly those before `min_tokens`: other weights
    would move all that are unsure.
    """
    if not len(positions.expected_rows):
        return None
    off = positions.off_line(1.0)
    known: Bools = np.asarray(positions.common.any(axis=1))
    likeliest = np.where(positions.common, positions.expected, -np.inf).max(axis=1)
    squares = np.where(positions.common, off, 0.0) ** 2
    sizes: Doubles = np.asarray(np.sqrt(squares.sum(axis=1) / np.maximum(positions.common.sum(axis=1), 1)))
    place = _places(positions)
    telling: Bools = np.asarray(known & (likeliest < _UNSURE))
    least = positions.expected_trace.sampling.min_tokens
    if least and (far := _far(sizes, telling, place < least)).any():
        return _min_tokens(positions, off, far, least)
    far = _far(sizes, telling, place == 0)
    if np.count_nonzero(far) > np.count_nonzero(telling & (place == 0)) / 2:
        count, size = int(np.count_nonzero(telling & (place == 0))), float(np.median(sizes[telling & (place == 0)]))
        text = (
            f"only the first token of a turn differs ({count:,} of them, median {size:.2g} nats), the others agree: the "
            "prefill of the prompt computes or reports something else; other weights would move all tokens"
        )
        return Finding(layer="path", cause=None, evidence=text, candidates=("chunked_prefill", "prefix_cache", "engine_build"))
    return None


def _far(sizes: Doubles, telling: Bools, inside: Bools) -> Bools:
    """Positions that are off, where all of them are `inside`, and so many that this is no chance; else none."""
    none = np.zeros(len(sizes), bool)
    if min(np.count_nonzero(telling & inside), np.count_nonzero(telling & ~inside)) < _ENOUGH:
        return none
    usual = float(np.quantile(sizes[telling & ~inside], _NEARLY_ALL))
    far = np.asarray(telling & (sizes > max(_LEAST, _TIMES * usual)))
    count, share = int(np.count_nonzero(far)), float(np.mean(inside[telling]))
    return none if (far & ~inside).any() or count < _ENOUGH or share**count > _CHANCE else far


def _places(positions: Positions) -> Any:
    """The place of each position in its turn."""
    starts = np.array([segment.start for segment in positions.expected_trace.segments()])
    return positions.expected_rows - starts[np.searchsorted(starts, positions.expected_rows, side="right") - 1]


def _min_tokens(positions: Positions, off: Doubles, chosen: Bools, least: int) -> Finding:
    """`min_tokens` by name where a token that only one side lists there has the probability that the others lack."""
    names, constants = positions.names, np.nanmean(off[chosen], axis=1)
    on_expected = float(np.median(constants)) < 0  # this run gives less to each: it has more tokens
    trace, rows = (
        (positions.actual_trace, positions.actual_rows) if on_expected else (positions.expected_trace, positions.expected_rows)
    )
    lacks, others = (
        (positions.expected_trace, positions.expected_rows) if on_expected else (positions.actual_trace, positions.actual_rows)
    )
    ids, logprobs = trace.top_token_ids[rows[chosen]], trace.top_logprobs[rows[chosen]].astype(np.float64)
    lacks_ids, lacks_logprobs = lacks.top_token_ids[others[chosen]], lacks.top_logprobs[others[chosen]]
    excluded = set(np.unique(ids[np.isfinite(logprobs)]).tolist()) - set(
        np.unique(lacks_ids[np.isfinite(lacks_logprobs)]).tolist()
    )
    left_out = np.where(np.isin(ids, sorted(excluded)) & np.isfinite(logprobs), np.exp(logprobs), 0.0).sum(axis=1)
    listed = left_out > _LEAST
    taken = -np.log1p(-np.minimum(left_out[listed], 1 - 1e-9))
    fits = np.abs(np.abs(constants[listed]) - taken) <= _EXACT + _SHARE * taken
    has, lacking = (names.actual, names.expected) if on_expected else names
    text = f"only the first {least} tokens of each turn differ, as many as min_tokens says"
    if np.count_nonzero(listed) >= _ENOUGH and fits.mean() > 1 - _SHARE:
        tokens = ", ".join(str(i) for i in sorted(excluded)[:3])
        text += f": {has} has {'tokens' if len(excluded) > 1 else 'token'} {tokens} there, which {lacking} excludes"
        return Finding(layer="semantic", cause="min_tokens", evidence=text)
    return Finding(layer="semantic", cause=None, evidence=text, candidates=("min_tokens", "penalties", "truncation"))
