"""Ask an engine for its logprobs of the tokens of a trace: by decode, prefill, regenerate or window.

A replay is a plan (which requests, and how their answers become a trace) and one batched call for each turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import numpy as np

from ..errors import EngineError, UsageError
from ..trace import NO_SEED, ReplayPath, Segment, Trace, TracePath, finish_code, offsets_of
from .backend import Backend, Completion, Request
from .columns import Rows, labels
from .generate import turn_seed
from .refusals import check_trace_ids

REPLAYS: Final[tuple[ReplayPath, ...]] = get_args(ReplayPath)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Requests by turn, and how their answers become a trace."""

    turns: list[list[Request]]
    assemble: Callable[[list[list[Completion]]], Trace]


def replay(backend: Backend, trace: Trace, path: ReplayPath = "decode", **options: Any) -> Trace:
    """What the engine says of the tokens of `trace`.

    - `decode`: it decodes, forced along the tokens. Processed or raw, as the engine reports.
    - `prefill`: one pass over prompt and completion; raw logprobs; misses what only decode does.
    - `regenerate`: the free run under the same seeds, one sequence for each turn of the trace.
    - `window`: forced decode of `width` tokens from each of `windows` places of a sequence; the rest is masked.

    Raises UsageError for an unknown path, EngineError where the engine cannot do it or did not take the tokens.
    """
    return replay_all(backend, trace, [path], **options)[path]


def replay_all(backend: Backend, trace: Trace, paths: Sequence[ReplayPath], **options: Any) -> dict[ReplayPath, Trace]:
    """Several replays of one trace; see `replay`. Each turn is one batched call for each path, in the trace's order.

    Calls are not merged across paths: the batch shape of a call is part of what a logprob depends on, so a decode
    replay has the shape of the run that recorded the trace, and reproduces it bit for bit on the same engine.
    """
    makers: dict[ReplayPath, Callable[..., _Plan]] = {
        "decode": _plan_decode, "prefill": _plan_prefill, "regenerate": _plan_regenerate, "window": _plan_window,
    }  # fmt: skip
    limit = backend.config.max_model_len
    longest = int(trace.total_lengths.max(initial=0))
    if limit is not None and longest > limit:
        raise UsageError(f"the trace has a sequence of {longest:,} tokens with its prompt; max_model_len is {limit:,}")
    check_trace_ids(backend, trace)
    result: dict[ReplayPath, Trace] = {}
    for path in paths:
        if path not in makers:
            raise UsageError(f"replay {path!r} is not one of {', '.join(REPLAYS)}")
        plan = makers[path](backend, trace, **(options if path == "window" else {}))
        result[path] = plan.assemble([backend.run(requests) if requests else [] for requests in plan.turns])
    return result


def can_regenerate(trace: Trace) -> bool:
    """Whether the free run of a trace can be repeated: greedy decoding, or seeds that are known."""
    return trace.sampling.greedy or not bool(np.any(trace.seeds == NO_SEED))


def _plan_decode(backend: Backend, trace: Trace) -> _Plan:
    return _forced(backend, trace, [(segment, 0) for segment in trace.segments()], trace.mask, "decode")


def _plan_window(backend: Backend, trace: Trace, windows: int = 4, width: int = 32) -> _Plan:
    if windows < 1 or width < 1:
        raise UsageError(f"replay 'window' needs windows and width of 1 or more, not {windows} and {width}")
    if trace.sampling.presence_penalty or trace.sampling.frequency_penalty:
        raise UsageError("replay 'window' cannot follow presence and frequency penalties: they count the whole completion")
    mask = np.zeros(trace.num_tokens, bool)
    pieces = []
    for segment in trace.segments():
        length = segment.stop - segment.start
        last = max(length - width, 0)
        for start in sorted({round(last * i / max(windows - 1, 1)) for i in range(windows)}):
            begin, end = segment.start + start, segment.start + min(start + width, length)
            begin += int(np.count_nonzero(mask[begin:end]))  # windows of a short segment overlap
            if begin < end:
                pieces.append((dataclasses.replace(segment, start=begin, stop=end), begin - segment.start))
                mask[begin:end] = True
    return _forced(backend, trace, pieces, mask, "window")


def _forced(backend: Backend, trace: Trace, pieces: list[tuple[Segment, int]], mask: Any, name: ReplayPath) -> _Plan:
    """Forced decode of segments, each with how many tokens of its turn stand before it, in its prompt."""
    config = backend.config
    if not config.forces:
        raise EngineError(f"decode replay is not possible: {config.unforced}. Use replay=('prefill',), or turn that off")
    turns = by_turn([segment for segment, _ in pieces])
    before = dict(pieces)
    tells_kept = name == "decode"
    requests = [[forced_request(trace, s, before[s], tells_kept=tells_kept) for s in turn] for turn in turns]

    def assemble(answers: list[list[Completion]]) -> Trace:
        rows = Rows.empty(trace.num_tokens, trace.sampling.logprobs)
        for segment, completion in _pairs(turns, answers):
            expected = trace.token_ids[segment.start : segment.stop]
            if not np.array_equal(completion.token_ids, expected):
                raise EngineError(
                    f"decode replay did not force the tokens: sequence {segment.sequence} came back with "
                    f"{first_difference(completion.token_ids, expected)}; its logprobs are of other tokens "
                    f"({config.forcing})"
                )
            rows.fill(segment.start, completion)
        return _same_tokens(backend, trace, rows, mask, path="decode", replay=name).with_(forcing=config.forcing)

    return _Plan(requests, assemble)


def forced_request(trace: Trace, segment: Segment, before: int = 0, *, tells_kept: bool = False) -> Request:
    """The request that decodes a segment again, forced; `before` tokens of its turn stand before it, in its prompt.

    With `tells_kept` the engine also says what truncation kept, if it can.
    """
    sampling = trace.sampling
    if sampling.min_tokens and before:
        sampling = dataclasses.replace(sampling, min_tokens=max(sampling.min_tokens - before, 0))
    forced = trace.token_ids[segment.start : segment.stop].tolist()
    return Request(prompt_token_ids=_history(trace, segment), sampling=sampling, forced_token_ids=forced, tells_kept=tells_kept)


def _plan_prefill(backend: Backend, trace: Trace) -> _Plan:
    bounds = map(trace.bounds, range(trace.num_sequences))
    segments = [Segment(sequence=i, turn=0, start=start, stop=stop) for i, (start, stop) in enumerate(bounds)]
    requests = [
        Request(
            prompt_token_ids=_history(trace, s),
            sampling=trace.sampling,
            scored_token_ids=trace.token_ids[s.start : s.stop].tolist(),
        )
        for s in segments
    ]

    def assemble(answers: list[list[Completion]]) -> Trace:
        rows = Rows.empty(trace.num_tokens, trace.sampling.logprobs)
        for segment, completion in zip(segments, answers[0], strict=True):
            rows.fill(segment.start, completion)
        scored = _same_tokens(backend, trace, rows, trace.mask, path="prefill", replay="prefill")
        return scored.with_(logprobs_mode="raw_logprobs")  # whatever the engine's mode: prompt logprobs are raw

    return _Plan([requests], assemble)


def _plan_regenerate(backend: Backend, trace: Trace) -> _Plan:
    if not can_regenerate(trace):
        raise UsageError("replay 'regenerate': the trace does not know its seeds; give them (seed=...), or leave it out")
    turns = by_turn(list(trace.segments()))
    seeds = trace.seeds.tolist()
    requests = [
        [
            Request(
                prompt_token_ids=_history(trace, s),
                sampling=trace.sampling,
                seed=turn_seed(seeds[s.sequence], s.turn, trace.num_sequences),
            )
            for s in turn
        ]
        for turn in turns
    ]

    def assemble(answers: list[list[Completion]]) -> Trace:
        pairs = sorted(_pairs(turns, answers), key=lambda pair: (pair[0].sequence, pair[0].turn))
        histories: dict[tuple[int, ...], int] = {}
        groups = [histories.setdefault(tuple(_history(trace, s)), len(histories)) for s, _ in pairs]
        prompts = list(histories)
        offsets = offsets_of([c.token_ids for _, c in pairs])
        rows = Rows.empty(int(offsets[-1]), trace.sampling.logprobs)
        for start, (_, completion) in zip(offsets.tolist(), pairs, strict=False):
            rows.fill(start, completion)
        return Trace.from_arrays(
            prompt_token_ids=np.concatenate(prompts),
            prompt_offsets=offsets_of(prompts),
            token_ids=np.concatenate([c.token_ids for _, c in pairs]),
            sequence_offsets=offsets,
            logprobs=rows.logprobs,
            ranks=rows.ranks,
            top_token_ids=rows.top_token_ids,
            top_logprobs=rows.top_logprobs,
            finish_reasons=[finish_code(c.finish_reason) for _, c in pairs],
            group=groups,
            episode=[s.sequence for s, _ in pairs],
            turn=[s.turn for s, _ in pairs],
            seeds=[turn_seed(seeds[s.sequence], s.turn, trace.num_sequences) or 0 for s, _ in pairs],
            sampling=trace.sampling,
            path="decode",
            replay="regenerate",
            token_texts=trace.token_texts,
            **labels(backend),
        )

    return _Plan(requests, assemble)


def _same_tokens(backend: Backend, trace: Trace, rows: Rows, mask: Any, *, path: TracePath, replay: ReplayPath) -> Trace:
    """A trace over the tokens of `trace` with other logprobs."""
    return trace.with_(
        logprobs=rows.logprobs,
        ranks=rows.ranks,
        top_token_ids=rows.top_token_ids,
        top_logprobs=rows.top_logprobs,
        mask=np.asarray(mask, bool),
        **rows.optional_columns(),
        weight_versions=None,
        trainer_logprobs=None,
        trainer_entropies=None,
        newest_version=None,
        path=path,
        replay=replay,
        **labels(backend),
    )


def by_turn(segments: list[Segment]) -> list[list[Segment]]:
    """Segments in the order in which turns are written: the first of all sequences, then the second."""
    count = max((s.turn for s in segments), default=0) + 1
    turns: list[list[Segment]] = [[] for _ in range(count)]
    for segment in segments:
        turns[segment.turn].append(segment)
    return turns


def _pairs(turns: list[list[Segment]], answers: list[list[Completion]]) -> Iterator[tuple[Segment, Completion]]:
    for segments, completions in zip(turns, answers, strict=True):
        yield from zip(segments, completions, strict=True)


def _history(trace: Trace, segment: Segment) -> list[int]:
    """What stood before a segment: the prompt and all of the sequence up to it."""
    start, _ = trace.bounds(segment.sequence)
    return [*trace.prompt(segment.sequence), *trace.token_ids[start : segment.start].tolist()]


def first_difference(got: Any, expected: Any) -> str:
    """Where and how token ids differ from the expected ones, in words."""
    common = min(len(got), len(expected))
    differs = np.flatnonzero(np.asarray(got[:common]) != np.asarray(expected[:common]))
    if len(differs):
        place = int(differs[0])
        return f"token {int(got[place])} in place of {int(expected[place])} at position {place}"
    return f"{len(got)} tokens in place of {len(expected)}"
