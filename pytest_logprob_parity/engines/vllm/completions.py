"""From vLLM's outputs to completions: chosen logprobs, ranks and top-k, flat or one dict a position."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...trace import empty_top_k, top_k_columns
from ..backend import Completion, KeptSets, Request, Routing
from .kept_reader import kept_of
from .routing_reader import routing_of


def completion_of(
    request: Request, output: Any, kept: KeptSets | None = None, routing: Routing | None = None
) -> Completion:  # fmt: skip
    """What vLLM wrote, or scored, for one request; `kept` and `routing` are what its worker kept of it.

    Raises EngineError for a routing of the engine's own that is not of these tokens.
    """
    written = output.outputs[0]
    if request.scored_token_ids is not None:
        tokens = np.asarray(request.scored_token_ids, np.int32)
        logprobs = output.prompt_logprobs[len(request.prompt_token_ids) :]
        reason = "unknown"
    else:
        tokens = np.asarray(written.token_ids, np.int32)
        logprobs, reason = written.logprobs, str(written.finish_reason)
    chosen, ranks, top_ids, top_logprobs = _columns(tokens, logprobs, request.sampling.logprobs)
    return Completion(
        token_ids=tokens, logprobs=chosen, ranks=ranks, top_token_ids=top_ids, top_logprobs=top_logprobs, finish_reason=reason,
        kept=kept_of(request, len(tokens), kept, getattr(getattr(written, "sampling_mask", None), "token_ids", None)),
        routing=routing_of(request, len(tokens), routing, getattr(written, "routed_experts", None)),
    )  # fmt: skip


def _columns(tokens: Any, logprobs: Any, k: int) -> tuple[Any, Any, Any, Any]:
    """Chosen logprobs and ranks [L], top ids and logprobs [L, k] of vLLM's logprobs, flat or one dict a position."""
    length = len(tokens)
    if length == 0:
        return np.empty(0, np.float32), np.empty(0, np.int32), *empty_top_k(0, k)
    if hasattr(logprobs, "start_indices"):
        starts = np.asarray(logprobs.start_indices[:length])
        widths = np.asarray(logprobs.end_indices[:length]) - starts
        if np.all(widths == k + 1):
            # The chosen token first, then the top k; the ids are compared, for a place alone proves nothing.
            first, last = int(starts[0]), int(starts[-1]) + k + 1
            ids = np.asarray(logprobs.token_ids[first:last], np.int32).reshape(length, k + 1)
            values = np.asarray(logprobs.logprobs[first:last], np.float32).reshape(length, k + 1)
            ranks = np.asarray(logprobs.ranks[first : last : k + 1], np.int32)
            if np.array_equal(ids[:, 0], tokens):
                return values[:, 0].copy(), ranks, ids[:, 1:].copy(), values[:, 1:].copy()
    chosen = np.full(length, np.nan, np.float32)
    ranks = np.zeros(length, np.int32)
    tops: list[list[tuple[int, float]]] = []
    for i, (token, position) in enumerate(zip(tokens.tolist(), logprobs, strict=True)):
        if position and token in position:
            chosen[i], ranks[i] = position[token].logprob, position[token].rank or 0
        top = sorted((position or {}).items(), key=lambda item: (item[1].rank or 0, -item[1].logprob))[:k]
        tops.append([(t, v.logprob) for t, v in top])
    return chosen, ranks, *top_k_columns(tops, k)
