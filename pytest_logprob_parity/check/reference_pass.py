"""Compute the reference column: one pass of the model in float32 over the golden's tokens, by transformers or by the engine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import EngineError, ParityError, UsageError
from ..golden.reference import Reference
from ..progress import doing

if TYPE_CHECKING:
    from ..checkpoint.lm_head import Head
    from ..engines.engine import Engine
    from ..trace import Segment, Trace

#: Who may compute it (ini `parity_reference`): whichever runs, one of the two, or nobody.
SOURCES: Final = ("auto", "transformers", "engine", "none")
#: So many sequences, of as many prompts where there are so many, are covered however long it takes.
_LEAST: Final = 8
#: Sequences that go through the model together, and logits [rows, vocabulary] in memory at once.
_BATCH, _ROWS = 16, 512
#: Seconds that a pass may take whatever generating took: a small golden is covered whole, and comes out the same each time.
_FREE: Final = 5.0
#: A batch may take so many times as long as the slowest before it.
_ROOM: Final = 1.1
#: Attention by the book, with soft caps and windows, up to this many tokens; beyond, the whole matrix would not fit.
_EAGER_TOKENS: Final = 4096


def reference_of(engine: Engine, trace: Trace, seconds: float, source: str = "auto") -> tuple[Reference | None, str]:
    """The reference of `trace`, and a sentence that says what it is or why there is none.

    transformers in float32 comes first, for it is another implementation; where it cannot, the engine itself in float32. A pass
    of transformers covers as many sequences as fit into `seconds`, 8 at least: one of each prompt, then another one of each;
    the order of the prompts is drawn with a fixed seed. Raises UsageError for a source that does not exist.
    """
    if source not in SOURCES:
        raise UsageError(f"parity_reference: {source!r} is not one of {', '.join(SOURCES)}")
    if source == "none":
        return None, "no reference: parity_reference = none"
    if engine.weight_version:
        return None, "no reference: the engine's weights are no longer those of its checkpoint"
    reasons = []
    for name, compute in (("transformers", _by_transformers), ("engine", _by_engine)):
        if source in ("auto", name):
            try:
                reference = compute(engine, trace, seconds)
            except (ParityError, ImportError) as error:
                reasons.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            return reference, reference.describe(trace.logprobs)
    return None, f"no reference: {'; '.join(reasons)}"


# -- transformers ---------------------------------------------------------------------------------------------------------


def _by_transformers(engine: Engine, trace: Trace, seconds: float) -> Reference:
    import torch

    from ..checkpoint.lm_head import Head
    from ..checkpoint.prompts import banned_ids
    from ..engines.transformers.backend import end_tokens_of

    began = time.monotonic()
    model = _load(engine, int(trace.total_lengths.max(initial=0)))
    head, stop_ids = Head(model, "float32"), end_tokens_of(model, engine.tokenizer)
    banned = banned_ids(engine.tokenizer, trace.sampling.bad_words)
    logprobs = np.full(trace.num_tokens, np.nan, np.float32)
    segments: list[list[Segment]] = [[] for _ in range(trace.num_sequences)]
    for segment in trace.segments():
        segments[segment.sequence].append(segment)
    order, covered, slowest = by_turns(trace), 0, 0.0
    with torch.no_grad():
        while covered < len(order):
            left = max(seconds, _FREE) - (time.monotonic() - began)
            size = int(min(_BATCH, left / (_ROOM * slowest))) if covered else _LEAST
            if size < 1:
                break
            batch, started = order[covered : covered + size], time.monotonic()
            for alike in _alike(trace, [segment for sequence in batch for segment in segments[sequence]]):
                with doing(f"{covered:,} of {len(order):,} sequences"):
                    _score(model, head, trace, alike, (stop_ids, banned), logprobs)
            slowest = max(slowest, (time.monotonic() - started) / len(batch))
            covered += len(batch)
    logprobs[~trace.mask] = np.nan
    return Reference(logprobs, "transformers float32", covered)


def _load(engine: Engine, longest: int) -> Any:
    """The checkpoint in float32, with the engine's adapter and overrides. Raises UsageError for what cannot be laid on."""
    import torch
    from transformers import AutoConfig

    from ..checkpoint.adapter import apply_adapter
    from ..checkpoint.loading import load_whole

    folder = engine.folder
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    overrides = engine.spec.settings.get("hf_overrides") or {}
    if not isinstance(overrides, Mapping) or any(isinstance(value, Mapping) for value in overrides.values()):
        raise UsageError("hf_overrides that are not plain values are not laid on")
    for name, value in overrides.items():
        if name != "head_dtype":
            setattr(config, name, value)
    attention = {"attn_implementation": "eager"} if longest <= _EAGER_TOKENS else {}
    model = load_whole(folder, engine.spec.model, config=config, torch_dtype=torch.float32, **attention)
    if engine.adapter is not None:
        apply_adapter(model, engine.adapter)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def by_turns(trace: Trace) -> list[int]:
    """The sequences as a pass takes them: one of each prompt, then a second one of each; prompts in a fixed random order."""
    prompts = np.random.default_rng(0).permutation(trace.num_prompts)
    samples = [np.flatnonzero(trace.group == prompt) for prompt in prompts]
    return [int(own[turn]) for turn in range(max(map(len, samples), default=0)) for own in samples if turn < len(own)]


def _alike(trace: Trace, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """The segments in groups of like length, for what fills a batch up to its longest is computed too."""
    lengths = {s: len(trace.prompt(s.sequence)) + s.stop - trace.bounds(s.sequence)[0] for s in segments}
    group: list[Segment] = []
    for segment in sorted(segments, key=lengths.__getitem__):
        if group and lengths[segment] > 1.25 * lengths[group[0]]:
            yield group
            group = []
        group.append(segment)
    if group:
        yield group


def _score(
    model: Any, head: Head, trace: Trace, segments: Sequence[Segment], special: tuple[frozenset[int], list[list[int]]],
    logprobs: np.ndarray[Any, Any],
) -> None:  # fmt: skip
    """Fill in the logprobs of these segments' tokens, processed as the golden's are; `special` are the ids that end a
    completion, and those of the bad words.
    """
    import torch

    rows = []
    for segment in segments:
        begin, _ = trace.bounds(segment.sequence)
        rows.append([*trace.prompt(segment.sequence), *trace.token_ids[begin : segment.stop].tolist()])
    width, device = max(map(len, rows)), model.device
    ids = torch.zeros((len(rows), width), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    for i, segment in enumerate(segments):
        count = segment.stop - segment.start
        for start in range(0, count, _ROWS):
            stop = min(start + _ROWS, count)
            first = len(rows[i]) - count
            logits = head.logits(hidden[i, first + start - 1 : first + stop - 1])
            processed = _process(logits, trace, rows[i], first, start, *special)
            chosen = ids[i, first + start : first + stop, None]
            values = processed.log_softmax(-1).gather(-1, chosen)[:, 0]
            logprobs[segment.start + start : segment.start + stop] = values.cpu().numpy()


def _process(
    logits: Any, trace: Trace, row: list[int], first: int, start: int, stop_ids: frozenset[int], banned: list[list[int]]
) -> Any:  # fmt: skip
    """Logits [rows, V] after what the golden's logprobs went through; `row` holds its tokens from `first` on."""
    import torch

    from ..engines.transformers.backend import penalize, truncate

    sampling = trace.sampling
    if trace.logprobs_mode != "processed_logprobs":
        return logits
    if sampling.edits_logits or sampling.min_tokens:
        logits = torch.stack([
            penalize(one, sampling, row[:first], row[first : first + start + n], stop_ids, banned)
            for n, one in enumerate(logits)
        ])  # fmt: skip
    return logits if sampling.greedy else truncate(logits, sampling)


# -- the engine ---------------------------------------------------------------------------------------------------------


def _by_engine(engine: Engine, trace: Trace, seconds: float) -> Reference:
    """The engine's own float32 by teacher-forced decode: all sequences, for a start costs more than they do."""
    if engine.spec.engine not in ("vllm", "transformers"):
        raise EngineError(f"engine {engine.spec.engine!r} cannot be started anew in float32")
    replayed = engine.in_dtype("float32").replay(trace)
    if not replayed.means_as(trace):
        raise EngineError(f"it gives {replayed.distribution()} logprobs, the golden's are {trace.distribution()}")
    return Reference(replayed.logprobs.astype(np.float32), f"{replayed.engine} float32", trace.num_sequences)
