"""Retokenisation: turns whose text encodes to other token ids than the engine wrote, and what that does to their logprobs.

A rollout loop that decodes a turn, appends its text to the conversation and encodes that again trains on tokens that nobody
sampled, wherever the written tokens are not the canonical encoding of their text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..grammar import counted
from ..notes import Note
from ..trace import Segment, Trace, offsets_of

if TYPE_CHECKING:
    from ..engines.engine import Engine

#: Tokens of a difference that a sentence shows.
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RetokenisedTurn:
    """A turn whose text encodes to other ids: turn `turn` of sequence `sequence`, different from token `position` on.

    `written` and `encoded` are its token ids, as the engine wrote them and as its text encodes. `logprobs` are the sums (nats)
    of both, where an engine was asked; `after_rms` is the RMS difference (nats) of the tokens behind the last difference, which
    both have, NaN where there are none.
    """

    sequence: int
    turn: int
    position: int
    written: tuple[int, ...]
    encoded: tuple[int, ...]
    texts: tuple[str, str]
    logprobs: tuple[float, float] | None = None
    after_rms: float = float("nan")

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, turn {self.turn}, position {self.position}: {self.texts[0]} encodes to {self.texts[1]}"
        )

    @property
    def shift(self) -> float:
        """The logprob of the encoded turn minus that of the written one (nats); NaN where no engine was asked."""
        return float("nan") if self.logprobs is None else self.logprobs[1] - self.logprobs[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retokenisation:
    """How many of `turns` turns encode to other ids: those in `different`, in the order of the trace."""

    turns: int
    different: tuple[RetokenisedTurn, ...]

    @property
    def share(self) -> float:
        """The share (0 to 1) of turns that encode to other ids."""
        return len(self.different) / self.turns if self.turns else 0.0

    @property
    def first(self) -> RetokenisedTurn | None:
        """The first such turn; None where there is none."""
        return self.different[0] if self.different else None

    def __str__(self) -> str:
        if self.first is None:
            return f"all {counted(self.turns, 'turns')} encode to their own ids"
        text = (
            f"{len(self.different)} of {counted(self.turns, 'turns')} ({self.share:.1%}) encode to other ids than the engine "
            f"wrote, first {self.first}"
        )
        shifts = [turn.shift for turn in self.different if np.isfinite(turn.shift)]
        if not shifts:
            return text
        return f"{text}; the logprob of such a turn changes by {np.mean(np.abs(shifts)):.3g} nats on average"


def retokenisation(trace: Trace, tokenizer: Any, engine: Engine | None = None) -> Retokenisation:
    """The turns of `trace` whose text encodes to other token ids than were written; `tokenizer` is a transformers tokenizer.

    A turn is a run of unmasked tokens. It is decoded with its special tokens and encoded without adding any. With `engine`
    the written and the encoded tokens of each different turn are decoded teacher-forced, after what stood before the turn, at
    the trace's temperature and penalties without truncation.

    Raises UsageError without a tokenizer, EngineError where the engine fails.
    """
    if tokenizer is None:
        raise UsageError("retokenisation needs the model's tokenizer: the model's folder has none")
    segments = list(trace.segments())
    different = tuple(_different(trace, segments, tokenizer))
    if engine is not None and different:
        different = _with_logprobs(trace, segments, different, engine)
    return Retokenisation(turns=len(segments), different=different)


def retokenisation_notes(trace: Trace, tokenizer: Any) -> list[Note]:
    """A note that says how many turns encode to other ids; none where all encode to their own, and without a tokenizer."""
    if tokenizer is None:
        return []
    found = retokenisation(trace, tokenizer)
    return [Note("retokenised", f"retokenisation: {found}")] if found.different else []


def has_turns(trace: Trace) -> bool:
    """Whether a trace has rollouts of more than one turn."""
    return not trace.mask.all() or bool(trace.turn.any())


def _different(trace: Trace, segments: Sequence[Segment], tokenizer: Any) -> Iterator[RetokenisedTurn]:
    written = [trace.token_ids[s.start : s.stop].tolist() for s in segments]
    texts = [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in written]
    for segment, ids, text in zip(segments, written, texts, strict=True):
        encoded = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
        if encoded != ids:
            place = next((i for i, (a, b) in enumerate(zip(ids, encoded, strict=False)) if a != b), min(len(ids), len(encoded)))
            yield RetokenisedTurn(
                sequence=segment.sequence,
                turn=segment.turn,
                position=place,
                written=tuple(ids),
                encoded=tuple(encoded),
                texts=(_pieces(ids, place, tokenizer), _pieces(encoded, place, tokenizer)),
            )


def _pieces(ids: Sequence[int], place: int, tokenizer: Any) -> str:
    """The tokens from `place` on, in quotes: a few of them."""
    pieces = [repr(tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids[place : place + _SHOWN]]
    return " ".join([*pieces, *(["..."] if len(ids) > place + _SHOWN else [])]) or "nothing"


# -- what it does to the logprobs -----------------------------------------------------------------------------------------


def _with_logprobs(
    trace: Trace, segments: Sequence[Segment], different: Sequence[RetokenisedTurn], engine: Engine
) -> tuple[RetokenisedTurn, ...]:
    """The turns with the logprobs of both ways to write them."""
    starts = {(s.sequence, s.turn): s.start for s in segments}
    prompts = []
    for turn in different:
        begin, _ = trace.bounds(turn.sequence)
        prompts.append([*trace.prompt(turn.sequence), *trace.token_ids[begin : starts[turn.sequence, turn.turn]].tolist()])
    both = [ids for turn in different for ids in (turn.written, turn.encoded)]
    asked = Trace.from_arrays(
        prompt_token_ids=np.concatenate(prompts),
        prompt_offsets=offsets_of(prompts),
        token_ids=np.concatenate(both),
        sequence_offsets=offsets_of(both),
        logprobs=np.full(sum(map(len, both)), np.nan, np.float32),
        group=np.repeat(np.arange(len(different)), 2),
        sampling=dataclasses.replace(trace.sampling.untruncated(), min_tokens=0),
        engine=trace.engine,
        dtype=trace.dtype,
    )
    logprobs = engine.replay(asked).logprobs.astype(np.float64)
    result = []
    for index, turn in enumerate(different):
        one, other = (logprobs[slice(*asked.bounds(2 * index + which))] for which in (0, 1))
        tail = _common_tail(turn.written, turn.encoded)
        d = other[len(other) - tail :] - one[len(one) - tail :]
        after = float(np.sqrt(np.mean(d**2))) if tail else float("nan")
        result.append(dataclasses.replace(turn, logprobs=(float(one.sum()), float(other.sum())), after_rms=after))
    return tuple(result)


def _common_tail(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both end with."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
