"""Tokens that the sampling names: `logit_bias` moves their logits, `bad_words` and `allowed_token_ids` exclude tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from ...grammar import counted
from ...spec import Sampling
from ..findings import Finding
from ..sides import Side
from .logit_scale import ENOUGH, FINEST
from .logits_processing_step import ProcessingStep, applied
from .positions import Bools, Doubles, Positions

#: A fitted share of a bias is so many standard errors from the recorded one where it is another; the least such share.
_SURE, _LEAST = 5.0, 0.02
#: A bias that nobody recorded is at least this large (nats), and leaves at most this share of itself between its tokens.
_LEAST_BIAS, _UNIFORM = 0.05, 0.05
#: Tokens that a bias without a record moves, as a share of the tokens that were looked at.
_FEW: Final = 0.2
#: A token that is excluded wherever it stands, so many times: no truncation does that to a token that was likely somewhere.
_TIMES, _LIKELY = 5, -1.5


def named_token_steps(positions: Positions) -> tuple[list[ProcessingStep], Positions]:
    """The steps of named tokens that the two sides do not share, and the positions without the tokens that they explain."""
    steps, moved = _biases(positions)
    banned, excluded = _bans(positions)
    hidden = np.isin(positions.ids, sorted({*moved, *excluded}))
    if not hidden.any():
        return [*steps, *banned], positions
    expected, actual = (np.where(hidden, np.nan, side) for side in (positions.expected, positions.actual))
    return [*steps, *banned], dataclasses.replace(positions, expected=expected, actual=actual)


# -- logit_bias ---------------------------------------------------------------------------------------------------------


def _biases(positions: Positions) -> tuple[list[ProcessingStep], set[int]]:
    """The step of a bias that one side lacks, and the ids that it moves."""
    recorded = dict(positions.expected_trace.sampling.logit_bias)
    if positions.expected_trace.logprobs_mode != "processed_logprobs" or positions.ids.shape[1] < 2:
        return [], set()
    if recorded:
        step = _recorded_bias(positions, recorded)
        return ([step], {t for t, bias in recorded.items() if bias}) if step else ([], set())
    found = _unrecorded_bias(positions)
    if not found:
        return [], set()
    words = ", ".join(f"{bias:+.3g} on {positions.expected_trace.text(t)!r}" for t, bias in found.items())
    name = f"a logit bias ({words})"
    finding = Finding(
        layer="semantic",
        cause="logit_bias",
        evidence=f"{applied(name, positions.names, on_expected=False)}; no other token is moved",
        values={"tokens": {str(t): bias for t, bias in found.items()}},
    )
    return [ProcessingStep(finding=finding, on_expected=False, recorded=False, name=name)], set(found)


def _recorded_bias(positions: Positions, biases: dict[int, float]) -> ProcessingStep | None:
    """The recorded bias where this run applied another multiple of it: none, or twice as much."""
    named = np.isin(positions.ids, [t for t, bias in biases.items() if bias])
    off = _beside_others(positions, named)
    used = positions.common & named & np.isfinite(off)
    if np.count_nonzero(used) < ENOUGH:
        return None
    sizes = np.array([biases[int(t)] for t in positions.ids[used]])
    change = off[used] * positions.actual_trace.applied_temperature
    share = 1 + float((change * sizes).sum() / (sizes**2).sum())
    left = change - (share - 1) * sizes
    error = float(np.sqrt((left**2 * sizes**2).sum()) / (sizes**2).sum())
    if not abs(share - 1) > max(_LEAST, _SURE * error):
        return None
    names = positions.names
    name = f"logit bias of {counted(len(biases), 'tokens')}"
    near = max(_LEAST, _SURE * error)
    if abs(share) <= near:
        text = applied(name, names, on_expected=True)
        if not _other_steps(positions.expected_trace.sampling):
            text += f", or {names.actual}'s logprobs are raw"
    else:
        text = f"{name}: {names.actual} has {share:.3f} times the recorded bias"
    text += f" (fitted share {share:.3f} +- {error:.1g} from {np.count_nonzero(used):,} tokens)"
    values = {"share": share, "error": error, "tokens": int(np.count_nonzero(used))}
    return ProcessingStep(
        finding=Finding(layer="semantic", cause="logit_bias", evidence=text, values=values),
        on_expected=share < 1,
        recorded=abs(share) <= near,
        name=name,
    )


def _unrecorded_bias(positions: Positions) -> dict[int, float]:
    """A bias by token id, where a few tokens are moved by a constant each, and the others are not; {} where none are."""
    off = _beside_others(positions, np.zeros(positions.ids.shape, bool))
    fresh = positions.common & ~positions.seen & np.isfinite(off)  # penalties move what was seen
    ids, values = positions.ids[fresh], off[fresh] * positions.actual_trace.applied_temperature
    kinds, counts = np.unique(ids, return_counts=True)
    often = kinds[counts >= ENOUGH]
    moved: dict[int, float] = {}
    for token in often.tolist():
        own = values[ids == token]
        size = float(np.median(own))
        if abs(size) > _LEAST_BIAS and float(np.median(np.abs(own - size))) < _UNIFORM * abs(size):
            moved[token] = size
    others = values[~np.isin(ids, list(moved))]
    if not moved or len(moved) > max(_FEW * len(often), 1) or len(others) < ENOUGH:
        return {}
    rest = float(np.quantile(np.abs(others), 0.9))
    return moved if rest < _UNIFORM * min(map(abs, moved.values())) else {}


def _beside_others(positions: Positions, named: Bools) -> Doubles:
    """How far [n, m] each token is off the line of its position's other tokens, by their median; NaN where there are none."""
    slope = positions.expected_trace.applied_temperature / positions.actual_trace.applied_temperature
    off = positions.off_line(slope)
    others = np.where(positions.common & ~named, off, np.nan)
    rows = np.isfinite(others).any(axis=1)
    centre = np.full(len(off), np.nan)
    centre[rows] = np.nanmedian(others[rows], axis=1)
    away = off - centre[:, None]
    return np.asarray(np.where(np.abs(away) < FINEST, 0.0, away))


def _other_steps(sampling: Sampling) -> bool:
    """Whether processed logprobs differ from raw ones by more than a logit bias and excluded tokens."""
    bare = dataclasses.replace(sampling, logit_bias=(), bad_words=(), allowed_token_ids=())
    return not bare.raw_is_processed


# -- bad_words, allowed_token_ids -----------------------------------------------------------------------------------------


def _bans(positions: Positions) -> tuple[list[ProcessingStep], set[int]]:
    """The steps of excluded tokens that one side lacks, and the ids that are excluded on one side."""
    recorded, unrecorded = _recorded_bans(positions), _unrecorded_ban(positions)
    steps = [step for step, _ in recorded] + ([unrecorded[0]] if unrecorded else [])
    return steps, {t for _, ids in recorded for t in ids} | (unrecorded[1] if unrecorded else set())


def _recorded_bans(positions: Positions) -> list[tuple[ProcessingStep, set[int]]]:
    """The recorded bans of tokens that this run lists with a probability, and that the golden does not."""
    sampling = positions.expected_trace.sampling
    if positions.expected_trace.logprobs_mode != "processed_logprobs" or not (sampling.bad_words or sampling.allowed_token_ids):
        return []
    listed, before = _kept_ids(positions, "actual"), set(_kept_ids(positions, "expected").tolist())
    found = []
    for name, banned in (
        ("allowed_token_ids", set(listed.tolist()) - {*sampling.allowed_token_ids} if sampling.allowed_token_ids else set()),
        ("bad_words", _word_ids(positions, listed)),
    ):
        banned -= before
        count = int(np.count_nonzero(np.isin(listed, sorted(banned))))
        if count < 2:
            continue
        text = (
            f"{applied(name, positions.names, on_expected=True)}: {positions.names.actual} lists tokens that it excludes "
            f"({_texts(positions, banned)}), {count:,} times"
        )
        finding = Finding(layer="semantic", cause="banned_tokens", evidence=text, values={"listed": count})
        found.append((ProcessingStep(finding=finding, on_expected=True, recorded=True, name=name), banned))
    return found


def _unrecorded_ban(positions: Positions) -> tuple[ProcessingStep, set[int]] | None:
    """Tokens of the golden that this run excludes wherever they stand, although some were likely: no truncation does that."""
    chosen, said, other = positions.ids[:, 0], positions.expected[:, 0], positions.actual[:, 0]
    gone = np.isneginf(other) & np.isfinite(said)
    ids = {
        int(t)
        for t in np.unique(chosen[gone])
        if np.all(gone[chosen == t]) and np.count_nonzero(chosen == t) >= _TIMES and said[chosen == t].max() > _LIKELY
    }
    count = int(np.count_nonzero(np.isin(chosen, sorted(ids))))
    if not ids or count < 0.9 * np.count_nonzero(gone):
        return None
    name = f"a ban of {counted(len(ids), 'tokens')}"
    text = (
        f"{applied(name, positions.names, on_expected=False)}: {_texts(positions, ids)} is excluded at each of {count:,} "
        "positions, as bad_words, allowed_token_ids and a logit_bias of -inf do"
    )
    finding = Finding(layer="semantic", cause="banned_tokens", evidence=text, values={"banned": count})
    return ProcessingStep(finding=finding, on_expected=False, recorded=False, name=name), ids


def _kept_ids(positions: Positions, side: Side) -> Any:
    """The ids that one side lists with a probability, one for each time."""
    trace, rows, _ = positions.side(side)
    ids, top = trace.top_token_ids[rows], trace.top_logprobs[rows]
    return ids[(ids >= 0) & np.isfinite(top)]


def _word_ids(positions: Positions, listed: Any) -> set[int]:
    """The listed ids whose text is a bad word, with or without a space before it; words of several tokens are left out."""
    words = {word.strip() for word in positions.expected_trace.sampling.bad_words}
    texts = positions.expected_trace.token_texts
    return {int(t) for t in np.unique(listed) if (text := texts.get(int(t), "")) and text.removeprefix(" ") in words}


def _texts(positions: Positions, ids: Sequence[int] | set[int]) -> str:
    return ", ".join(_shown(positions, sorted(ids)))


def _shown(positions: Positions, ids: Sequence[int]) -> Iterator[str]:
    yield from (repr(positions.expected_trace.text(t)) for t in ids[:3])
    if len(ids) > 3:
        yield f"{len(ids) - 3} more"
