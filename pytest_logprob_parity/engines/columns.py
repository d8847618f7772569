"""From an engine's completions to the columns of a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import EngineError
from ..trace import empty_top_k
from .backend import Backend, Completion, KeptSets, Routing


@dataclass(kw_only=True)
class Rows:
    """The columns of a trace over the same tokens as another one, filled piece by piece."""

    logprobs: Any
    ranks: Any
    top_token_ids: Any
    top_logprobs: Any
    kept: list[tuple[int, KeptSets | None, int]] = field(default_factory=list)
    routings: list[tuple[int, Routing | None, int]] = field(default_factory=list)

    @classmethod
    def empty(cls, tokens: int, k: int) -> Rows:
        top_token_ids, top_logprobs = empty_top_k(tokens, k)
        return cls(
            logprobs=np.full(tokens, np.nan, np.float32),
            ranks=np.zeros(tokens, np.int32),
            top_token_ids=top_token_ids,
            top_logprobs=top_logprobs,
        )

    def fill(self, start: int, completion: Completion) -> None:
        rows = slice(start, start + len(completion.token_ids))
        self.logprobs[rows] = completion.logprobs
        self.ranks[rows] = completion.ranks
        self.top_token_ids[rows] = completion.top_token_ids
        self.top_logprobs[rows] = completion.top_logprobs
        self.kept.append((start, completion.kept, len(completion.token_ids)))
        self.routings.append((start, completion.routing, len(completion.token_ids)))

    def optional_columns(self) -> dict[str, Any]:
        """The columns that not every completion brings; None each where one lacks them."""
        return {**self.kept_columns(), **self.routing_columns()}

    def routing_columns(self) -> dict[str, Any]:
        """The columns `routed_experts`, `router_margins` and `router_inputs`; None each where a completion lacks them.

        Raises EngineError for completions whose routings have other shapes.
        """
        pieces = [(start, routing) for start, routing, length in self.routings if length]
        columns: dict[str, Any] = dict.fromkeys(("routed_experts", "router_margins", "router_inputs"))
        known = [routing for _, routing in pieces if routing is not None]
        if not known or len(known) < len(pieces):
            return columns
        shapes = {routing.experts.shape[1:] for routing in known}
        if len(shapes) > 1:
            raise EngineError(f"the engine told routings of {len(shapes)} shapes ({sorted(shapes)}): one model has one")
        shape = (len(self.logprobs), *shapes.pop())
        columns["routed_experts"] = np.full(shape, -1, np.int16)
        if all(routing.margins is not None and routing.inputs is not None for routing in known):
            columns |= {name: np.full(shape[:2], np.nan, np.float16) for name in ("router_margins", "router_inputs")}
        for start, routing in pieces:
            assert routing is not None
            rows = slice(start, start + len(routing.experts))
            columns["routed_experts"][rows] = routing.experts
            if columns["router_margins"] is not None:
                columns["router_margins"][rows], columns["router_inputs"][rows] = routing.margins, routing.inputs
        return columns

    def kept_columns(self) -> dict[str, Any]:
        """The columns `untruncated_logprobs`, `kept_counts` and `kept_token_ids`; None each where a completion lacks them."""
        pieces = [(start, kept) for start, kept, length in sorted(self.kept, key=lambda piece: piece[0]) if length]
        sets = [kept for _, kept in pieces if kept is not None]
        if not sets or len(sets) < len(pieces):
            return {"untruncated_logprobs": None, "kept_counts": None, "kept_token_ids": None}
        free: Any = np.full(len(self.logprobs), np.nan, np.float32)
        counts = np.zeros(len(self.logprobs), np.int32)
        for start, kept in pieces:
            assert kept is not None
            rows = slice(start, start + len(kept.counts))
            counts[rows] = kept.counts
            if free is not None:
                free = None if kept.untruncated_logprobs is None else free
            if free is not None:
                free[rows] = kept.untruncated_logprobs
        ids = np.concatenate([kept.token_ids for kept in sets])
        return {"untruncated_logprobs": free, "kept_counts": counts, "kept_token_ids": ids}


def labels(backend: Backend) -> dict[str, Any]:
    config = backend.config
    return {
        "logprobs_mode": config.logprobs_mode,
        "engine": config.engine,
        "engine_version": config.version,
        "dtype": config.dtype,
    }
