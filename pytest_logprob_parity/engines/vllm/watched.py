"""What vLLM's worker kept beside the logprobs of a run (see `kept_sets`, `routing`), put into the completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Completion, KeptSets, Request, ResolvedConfig, Routing
from . import forced_decode, kept_sets


def tells_kept(request: Request, config: ResolvedConfig) -> bool:
    """Whether the worker keeps what truncation leaves of this request."""
    truncates = request.sampling.truncates and request.scored_token_ids is None
    return truncates and config.forcing == "sampler" and config.logprobs_mode == "processed_logprobs"


def tells_routing(request: Request, config: ResolvedConfig) -> bool:
    """Whether the worker of a mixture of experts keeps the routing of this request: of decoded tokens."""
    return request.scored_token_ids is None and config.forcing == "sampler"


def is_routed(vllm_config: Any) -> bool:
    """Whether an engine's model routes tokens to experts, and the engine does not return the routing itself."""
    model = vllm_config.model_config
    if getattr(getattr(vllm_config, "aux_output_config", None), "enable_return_routed_experts", False):
        return False
    try:
        return int(model.get_num_experts()) > 1
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return False


def with_watched(
    llm: Any, completions: Sequence[Completion], requests: Sequence[Request], config: ResolvedConfig, *, routed: bool
) -> list[Completion]:
    """Completions with what the worker kept of them: what truncation left, and with `routed` their experts."""
    kept = _kept_sets(llm) if any(tells_kept(r, config) for r in requests) else {}
    routing = _routings(llm) if routed and any(tells_routing(r, config) for r in requests) else {}
    return [
        _with(completion, kept.get(str(place)), routing.get(str(place))) for place, completion in enumerate(completions)
    ]  # fmt: skip


def _with(completion: Completion, kept: KeptSets | None, routing: Routing | None) -> Completion:
    """A completion with those of the two that are of as many tokens."""
    length = len(completion.token_ids)
    if kept is not None and len(kept.counts) == length:
        completion = dataclasses.replace(completion, kept=kept)
    if routing is not None and len(routing.experts) == length:
        completion = dataclasses.replace(completion, routing=routing)
    return completion


def _taken(llm: Any, name: str, function: Any) -> dict[str, Any]:
    """What the worker kept since the last time, by the number of the request; {} where nobody can ask it."""
    extended = getattr(llm.llm_engine.vllm_config.parallel_config, "worker_extension_cls", "")
    try:
        taken: dict[str, Any] = llm.collective_rpc(name if extended else function)[0]
    except (AttributeError, NotImplementedError, TypeError):
        return {}
    return taken


def _kept_sets(llm: Any) -> dict[str, KeptSets]:
    return {
        number: KeptSets(
            untruncated_logprobs=np.asarray(logprobs, np.float32),
            counts=np.asarray(counts, np.int32),
            token_ids=np.asarray(ids, np.int32),
        )
        for number, (logprobs, counts, ids) in _taken(llm, "logprob_parity_kept", kept_sets.take).items()
    }


def _routings(llm: Any) -> dict[str, Routing]:
    routings = {}
    for number, (shape, *data) in _taken(llm, "logprob_parity_routing", forced_decode.taken_routing).items():
        experts, margins, inputs = (
            np.frombuffer(column, dtype) for column, dtype in zip(data, (np.int16, np.float16, np.float16), strict=True)
        )
        routings[number] = Routing(
            experts=experts.reshape(shape), margins=margins.reshape(shape[:2]), inputs=inputs.reshape(shape[:2])
        )
    return routings
