"""What a trainer may have done otherwise, tried on a scorer that gives the right numbers: other context, labels, masks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from ..comparison.result import Cause, Finding, Layer
from ..trace import Trace
from .scoring import score

#: Sequences that are asked about, and tokens of context that a packed row may have.
_FEW, _LONGEST = 4, 4096
#: Token ids of which one may have been taken for the padding's: the commonest.
_COMMON: Final = 4
#: Positions of a sequence that are asked for another token.
_POSITIONS: Final = 12


def otherwise(rollouts: Trace, column: Trace, scorer: Any, noise: float) -> Finding | None:
    """What explains `column`, the trainer's numbers, up to `noise` (RMS, nats): the scorer asked with that fault. None where
    nothing that is tried does.
    """
    few = np.linspace(0, rollouts.num_sequences - 1, min(_FEW, rollouts.num_sequences)).astype(int).tolist()
    for layer, cause, text, places, ask in _tried(rollouts, column, scorer, few):
        given = column.logprobs[places].astype(np.float64)
        told = ask()
        known = np.isfinite(told) & np.isfinite(given)
        if np.count_nonzero(known) < 4:
            continue
        left = float(np.sqrt(np.mean(np.square(told - given)[known])))
        if left <= noise:
            return Finding(layer, cause, f"{text} (leaves RMS {left:.2g} nats)", values={"left": left})
    return None


_Tried = tuple[Layer, Cause, str, Any, Callable[[], Any]]


def _tried(rollouts: Trace, column: Trace, scorer: Any, few: Sequence[int]) -> Iterator[_Tried]:
    """Layer, cause and text of each fault, the places [n] of its tokens, and what gives their logprobs [n] with it."""
    places = _places(rollouts, few)

    def with_prompts(change: Callable[[list[int]], list[int]]) -> Callable[[], Any]:
        prompts = [change(rollouts.prompt(s)) or rollouts.prompt(s) for s in range(rollouts.num_sequences)]
        return lambda: score(_with_prompts(rollouts, prompts), scorer, sequences=list(few)).logprobs[places]

    changes: tuple[tuple[str, Callable[[list[int]], list[int]]], ...] = (
        ("without the first token of the prompt", lambda p: p[1:]),
        ("with the first token of the prompt twice", lambda p: [p[0], *p]),
        ("without the last token of the prompt", lambda p: p[:-1]),
        ("with the first token of the prompt once more before the completion", lambda p: [*p, p[0]]),
    )
    for text, change in changes:
        yield "trainer", "prompt", f"it computed {text}", places, with_prompts(change)

    tokenizer, widest = getattr(scorer, "tokenizer", None), int(np.diff(rollouts.prompt_offsets).max())
    paddings = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    for padding in dict.fromkeys((*(int(i) for i in paddings if i is not None), 0)):
        text = f"it saw the padding (token {padding}) before shorter prompts"
        padded = with_prompts(lambda p, i=padding: [i] * (widest - len(p)) + p)  # type: ignore[misc]
        yield "trainer", "attention_mask", text, places, padded

    ids, counts = np.unique(rollouts.token_ids, return_counts=True)
    for token in ids[np.argsort(-counts)][:_COMMON].tolist():
        text = f"it did not see token {token} ({rollouts.text(token)!r}), as if that were padding"
        yield "trainer", "attention_mask", text, places, _without(rollouts, scorer, token, few, places)

    packed = [s for s in range(1, min(_FEW, rollouts.num_sequences)) if _length(rollouts, s) <= _LONGEST]
    if packed:
        text = f"its row of sequence {packed[-1]} saw the {packed[-1]} before it: packed without a border between them"
        prompts = [_before(rollouts, s) * (s in packed) + rollouts.prompt(s) for s in range(rollouts.num_sequences)]
        of_packed = _places(rollouts, packed)
        yield "trainer", "packing", text, of_packed, lambda: score(
            _with_prompts(rollouts, prompts), scorer, sequences=packed
        ).logprobs[of_packed]  # fmt: skip
    yield from _of_other_tokens(rollouts, scorer, few)


def _places(trace: Trace, sequences: Sequence[int]) -> Any:
    """The places of all tokens of these sequences."""
    return np.concatenate([np.arange(*trace.bounds(s)) for s in sequences])


def _of_other_tokens(rollouts: Trace, scorer: Any, few: Sequence[int]) -> Iterator[_Tried]:
    """Numbers of other tokens: the one after the next, at each position; or those of the row's first tokens."""
    next_but_one, firsts = list[tuple[list[int], int]](), list[tuple[list[int], int]]()
    of_next, of_firsts = list[int](), list[int]()
    for s in few:
        (start, _), prompt, written = rollouts.bounds(s), rollouts.prompt(s), rollouts.completion(s)
        count = min(len(written) - 1, _POSITIONS)
        next_but_one += [([*prompt, *written[:t]], written[t + 1]) for t in range(count)]
        of_next += range(start, start + count)
        count = min(len(written), len(prompt) - 1, _POSITIONS)
        firsts += [(prompt[: 1 + t], prompt[1 + t]) for t in range(count)]
        of_firsts += range(start, start + count)
    for questions, places, text in (
        (next_but_one, of_next, "of the token after the one that is scored: labels were shifted twice"),
        (firsts, of_firsts, "of the first tokens of its row, which are the prompt's"),
    ):
        if questions:
            ask = functools.partial(_answers, rollouts, scorer, questions)
            yield "semantic", "wrong_token", f"its numbers are {text}", np.array(places), ask


def _answers(rollouts: Trace, scorer: Any, questions: Sequence[tuple[list[int], int]]) -> Any:
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


def _with_prompts(trace: Trace, prompts: Sequence[Sequence[int]]) -> Trace:
    """The trace with a prompt of its own for each sequence."""
    return trace.with_(
        prompt_token_ids=np.concatenate([np.asarray(p, trace.prompt_token_ids.dtype) for p in prompts]),
        prompt_offsets=np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64),
        group=np.arange(trace.num_sequences, dtype=trace.group.dtype),
    )


def _before(trace: Trace, sequence: int) -> list[int]:
    """All tokens of the sequences before this one, prompts and completions."""
    return [token for s in range(sequence) for token in (*trace.prompt(s), *trace.completion(s))]


def _length(trace: Trace, sequence: int) -> int:
    return sum(len(trace.prompt(s)) + len(trace.completion(s)) for s in range(sequence + 1))


def _without(trace: Trace, scorer: Any, token: int, few: Sequence[int], places: Any) -> Callable[[], Any]:
    """The scorer's logprobs with a mask that hides one token id wherever it stands."""

    def blind(ids: Any, mask: Any, temperature: float) -> Any:
        return scorer(ids, mask * (ids != token), temperature)

    return lambda: score(trace, blind, sequences=list(few)).logprobs[places]
