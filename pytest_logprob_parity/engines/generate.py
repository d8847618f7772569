"""Ask an engine for new completions, turn by turn, or with a weight update on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.prompts import Prompt
from ..checkpoint.weight_update import WeightUpdate
from ..errors import UsageError
from ..spec import Sampling
from ..trace import NO_SEED, BoolArray, Trace, finish_code, offsets_of
from ..trace.columns import IntArray
from .backend import Backend, Completion, Request, TakesWeights
from .columns import Rows, labels
from .refusals import check_ids, check_lengths


def generate(
    backend: Backend, prompts: Sequence[Prompt], sampling: Sampling, tokenizer: Any = None,
    run: Callable[[Sequence[Request]], list[Completion]] | None = None,
) -> Trace:  # fmt: skip
    """Sample `sampling.n` completions of every prompt; each sequence has a seed of its own, `sampling.seed` + its number.

    A prompt with turns is written turn by turn; what the environment says between them is masked in the trace.
    `tokenizer` gives the texts of the tokens, `run` answers requests in the backend's place. Raises EngineError, and UsageError
    for an engine that only scores.
    """
    _check(backend, prompts, sampling)
    groups = [group for group in range(len(prompts)) for _ in range(sampling.n)]
    sequences = len(groups)
    seeds = [sampling.seed + index for index in range(sequences)]
    histories = [list(prompts[group].token_ids) for group in groups]
    written: list[list[tuple[Completion, int]]] = [[] for _ in groups]  # a turn, and how many masked tokens follow it
    finish = ["unknown"] * sequences
    for turn in range(max(len(p.between) for p in prompts) + 1):
        alive = [i for i, group in enumerate(groups) if turn <= len(prompts[group].between)]
        requests = [
            Request(
                prompt_token_ids=histories[i],
                sampling=sampling,
                seed=turn_seed(seeds[i], turn, sequences),
                tells_kept=True,
            )
            for i in alive
        ]
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
    rows, mask = _filled(written, offsets.tolist(), sampling.logprobs)
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
        **rows.optional_columns(),
        finish_reasons=[finish_code(reason) for reason in finish],
        group=groups,
        seeds=seeds,
        sampling=sampling,
        path="decode",
        **labels(backend),
    )
    return trace.with_(token_texts=_texts(trace, tokenizer)) if tokenizer is not None else trace


def _check(backend: Backend, prompts: Sequence[Prompt], sampling: Sampling) -> None:
    """Raise UsageError for an engine that only scores, and for prompts that are too long or have unknown ids."""
    if not backend.config.generates:
        raise UsageError(f"{backend.config.unforced}; it writes no completions: record with another engine")
    check_lengths(backend, [p.token_ids for p in prompts], sampling)
    for index, prompt in enumerate(prompts):
        for part, ids in enumerate((prompt.token_ids, *prompt.between)):
            check_ids(backend, ids, f"prompts[{index}]" + (f", before turn {part}," if part else ""))


def generate_with_drafts(
    backend: Backend, prompts: Sequence[Prompt], sampling: Sampling, tokenizer: Any
) -> tuple[Trace, npt.NDArray[np.uint8] | None]:
    """What `generate` does; also how each token [N] came about (`Completion.drafted`), None where the backend does not tell.

    Raises UsageError for prompts with turns.
    """
    if any(prompt.between for prompt in prompts):
        raise UsageError("accepted drafts are told of single turns, not of turns of an environment")
    drafted: list[npt.NDArray[np.uint8] | None] = []

    def run(requests: Sequence[Request]) -> list[Completion]:
        completions = backend.run(requests)
        drafted[:] = [completion.drafted for completion in completions]
        return completions

    trace = generate(backend, prompts, sampling, tokenizer, run)
    told = [of for of in drafted if of is not None]
    return trace, np.concatenate(told) if len(told) == len(drafted) else None


def _filled(written: list[list[tuple[Completion, int]]], offsets: list[int], k: int) -> tuple[Rows, BoolArray]:
    """The columns of sequences that begin at `offsets`, and the mask: False where the environment wrote the token."""
    rows = Rows.empty(offsets[-1], k)
    mask = np.ones(offsets[-1], bool)
    for position, turns in zip(offsets, written, strict=False):
        for completion, environment in turns:
            rows.fill(position, completion)
            position += len(completion.token_ids)
            mask[position : position + environment] = False
            position += environment
    return rows, mask


def generate_through(
    backend: Backend, prompts: Sequence[Prompt], sampling: Sampling, tokenizer: Any, update: WeightUpdate, version: int
) -> Trace:
    """What `generate` does, with a weight update on the way: the trace's `weight_versions` are `version`, then one more, which
    is its `newest_version` even where every request had ended by then. `engine_versions` say the same by the engine's labels.

    Raises UsageError for prompts with turns, EngineError where the engine cannot take the update.
    """
    if any(prompt.between for prompt in prompts):
        raise UsageError("a weight update in flight goes with single turns, not with turns of an environment")
    if not isinstance(backend, TakesWeights):
        raise UsageError(f"{backend.config.engine} takes no weight updates in flight")
    before: list[int] = []
    labels_of: list[IntArray | None] = []

    def run(requests: Sequence[Request]) -> list[Completion]:
        completions, before[:] = backend.run_through(requests, update)
        labels_of[:] = [completion.engine_versions for completion in completions]
        return list(completions)

    trace = generate(backend, prompts, sampling, tokenizer, run)
    versions = np.full(trace.num_tokens, version, np.int32)
    for sequence, count in enumerate(before):
        start, stop = trace.bounds(sequence)
        versions[start + count : stop] = version + 1
    labels_there = [claimed for claimed in labels_of if claimed is not None]
    claimed = None
    if labels_there and len(labels_there) == trace.num_sequences:
        told = np.concatenate(labels_there)
        claimed = np.where(told < 0, -1, told + version).astype(np.int32)
    return trace.with_(weight_versions=versions, engine_versions=claimed, newest_version=version + 1)


def turn_seed(seed: int, turn: int, sequences: int) -> int | None:
    """The seed of one turn of a sequence: no two turns of a trace share one. None where there is no seed."""
    return None if seed == NO_SEED else seed + turn * sequences


def _texts(trace: Trace, tokenizer: Any) -> dict[int, str]:
    """The text of every token that the trace names."""
    ids = np.unique(np.concatenate([trace.prompt_token_ids, trace.token_ids, trace.top_token_ids.ravel()]))
    known = [int(i) for i in ids if 0 <= i < len(tokenizer)]
    return dict(zip(known, tokenizer.batch_decode([[i] for i in known]), strict=True))
