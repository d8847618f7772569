"""Ask an engine: for new completions, or for its logprobs of the tokens of a trace (decode, prefill, regenerate, window).

A replay is a plan (which requests, and how their answers become a trace) and one batched call for each turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

import numpy as np

from ..checkpoint.prompts import Prompt
from ..checkpoint.weight_update import WeightUpdate
from ..errors import EngineError, UsageError
from ..spec import Sampling
from ..trace import NO_SEED, ReplayPath, Segment, Trace, TracePath, empty_top_k, finish_code, offsets_of, rows_of
from .backend import Backend, Completion, Request

REPLAYS: Final[tuple[ReplayPath, ...]] = get_args(ReplayPath)


@dataclass
class _Rows:
    """The columns of a trace over the same tokens as another one, filled piece by piece."""

    logprobs: Any
    ranks: Any
    top_token_ids: Any
    top_logprobs: Any

    @classmethod
    def empty(cls, tokens: int, k: int) -> _Rows:
        return cls(
            np.full(tokens, np.nan, np.float32),
            np.zeros(tokens, np.int32),
            *empty_top_k(tokens, k),
        )

    def fill(self, start: int, completion: Completion) -> None:
        rows = slice(start, start + len(completion.token_ids))
        self.logprobs[rows] = completion.logprobs
        self.ranks[rows] = completion.ranks
        self.top_token_ids[rows] = completion.top_token_ids
        self.top_logprobs[rows] = completion.top_logprobs


# -- generating -------------------------------------------------------------------------------------------------------


def generate(
    backend: Backend, prompts: Sequence[Prompt], sampling: Sampling, tokenizer: Any = None,
    run: Callable[[Sequence[Request]], list[Completion]] | None = None,
) -> Trace:  # fmt: skip
    """Sample `sampling.n` completions of every prompt; each sequence has a seed of its own, `sampling.seed` + its number.

    A prompt with turns is written turn by turn; what the environment says between them is masked in the trace.
    `tokenizer` gives the texts of the tokens, `run` answers requests in the backend's place. Raises EngineError.
    """
    _check_lengths(backend, [p.token_ids for p in prompts], sampling)
    for index, prompt in enumerate(prompts):
        for part, ids in enumerate((prompt.token_ids, *prompt.between)):
            _check_ids(backend, ids, f"prompts[{index}]" + (f", before turn {part}," if part else ""))
    groups = [group for group in range(len(prompts)) for _ in range(sampling.n)]
    sequences = len(groups)
    seeds = [sampling.seed + index for index in range(sequences)]
    histories = [list(prompts[group].token_ids) for group in groups]
    written: list[list[tuple[Completion, int]]] = [[] for _ in groups]  # a turn, and how many masked tokens follow it
    finish = ["unknown"] * sequences
    for turn in range(max(len(p.between) for p in prompts) + 1):
        alive = [i for i, group in enumerate(groups) if turn <= len(prompts[group].between)]
        requests = [Request(histories[i], sampling, turn_seed(seeds[i], turn, sequences)) for i in alive]
        for i, completion in zip(alive, (run or backend.run)(requests), strict=True):
            tokens = completion.token_ids.tolist()
            after: Sequence[int] = prompts[groups[i]].between[turn] if turn < len(prompts[groups[i]].between) else ()
            if after and tokens and tokens[-1] == after[0]:
                after = after[1:]  # the turn already ends with the token that ends it in the chat template
            histories[i] += [*tokens, *after]
            written[i].append((completion, len(after)))
            finish[i] = completion.finish_reason
    first = np.cumsum([0, *(len(p.token_ids) for p in prompts)])
    completions = [histories[i][len(prompts[g].token_ids) :] for i, g in enumerate(groups)]
    offsets = offsets_of(completions)
    rows = _Rows.empty(int(offsets[-1]), sampling.logprobs)
    mask = np.ones(int(offsets[-1]), bool)
    for i, turns in enumerate(written):
        position = int(offsets[i])
        for completion, environment in turns:
            rows.fill(position, completion)
            position += len(completion.token_ids)
            mask[position : position + environment] = False
            position += environment
    trace = Trace.from_arrays(
        prompt_token_ids=np.concatenate([p.token_ids for p in prompts]),
        prompt_offsets=first,
        token_ids=np.concatenate(completions),
        sequence_offsets=offsets,
        logprobs=rows.logprobs,
        ranks=rows.ranks,
        mask=mask,
        top_token_ids=rows.top_token_ids,
        top_logprobs=rows.top_logprobs,
        finish_reasons=[finish_code(reason) for reason in finish],
        group=groups,
        seeds=seeds,
        sampling=sampling,
        path="decode",
        **_labels(backend),
    )
    return trace.with_(token_texts=_texts(trace, tokenizer)) if tokenizer is not None else trace


def generate_through(
    backend: Any, prompts: Sequence[Prompt], sampling: Sampling, tokenizer: Any, update: WeightUpdate, version: int
) -> Trace:
    """What `generate` does, with a weight update on the way: the trace's `weight_versions` are `version`, then one more, which
    is its `newest_version` even where every request had ended by then.

    Raises UsageError for prompts with turns, EngineError where the engine cannot take the update.
    """
    if any(prompt.between for prompt in prompts):
        raise UsageError("a weight update in flight goes with single turns, not with turns of an environment")
    if not hasattr(backend, "run_through"):
        raise UsageError(f"{backend.config.engine} takes no weight updates in flight")
    before: list[int] = []

    def run(requests: Sequence[Request]) -> list[Completion]:
        completions, before[:] = backend.run_through(requests, update)
        return list(completions)

    trace = generate(backend, prompts, sampling, tokenizer, run)
    versions = np.full(trace.num_tokens, version, np.int32)
    for sequence, count in enumerate(before):
        start, stop = trace.bounds(sequence)
        versions[start + count : stop] = version + 1
    return trace.with_(weight_versions=versions, newest_version=version + 1)


def turn_seed(seed: int, turn: int, sequences: int) -> int | None:
    """The seed of one turn of a sequence: no two turns of a trace share one. None where there is no seed."""
    return None if seed == NO_SEED else seed + turn * sequences


# -- replaying --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
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
    _check_trace_ids(backend, trace)
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
                pieces.append((Segment(segment.sequence, segment.turn, begin, end), begin - segment.start))
                mask[begin:end] = True
    return _forced(backend, trace, pieces, mask, "window")


def _forced(backend: Backend, trace: Trace, pieces: list[tuple[Segment, int]], mask: Any, name: ReplayPath) -> _Plan:
    """Forced decode of segments, each with how many tokens of its turn stand before it, in its prompt."""
    config = backend.config
    if not config.forces:
        raise EngineError(f"decode replay is not possible: {config.unforced}. Use replay=('prefill',), or turn that off")
    turns = by_turn([segment for segment, _ in pieces])
    before = dict(pieces)
    requests = [[forced_request(trace, segment, before[segment]) for segment in turn] for turn in turns]

    def assemble(answers: list[list[Completion]]) -> Trace:
        rows = _Rows.empty(trace.num_tokens, trace.sampling.logprobs)
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


def forced_request(trace: Trace, segment: Segment, before: int = 0) -> Request:
    """The request that decodes a segment again, forced; `before` tokens of its turn stand before it, in its prompt."""
    sampling = trace.sampling
    if sampling.min_tokens and before:
        sampling = dataclasses.replace(sampling, min_tokens=max(sampling.min_tokens - before, 0))
    forced = trace.token_ids[segment.start : segment.stop].tolist()
    return Request(_history(trace, segment), sampling, forced_token_ids=forced)


def _plan_prefill(backend: Backend, trace: Trace) -> _Plan:
    segments = [Segment(i, 0, *trace.bounds(i)) for i in range(trace.num_sequences)]
    requests = [
        Request(_history(trace, s), trace.sampling, scored_token_ids=trace.token_ids[s.start : s.stop].tolist())
        for s in segments
    ]

    def assemble(answers: list[list[Completion]]) -> Trace:
        rows = _Rows.empty(trace.num_tokens, trace.sampling.logprobs)
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
        [Request(_history(trace, s), trace.sampling, turn_seed(seeds[s.sequence], s.turn, trace.num_sequences)) for s in turn]
        for turn in turns
    ]

    def assemble(answers: list[list[Completion]]) -> Trace:
        pairs = sorted(_pairs(turns, answers), key=lambda pair: (pair[0].sequence, pair[0].turn))
        histories: dict[tuple[int, ...], int] = {}
        groups = [histories.setdefault(tuple(_history(trace, s)), len(histories)) for s, _ in pairs]
        prompts = list(histories)
        offsets = offsets_of([c.token_ids for _, c in pairs])
        rows = _Rows.empty(int(offsets[-1]), trace.sampling.logprobs)
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
            **_labels(backend),
        )

    return _Plan(requests, assemble)


def _same_tokens(backend: Backend, trace: Trace, rows: _Rows, mask: Any, *, path: TracePath, replay: ReplayPath) -> Trace:
    """A trace over the tokens of `trace` with other logprobs."""
    return trace.with_(
        logprobs=rows.logprobs,
        ranks=rows.ranks,
        top_token_ids=rows.top_token_ids,
        top_logprobs=rows.top_logprobs,
        mask=np.asarray(mask, bool),
        untruncated_logprobs=None,
        weight_versions=None,
        trainer_logprobs=None,
        trainer_entropies=None,
        newest_version=None,
        path=path,
        replay=replay,
        **_labels(backend),
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


def _labels(backend: Backend) -> dict[str, Any]:
    config = backend.config
    return {
        "logprobs_mode": config.logprobs_mode,
        "engine": config.engine,
        "engine_version": config.version,
        "dtype": config.dtype,
    }


def _check_lengths(backend: Backend, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    limit = backend.config.max_model_len
    for index, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            raise UsageError(f"prompts[{index}] has {len(prompt):,} tokens; the engine's context (max_model_len) is {limit:,}")
    most = backend.config.values.get("max_logprobs")
    if isinstance(most, int) and 0 <= most < sampling.logprobs:
        raise UsageError(f"Sampling(logprobs={sampling.logprobs}): the engine gives at most {most}; set max_logprobs")


def _check_trace_ids(backend: Backend, trace: Trace) -> None:
    """Raise UsageError for a trace with a token that the engine has no logits for: one such id can end the engine."""
    size = _ids_of(backend)
    for ids, offsets, what in (
        (trace.token_ids, trace.sequence_offsets, "sequence"),
        (trace.prompt_token_ids, trace.prompt_offsets, "prompt"),
    ):
        wrong = np.flatnonzero((ids < 0) | (ids >= size))
        if len(wrong):
            row = int(rows_of(offsets)[wrong[0]])
            raise _no_token(backend, f"{what} {row} of the trace", int(wrong[0] - offsets[row]), int(ids[wrong[0]]))


def _check_ids(backend: Backend, ids: Sequence[int], where: str) -> None:
    size = _ids_of(backend)
    for position, token in enumerate(ids):
        if not 0 <= token < size:
            raise _no_token(backend, where, position, token)


def _ids_of(backend: Backend) -> int:
    """How many token ids there are: as many as the engine has logits for, or, where it does not tell, as a trace can hold."""
    size = backend.config.vocabulary
    return 2**31 if size is None else size


def _no_token(backend: Backend, where: str, position: int, token: int) -> UsageError:
    size = backend.config.vocabulary
    known = f"ids are 0 to {2**31 - 1}" if size is None else f"the engine's vocabulary has {size:,} tokens, ids 0 to {size - 1}"
    return UsageError(f"{where} has the token id {token!s:.40} at position {position}; {known}")


def _texts(trace: Trace, tokenizer: Any) -> dict[int, str]:
    """The text of every token that the trace names."""
    ids = np.unique(np.concatenate([trace.prompt_token_ids, trace.token_ids, trace.top_token_ids.ravel()]))
    known = [int(i) for i in ids if 0 <= i < len(tokenizer)]
    return dict(zip(known, tokenizer.batch_decode([[i] for i in known]), strict=True))


def first_difference(got: Any, expected: Any) -> str:
    """Where and how token ids differ from the expected ones, in words."""
    common = min(len(got), len(expected))
    differs = np.flatnonzero(np.asarray(got[:common]) != np.asarray(expected[:common]))
    if len(differs):
        place = int(differs[0])
        return f"token {int(got[place])} in place of {int(expected[place])} at position {place}"
    return f"{len(got)} tokens in place of {len(expected)}"
