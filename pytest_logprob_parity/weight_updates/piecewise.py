"""Logprobs of sequences whose positions are computed by several models, each going on from the keys and values before."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..trace import FloatArray, Trace

#: How many logits one batch may have: 256 MB in float32.
_LOGITS: Final = 1 << 26
_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """A model that computes the positions of a sequence up to `stop`, from the end of the piece before."""

    model: Any
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The tokens `first` to `until` of a completion, and the pieces that give their logprobs."""

    sequence: int
    first: int
    until: int
    pieces: tuple[Piece, ...]

    @property
    def models(self) -> tuple[int, ...]:
        """Equal for stretches that one batch can have: of the same models, one or two."""
        return tuple(id(piece.model) for piece in self.pieces)


class Piecewise:
    """Computes logprobs of the tokens of a trace at one temperature; what one of `models` gives alone is computed once."""

    def __init__(self, trace: Trace, temperature: float, models: Sequence[Any]) -> None:
        self._trace, self._temperature, self._models = trace, temperature, models
        self._alone: dict[int, FloatArray] = {}

    def logprobs(self, stretches: Iterable[Stretch]) -> FloatArray:
        """Logprobs [N] in nats, float32: of the tokens in `stretches`, and 0 elsewhere."""
        found = np.zeros(self._trace.num_tokens, np.float32)
        left = []
        for stretch in stretches:
            model = stretch.pieces[0].model
            if len(stretch.pieces) == 1 and any(model is one for one in self._models):
                tokens = self._tokens(stretch)
                found[tokens] = self._of_one(model)[tokens]
            else:
                left.append(stretch)
        self._fill(found, left)
        return found

    def _of_one(self, model: Any) -> FloatArray:
        """Logprobs [N] of one model for all sequences."""
        if id(model) not in self._alone:
            lengths = [len(self._trace.completion(i)) for i in range(self._trace.num_sequences)]
            self._alone[id(model)] = found = np.zeros(self._trace.num_tokens, np.float32)
            ends = [len(self._trace.prompt(i)) + length - 1 for i, length in enumerate(lengths)]
            whole = (
                Stretch(sequence=i, first=0, until=length, pieces=(Piece(model, end),))
                for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
            )
            self._fill(found, [stretch for stretch in whole if stretch.until])
        return self._alone[id(model)]

    def _tokens(self, stretch: Stretch) -> slice:
        start, _ = self._trace.bounds(stretch.sequence)
        return slice(start + stretch.first, start + stretch.until)

    def _fill(self, found: FloatArray, stretches: list[Stretch]) -> None:
        import torch

        alike = sorted(stretches, key=lambda s: (s.models, s.pieces[-1].stop))
        with torch.no_grad():
            for _, group in itertools.groupby(alike, lambda s: s.models):
                for batch in self._batches(list(group)):
                    for stretch, logprobs in zip(batch, self._compute(batch), strict=True):
                        found[self._tokens(stretch)] = logprobs[stretch.first : stretch.until]

    def _batches(self, group: Sequence[Stretch]) -> Iterator[list[Stretch]]:
        """Batches of stretches that are sorted by length."""
        vocabulary = group[0].pieces[-1].model.config.get_text_config().vocab_size
        batch: list[Stretch] = []
        for stretch in group:
            rows = len(batch) + 1
            if batch and (rows > _ROWS or rows * stretch.pieces[-1].stop * vocabulary > _LOGITS):
                yield batch
                batch = []
            batch.append(stretch)
        yield batch

    def _compute(self, batch: Sequence[Stretch]) -> list[Any]:
        """Logprobs of the tokens of each sequence of a batch.

        Sequences are padded on the left, so that all change the model at the same column, and on the right.
        """
        import torch

        models = [piece.model for piece in batch[0].pieces]
        change = max(stretch.pieces[0].stop for stretch in batch)
        shifts = [change - stretch.pieces[0].stop if len(models) > 1 else 0 for stretch in batch]
        width = max(shift + stretch.pieces[-1].stop for shift, stretch in zip(shifts, batch, strict=True))
        ids, mask = torch.zeros((2, len(batch), width), dtype=torch.long)
        for row, (stretch, shift) in enumerate(zip(batch, shifts, strict=True)):
            tokens = [*self._trace.prompt(stretch.sequence), *self._trace.completion(stretch.sequence)]
            known = slice(shift, shift + stretch.pieces[-1].stop)
            ids[row, known], mask[row, known] = torch.tensor(tokens[: stretch.pieces[-1].stop]), 1
        places = (torch.arange(width) - torch.tensor(shifts)[:, None]).clamp(min=0)
        logits, cache, begin = [], None, 0
        for model, end in zip(models, [change, width] if len(models) > 1 else [width], strict=True):
            columns = slice(begin, end)
            out = model(
                ids[:, columns], attention_mask=mask[:, :end], position_ids=places[:, columns], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            logits.append(out.logits)
            cache, begin = out.past_key_values, end
        every = torch.cat(logits, 1)
        return [
            self._of_tokens(every[row, shift:], stretch.sequence)
            for row, (stretch, shift) in enumerate(zip(batch, shifts, strict=True))
        ]

    def _of_tokens(self, logits: Any, sequence: int) -> Any:
        """Logprobs of the tokens of a sequence, of the logits of its positions."""
        import torch

        prompt, tokens = len(self._trace.prompt(sequence)), self._trace.completion(sequence)
        logprobs = (logits[prompt - 1 : prompt - 1 + len(tokens)].float() / self._temperature).log_softmax(-1)
        return logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()
