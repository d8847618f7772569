"""What vLLM is asked for one request, in the names of its SamplingParams: the same in process and over HTTP."""

from __future__ import annotations

from typing import Any

from ...errors import EngineError
from ...trace import Forcing
from ..backend import Request
from .forced_decode import FORCED
from .kept_sets import WATCHED
from .routing import ROUTED


def sampling_parameters(
    request: Request, forcing: Forcing | None, watched: int | None = None, routed: int | None = None
) -> dict[str, Any]:
    """The SamplingParams of a request as keywords; `forcing` is how the engine forces tokens, `watched` the number under which
    the worker keeps what truncation leaves, `routed` that of its routing, None where it keeps nothing.

    Raises EngineError for what native trace replay cannot do.
    """
    sampling = request.sampling
    if request.scored_token_ids is not None:
        return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": sampling.logprobs, "detokenize": False}
    parameters: dict[str, Any] = {
        name: getattr(sampling, name)
        for name in (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "max_tokens", "min_tokens", "ignore_eos", "logprobs",
        )
    }  # fmt: skip
    if not sampling.top_k:
        parameters["top_k"] = -1  # no top-k, as all versions write it
    parameters |= {"seed": request.seed, "detokenize": bool(sampling.stop)}
    stop_token_ids = list(sampling.stop_token_ids)
    extra = {name: number for name, number in ((WATCHED, watched), (ROUTED, routed)) if number is not None}
    if extra:
        parameters["extra_args"] = extra
    if request.forced_token_ids is None:
        return parameters | {"stop": list(sampling.stop), "stop_token_ids": stop_token_ids}
    forced = [int(token) for token in request.forced_token_ids]
    # min_tokens masks the stop ids, which moves the logprobs; without it they must not end the replay early.
    parameters |= {
        "seed": None,
        "detokenize": False,
        "ignore_eos": True,
        "max_tokens": len(forced),
        "min_tokens": min(sampling.min_tokens, len(forced)),
        "stop_token_ids": stop_token_ids if sampling.min_tokens else [],
    }
    if forcing == "native":
        if sampling.min_tokens:
            raise EngineError("vLLM's trace replay drops the stop ids of min_tokens: it cannot replay min_tokens > 0")
        return parameters | {"trace_decode_token_ids": forced}
    return parameters | {"extra_args": {**extra, FORCED: forced}}
