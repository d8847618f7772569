"""Speculative decoding: are the logprobs of accepted drafts the target model's? Only they are wrong where they are not."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ...trace import BoolArray, Trace
from ..findings import Finding

#: How accepted drafts were reported.
DraftFault: TypeAlias = Literal["probability_one", "one_token_late", "one_token_early", "another_distribution"]

#: A draft is off where it is so many times as far as the other tokens are (RMS), and as far as this (nats).
_FAR, _LEAST = 8.0, {"float32": 1e-3, "float64": 1e-3}
_LEAST_OTHERWISE: Final = 0.25
#: So many drafts that are off are no noise, and this share of those that are.
_ENOUGH, _SHARE = 3, 0.02
#: A token with a lower logprob than -_UNSURE (nats) is not certain.
_UNSURE: Final = 0.01
#: An explanation fits this share of the drafts that are off.
_MOST: Final = 0.8
#: The other tokens are no better than those that were verified where their RMS is more than this share of theirs.
_ALIKE: Final = 0.5


def speculation_finding(replayed: Trace, reported: Trace, drafted: npt.NDArray[np.uint8]) -> Finding | None:
    """The finding where what an engine `reported` of tokens that it verified is not what it says without speculation
    (`replayed`).

    `drafted` [N]: 1 for accepted drafts, 2 for tokens drawn in place of rejected ones, 0 for all others. None where they agree,
    and where the others are as far apart: then speculation is not what moved them.
    """
    usable = reported.mask & np.isfinite(replayed.logprobs)
    with np.errstate(invalid="ignore"):
        d = reported.logprobs.astype(np.float64) - replayed.logprobs
    finite = usable & np.isfinite(d)
    verified, others = usable & (drafted > 0), finite & (drafted == 0)
    if not verified.any():
        return None
    rms_verified, rms_others = _rms(d[verified & finite]), _rms(d[others])
    limit = max(_FAR * rms_others, least := _LEAST.get(replayed.dtype, _LEAST_OTHERWISE))
    with np.errstate(invalid="ignore"):
        off = verified & ~(np.abs(d) <= limit)
    if (certain := _certain(replayed, reported, verified & (drafted == 1))).any():
        off = certain  # exact zeros are no noise, however near to 0 the tokens are
    count, of = int(np.count_nonzero(off)), int(np.count_nonzero(verified))
    apart = certain.any() or count > int(np.count_nonzero(verified & finite & off)) or rms_others <= _ALIKE * rms_verified
    if count < (_ENOUGH if certain.any() else max(_ENOUGH, _SHARE * of)) or not apart:
        return None
    fault, how = _explain(replayed, reported, off & (drafted == 1) if (off & (drafted == 1)).any() else off, least)
    kinds = [
        f"{np.count_nonzero(off & (drafted == code)):,} of {np.count_nonzero(usable & (drafted == code)):,} {name}"
        for code, name in ((1, "accepted drafts"), (2, "tokens in place of rejected drafts"))
        if (off & (drafted == code)).any()
    ]
    broken = int(np.count_nonzero(off & ~np.isfinite(d)))
    how += f"; {broken:,} are NaN or infinite" if broken else ""
    text = (
        f"{' and '.join(kinds)} have another logprob than without speculation: {how}. RMS difference of what "
        f"was verified {rms_verified:.2g} nats, of the other {int(np.count_nonzero(others)):,} tokens {rms_others:.2g}"
    )
    values = {
        "fault": fault, "off": count, "verified": of, "not_finite": broken, "rms_verified": rms_verified,
        "rms_others": rms_others,
    }  # fmt: skip
    return Finding(layer="path", cause="speculative_decoding", evidence=text, values=values)


def _certain(replayed: Trace, reported: Trace, drafts: BoolArray) -> BoolArray:
    """The accepted drafts [N] that are reported at exactly 0.0, where nearly all are that the replay is not sure of."""
    unsure = drafts & (replayed.logprobs < -_UNSURE)
    zero = unsure & (reported.logprobs == 0)
    return zero if np.count_nonzero(zero) >= max(_ENOUGH, _MOST * np.count_nonzero(unsure)) else np.zeros_like(zero)


def _explain(replayed: Trace, reported: Trace, off: BoolArray, least: float) -> tuple[DraftFault, str]:
    """How the drafts that are `off` were reported, with the words for it."""
    rows = np.flatnonzero(off)
    if np.mean(reported.logprobs[rows] == 0) >= _MOST:
        return "probability_one", "they are reported at 0.0, probability 1"
    for fault, step, word in (("one_token_late", 1, "after"), ("one_token_early", -1, "before")):
        if _by_number(replayed, reported, rows, step, least) >= _MOST or _by_top(replayed, reported, rows, step) >= _MOST:
            name: DraftFault = "one_token_late" if fault == "one_token_late" else "one_token_early"
            return name, f"they are read from the distribution of the token {word} ({fault.replace('_', ' ')})"
    return "another_distribution", "they are of another distribution, such as the draft model's or another temperature's"


def _by_number(replayed: Trace, reported: Trace, rows: npt.NDArray[Any], step: int, least: float) -> float:
    """The share of these tokens whose number is the neighbour's."""
    there, beside = _neighbours(replayed, rows, step)
    if len(there) < _ENOUGH:
        return 0.0
    near = np.abs(reported.logprobs[there].astype(np.float64) - replayed.logprobs[beside]) < least
    return float(np.mean(near))


def _by_top(replayed: Trace, reported: Trace, rows: npt.NDArray[Any], step: int) -> float:
    """The share of these tokens whose likeliest tokens are the neighbour's, and not their own."""
    there, beside = _neighbours(replayed, rows, step)
    k = min(replayed.top_k, reported.top_k)
    if len(there) < _ENOUGH or k < 1:
        return 0.0
    near = min(k, 3)
    said, own, other = (
        np.sort(ids[:, :near], axis=1)
        for ids in (reported.top_token_ids[there], replayed.top_token_ids[there], replayed.top_token_ids[beside])
    )
    telling = (own != other).any(axis=1)
    if np.count_nonzero(telling) < _ENOUGH:
        return 0.0
    return float(np.mean((said == other).all(axis=1)[telling]))


def _neighbours(trace: Trace, rows: npt.NDArray[Any], step: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """The rows that have a neighbour `step` places on in their sequence, and the neighbours."""
    owner = trace.sequence_of_token
    beside = rows + step
    inside = (beside >= 0) & (beside < trace.num_tokens)
    inside[inside] &= owner[beside[inside]] == owner[rows[inside]]
    return rows[inside], beside[inside]


def _rms(d: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0
