"""What no engine is asked: prompts that are too long for it, and token ids that it has no logits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UsageError
from ..spec import Sampling
from ..trace import Trace, rows_of
from .backend import Backend


def check_lengths(backend: Backend, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    limit = backend.config.max_model_len
    for index, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            raise UsageError(f"prompts[{index}] has {len(prompt):,} tokens; the engine's context (max_model_len) is {limit:,}")
    most = backend.config.values.get("max_logprobs")
    if isinstance(most, int) and 0 <= most < sampling.logprobs:
        raise UsageError(f"Sampling(logprobs={sampling.logprobs}): the engine gives at most {most}; set max_logprobs")


def check_trace_ids(backend: Backend, trace: Trace) -> None:
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
    if trace.kept_token_ids is not None and trace.kept_token_ids.max(initial=0) >= size:
        row = int(trace.kept_rows[np.argmax(trace.kept_token_ids >= size)])
        sequence = int(trace.sequence_of_token[row])
        token = int(trace.kept_token_ids.max())
        raise _no_token(backend, f"a kept set of sequence {sequence} of the trace", row - trace.bounds(sequence)[0], token)


def check_ids(backend: Backend, ids: Sequence[int], where: str) -> None:
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
