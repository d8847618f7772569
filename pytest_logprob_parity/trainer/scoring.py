"""A scorer's logprobs of the tokens of a trace, as a trace."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from ..comparison.signatures.truncated_support import listed_whole
from ..errors import UsageError
from ..spec import Sampling
from ..trace import FloatArray, IntArray, LongArray, Trace
from ..trace.kept import kept_offsets
from .scorer import Declared, Scorer, name_of

#: A logprob may be this far above 0 by rounding (nats).
_POSITIVE: Final = 0.02
#: Kept token ids of one batch, padded, at most: 256 MiB. A batch has one sequence at least.
_MOST_KEPT: Final = 2**25


def score(
    trace: Trace,
    scorer: Scorer,
    *,
    batch_size: int = 16,
    temperature: float | None = None,
    sequences: Sequence[int] | None = None,
    entropies: bool = False,
) -> Trace:
    """The scorer's logprobs of the tokens of `trace`, as a trace of its own: path `prefill`, no top-k.

    `temperature` replaces the rollouts' own. `sequences` are those to score (default: all); the others get NaN. With
    `entropies` the trace has the entropies of the scorer's distributions (`trainer_entropies`), if the scorer gives them.

    Masked tokens are context and get no logprob. Where the rollouts were truncated, the scorer's distributions are over the
    truncated support, if it can do that and the trace has it whole (`kept_token_ids`, or a top-k that lists it); else over all
    tokens, to compare with `untruncated_logprobs`.

    Raises UsageError for rollouts that cannot be compared with a trainer, with the reason.
    """
    _check_can_score(trace, scorer)
    declared = Declared.by(scorer)
    kept = _supports(trace, declared)
    temperature = trace.sampling.applied_temperature if temperature is None else temperature
    more = {"entropies": True} if entropies and declared.gives_entropies else {}
    columns, before = np.full((1 + len(more), trace.num_tokens), np.nan, np.float32), _state_of(declared.model)
    for batch in _batches(trace, range(trace.num_sequences) if sequences is None else sequences, batch_size, kept):
        for sequence, values in zip(batch, _score_batch(trace, scorer, batch, temperature, kept, more), strict=True):
            columns[:, slice(*trace.bounds(sequence))] = values
    if changed := [name for name, state in _state_of(declared.model).items() if before[name] != state]:
        raise UsageError(
            f"{declared.name} changed its model while it scored ({', '.join(changed)}): this changes the training that "
            "follows; restore the model after scoring"
        )
    return trainers_trace(
        trace,
        columns[0],
        entropies=columns[1] if more else None,
        sampling=trace.sampling if kept is not None else trace.sampling.untruncated(),
        name=declared.name,
        dtype=declared.dtype,
    )


def trainers_trace(
    trace: Trace, logprobs: FloatArray, *, entropies: FloatArray | None, sampling: Sampling, name: str, dtype: str
) -> Trace:
    """The trace of a trainer called `name` for the tokens of `trace`: its `logprobs` [N] and `entropies` [N] (nats), NaN where
    masked; path `prefill`, no top-k and no ranks.
    """
    return trace.with_(
        logprobs=np.where(trace.mask, logprobs, np.nan).astype(np.float32),
        ranks=np.zeros(trace.num_tokens, np.int32),
        top_token_ids=np.empty((trace.num_tokens, 0), np.int32),
        top_logprobs=np.empty((trace.num_tokens, 0), np.float32),
        untruncated_logprobs=None,
        routed_experts=None,
        router_margins=None,
        router_inputs=None,
        kept_counts=None,
        kept_token_ids=None,
        weight_versions=None,
        trainer_logprobs=None,
        trainer_entropies=entropies,
        newest_version=None,
        path="prefill",
        logprobs_mode="processed_logprobs",
        sampling=sampling,
        engine=name,
        engine_version="",
        dtype=dtype,
        replay="scorer",
        forcing=None,
    )


def rms(expected: Trace, actual: Trace) -> float:
    """RMS difference (nats) of two traces of the same tokens, over the unmasked tokens of `expected` where it is finite; 0
    where there is none.
    """
    d = (actual.logprobs.astype(np.float64) - expected.logprobs)[expected.mask]
    d = d[np.isfinite(d)]
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0


def spread(trace: Trace, count: int) -> list[int]:
    """`count` sequences at even distances, or all where there are fewer."""
    places: list[int] = np.linspace(0, trace.num_sequences - 1, min(trace.num_sequences, count)).astype(int).tolist()
    return places


def _state_of(model: Any) -> dict[str, Any]:
    """What scoring must leave as it was in a scorer's model: training modes, gradients, the versions of its parameters."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return {}
    parameters = list(model.parameters())
    return {
        "training modes": [module.training for module in model.modules()],
        "gradients asked for": [parameter.requires_grad for parameter in parameters],
        "weights": [parameter._version for parameter in parameters],
    }


def _check_can_score(trace: Trace, scorer: Any) -> None:
    if not callable(scorer):
        raise UsageError(f"a scorer is a callable (token ids, attention mask, temperature) -> logprobs, not {scorer!r:.60}")
    with contextlib.suppress(ValueError):  # a function written in C has no signature
        try:
            inspect.signature(scorer).bind(None, None, 1.0)
        except TypeError as error:
            raise UsageError(
                f"{name_of(scorer)} cannot be called as (token ids, attention mask, temperature): {error}"
            ) from None
    if not trace.mask.any():
        raise UsageError("every token of these rollouts is masked: there is nothing to score")
    if np.isnan(trace.logprobs[trace.mask]).all():
        raise UsageError("these rollouts have no logprobs: ask the engine for them (SamplingParams(logprobs=0) or more)")
    if (largest := float(trace.logprobs[trace.mask & np.isfinite(trace.logprobs)].max(initial=-np.inf))) > _POSITIVE:
        raise UsageError(
            f"the largest logprob of these rollouts is {largest:+.3g}: a logprob is at most 0; are they probabilities?"
        )
    if trace.sampling.penalizes:
        raise UsageError(
            f"these rollouts were sampled with {trace.sampling.processing()}: a trainer applies no penalty, so its "
            "logprobs are of another distribution; sample without penalties, or compare an engine's raw logprobs"
        )
    if (empty := np.flatnonzero(np.diff(trace.prompt_offsets) == 0)).size:
        raise UsageError(f"prompt {empty[0]} is empty: a trainer has no logprob for the first token of a row")
    declared = Declared.by(scorer)
    largest = int(max(trace.token_ids.max(initial=0), trace.prompt_token_ids.max(initial=0)))
    kept = -1 if trace.kept_token_ids is None else int(trace.kept_token_ids.max(initial=-1))
    if declared.vocabulary is not None and max(largest, kept) >= declared.vocabulary:
        what = "token id" if largest >= declared.vocabulary else "a kept set has the token id"
        raise UsageError(
            f"{what} {max(largest, kept)} is beyond the {declared.vocabulary:,} of {declared.name}: another tokenizer or model"
        )
    _check_tokenizer(trace, declared)


def _check_tokenizer(trace: Trace, declared: Declared) -> None:
    tokenizer = declared.tokenizer
    if tokenizer is None or not trace.token_texts:
        return
    ids = [int(i) for i in np.unique(trace.token_ids) if int(i) in trace.token_texts]
    for token, text in zip(ids, tokenizer.batch_decode([[i] for i in ids]), strict=True):
        if text != trace.text(token):
            raise UsageError(
                f"{declared.name} has another tokenizer than the rollouts: token {token} is {text!r} in the scorer and "
                f"{trace.text(token)!r} in the rollouts"
            )


class _Supports(NamedTuple):
    """The truncated support of each token of a trace: the ids of token i are `ids[offsets[i] : offsets[i + 1]]`."""

    offsets: LongArray
    ids: IntArray

    @classmethod
    def of(cls, counts: IntArray, ids: IntArray) -> _Supports:
        return cls(kept_offsets(counts), ids)

    def largest(self, start: int, stop: int) -> int:
        """The size of the largest support of tokens `start` to `stop`."""
        return int(np.diff(self.offsets[start : stop + 1]).max(initial=0))

    def padded(self, start: int, stop: int, width: int) -> IntArray:
        """The supports of these tokens as rows [stop - start, width], -1 where one has no more ids."""
        counts = np.diff(self.offsets[start : stop + 1])
        rows = np.full((len(counts), width), -1, np.int32)
        rows[np.arange(width) < counts[:, None]] = self.ids[self.offsets[start] : self.offsets[stop]]
        return rows


def _supports(trace: Trace, declared: Declared) -> _Supports | None:
    """The truncated supports that the scorer's distributions have to be over; None where they are over all tokens."""
    if trace.logprobs_mode == "raw_logprobs" or trace.untruncated_logprobs is not None:
        return None
    if trace.kept_counts is None and not trace.sampling.truncates:
        return None
    processing = trace.sampling.processing()
    if not declared.renormalises:
        raise UsageError(
            f"these rollouts are of a truncated distribution ({processing}), and {declared.name} computes one over all tokens: "
            "give a scorer that renormalises over the kept tokens (TransformersScorer does), or untruncated_logprobs (an "
            "engine's replay without truncation; goldens have them)"
        )
    if trace.kept_counts is not None and trace.kept_token_ids is not None:
        lacks = (trace.kept_counts == 0) & trace.mask
        if lacks.any():
            raise UsageError(
                f"these rollouts are of a truncated distribution ({processing}), and {int(lacks.sum()):,} of "
                f"{int(trace.mask.sum()):,} tokens have no kept set: give kept_token_ids for every token that is not masked"
            )
        return _Supports.of(trace.kept_counts, trace.kept_token_ids)
    complete = listed_whole(trace) | ~trace.mask
    if not complete.all():
        raise UsageError(
            f"these rollouts are of a truncated distribution ({processing}), and their top-{trace.top_k} logprobs do not list "
            f"the whole truncated support of {int(np.count_nonzero(~complete))} of {int(trace.mask.sum())} tokens: give "
            "kept_token_ids (the ids that truncation kept at each token), a larger top-k, or untruncated_logprobs"
        )
    listed = np.isfinite(trace.top_logprobs)
    return _Supports.of(listed.sum(axis=1).astype(np.int32), trace.top_token_ids[listed])


def _batches(trace: Trace, sequences: Sequence[int], size: int, kept: _Supports | None) -> Iterator[list[int]]:
    """Batches of sequences of similar lengths, the longest first; smaller ones where their truncated supports are large."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"batch_size={size!r}: must be a whole number, 1 or more")
    lengths = trace.total_lengths
    order = sorted(sequences, key=lambda i: -lengths[i])
    batch: list[int] = []
    widest = 0
    for sequence in order:
        widest = max(widest, 0 if kept is None else kept.largest(*trace.bounds(sequence)))
        longest = int(lengths[batch[0] if batch else sequence])
        if batch and (len(batch) == size or (len(batch) + 1) * longest * widest > _MOST_KEPT):
            yield batch
            batch, widest = [], 0 if kept is None else kept.largest(*trace.bounds(sequence))
        batch.append(sequence)
    if batch:
        yield batch


def _score_batch(
    trace: Trace, scorer: Any, batch: Sequence[int], temperature: float, kept: _Supports | None, more: dict[str, Any]
) -> Iterator[FloatArray]:  # fmt: skip
    """The columns [1 or 2, tokens] of each sequence of a batch."""
    import torch

    rows = [[*trace.prompt(i), *trace.completion(i)] for i in batch]
    width = max(map(len, rows))
    ids, mask = torch.zeros((len(rows), width), dtype=torch.long), torch.zeros((len(rows), width), dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        mask[n, : len(row)] = 1
    if kept is not None:
        more = more | _padded_kept(trace, kept, batch, rows, width)
    answer = scorer(ids, mask, temperature, **more)
    columns = [_as_array(column, scorer) for column in (answer if "entropies" in more else (answer,))]
    for values in columns:
        if values.shape not in {(len(rows), width - 1), (len(rows), width)}:
            raise UsageError(
                f"{name_of(scorer)} gave logprobs of shape {list(values.shape)} for token ids of shape {[len(rows), width]}: "
                f"expected {[len(rows), width - 1]}, of the tokens from the second one on, or {[len(rows), width]}"
            )
    for n, sequence in enumerate(batch):
        stop, length = len(rows[n]) - 1, len(trace.completion(sequence))
        yield np.stack([values[n, values.shape[1] - (width - 1) :][stop - length : stop] for values in columns])


def _as_array(answer: Any, scorer: Any) -> FloatArray:
    if hasattr(answer, "detach"):
        return answer.detach().float().cpu().numpy()  # type: ignore[no-any-return]
    if isinstance(answer, np.ndarray) and answer.dtype.kind in "fiu":
        return answer.astype(np.float32)
    raise UsageError(f"{name_of(scorer)} gave {type(answer).__name__}: one tensor or array of logprobs is expected")


def _padded_kept(
    trace: Trace, kept: _Supports, batch: Sequence[int], rows: Sequence[Sequence[int]], width: int
) -> dict[str, Any]:  # fmt: skip
    """What a scorer takes of the truncated supports of a batch: as wide as its largest one."""
    import torch

    widest = max(kept.largest(*trace.bounds(sequence)) for sequence in batch)
    ids = torch.full((len(rows), width - 1, widest), -1, dtype=torch.long)
    used = torch.zeros((len(rows), width - 1), dtype=torch.bool)
    for n, sequence in enumerate(batch):
        start, stop = trace.bounds(sequence)
        place = slice(len(rows[n]) - 1 - (stop - start), len(rows[n]) - 1)
        ids[n, place] = torch.tensor(kept.padded(start, stop, widest), dtype=torch.long)
        used[n, place] = torch.tensor(trace.mask[start:stop])
    return {"kept_token_ids": ids, "kept_mask": used}
