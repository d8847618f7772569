"""Takes what vLLM says that truncation kept: from its worker, under numbers of our own, or from its own sampling mask."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import EngineError
from ..backend import KeptSets, Request, ResolvedConfig
from .numbered_requests import Ask, numbers_of, take


def numbered(requests: Sequence[Request], config: ResolvedConfig) -> list[int | None]:
    """A number for each request whose kept tokens the worker is to keep, None for the others: no two runs have one in common,
    on whatever side of a server they are.
    """
    able = config.forcing == "sampler" and config.logprobs_mode == "processed_logprobs"
    return numbers_of([able and wants_kept(request) for request in requests])


def wants_kept(request: Request) -> bool:
    """Whether the kept tokens of a request are asked for, and there is something to tell."""
    return request.tells_kept and request.sampling.truncates and request.scored_token_ids is None


def take_kept(numbers: Sequence[int | None], ask: Ask) -> dict[int | None, KeptSets]:
    """What the worker kept under these numbers; those that it does not have are left out. Raises EngineError for an answer that
    is none.
    """
    return take(numbers, ask, unpacked)


def unpacked(packed: Any) -> KeptSets:
    """One request of `kept_sets.take`. Raises EngineError."""
    try:
        logprobs, counts, ids = (
            np.frombuffer(base64.b64decode(column, validate=True), dtype)
            for column, dtype in zip(packed, ("<f4", "<i4", "<i4"), strict=True)
        )
    except (ValueError, TypeError, binascii.Error) as error:
        raise EngineError(f"the worker's kept tokens cannot be read ({error}): install one version on both sides") from None
    if len(logprobs) != len(counts) or np.any(counts < 0) or int(counts.sum(dtype=np.int64)) != len(ids):
        raise EngineError("the worker's kept tokens do not fit together: install one version on both sides")
    return KeptSets(untruncated_logprobs=logprobs, counts=counts, token_ids=ids)


def kept_of_mask(mask: Sequence[Sequence[int]]) -> KeptSets:
    """The kept tokens of vLLM's own sampling mask (`return_sampling_mask`): one list of ids for each token."""
    counts = np.fromiter(map(len, mask), np.int32, len(mask))
    ids = np.concatenate([np.asarray(kept, np.int32) for kept in mask]) if len(mask) else np.empty(0, np.int32)
    return KeptSets(counts=counts, token_ids=ids)


def kept_of(request: Request, tokens: int, kept: KeptSets | None, mask: Sequence[Sequence[int]] | None) -> KeptSets | None:
    """What is known to be kept of the `tokens` that a request wrote: what the worker said, else the sampling mask. A worker may
    be a step ahead of what came out; one that is behind says nothing.
    """
    if kept is None and mask is not None and wants_kept(request):
        kept = kept_of_mask(mask)
    return None if kept is None else kept.first(tokens)
