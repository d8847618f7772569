"""The reference of a weight update: transformers computes each outcome, and which outcome explains a trace is decided here."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..checkpoint.adapter import is_adapter
from ..comparison.findings import WeightsCause
from ..comparison.intervals import t_quantile
from ..errors import UsageError
from ..trace import FloatArray, Trace
from ..trainer.limits import trainer_tolerance
from .outcomes import CLEARED, KEPT, NEVER, PLAIN, Evaluation, Outcome, Part

#: One outcome explains a trace better than another where its RMS is less than this share of the other's, and its squares are
#: smaller, sequence by sequence, with this confidence. An RMS of less than half is enough by itself: noise cannot cause that.
BETTER: Final = 0.8
_SURE: Final = 0.999
_FAR_BETTER: Final = 0.5
#: An outcome explains a trace where it leaves less than this share of the RMS that two implementations may differ by.
FITS: Final = 1 / 3
#: How many stale parts are found together.
_PARTS: Final = 4
#: An update is looked for up to this many tokens from the token that the trace says.
_WITHIN: Final = 4
#: The name of a tensor with the number of its layer.
_LAYER: Final = re.compile(r"^.*?layers\.(\d+)\.")
#: Sizes of the blocks in which engines keep keys and values of a prompt.
_BLOCKS: Final = (128, 64, 32, 16)


#: How many logits are computed together, at least those of one sequence.
_MOST_LOGITS: Final = 1 << 27
#: Tensors of a layer that are loaded into one parameter, one after the other, and so may be swapped.
_TWINS: Final = (("gate_proj", "up_proj"), ("k_proj", "v_proj"))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A model that computes the positions of a sequence up to `stop`, from the end of the piece before."""

    model: Any
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Tokens `first` to `end` of a sequence are computed by these pieces, one or two, none of them empty."""

    sequence: int
    first: int
    end: int
    pieces: list[_Piece]

    @property
    def models(self) -> tuple[Any, ...]:
        return tuple(piece.model for piece in self.pieces)


class UpdateReference:
    """Logprobs [N] of the tokens of a trace under each outcome of an update from one checkpoint to another."""

    def __init__(self, before: Path, after: Path, trace: Trace, model: Path | None = None) -> None:
        if trace.weight_versions is None:
            raise UsageError(
                "this trace does not say which weights wrote its tokens: it is not from engine.update_weights(...); give "
                "weight_versions"
            )
        raw = trace.logprobs_mode == "raw_logprobs" and not trace.sampling.raw_is_processed
        if trace.sampling.truncates or trace.sampling.edits_logits or raw:
            raise UsageError(
                f"a weight update is checked on processed logprobs without truncation and penalties, not {trace.distribution()}"
            )
        #: The cause where weights did not arrive.
        self.stale: WeightsCause = "adapter" if is_adapter(after) else "stale_weights"
        self._old, self._new = _load(before, model), _load(after, model)
        self._trace = trace
        self._temperature = trace.sampling.applied_temperature
        self._known: dict[Outcome, FloatArray] = {}
        newest = max(int(trace.weight_versions.max(initial=0)), 1)  # an engine starts with version 0
        if trace.newest_version is not None and len(np.unique(trace.weight_versions)) == 1:
            newest = trace.newest_version
        #: How many tokens of each sequence the old weights wrote.
        self._written = [int(np.count_nonzero(trace.weight_versions[a:b] < newest)) for a, b in map(trace.bounds, self._all())]

    @property
    def updated(self) -> bool:
        """Whether the new weights wrote any token."""
        return any(k < len(self._trace.completion(i)) for i, k in enumerate(self._written))

    def evaluate(self, asked: Outcome) -> Evaluation:
        """Compare the trace with all outcomes; with the expensive ones only where no other explains it."""
        rms = {outcome: self._rms(outcome) for outcome in PLAIN}
        rivals = [outcome for outcome in rms if outcome != asked and self._beats(outcome, asked)]
        if rivals or rms[asked] > suspicious(self._trace.dtype):
            for outcome in self._others(asked):
                rms[outcome] = self._rms(outcome)
            rms |= self._several_parts(rms)
        best = asked
        for outcomes in (PLAIN, tuple(rms)):  # a more complex outcome has to explain more
            nearest = min((outcome for outcome in outcomes if outcome != best), key=lambda outcome: rms[outcome])
            best = nearest if self._beats(nearest, best) else best
        other = KEPT if asked == CLEARED else CLEARED
        return Evaluation(
            rms=rms,
            asked=asked,
            best=best,
            shows_arrival=self._beats(asked, NEVER) or best == NEVER,
            shows_cache=self._beats(asked, other) or self._beats(other, asked),
        )

    def logprobs(self, outcome: Outcome) -> FloatArray:
        """Logprobs [N] under one outcome."""
        if outcome not in self._known:
            new = self._mixed(outcome.stale_parts, outcome.swapped) if outcome.stale_parts or outcome.swapped else self._new
            self._known[outcome] = self._over(lambda sequence: self._pieces(sequence, outcome, new))
        return self._known[outcome]

    def _all(self) -> range:
        return range(self._trace.num_sequences)

    def _others(self, asked: Outcome) -> Iterator[Outcome]:
        if any(0 < k < len(self._trace.completion(i)) for i, k in enumerate(self._written)):
            yield from (dataclasses.replace(asked, later=by) for by in range(-_WITHIN, _WITHIN + 1) if by)
        yield from (Outcome(stale_parts=(part,)) for part in (*self._parts(), *self._kinds()))
        shapes = {name: tensor.shape for name, tensor in self._new.state_dict().items()}
        for one, other in _TWINS:
            pairs = [(shapes[n], shapes.get(n.replace(f".{one}.", f".{other}."))) for n in shapes if f".{one}." in n]
            if pairs and all(mine == its for mine, its in pairs):
                yield Outcome(swapped=(one, other))
        yield from (Outcome(prompt_block=size) for size in _BLOCKS)

    def _several_parts(self, rms: Mapping[Outcome, float]) -> dict[Outcome, float]:
        """The stale part that explains most, with further parts added one by one as long as each helps: RMS by outcome."""
        found: dict[Outcome, float] = {}
        best = min((outcome for outcome in rms if outcome.stale_parts), key=lambda outcome: rms[outcome], default=KEPT)
        fits = FITS * trainer_tolerance("float32", self._trace.dtype).fit_rms
        if min(rms, key=lambda outcome: rms[outcome]) != best:
            return found
        while self._rms(best) > fits and len(best.stale_parts) < _PARTS:
            more = (Outcome(stale_parts=(*best.stale_parts, part)) for part in self._parts() if part not in best.stale_parts)
            further = min(more, key=self._rms, default=best)
            if not self._beats(further, best):
                break
            best, found[further] = further, self._rms(further)
        return found

    def _parts(self) -> list[Part]:
        return list(dict.fromkeys(map(_part_of, self._new.state_dict())))

    def _kinds(self) -> list[Part]:
        """The kinds of tensors in the layers."""
        kinds = (
            n.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
            for n in self._new.state_dict()
            if _LAYER.match(n)
        )
        return [Part(kind, kind=True) for kind in dict.fromkeys(kinds)]

    def _pieces(self, sequence: int, outcome: Outcome, new: Any) -> list[tuple[int, list[_Piece]]]:
        """The pieces of one sequence, and the token from which on each list of pieces gives the logprobs."""
        prompt, length = len(self._trace.prompt(sequence)), len(self._trace.completion(sequence))
        written = self._written[sequence]
        if 0 < written < length:
            written = min(max(written + outcome.later, 0), length)
        end = prompt + length - 1  # no logprob depends on the last token
        old = [(0, [_Piece(self._old, end)])]
        if not outcome.came or written >= length:
            return old
        if outcome.prompt_block and not written:
            cached = (prompt - 1) // outcome.prompt_block * outcome.prompt_block
            return [(0, [_Piece(self._old, cached), _Piece(new, end)] if cached else [_Piece(new, end)])]
        if outcome.cleared or not written:
            return [*(old if written else []), (written, [_Piece(new, end)])]
        return [(0, [_Piece(self._old, prompt + written - 1), _Piece(new, end)])]

    def _over(self, pieces_of: Callable[[int], list[tuple[int, list[_Piece]]]]) -> FloatArray:
        import torch

        logprobs = np.zeros(self._trace.num_tokens, np.float32)
        alike: dict[tuple[Any, ...], list[_Run]] = {}
        for sequence in self._all():
            parts = pieces_of(sequence)
            ends = [*(first for first, _ in parts[1:]), len(self._trace.completion(sequence))]
            for (first, pieces), end in zip(parts, ends, strict=True):
                run = _Run(sequence=sequence, first=first, end=end, pieces=pieces)
                alike.setdefault(run.models, []).append(run)
        with torch.no_grad():
            for runs in alike.values():
                for batch in self._batches(runs):
                    for run, computed in zip(batch, self._compute(batch), strict=True):
                        start = self._trace.bounds(run.sequence)[0]
                        logprobs[start + run.first : start + run.end] = computed[run.first : run.end]
        return logprobs

    def _batches(self, runs: Sequence[_Run]) -> Iterator[list[_Run]]:
        """The runs in groups whose logits are not too large."""
        vocabulary = self._new.config.get_text_config().vocab_size
        batch: list[_Run] = []
        for run in sorted(runs, key=lambda run: run.pieces[-1].stop):
            if batch and run.pieces[-1].stop * (len(batch) + 1) * vocabulary > _MOST_LOGITS:
                yield batch
                batch = []
            batch.append(run)
        yield batch

    def _compute(self, batch: Sequence[_Run]) -> Iterator[Any]:
        """Logprobs of the tokens of each run, all of the same models, each position computed by the model of its piece.

        Sequences are padded on the left, so that all of them change the model at the same column, and on the right.
        """
        import torch

        stops = [[piece.stop for piece in run.pieces] for run in batch]
        change = max(stop[0] for stop in stops)
        shifts = [change - stop[0] if len(stop) > 1 else 0 for stop in stops]
        width = max(shift + stop[-1] for shift, stop in zip(shifts, stops, strict=True))
        ids, mask = torch.zeros((2, len(batch), width), dtype=torch.long)
        for row, (run, shift) in enumerate(zip(batch, shifts, strict=True)):
            tokens = torch.tensor([*self._trace.prompt(run.sequence), *self._trace.completion(run.sequence)])[: stops[row][-1]]
            ids[row, shift : shift + len(tokens)] = tokens
            mask[row, shift : shift + len(tokens)] = 1
        places = (torch.arange(width) - torch.tensor(shifts)[:, None]).clamp(min=0)
        logits, cache, begin = [], None, 0
        for model, stop in zip(batch[0].models, (change, width)[-len(batch[0].models) :], strict=True):
            columns = slice(begin, stop)
            out = model(
                ids[:, columns], attention_mask=mask[:, :stop], position_ids=places[:, columns], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            logits.append(out.logits)
            cache, begin = out.past_key_values, stop
        computed = torch.cat(logits, dim=1)
        for row, (run, shift) in enumerate(zip(batch, shifts, strict=True)):
            prompt, tokens = self._trace.prompt(run.sequence), self._trace.completion(run.sequence)
            rows = computed[row, shift + len(prompt) - 1 : shift + stops[row][-1]].float() / self._temperature
            yield rows.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()

    def _mixed(self, parts: Sequence[Part], swapped: tuple[str, str] | None) -> Any:
        """The new model with the old weights in some parts, or with two kinds of tensors swapped. A tied LM head is untied."""
        import torch

        mixed = copy.deepcopy(self._new)
        head, embeddings = mixed.get_output_embeddings(), mixed.get_input_embeddings()
        if head is not None and head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        old = {n: t for n, t in self._old.state_dict().items() if any(part.key in f".{n}." for part in parts)}
        if swapped is not None:
            one, other = (f".{name}." for name in swapped)
            state = self._new.state_dict()
            old |= {
                n: state[n.replace(one, "?").replace(other, one).replace("?", other)] for n in state if one in n or other in n
            }
        mixed.load_state_dict(old, strict=False)
        return mixed

    def _squares(self, outcome: Outcome) -> Any:
        d = self._trace.logprobs.astype(np.float64) - self.logprobs(outcome)
        used = self._trace.mask & np.isfinite(d)
        owner = self._trace.sequence_of_token
        squares = np.bincount(owner[used], np.minimum(d[used] ** 2, 9.0), self._trace.num_sequences)
        return squares, int(np.count_nonzero(used))

    def _rms(self, outcome: Outcome) -> float:
        squares, count = self._squares(outcome)
        return float(np.sqrt(squares.sum() / max(count, 1)))

    def _beats(self, one: Outcome, other: Outcome) -> bool:
        """Whether one outcome explains the trace better than another: paired over sequences, and by enough."""
        mine, others = self._rms(one), self._rms(other)
        if mine >= BETTER * others:
            return False
        gain = self._squares(other)[0] - self._squares(one)[0]
        spread = float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
        return mine < _FAR_BETTER * others or bool(gain.mean() > t_quantile(_SURE, max(len(gain) - 1, 1)) * spread)


def _part_of(tensor: str) -> Part:
    """The part of a model to which a tensor of this name belongs."""
    if layer := _LAYER.match(tensor):
        return Part("layer", int(layer[1]))
    return Part(tensor.removesuffix(".weight").rpartition(".")[2])


def _load(weights: Path, model: Path | None) -> Any:
    """The transformers model of a checkpoint, or of an adapter merged into `model`, in float32."""
    from ..trainer.transformers_scorer import TransformersScorer

    if not is_adapter(weights):
        return TransformersScorer(weights).model
    if model is None:
        raise UsageError(f"{weights} is an adapter: say which model it belongs to, model=...")
    return TransformersScorer(model, adapter=weights).model


def suspicious(dtype: str) -> float:
    """The RMS (nats) above which all outcomes are compared, even where the trace fits the outcome that was asked for."""
    return trainer_tolerance("float32", dtype).fit_rms / 4
