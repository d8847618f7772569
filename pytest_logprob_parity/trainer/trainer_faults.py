"""What a trainer may have done otherwise, tried on a scorer that gives the right numbers: other context, labels, masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from ..comparison.findings import Cause, Layer
from ..comparison.result import Finding
from ..trace import Trace
from .scorer import Declared, Scorer
from .scoring import score

#: Sequences that are asked about first, and up to how many then; tokens of context that a packed row may have.
_FEW, _MORE, _LONGEST = 4, 12, 4096
#: A sequence, or what was asked about, is off by so many times the noise, and of so many tokens.
_FAR, _TOKENS = 5.0, 8
#: So many token ids of each kind of which one may have been taken for the padding's.
_COMMON: Final = 4
#: Positions of a sequence that are asked for another token.
_POSITIONS: Final = 12


def otherwise(rollouts: Trace, scored: Trace, column: Trace, scorer: Scorer, noise: float) -> Finding | None:
    """What explains `column`, the trainer's numbers, up to `noise` (RMS, nats): the scorer asked with that fault. None where
    nothing that is tried does.

    `scored` is what it gives without. The sequences that are furthest off are asked about, and then others that are off: a
    fault that explains a few of them and not the rest is none.
    """
    off = furthest_off(rollouts, scored, column, noise)
    for layer, causes, text, ask in _tried(rollouts, scorer, _hidden_words(rollouts, scored, column, noise)):
        left = [_left(ask(some), scored, column, noise) for some in (off[:_FEW], off[_FEW:_MORE]) if some]
        if left and max(left) <= noise:
            alone = causes[0] if len(causes) == 1 else None
            text = f"{text} (leaves RMS {left[0]:.2g} nats)"
            return Finding(layer, alone, text, () if alone else causes, values={"left": left[0]})
    return None


def furthest_off(rollouts: Trace, scored: Trace, column: Trace, noise: float) -> list[int]:
    """The sequences in which the column is off by more than `noise`, the furthest first; those with NaN count as furthest."""
    d = np.where(rollouts.mask, column.logprobs.astype(np.float64) - scored.logprobs, 0.0)
    owner = rollouts.sequence_of_token
    sizes = np.bincount(owner, np.square(np.nan_to_num(d, nan=1e3, posinf=1e3, neginf=-1e3)), rollouts.num_sequences)
    rms = np.sqrt(sizes / np.maximum(np.bincount(owner, rollouts.mask, rollouts.num_sequences), 1))
    return [int(s) for s in np.argsort(-rms, kind="stable") if rms[s] > _FAR * noise]


def _left(told: tuple[Any, Any], scored: Trace, column: Trace, noise: float) -> float:
    """RMS (nats) of what a fault leaves at the places [n] that it was asked about; infinite where it explains nothing there."""
    places, values = told
    given, clean = (trace.logprobs[places].astype(np.float64) for trace in (column, scored))
    if len(places) < _TOKENS or not np.isfinite(values).all() or not np.isfinite(given).all():
        return float(np.inf)
    if np.sqrt(np.mean(np.square(clean - given))) <= _FAR * noise:
        return float(np.inf)  # nothing is off there
    return float(np.sqrt(np.mean(np.square(values - given))))


#: What gives places [n] of a trace and the logprobs [n] there, for some sequences.
_Ask = Callable[[Sequence[int]], tuple[Any, Any]]
_Tried = tuple[Layer, tuple[Cause, ...], str, _Ask]


def _tried(rollouts: Trace, scorer: Scorer, words: Sequence[int]) -> Iterator[_Tried]:
    """Layer, cause and text of each fault, and what the scorer gives with it; `words` may have been taken for padding."""
    tokenizer, widest = Declared.by(scorer).tokenizer, int(np.diff(rollouts.prompt_offsets).max())

    def padded(by: int) -> Callable[[list[int]], list[int]]:
        return lambda prompt: [by] * (widest - len(prompt)) + prompt

    changes: list[tuple[Cause, str, Callable[[list[int]], list[int]]]] = [
        ("prompt", "it computed without the first token of the prompt", lambda p: p[1:] or p),
        ("prompt", "it computed with the first token of the prompt twice", lambda p: [p[0], *p]),
        ("prompt", "it computed without the last token of the prompt", lambda p: p[:-1] or p),
        ("prompt", "it computed with the first token of the prompt once more before the completion", lambda p: [*p, p[0]]),
    ]
    paddings = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    for padding in dict.fromkeys((*(int(i) for i in paddings if i is not None), 0)):
        text = f"it saw the padding (token {padding}) before shorter prompts"
        changes.append(("attention_mask", text, padded(padding)))
    for cause, text, change in changes:
        changed = {s: change(rollouts.prompt(s)) for s in range(rollouts.num_sequences)}
        yield "trainer", (cause,), text, functools.partial(_with_prompts, rollouts, scorer, changed.__getitem__)

    for token in words:
        text = f"it did not see token {token} ({rollouts.text(token)!r}), as if that were padding"
        inside = any(token in rollouts.completion(s)[:-1] for s in range(rollouts.num_sequences))
        hidden: tuple[Cause, ...] = ("attention_mask",) if inside else ("prompt", "attention_mask")
        for ask in (_hidden, _left_out):
            yield "trainer", hidden, text, functools.partial(ask, rollouts, scorer, token)

    text = "its rows saw those before them: packed without a border between them"
    yield "trainer", ("packing",), text, functools.partial(_packed, rollouts, scorer)
    for text, questions in (
        ("of the token after the one that is scored: labels were shifted twice", _after_next),
        ("of the first tokens of its row, which are the prompt's", _first_tokens),
    ):
        ask = functools.partial(_of_other_tokens, rollouts, scorer, questions)
        yield "semantic", ("wrong_token",), f"its numbers are {text}", ask


def _hidden_words(rollouts: Trace, scored: Trace, column: Trace, noise: float) -> list[int]:
    """Token ids that the trainer may not have seen: those after which sequences part most often, and the commonest."""
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
    """The places of all tokens of these sequences that are trained on."""
    places = np.concatenate([np.arange(*trace.bounds(s)) for s in sequences] or [np.empty(0, np.int64)])
    return places[trace.mask[places]]


def _with_prompts(
    trace: Trace, scorer: Scorer, change: Callable[[int], list[int]], sequences: Sequence[int]
) -> tuple[Any, Any]:  # fmt: skip
    """With other prompts, one for each sequence."""
    prompts = [change(s) if s in sequences else trace.prompt(s)[-1:] for s in range(trace.num_sequences)]
    other = trace.with_(
        prompt_token_ids=np.concatenate([np.asarray(p, trace.prompt_token_ids.dtype) for p in prompts]),
        prompt_offsets=np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64),
        group=np.arange(trace.num_sequences, dtype=trace.group.dtype),
    )
    places = _places(trace, sequences)
    return places, score(other, scorer, sequences=list(sequences)).logprobs[places]


def _packed(trace: Trace, scorer: Scorer, _: Sequence[int]) -> tuple[Any, Any]:
    """With all sequences before it as context; of the first few, for those after them have too many before."""
    few = [s for s in range(1, min(_FEW, trace.num_sequences)) if _length(trace, s) <= _LONGEST]
    return _with_prompts(trace, scorer, lambda s: _before(trace, s) + trace.prompt(s), few)


def _hidden(trace: Trace, scorer: Scorer, token: int, sequences: Sequence[int]) -> tuple[Any, Any]:
    """With a mask that hides one token id wherever it stands; not of that token, nor of what follows it."""

    def blind(ids: Any, mask: Any, temperature: float) -> Any:
        return scorer(ids, mask * (ids != token), temperature)

    places = _beside(trace, token, sequences)
    return places, score(trace, blind, sequences=list(sequences)).logprobs[places]


def _left_out(trace: Trace, scorer: Scorer, token: int, sequences: Sequence[int]) -> tuple[Any, Any]:
    """With one token id left out of all contexts, as where what is hidden has no position; not of that token, nor of what
    follows it.
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
    )  # fmt: skip
    values = np.full(trace.num_tokens, np.nan)
    values[keep] = score(shorter, scorer, sequences=list(sequences)).logprobs
    places = _beside(trace, token, sequences)
    return places, values[places]


def _first_of_group(trace: Trace) -> list[int]:
    """A sequence of each prompt."""
    return [int(np.argmax(trace.group == group)) for group in range(trace.num_prompts)]


def _beside(trace: Trace, token: int, sequences: Sequence[int]) -> Any:
    """The places of tokens that are not `token` and do not follow it."""
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
    """The logprobs of other tokens behind other contexts, in place of those of a sequence's first ones."""
    asked, places = list[tuple[list[int], int]](), list[int]()
    for s in sequences:
        of_this = questions(trace.prompt(s), trace.completion(s))
        asked += of_this
        places += range(trace.bounds(s)[0], trace.bounds(s)[0] + len(of_this))
    if not asked:
        return np.empty(0, np.int64), np.empty(0)
    return np.array(places), _answers(trace, scorer, asked)


def _answers(rollouts: Trace, scorer: Scorer, questions: Sequence[tuple[list[int], int]]) -> Any:
    """The scorer's logprobs of these tokens, each behind its context."""
    count = len(questions)
    asked = Trace.from_arrays(
        prompt_token_ids=np.concatenate([context for context, _ in questions]),
        prompt_offsets=np.concatenate([[0], np.cumsum([len(context) for context, _ in questions])]),
        token_ids=np.array([token for _, token in questions]),
        sequence_offsets=np.arange(count + 1), logprobs=np.full(count, -1.0), sampling=rollouts.sampling.untruncated(),
        dtype=rollouts.dtype,
    )  # fmt: skip
    return score(asked, scorer).logprobs


def _before(trace: Trace, sequence: int) -> list[int]:
    """All tokens of the sequences before this one, prompts and completions."""
    return [token for s in range(sequence) for token in (*trace.prompt(s), *trace.completion(s))]


def _length(trace: Trace, sequence: int) -> int:
    return sum(len(trace.prompt(s)) + len(trace.completion(s)) for s in range(sequence + 1))
