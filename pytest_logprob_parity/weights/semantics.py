"""What a weight update really did to requests that were running: each way it could have gone, computed by transformers."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..comparison.intervals import t_quantile
from ..comparison.result import Comparison, Finding, MismatchError
from ..comparison.tolerance import Tolerance, make_tolerance
from ..comparison.verdict import Evidence, judge
from ..errors import UsageError
from ..message import failure_message
from ..trace import FloatArray, Trace
from ..trainer.parity import trainer_tolerance
from ..trainer.scoring import temperature_of
from .adapter import is_adapter
from .update import WeightUpdate

#: One way explains a trace better than another where its RMS is less than this share of the other's, and its squares are
#: smaller, sequence by sequence, with this confidence. Where its RMS is less than half, no noise can have done that: what
#: explains a trace leaves its noise, and what does not adds to it.
_BETTER: Final = 0.8
_SURE: Final = 0.999
_FAR_BETTER: Final = 0.5
#: How far from the token that it is said to have arrived at an update is looked for.
_WITHIN: Final = 4
#: Sizes of the blocks in which engines keep keys and values of a prompt.
_BLOCKS: Final = (128, 64, 32, 16)

_KEPT: Final = "old keys and values kept under the new weights"
_CLEARED: Final = "keys and values computed again under the new weights"
_NEVER: Final = "the old weights all along"


@dataclass(frozen=True)
class UpdateReading:
    """How well each way that an update could have gone explains a trace: RMS (nats) by its name; `asked` is the one that
    was asked for, `best` the one that explains it best. `tells_arrival` and `tells_cache` say whether the trace can tell an
    update from none, and kept keys and values from those computed again.
    """

    rms: Mapping[str, float]
    asked: str
    best: str
    tells_arrival: bool
    tells_cache: bool

    def __str__(self) -> str:
        ranked = sorted(self.rms.items(), key=lambda item: item[1])
        return "; ".join(f"{name}: RMS {rms:.2g}" for name, rms in ranked[:4])


def assert_weight_update(
    trace: Trace,
    *,
    before: str | Path,
    after: str | Path,
    mode: str = "keep",
    clear_cache: bool = False,
    tolerance: Tolerance | Mapping[str, Any] | None = None,
    model: str | Path | None = None,
) -> Comparison:
    """Assert that an engine took a weight update as `mode` and `clear_cache` ask; returns the comparison.

    `trace` is what `Engine.update_weights(..., prompts=...)` returned, or what was written after it; its `weight_versions`
    say which tokens are of which weights. `before` and `after` are the checkpoints, or folders of LoRA adapters on top of
    `model`, which the reference merges. The reference is transformers in float32,
    which does the same with its `past_key_values`: old keys and values under new weights for `keep` without clearing (and
    `v0`), computed again with clearing. Other ways it could have gone are held against the trace too: an update that never
    came, at another token, not in every layer, keys and values that should have been thrown away (of the request itself, or
    of its prompt in a prefix cache).

    Raises MismatchError for the verdicts `fail` and `unverified`, with `stale_weights`, `adapter` (what `stale_weights` is
    called where adapters are what changed) or `stale_kv_cache` by name, and UsageError for a trace that says nothing of
    weights.
    """
    __tracebackhide__ = True
    comparison = check_weight_update(
        trace, before=before, after=after, mode=mode, clear_cache=clear_cache, tolerance=tolerance, model=model
    )  # fmt: skip
    if not comparison.passed:
        about = f"transformers, float32: {Path(before).name} until the update, then {Path(after).name}"
        message = failure_message(comparison, golden=about, about=[], differences=[], accept="")
        raise MismatchError(message, comparison)
    return comparison


def check_weight_update(
    trace: Trace,
    *,
    before: str | Path,
    after: str | Path,
    mode: str = "keep",
    clear_cache: bool = False,
    tolerance: Tolerance | Mapping[str, Any] | None = None,
    model: str | Path | None = None,
) -> Comparison:
    """What `assert_weight_update` asserts, whatever its verdict."""
    WeightUpdate(Path(after), mode, clear_cache)
    reference = UpdateReference(Path(before), Path(after), trace, None if model is None else Path(model))
    asked = _CLEARED if clear_cache else _KEPT
    reading = reference.read(asked)
    expected = trace.with_(
        logprobs=reference.logprobs(asked), top_token_ids=trace.top_token_ids[:, :0], top_logprobs=trace.top_logprobs[:, :0],
        engine="transformers", engine_version="", dtype="float32", logprobs_mode="processed_logprobs",
        untruncated_logprobs=None,
    )  # fmt: skip
    limits = make_tolerance(trainer_tolerance("float32", trace.dtype), tolerance)
    comparison = judge(expected, trace, limits, "rl", Evidence(sides=("reference", "engine")))
    notes = [*(n for n in comparison.notes if not n.startswith("top-")), f"explained by {reading}"]
    if reading.best != asked and comparison.verdict != "pass":
        return _failed(comparison, _finding(reading, reference.stale), notes)
    if reading.best != asked and reading.rms[reading.best] < _BETTER * reading.rms[asked]:
        return _failed(comparison, _finding(reading, reference.stale), notes)
    if comparison.passed and not reading.tells_arrival:
        why = "the two checkpoints give these tokens the same logprobs" if reference.updated else "none was written after it"
        headline = f"Not shown that the update arrived: {why}"
        return dataclasses.replace(comparison, verdict="unverified", headline=headline, notes=tuple(notes))
    if not reading.tells_cache:
        notes.append("these tokens do not tell whether keys and values were kept or computed again")
    return dataclasses.replace(comparison, notes=tuple(notes))


def _failed(comparison: Comparison, finding: Finding, notes: Sequence[str]) -> Comparison:
    return dataclasses.replace(
        comparison, verdict="fail", headline=f"The weight update did not go as asked: {finding.evidence}", findings=(finding,),
        notes=tuple(notes),
    )  # fmt: skip


def _finding(reading: UpdateReading, stale: str) -> Finding:
    """What a reading comes to; `stale` is the cause of weights that did not come."""
    best, text = (
        reading.best,
        f"{reading.best} (RMS {reading.rms[reading.best]:.2g}; as asked: {reading.rms[reading.asked]:.2g})",
    )
    if best == _CLEARED:
        return Finding("weights", None, text, ("stale_kv_cache", "engine_build"))
    stale_cache = best == _KEPT or "prompt" in best
    return Finding("weights", "stale_kv_cache" if stale_cache else stale, text)


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
        self.stale = "adapter" if is_adapter(after) else "stale_weights"
        self._old, self._new = _load(before, model), _load(after, model)
        self._trace = trace
        self._temperature = temperature_of(trace.sampling)
        self._known: dict[str, FloatArray] = {}
        newest = max(int(trace.weight_versions.max(initial=0)), 1)  # what an engine starts with is 0
        #: How many tokens of each sequence the old weights wrote.
        self._written = [int(np.count_nonzero(trace.weight_versions[a:b] < newest)) for a, b in map(trace.bounds, self._all())]

    @property
    def updated(self) -> bool:
        """Whether any token was written by the new weights."""
        return any(k < len(self._trace.completion(i)) for i, k in enumerate(self._written))

    def read(self, asked: str) -> UpdateReading:
        """Hold the trace against all ways; those that cost most only where none of the others explains it."""
        rms = {name: self._rms(name) for name in (_KEPT, _CLEARED, _NEVER)}
        rivals = [name for name in rms if name != asked and self._beats(name, asked)]
        if rivals or rms[asked] > _suspicious(self._trace.dtype):
            for name in self._others(asked):
                rms[name] = self._rms(name)
        best = asked
        for names in ((_KEPT, _CLEARED, _NEVER), rms):  # what is more involved has to explain more
            nearest = min((n for n in names if n != best), key=lambda n: rms[n])
            best = nearest if self._beats(nearest, best) else best
        other = _KEPT if asked == _CLEARED else _CLEARED
        return UpdateReading(
            rms,
            asked,
            best,
            self._beats(asked, _NEVER) or best == _NEVER,
            self._beats(asked, other) or self._beats(other, asked),
        )

    def logprobs(self, name: str) -> FloatArray:
        """Logprobs [N] under the way of this name."""
        if name not in self._known:
            self._known[name] = self._compute(name)
        return self._known[name]

    def _all(self) -> range:
        return range(self._trace.num_sequences)

    def _others(self, asked: str) -> Iterator[str]:
        spans = any(0 < k < len(self._trace.completion(i)) for i, k in enumerate(self._written))
        if spans:
            for by in range(-_WITHIN, _WITHIN + 1):
                if by:
                    yield f"{asked}, arrived {abs(by)} tokens {'later' if by > 0 else 'earlier'}"
        yield from (f"{part} still as before the update" for part in self._parts())
        yield from (f"old keys and values of the prompt, in blocks of {size}" for size in _BLOCKS)

    def _parts(self) -> list[str]:
        names = [re.sub(r"^.*?layers\.(\d+)\..*$", r"layer \1", name) for name in self._new.state_dict()]
        return list(dict.fromkeys(n if n.startswith("layer ") else n.removesuffix(".weight").rpartition(".")[2] for n in names))

    def _compute(self, name: str) -> FloatArray:
        later = re.search(r"arrived (\d+) tokens (later|earlier)", name)
        shift = 0 if later is None else int(later[1]) * (1 if later[2] == "later" else -1)
        base = name.partition(",")[0]
        new = self._new
        if name.endswith("still as before the update"):
            new, base = self._mixed(name.removesuffix(" still as before the update")), _KEPT
        block = re.search(r"in blocks of (\d+)$", name)
        return self._over(lambda i: self._pieces(i, base, shift, new, 0 if block is None else int(block[1])))

    def _pieces(self, sequence: int, name: str, shift: int, new: Any, block: int) -> list[tuple[int, list[_Piece]]]:
        """For one sequence: from which of its tokens on, which models read what."""
        prompt, length = len(self._trace.prompt(sequence)), len(self._trace.completion(sequence))
        written = min(max(self._written[sequence] + shift, 0), length) if 0 < self._written[sequence] < length else (
            self._written[sequence]
        )  # fmt: skip
        end = prompt + length - 1  # the last token is read by nobody
        old = [(0, [_Piece(self._old, end)])]
        if name == _NEVER or written >= length:
            return old
        if block and not written:
            cached = (prompt - 1) // block * block
            return [(0, [_Piece(self._old, cached), _Piece(new, end)] if cached else [_Piece(new, end)])]
        if name == _CLEARED or not written:
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

    def _mixed(self, part: str) -> Any:
        """The new model with the old weights in one layer, or in embeddings, norm or head; a tied head goes by itself."""
        import torch

        mixed = copy.deepcopy(self._new)
        head, embeddings = mixed.get_output_embeddings(), mixed.get_input_embeddings()
        if head is not None and head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        key = f".{part.replace(' ', 's.')}." if part.startswith("layer ") else f".{part}."
        old = {n: t for n, t in self._old.state_dict().items() if key in f".{n}."}
        mixed.load_state_dict(old, strict=False)
        return mixed

    def _squares(self, name: str) -> Any:
        d = self._trace.logprobs.astype(np.float64) - self.logprobs(name)
        used = self._trace.mask & np.isfinite(d)
        owner = np.repeat(np.arange(self._trace.num_sequences), np.diff(self._trace.sequence_offsets))
        squares = np.bincount(owner[used], np.minimum(d[used] ** 2, 9.0), self._trace.num_sequences)
        return squares, int(np.count_nonzero(used))

    def _rms(self, name: str) -> float:
        squares, count = self._squares(name)
        return float(np.sqrt(squares.sum() / max(count, 1)))

    def _beats(self, one: str, other: str) -> bool:
        """Whether one way explains the trace better than another: paired over sequences, and by enough."""
        mine, others = self._rms(one), self._rms(other)
        if mine >= _BETTER * others:
            return False
        gain = self._squares(other)[0] - self._squares(one)[0]
        spread = float(gain.std(ddof=1)) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
        return mine < _FAR_BETTER * others or bool(gain.mean() > t_quantile(_SURE, max(len(gain) - 1, 1)) * spread)


def _load(weights: Path, model: Path | None) -> Any:
    """The transformers model of a checkpoint, or of an adapter merged into `model`, in float32."""
    from ..trainer.transformers_scorer import TransformersScorer

    if not is_adapter(weights):
        return TransformersScorer(weights).model
    if model is None:
        raise UsageError(f"{weights} is an adapter: say which model it is on, model=...")
    return TransformersScorer(model, adapter=weights).model


def _suspicious(dtype: str) -> float:
    """RMS (nats) above which even the way that was asked for is looked into."""
    return trainer_tolerance("float32", dtype).rms_diff / 4
