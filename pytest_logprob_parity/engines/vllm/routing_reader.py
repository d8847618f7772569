"""Takes the experts of a mixture of experts: from vLLM's worker, under numbers of our own, or from what vLLM itself returns."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import EngineError, UsageError
from ...trace import completion_rows
from ..backend import Request, ResolvedConfig, Routing
from .numbered_requests import Ask, numbers_of, take


def is_watched(vllm_config: Any) -> bool:
    """Whether an engine's worker is to tell its routing: a mixture of experts, which does not return the routing itself."""
    if getattr(getattr(vllm_config, "aux_output_config", None), "enable_return_routed_experts", False):
        return False
    try:
        return int(vllm_config.model_config.get_num_experts()) > 1
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False


def routing_numbers(requests: Sequence[Request], config: ResolvedConfig, *, watched: bool) -> list[int | None]:
    """A number for each request whose experts the worker is to keep, None for the others: no two runs have one in common."""
    able = watched and config.forcing == "sampler"
    return numbers_of([able and wants_routing(request) for request in requests])


def wants_routing(request: Request) -> bool:
    """Whether the experts of a request are asked for: those of decoded tokens."""
    return request.tells_kept and request.scored_token_ids is None


def take_routings(numbers: Sequence[int | None], ask: Ask) -> dict[int | None, Routing]:
    """What the worker kept under these numbers; those that it does not have are left out. Raises EngineError for an answer that
    is none.
    """
    return take(numbers, ask, unpacked)


def unpacked(packed: Any) -> Routing:
    """One request of `routing.take_routing`. Raises EngineError."""
    try:
        shape, *columns = packed
        experts, margins, inputs = (
            np.frombuffer(base64.b64decode(column, validate=True), dtype)
            for column, dtype in zip(columns, ("<i2", "<f2", "<f2"), strict=True)
        )
        length, layers, k = shape
        return Routing(
            experts=experts.reshape(length, layers, k),
            margins=margins.reshape(length, layers),
            inputs=inputs.reshape(length, layers),
        )
    except (ValueError, TypeError, binascii.Error) as error:
        raise EngineError(f"the worker's routing cannot be read ({error}): install one version on both sides") from None


def routing_of(request: Request, tokens: int, routing: Routing | None, returned: Any) -> Routing | None:
    """The routing of the `tokens` that a request wrote: what the worker said, else what vLLM returned for the whole sequence.

    A worker may be a step ahead of what came out; one that is behind says nothing. Raises EngineError for rows of vLLM's that
    are not of these tokens.
    """
    if routing is None and returned is not None and request.scored_token_ids is None:
        try:
            return Routing(experts=completion_rows(returned, len(request.prompt_token_ids), tokens))
        except UsageError as error:
            raise EngineError(f"the engine's routing is not of its tokens: {error}; check it without prefix caching") from None
    if routing is None or len(routing.experts) < tokens:
        return None
    if len(routing.experts) == tokens:
        return routing
    columns = ("experts", "margins", "inputs")
    return Routing(**{name: getattr(routing, name)[:tokens] for name in columns})
