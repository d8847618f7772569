"""Requests and completions on the wire: /v1/completions, and /inference/v1/generate for native trace replay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ...errors import EngineError
from ...trace import MINUS_INFINITY, Forcing
from ..base import Completion, Request
from ..sampling_parameters import sampling_parameters

COMPLETIONS: Final = "/v1/completions"
GENERATE: Final = "/inference/v1/generate"

_TOKEN: Final = "token_id:"


def post_of(request: Request, forcing: Forcing | None, model: str) -> tuple[str, dict[str, Any]]:
    """The path and body that ask for one request; `model` is the name that the server knows it by.

    Raises EngineError for what native trace replay cannot do.
    """
    parameters = sampling_parameters(request, forcing)
    prompt = [int(token) for token in (*request.prompt_token_ids, *(request.scored_token_ids or ()))]
    if "trace_decode_token_ids" in parameters:
        return GENERATE, {"model": model, "token_ids": prompt, "sampling_params": parameters}
    del parameters["detokenize"]
    extra = parameters.pop("extra_args", None)
    body = {"model": model, "prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True, **parameters}
    return COMPLETIONS, body | ({} if extra is None else {"vllm_xargs": extra})


def completion_of(request: Request, content: Any, max_model_len: int | None) -> Completion:
    """What a server answered to one request. Raises EngineError for an answer that lacks what was asked for."""
    try:
        choice = content["choices"][0]
        reason = str(choice["finish_reason"])
    except (TypeError, KeyError, IndexError):
        raise EngineError(f"the server answers with no completion: {content!s:.200}") from None
    _check_prompt(request, choice)
    if request.scored_token_ids is not None:
        return _scored(request, choice)
    ids = choice.get("token_ids")
    if not isinstance(ids, list):
        raise EngineError(
            "the server answers without token ids: vLLM gives them for return_token_ids from 0.10.2 on; text alone does not "
            "say which tokens it was"
        )
    logprobs = choice.get("logprobs")
    rows = _rows(logprobs) if isinstance(logprobs, Mapping) else None
    if rows is None:
        raise EngineError("the server answers without logprobs, which were asked for (logprobs=K)")
    if len(rows) != len(ids):
        raise EngineError(f"the server answers with {len(ids)} tokens and {len(rows)} logprobs")
    room = math.inf if max_model_len is None else max_model_len - len(request.prompt_token_ids)
    wanted = min(request.sampling.max_tokens if request.forced_token_ids is None else len(request.forced_token_ids), room)
    if reason == "length" and len(ids) < wanted:
        raise EngineError(f"the server stopped after {len(ids)} of {wanted:.0f} tokens, and says that this was asked for")
    return _completion(ids, rows, request.sampling.logprobs, reason)


def _check_prompt(request: Request, choice: Mapping[str, Any]) -> None:
    sent = [*request.prompt_token_ids, *(request.scored_token_ids or ())]
    got = choice.get("prompt_token_ids")
    if got is not None and got != sent:
        raise EngineError(f"the server took another prompt than was sent: {len(got)} tokens, {len(sent)} were sent")


#: One position: the chosen token's logprob and rank (0: unknown), and the candidates, the chosen one among them.
_Row = tuple[float, int, list[tuple[int, float]]]


def _rows(logprobs: Mapping[str, Any]) -> list[_Row] | None:
    """The rows of either route; None where there are none. Raises EngineError for token texts in place of ids."""
    if isinstance(content := logprobs.get("content"), list):
        return [(_ranked(at), at.get("rank") or 0, [(c["token_id"], _ranked(c)) for c in at["top_logprobs"]]) for at in content]
    chosen, tops = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    if not isinstance(chosen, list) or not isinstance(tops, list):
        return None
    try:
        return [
            (_number(value), 0, [(int(key.removeprefix(_TOKEN)), _number(v)) for key, v in (top or {}).items()])
            for value, top in zip(chosen, tops, strict=True)
        ]
    except ValueError:
        raise EngineError(
            "the server answers with texts in place of token ids in top_logprobs: it ignores return_tokens_as_token_ids"
        ) from None


def _completion(ids: Sequence[int], rows: Sequence[_Row], k: int, reason: str) -> Completion:
    """The columns of a completion. `logprobs=k` gives k candidates, or k + 1 where the chosen token is none of the top k."""
    length = len(ids)
    logprobs = np.full(length, np.nan, np.float32)
    ranks = np.zeros(length, np.int32)
    top_ids = np.full((length, k), -1, np.int32)
    top_logprobs = np.full((length, k), -np.inf, np.float32)
    for i, (token, (value, rank, candidates)) in enumerate(zip(ids, rows, strict=True)):
        logprobs[i] = value
        among = len(candidates) <= k and rank <= k
        top = sorted((c for c in candidates if among or c[0] != token), key=lambda c: -c[1])[:k]
        if not rank and among and any(c[0] == token for c in top):
            rank = sum(c[1] >= value for c in top)
        ranks[i] = rank
        top_ids[i, : len(top)] = [c[0] for c in top]
        top_logprobs[i, : len(top)] = [c[1] for c in top]
    return Completion(np.asarray(ids, np.int32), logprobs, ranks, top_ids, top_logprobs, reason)


def _scored(request: Request, choice: Mapping[str, Any]) -> Completion:
    """The scored tokens' columns, of `prompt_logprobs`: these carry ranks."""
    tokens = [int(token) for token in request.scored_token_ids or ()]
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list):
        raise EngineError("the server answers without prompt_logprobs, which were asked for")
    if len(positions) != len(request.prompt_token_ids) + len(tokens):
        raise EngineError(
            f"the server answers with {len(positions)} prompt_logprobs for {len(request.prompt_token_ids) + len(tokens)} tokens"
        )
    k = request.sampling.logprobs
    logprobs = np.full(len(tokens), np.nan, np.float32)
    ranks = np.zeros(len(tokens), np.int32)
    top_ids = np.full((len(tokens), k), -1, np.int32)
    top_logprobs = np.full((len(tokens), k), -np.inf, np.float32)
    for i, (token, position) in enumerate(zip(tokens, positions[len(request.prompt_token_ids) :], strict=True)):
        found = {int(key): entry for key, entry in (position or {}).items()}
        if token in found:
            logprobs[i], ranks[i] = _number(found[token]["logprob"]), found[token].get("rank") or 0
        top = sorted(found.items(), key=lambda item: (item[1].get("rank") or 0, -_number(item[1]["logprob"])))[:k]
        top_ids[i, : len(top)] = [t for t, _ in top]
        top_logprobs[i, : len(top)] = [_number(entry["logprob"]) for _, entry in top]
    return Completion(np.asarray(tokens, np.int32), logprobs, ranks, top_ids, top_logprobs, "unknown")


def _ranked(entry: Mapping[str, Any]) -> float:
    """A logprob of the generate route, which writes NaN as -inf without a rank."""
    value = _number(entry["logprob"])
    return math.nan if value == -math.inf and entry.get("rank") is None else value


def _number(value: Any) -> float:
    """A logprob of the wire: null is what JSON makes of NaN."""
    if value is None:
        return math.nan
    return -math.inf if value <= MINUS_INFINITY else float(value)
