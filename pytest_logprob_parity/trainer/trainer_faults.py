"""Faults of a trainer, made on purpose with a scorer that is right: another context, other labels, another mask.

The fault that gives the trainer's own numbers is the one that the trainer has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from ..comparison.findings import Cause, Layer
from ..comparison.result import Finding
from ..trace import Trace
from .scorer import Declared, Scorer
from .scoring import score

#: Sequences that are scored first, up to how many are scored then, and tokens of context that a packed row may have.
_FEW, _MORE, _LONGEST = 4, 12, 4096
#: Numbers differ where their RMS is more than this many times the noise. A fault needs this many tokens to be judged.
_FAR, _TOKENS = 5.0, 8
#: How many frequent token ids of each kind may have been taken for padding.
_COMMON: Final = 4
#: Positions of a sequence at which another token is scored.
_POSITIONS: Final = 12

#: Scores some sequences with a fault: places [n] in the trace, and the logprobs [n] there.
_Score = Callable[[Sequence[int]], tuple[Any, Any]]


class _Fault(NamedTuple):
    """A fault: its layer, the causes that it may be, a key, a sentence about the trainer, and how to score with it."""

    layer: Layer
    causes: tuple[Cause, ...]
    key: str
    text: str
    score: _Score
    values: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default; never changed


def explaining_fault(
    rollouts: Trace, scored: Trace, column: Trace, scorer: Scorer, noise: float, *, whose: str
) -> Finding | None:  # fmt: skip
    """The fault with which the scorer gives the numbers of `column`, up to `noise` (RMS, nats); None where no fault does.

    `scored` has the scorer's numbers without a fault. The sequences that differ most are scored first, then others that
    differ: a fault that explains only the first ones is not the cause. `whose` column it is, for the sentence. `values` of the
    finding have the key of the fault.
    """
    off = furthest_off(rollouts, scored, column, noise)
    for fault in _faults(rollouts, scorer, _hidden_words(rollouts, scored, column, noise), whose):
        remains = [_remaining_rms(fault.score(some), scored, column, noise) for some in (off[:_FEW], off[_FEW:_MORE]) if some]
        if remains and max(remains) <= noise:
            alone = fault.causes[0] if len(fault.causes) == 1 else None
            text = f"{fault.text} (with this fault the scorer differs from it by RMS {remains[0]:.2g} nats)"
            values = {"fault": fault.key, **fault.values, "left": remains[0]}
            return Finding(
                layer=fault.layer, cause=alone, evidence=text, candidates=() if alone else fault.causes, values=values
            )
    return None


def furthest_off(rollouts: Trace, scored: Trace, column: Trace, noise: float) -> list[int]:
    """The sequences whose RMS difference is beyond `noise`, the largest first. Those with NaN count as the largest."""
    d = np.where(rollouts.mask, column.logprobs.astype(np.float64) - scored.logprobs, 0.0)
    squares = np.square(np.nan_to_num(d, nan=1e3, posinf=1e3, neginf=-1e3))
    sums = np.bincount(rollouts.sequence_of_token, squares, rollouts.num_sequences)
    counts = np.bincount(rollouts.sequence_of_token, rollouts.mask, rollouts.num_sequences)
    rms = np.sqrt(sums / np.maximum(counts, 1))
    return [int(s) for s in np.argsort(-rms, kind="stable") if rms[s] > _FAR * noise]


def _remaining_rms(with_fault: tuple[Any, Any], scored: Trace, column: Trace, noise: float) -> float:
    """RMS difference (nats) between the column and what the scorer gives with a fault, at the places [n] that were scored;
    infinite where this explains nothing.
    """
    places, expected = with_fault
    actual, without_fault = (trace.logprobs[places].astype(np.float64) for trace in (column, scored))
    if len(places) < _TOKENS or not np.isfinite(expected).all() or not np.isfinite(actual).all():
        return float(np.inf)
    if np.sqrt(np.mean(np.square(actual - without_fault))) <= _FAR * noise:
        return float(np.inf)  # nothing differs there
    return float(np.sqrt(np.mean(np.square(actual - expected))))


def _faults(rollouts: Trace, scorer: Scorer, words: Sequence[int], whose: str) -> Iterator[_Fault]:
    """All faults that are tried. `words` are the token ids that may have been taken for padding."""
    if rollouts.kept_counts is not None and rollouts.untruncated_logprobs is None:
        text = f"{whose} computes over all tokens, not over those that truncation kept"
        scores = functools.partial(_over_all_tokens, rollouts, scorer)
        yield _Fault("semantic", ("truncation",), "over_all_tokens", text, scores)
    for cause, key, text, change in _other_prompts(rollouts, scorer, whose):
        changed = {s: change(rollouts.prompt(s)) for s in range(rollouts.num_sequences)}
        yield _Fault("trainer", (cause,), key, text, functools.partial(_with_prompts, rollouts, scorer, changed.__getitem__))
    for token in words:
        text = f"{whose} does not see token {token} ({rollouts.text(token)!r}), as if it were padding"
        inside = any(token in rollouts.completion(s)[:-1] for s in range(rollouts.num_sequences))
        causes: tuple[Cause, ...] = ("attention_mask",) if inside else ("prompt", "attention_mask")
        for with_fault in (_hidden, _left_out):
            scores = functools.partial(with_fault, rollouts, scorer, token)
            yield _Fault("trainer", causes, "hidden_token", text, scores, {"token": token})
    text = f"each row of {whose} sees the rows before it: they are packed without a border between them"
    yield _Fault("trainer", ("packing",), "packed_rows", text, functools.partial(_packed, rollouts, scorer))
    for key, text, questions in (
        ("next_token", "belong to the token after their own: the labels are shifted twice", _after_next),
        ("first_tokens", "belong to the first tokens of the row, which are the prompt's", _first_tokens),
    ):
        scores = functools.partial(_of_other_tokens, rollouts, scorer, questions)
        yield _Fault("semantic", ("wrong_token",), key, f"{whose}'s numbers {text}", scores)


def _other_prompts(
    rollouts: Trace, scorer: Scorer, whose: str
) -> Iterator[tuple[Cause, str, str, Callable[[list[int]], list[int]]]]:  # fmt: skip
    """Faults that are another prompt: cause, key, text, and what they make of a prompt."""
    yield "prompt", "first_missing", f"{whose} computes without the first token of the prompt", lambda p: p[1:] or p
    yield "prompt", "first_twice", f"{whose} computes with the first token of the prompt twice", lambda p: [p[0], *p]
    yield "prompt", "last_missing", f"{whose} computes without the last token of the prompt", lambda p: p[:-1] or p
    text = f"{whose} computes with the first token of the prompt once more before the completion"
    yield "prompt", "first_again", text, lambda p: [*p, p[0]]
    tokenizer, widest = Declared.by(scorer).tokenizer, int(np.diff(rollouts.prompt_offsets).max())
    ids = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    for padding in dict.fromkeys((*(int(i) for i in ids if i is not None), 0)):
        text = f"{whose} sees the padding (token {padding}) before shorter prompts"
        yield "attention_mask", "seen_padding", text, functools.partial(_padded, padding, widest)


def _padded(padding: int, width: int, prompt: list[int]) -> list[int]:
    return [padding] * (width - len(prompt)) + prompt


def _hidden_words(rollouts: Trace, scored: Trace, column: Trace, noise: float) -> list[int]:
    """Token ids that the trainer may not see: those after which most sequences begin to differ, and the most frequent."""
    before, parted = np.roll(rollouts.token_ids, 1), list[int]()
    far = np.abs(column.logprobs.astype(np.float64) - scored.logprobs) > _FAR * noise
    for s in range(rollouts.num_sequences):
        start, stop = rollouts.bounds(s)
        if (off := np.flatnonzero(far[start:stop])).size and off[0]:
            parted.append(int(before[start + off[0]]))
    return list(dict.fromkeys([*_commonest(np.array(parted, np.int64)), *_commonest(rollouts.token_ids)]))


def _commonest(token_ids: Any) -> list[int]:
    ids, counts = np.unique(token_ids, return_counts=True)
    commonest: list[int] = ids[np.argsort(-counts, kind="stable")][:_COMMON].tolist()
    return commonest


def _places(trace: Trace, sequences: Sequence[int]) -> Any:
    """The places of the unmasked tokens of these sequences."""
    places = np.concatenate([np.arange(*trace.bounds(s)) for s in sequences] or [np.empty(0, np.int64)])
    return places[trace.mask[places]]


def _with_prompts(
    trace: Trace, scorer: Scorer, change: Callable[[int], list[int]], sequences: Sequence[int]
) -> tuple[Any, Any]:  # fmt: skip
    """Scores with another prompt for each sequence."""
    prompts = [change(s) if s in sequences else trace.prompt(s)[-1:] for s in range(trace.num_sequences)]
    other = trace.with_(
        prompt_token_ids=np.concatenate([np.asarray(p, trace.prompt_token_ids.dtype) for p in prompts]),
        prompt_offsets=np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64),
        group=np.arange(trace.num_sequences, dtype=trace.group.dtype),
    )
    places = _places(trace, sequences)
    return places, score(other, scorer, sequences=list(sequences)).logprobs[places]


def _over_all_tokens(trace: Trace, scorer: Scorer, sequences: Sequence[int]) -> tuple[Any, Any]:
    """Scores without the kept sets."""
    untruncated = trace.with_(kept_counts=None, kept_token_ids=None, sampling=trace.sampling.untruncated())
    places = _places(trace, sequences)
    return places, score(untruncated, scorer, sequences=list(sequences)).logprobs[places]


def _packed(trace: Trace, scorer: Scorer, _: Sequence[int]) -> tuple[Any, Any]:
    """Scores with all sequences before it as context. Only the first few: later ones have too many before them."""
    few = [s for s in range(1, min(_FEW, trace.num_sequences)) if _length(trace, s) <= _LONGEST]
    return _with_prompts(trace, scorer, lambda s: _before(trace, s) + trace.prompt(s), few)


def _hidden(trace: Trace, scorer: Scorer, token: int, sequences: Sequence[int]) -> tuple[Any, Any]:
    """Scores with a mask that hides a token id everywhere, except this token itself and the tokens that follow it."""

    def blind(ids: Any, mask: Any, temperature: float, **more: Any) -> Any:
        return scorer(ids, mask * (ids != token), temperature, **more)

    vars(blind)["renormalises"] = Declared.by(scorer).renormalises
    places = _beside(trace, token, sequences)
    return places, score(trace, blind, sequences=list(sequences)).logprobs[places]


def _left_out(trace: Trace, scorer: Scorer, token: int, sequences: Sequence[int]) -> tuple[Any, Any]:
    """Scores with a token id removed from all contexts, as where a hidden token has no position; except this token itself
    and the tokens that follow it.
    """
    keep = trace.token_ids != token
    if not (keep & trace.mask & np.isfinite(trace.logprobs)).any():
        return np.empty(0, np.int64), np.empty(0)
    owner = trace.sequence_of_token
    prompts = [[i for i in trace.prompt(s) if i != token] for s in _first_of_group(trace)]
    sequences = [s for s in sequences if prompts[trace.group[s]]]  # those of another prompt than of that token alone
    shorter = Trace.from_arrays(
        prompt_token_ids=np.concatenate([np.asarray(p or [token], np.int32) for p in prompts]),
        prompt_offsets=np.concatenate([[0], np.cumsum([len(p or [token]) for p in prompts])]),
        token_ids=trace.token_ids[keep],
        sequence_offsets=np.concatenate([[0], np.cumsum(np.bincount(owner[keep], minlength=trace.num_sequences))]),
        logprobs=trace.logprobs[keep], mask=trace.mask[keep], group=trace.group, sampling=trace.sampling, dtype=trace.dtype,
        top_token_ids=trace.top_token_ids[keep], top_logprobs=trace.top_logprobs[keep], **_kept_columns(trace, keep),
    )  # fmt: skip
    values = np.full(trace.num_tokens, np.nan)
    values[keep] = score(shorter, scorer, sequences=list(sequences)).logprobs
    places = _beside(trace, token, sequences)
    return places, values[places]


def _kept_columns(trace: Trace, keep: Any) -> dict[str, Any]:
    """What truncation left of the tokens that `keep` [N] selects, as columns of a trace; None each where the trace has none."""
    free, counts, ids = trace.untruncated_logprobs, trace.kept_counts, trace.kept_token_ids
    return {
        "untruncated_logprobs": None if free is None else free[keep],
        "kept_counts": None if counts is None else counts[keep],
        "kept_token_ids": None if ids is None else ids[keep[trace.kept_rows]],
    }


def _first_of_group(trace: Trace) -> list[int]:
    """One sequence of each prompt."""
    return [int(np.argmax(trace.group == group)) for group in range(trace.num_prompts)]


def _beside(trace: Trace, token: int, sequences: Sequence[int]) -> Any:
    """The places of tokens that are neither `token` nor follow it."""
    before, places = np.roll(trace.token_ids, 1), _places(trace, sequences)
    for start, stop, s in ((*trace.bounds(s), s) for s in sequences):
        before[start : min(start + 1, stop)] = trace.prompt(s)[-1]
    return places[(trace.token_ids[places] != token) & (before[places] != token)]


def _after_next(prompt: list[int], written: list[int]) -> list[tuple[list[int], int]]:
    return [([*prompt, *written[:t]], written[t + 1]) for t in range(min(len(written) - 1, _POSITIONS))]


def _first_tokens(prompt: list[int], written: list[int]) -> list[tuple[list[int], int]]:
    return [(prompt[: 1 + t], prompt[1 + t]) for t in range(min(len(written), len(prompt) - 1, _POSITIONS))]


def _of_other_tokens(
    trace: Trace,
    scorer: Scorer,
    questions: Callable[[list[int], list[int]], list[tuple[list[int], int]]],
    sequences: Sequence[int],
) -> tuple[Any, Any]:
    """Scores other tokens after other contexts, in place of the first tokens of a sequence."""
    chosen, places = list[tuple[list[int], int]](), list[int]()
    for s in sequences:
        of_this = questions(trace.prompt(s), trace.completion(s))
        chosen += of_this
        places += range(trace.bounds(s)[0], trace.bounds(s)[0] + len(of_this))
    if not chosen:
        return np.empty(0, np.int64), np.empty(0)
    return np.array(places), _logprobs_of(trace, scorer, chosen)


def _logprobs_of(rollouts: Trace, scorer: Scorer, questions: Sequence[tuple[list[int], int]]) -> Any:
    """The scorer's logprobs of these tokens, each after its context."""
    count = len(questions)
    trace = Trace.from_arrays(
        prompt_token_ids=np.concatenate([context for context, _ in questions]),
        prompt_offsets=np.concatenate([[0], np.cumsum([len(context) for context, _ in questions])]),
        token_ids=np.array([token for _, token in questions]),
        sequence_offsets=np.arange(count + 1), logprobs=np.full(count, -1.0), sampling=rollouts.sampling.untruncated(),
        dtype=rollouts.dtype,
    )  # fmt: skip
    return score(trace, scorer).logprobs


def _before(trace: Trace, sequence: int) -> list[int]:
    """All tokens of the sequences before this one, prompts and completions."""
    return [token for s in range(sequence) for token in (*trace.prompt(s), *trace.completion(s))]


def _length(trace: Trace, sequence: int) -> int:
    return sum(len(trace.prompt(s)) + len(trace.completion(s)) for s in range(sequence + 1))
