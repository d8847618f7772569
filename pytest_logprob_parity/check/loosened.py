"""What a new golden would let pass, or leave out, that the one in its place does not: each in a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ..comparison.alignment import align
from ..engines.replay import can_regenerate
from ..golden import Golden
from ..grammar import counted, is_or_are
from ..trace import FloatArray, Trace
from .two_files import limits_of

#: How wide a value may be in a line.
_WIDE: Final = 60
#: A golden is a looser one where it compares, or has a reference for, less than this share of the tokens that it did; where
#: it masks so much more of them (0 to 1), or knows less than this share of what was known; and where its noise is so many times
#: as large, beyond the last digits (nats).
_FEW: Final = 0.8
_MORE_MASKED: Final = 0.1
_MOST: Final = 0.95
_NOISIER: Final = 2.0
_DIGITS: Final = 1e-5


def cut(value: Any) -> str:
    """A value in a line: both of its ends, without runs of blanks, behind which it could hide."""
    text = re.sub(r"\s{2,}", lambda blanks: f"\u27e8{len(blanks[0])} blanks\u27e9", repr(value))
    return text if len(text) <= _WIDE else f"{text[: _WIDE // 2]}...{text[-_WIDE // 2 :]}"


def loosened_by(golden: Golden, candidate: Golden) -> tuple[str, ...]:
    """What the candidate would let pass, or leave out, that the golden does not."""
    unseen = (
        () if align(golden.trace, candidate.trace).tokens else ("none of its own numbers could be compared with the golden's",)
    )
    return (
        *unseen, *_wider_limits(golden, candidate), *_less_compared(golden.trace, candidate.trace),
        *_less_known(golden, candidate),
    )  # fmt: skip


def _wider_limits(golden: Golden, candidate: Golden) -> Iterator[str]:
    """Limits in force: those that a test asked for may not be wider at all, those that noise makes not much."""
    then, now = (limits_of(side, side).limits() for side in (golden, candidate))
    asked = {*golden.tolerance, *candidate.tolerance}
    for name in then:
        if name in golden.tolerance and name not in candidate.tolerance:
            yield f"limit {name}: what noise explains is allowed beside it; the golden asks for {then[name]:g} as it is"
        elif not now[name] <= then[name] * (1.001 if name in asked else _NOISIER) and (name in asked or name != "near_tie"):
            yield f"limit {name}: {now[name]:g} in place of {then[name]:g}"


def _less_compared(golden: Trace, candidate: Trace) -> Iterator[str]:
    then, now = int(golden.mask.sum()), int(candidate.mask.sum())
    masked, masked_then = len(candidate.mask) - now, len(golden.mask) - then
    newly = sum(_newly_masked(golden, candidate, sequence) for sequence in range(golden.num_sequences))
    if now < _FEW * then:
        yield f"compares {counted(now, 'tokens')} in place of {then:,} ({masked:,} {is_or_are(masked)} masked)"
    elif newly or masked / len(candidate.mask) > masked_then / len(golden.mask) + _MORE_MASKED or (masked and not masked_then):
        yield f"masks {masked:,} of its {len(candidate.mask):,} tokens; the golden {masked_then:,} of {len(golden.mask):,}"
    known, known_then = _known(candidate), _known(golden)
    for name, share in known_then.items():
        if known[name] < _MOST * share:
            yield f"{name}: known of {known[name]:.1%} of them, in the golden of {share:.1%}"
    if candidate.top_k < golden.top_k:
        yield f"top-{candidate.top_k} in place of top-{golden.top_k}: causes are read off it"
    if can_regenerate(golden) and not can_regenerate(candidate):
        yield "it does not know its seeds: free generation would no longer be checked"
    for name in ("dtype", "path", "logprobs_mode"):
        if getattr(golden, name) != getattr(candidate, name):
            yield f"{name} {cut(getattr(candidate, name))} in place of {cut(getattr(golden, name))}: limits go by it"


def _newly_masked(golden: Trace, candidate: Trace, sequence: int) -> int:
    """How many tokens of a sequence that is the same on both sides are masked now."""
    (start, stop), (other, end) = golden.bounds(sequence), candidate.bounds(sequence)
    if not np.array_equal(golden.token_ids[start:stop], candidate.token_ids[other:end]):
        return 0
    return int(np.count_nonzero(golden.mask[start:stop] & ~candidate.mask[other:end]))


def _known(trace: Trace) -> dict[str, float]:
    """Of which share (0 to 1) of its tokens, or sequences, a trace knows what is not always known."""
    untruncated = trace.untruncated_logprobs
    return {
        "reasons to end": float(np.mean(trace.finish_reasons != 0)),
        "ranks": float(np.mean(trace.ranks[trace.mask] > 0)) if trace.mask.any() else 0.0,
        "top-k": float(np.mean(trace.top_token_ids[:, 0] >= 0)) if trace.top_k else 0.0,
        "experts": 0.0 if trace.routed_experts is None else 1.0,
        "logprobs without truncation": 0.0 if untruncated is None else float(np.mean(~np.isnan(untruncated[trace.mask]))),
    }


def _less_known(golden: Golden, candidate: Golden) -> Iterator[str]:
    """Noise floor and reference: less of them, or a larger error that they would excuse."""
    floor, new = golden.floor, candidate.floor
    if floor is not None and new is None:
        yield "it has no noise floor, and the golden has one"
    if floor is not None and new is not None:
        if new.rms > _NOISIER * floor.rms + _DIGITS:
            yield f"its noise floor has an RMS of {new.rms:.2g} nats, the golden's of {floor.rms:.2g}"
        if floor.reproduces and not new.reproduces:
            yield "a replay in its own batches is not bit-identical, and for the golden it was"
    if candidate.routed and not golden.routed:
        yield "its model routes tokens to experts, and the golden's does not: limits go by it"
    now, then = (_reference_errors(side) for side in (candidate, golden))
    if golden.reference is None:
        if candidate.reference is not None:
            yield f"it has a reference, whose errors are excused (RMS {_rms(now):.2g} nats), and the golden has none"
    elif len(now) < _FEW * len(then):
        yield f"it has a reference for {counted(len(now), 'tokens')}, the golden for {len(then):,}"
    elif len(then) and _rms(now) > _NOISIER * _rms(then) + _DIGITS:
        yield f"its distance to its reference has an RMS of {_rms(now):.2g} nats, the golden's of {_rms(then):.2g}"


def _reference_errors(golden: Golden) -> FloatArray:
    """The distances (nats) to the reference, of the tokens that it has; none where there is no reference."""
    if golden.reference is None:
        return np.empty(0, np.float32)
    errors: FloatArray = np.abs(golden.reference.errors(golden.trace.logprobs))
    known: FloatArray = errors[np.isfinite(errors)]
    return known


def _rms(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if len(values) else 0.0
