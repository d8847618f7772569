"""From an engine's completions to the columns of a trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..trace import empty_top_k
from .backend import Backend, Completion


@dataclass(kw_only=True)
class Rows:
    """The columns of a trace over the same tokens as another one, filled piece by piece."""

    logprobs: Any
    ranks: Any
    top_token_ids: Any
    top_logprobs: Any

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


def labels(backend: Backend) -> dict[str, Any]:
    config = backend.config
    return {
        "logprobs_mode": config.logprobs_mode,
        "engine": config.engine,
        "engine_version": config.version,
        "dtype": config.dtype,
    }
