"""What a weight update does to requests that run: each way it can go, computed by transformers, and which one a trace shows."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from ..checkpoint.adapter import is_adapter
from ..comparison.findings import WeightsCause
from ..comparison.intervals import t_quantile
from ..errors import UsageError
from ..trace import FloatArray, Trace
from ..trainer.limits import trainer_tolerance

#: One way explains a trace better than another where its RMS is less than this share of the other's, and its squares are
#: smaller, sequence by sequence, with this confidence. Where its RMS is less than half, no noise can have done that: what
#: explains a trace leaves its noise, and what does not adds to it.
BETTER: Final = 0.8
_SURE: Final = 0.999
_FAR_BETTER: Final = 0.5
#: A way explains a trace where it leaves less than this share of the RMS that two implementations may differ by.
FITS: Final = 1 / 3
#: How many parts may have been left out together, of those that are looked for one by one.
_PARTS: Final = 4
#: How far from the token that it is said to have arrived at an update is looked for.
_WITHIN: Final = 4
#: A tensor's name that has the number of its layer.
_LAYER: Final = re.compile(r"^.*?layers\.(\d+)\.")
#: Sizes of the blocks in which engines keep keys and values of a prompt.
_BLOCKS: Final = (128, 64, 32, 16)


#: Parts of a layer that are loaded into one parameter, one after the other, where they may change places.
_TWINS: Final = (("gate_proj", "up_proj"), ("k_proj", "v_proj"))


class Part(NamedTuple):
    """A part of a model that an update may have left out: a layer by its number, what stands beside the layers by name, or a
    kind of tensors of all layers.
    """

    name: str
    layer: int | None = None
    kind: bool = False

    @property
    def key(self) -> str:
        """What the names of its tensors have in them, between dots."""
        return f".{self.name}." if self.layer is None else f".layers.{self.layer}."

    def __str__(self) -> str:
        return f"every {self.name}" if self.kind else self.name if self.layer is None else f"{self.name} {self.layer}"


@dataclass(frozen=True)
class Way:
    """One way that an update can go.

    `came`: it arrived, `later` tokens after the one that the trace says (before it, if negative). `cleared`: keys and values
    of what was written until then are computed again under the new weights; else they are kept. `stale_parts` are those that
    still have the old weights, `swapped` two kinds that have each other's. `prompt_block`: a prompt's first whole blocks of
    this many tokens are read from a cache that the old weights filled.
    """

    came: bool = True
    cleared: bool = False
    later: int = 0
    stale_parts: tuple[Part, ...] = ()
    prompt_block: int = 0
    swapped: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "stale_parts": [str(part) for part in self.stale_parts]}

    def __str__(self) -> str:
        if not self.came:
            return "the old weights all along"
        if self.stale_parts:
            return f"{' and '.join(map(str, self.stale_parts))} still as before the update"
        if self.swapped:
            return f"every {self.swapped[0]} swapped with its {self.swapped[1]}"
        if self.prompt_block:
            return f"old keys and values of the prompt, in blocks of {self.prompt_block}"
        cache = "keys and values computed again" if self.cleared else "old keys and values kept"
        arrived = f", arrived {abs(self.later)} tokens {'later' if self.later > 0 else 'earlier'}" if self.later else ""
        return f"{cache} under the new weights{arrived}"


KEPT: Final = Way()
CLEARED: Final = Way(cleared=True)
NEVER: Final = Way(came=False)
PLAIN_WAYS: Final = (KEPT, CLEARED, NEVER)


@dataclass(frozen=True)
class UpdateReading:
    """How well each way that an update could have gone explains a trace: RMS (nats) by way; `asked` is the one that
    was asked for, `best` the one that explains it best. `tells_arrival` and `tells_cache` say whether the trace can tell an
    update from none, and kept keys and values from those computed again.
    """

    rms: Mapping[Way, float]
    asked: Way
    best: Way
    tells_arrival: bool
    tells_cache: bool

    def __str__(self) -> str:
        ranked = sorted(self.rms.items(), key=lambda item: item[1])
        return "; ".join(f"{way}: RMS {rms:.2g}" for way, rms in ranked[:4])


@dataclass(frozen=True)
class _Piece:
    """A model that reads the positions of a sequence up to `stop`, from where the piece before it ended."""

    model: Any
    stop: int


class UpdateReference:
    """Logprobs [N] of a trace's tokens under each way that an update from one checkpoint to another could have gone."""

    def __init__(self, before: Path, after: Path, trace: Trace, model: Path | None = None) -> None:
        if trace.weight_versions is None:
            raise UsageError(
                "this trace does not say which weights wrote its tokens: it comes of no engine.update_weights(...); give "
                "weight_versions"
            )
        raw = trace.logprobs_mode == "raw_logprobs" and not trace.sampling.raw_is_processed
        if trace.sampling.truncates or trace.sampling.penalizes or raw:
            raise UsageError(
                f"a weight update is checked on processed logprobs without truncation and penalties, not {trace.distribution()}"
            )
        #: The cause of weights that did not come.
        self.stale: WeightsCause = "adapter" if is_adapter(after) else "stale_weights"
        self._old, self._new = _load(before, model), _load(after, model)
        self._trace = trace
        self._temperature = trace.sampling.applied_temperature
        self._known: dict[Way, FloatArray] = {}
        newest = max(int(trace.weight_versions.max(initial=0)), 1)  # what an engine starts with is 0
        if trace.newest_version is not None and len(np.unique(trace.weight_versions)) == 1:
            newest = trace.newest_version
        #: How many tokens of each sequence the old weights wrote.
        self._written = [int(np.count_nonzero(trace.weight_versions[a:b] < newest)) for a, b in map(trace.bounds, self._all())]

    @property
    def updated(self) -> bool:
        """Whether any token was written by the new weights."""
        return any(k < len(self._trace.completion(i)) for i, k in enumerate(self._written))

    def read(self, asked: Way) -> UpdateReading:
        """Hold the trace against all ways; those that cost most only where none of the others explains it."""
        rms = {way: self._rms(way) for way in PLAIN_WAYS}
        rivals = [way for way in rms if way != asked and self._beats(way, asked)]
        if rivals or rms[asked] > suspicious(self._trace.dtype):
            for way in self._others(asked):
                rms[way] = self._rms(way)
            rms |= self._several_parts(rms)
        best = asked
        for ways in (PLAIN_WAYS, tuple(rms)):  # what is more involved has to explain more
            nearest = min((way for way in ways if way != best), key=lambda way: rms[way])
            best = nearest if self._beats(nearest, best) else best
        other = KEPT if asked == CLEARED else CLEARED
        return UpdateReading(
            rms,
            asked,
            best,
            self._beats(asked, NEVER) or best == NEVER,
            self._beats(asked, other) or self._beats(other, asked),
        )

    def logprobs(self, way: Way) -> FloatArray:
        """Logprobs [N] under one way."""
        if way not in self._known:
            new = self._mixed(way.stale_parts, way.swapped) if way.stale_parts or way.swapped else self._new
            self._known[way] = self._over(lambda sequence: self._pieces(sequence, way, new))
        return self._known[way]

    def _all(self) -> range:
        return range(self._trace.num_sequences)

    def _others(self, asked: Way) -> Iterator[Way]:
        if any(0 < k < len(self._trace.completion(i)) for i, k in enumerate(self._written)):
            yield from (dataclasses.replace(asked, later=by) for by in range(-_WITHIN, _WITHIN + 1) if by)
        yield from (Way(stale_parts=(part,)) for part in (*self._parts(), *self._kinds()))
        shapes = {name: tensor.shape for name, tensor in self._new.state_dict().items()}
        for one, other in _TWINS:
            pairs = [(shapes[n], shapes.get(n.replace(f".{one}.", f".{other}."))) for n in shapes if f".{one}." in n]
            if pairs and all(mine == its for mine, its in pairs):
                yield Way(swapped=(one, other))
        yield from (Way(prompt_block=size) for size in _BLOCKS)

    def _several_parts(self, rms: Mapping[Way, float]) -> dict[Way, float]:
        """The part that explains most, and the others that do so beside it, one after another as long as each helps."""
        found: dict[Way, float] = {}
        best = min((way for way in rms if way.stale_parts), key=lambda way: rms[way], default=KEPT)
        fits = FITS * trainer_tolerance("float32", self._trace.dtype).fit_rms
        if min(rms, key=lambda way: rms[way]) != best:
            return found
        while self._rms(best) > fits and len(best.stale_parts) < _PARTS:
            more = (Way(stale_parts=(*best.stale_parts, part)) for part in self._parts() if part not in best.stale_parts)
            further = min(more, key=self._rms, default=best)
            if not self._beats(further, best):
                break
            best, found[further] = further, self._rms(further)
        return found

    def _parts(self) -> list[Part]:
        return list(dict.fromkeys(map(_part_of, self._new.state_dict())))

    def _kinds(self) -> list[Part]:
        """The kinds of tensors that layers have."""
        kinds = (
            n.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
            for n in self._new.state_dict()
            if _LAYER.match(n)
        )
        return [Part(kind, kind=True) for kind in dict.fromkeys(kinds)]

    def _pieces(self, sequence: int, way: Way, new: Any) -> list[tuple[int, list[_Piece]]]:
        """For one sequence: from which of its tokens on, which models read what."""
        prompt, length = len(self._trace.prompt(sequence)), len(self._trace.completion(sequence))
        written = self._written[sequence]
        if 0 < written < length:
            written = min(max(written + way.later, 0), length)
        end = prompt + length - 1  # the last token is read by nobody
        old = [(0, [_Piece(self._old, end)])]
        if not way.came or written >= length:
            return old
        if way.prompt_block and not written:
            cached = (prompt - 1) // way.prompt_block * way.prompt_block
            return [(0, [_Piece(self._old, cached), _Piece(new, end)] if cached else [_Piece(new, end)])]
        if way.cleared or not written:
            return [*(old if written else []), (written, [_Piece(new, end)])]
        return [(0, [_Piece(self._old, prompt + written - 1), _Piece(new, end)])]

    def _over(self, pieces_of: Callable[[int], list[tuple[int, list[_Piece]]]]) -> FloatArray:
        import torch

        logprobs = np.zeros(self._trace.num_tokens, np.float32)
        with torch.no_grad():
            for sequence in self._all():
                start, stop = self._trace.bounds(sequence)
                for first, pieces in pieces_of(sequence):
                    logprobs[start + first : stop] = self._read(sequence, pieces)[first:]
        return logprobs

    def _read(self, sequence: int, pieces: Sequence[_Piece]) -> Any:
        """Logprobs of the sequence's tokens, each position read by the model whose piece it lies in."""
        import torch

        prompt, tokens = self._trace.prompt(sequence), self._trace.completion(sequence)
        ids = torch.tensor([[*prompt, *tokens]])
        logits, cache, begin = [], None, 0
        for piece in pieces:
            if piece.stop > begin:
                out = piece.model(ids[:, begin : piece.stop], past_key_values=cache, use_cache=True)
                logits.append(out.logits[0])
                cache, begin = out.past_key_values, piece.stop
        rows = torch.cat(logits)[len(prompt) - 1 :].float() / self._temperature
        return rows.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0].numpy()

    def _mixed(self, parts: Sequence[Part], swapped: tuple[str, str] | None) -> Any:
        """The new model with the old weights in some parts, or two kinds of tensors swapped; a tied head goes by itself."""
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

    def _squares(self, way: Way) -> Any:
        d = self._trace.logprobs.astype(np.float64) - self.logprobs(way)
        used = self._trace.mask & np.isfinite(d)
        owner = self._trace.sequence_of_token
        squares = np.bincount(owner[used], np.minimum(d[used] ** 2, 9.0), self._trace.num_sequences)
        return squares, int(np.count_nonzero(used))

    def _rms(self, way: Way) -> float:
        squares, count = self._squares(way)
        return float(np.sqrt(squares.sum() / max(count, 1)))

    def _beats(self, one: Way, other: Way) -> bool:
        """Whether one way explains the trace better than another: paired over sequences, and by enough."""
        mine, others = self._rms(one), self._rms(other)
        if mine >= BETTER * others:
            return False
        gain = self._squares(other)[0] - self._squares(one)[0]
        spread = float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
        return mine < _FAR_BETTER * others or bool(gain.mean() > t_quantile(_SURE, max(len(gain) - 1, 1)) * spread)


def _part_of(tensor: str) -> Part:
    """The part that a tensor of this name belongs to."""
    if layer := _LAYER.match(tensor):
        return Part("layer", int(layer[1]))
    return Part(tensor.removesuffix(".weight").rpartition(".")[2])


def _load(weights: Path, model: Path | None) -> Any:
    """The transformers model of a checkpoint, or of an adapter merged into `model`, in float32."""
    from ..trainer.transformers_scorer import TransformersScorer

    if not is_adapter(weights):
        return TransformersScorer(weights).model
    if model is None:
        raise UsageError(f"{weights} is an adapter: say which model it is on, model=...")
    return TransformersScorer(model, adapter=weights).model


def suspicious(dtype: str) -> float:
    """RMS (nats) above which even the way that was asked for is looked into."""
    return trainer_tolerance("float32", dtype).fit_rms / 4
