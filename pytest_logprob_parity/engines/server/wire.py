"""Requests and completions on the wire: /v1/completions, and /inference/v1/generate for native trace replay."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np

from ...errors import EngineError
from ...trace import MINUS_INFINITY, Forcing, top_k_columns
from ..backend import Completion, Request
from ..vllm.kept_reader import kept_of, wants_kept
from ..vllm.sampling_parameters import sampling_parameters
from .answer import shown

COMPLETIONS: Final = "/v1/completions"
GENERATE: Final = "/inference/v1/generate"

_TOKEN: Final = "token_id:"
_TOKEN_KEY: Final = re.compile(rf"({_TOKEN})?[0-9]{{1,10}}")
#: A logprob so far above 0 (nats) is rounding.
_ROUNDING: Final = 1e-3
#: Bytes that an answer takes at most for one candidate of one token, its text included, and for what stands around them all.
_CANDIDATE: Final = 512
_FRAME: Final = 2**20
#: Bytes that a sampling mask takes at most for one token, on average.
_MASK: Final = 2**16


def post_of(
    request: Request, forcing: Forcing | None, model: str, watched: int | None = None
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """The path and body that ask for one request; `model` is the name that the server knows it by, `watched` the number under
    which its worker keeps what truncation leaves.

    Raises EngineError for what native trace replay cannot do.
    """
    parameters = sampling_parameters(request, forcing, watched)
    prompt = [int(token) for token in (*request.prompt_token_ids, *(request.scored_token_ids or ()))]
    if "trace_decode_token_ids" in parameters:
        return GENERATE, {"model": model, "token_ids": prompt, "sampling_params": parameters}
    del parameters["detokenize"]
    extra = parameters.pop("extra_args", None)
    body = {"model": model, "prompt": prompt, "return_token_ids": True, "return_tokens_as_token_ids": True, **parameters}
    return COMPLETIONS, body | ({} if extra is None else {"vllm_xargs": extra})


def largest_answer(request: Request) -> int:
    """A bound on the bytes of the answer to a request: what its tokens and their candidates take, several times over."""
    tokens = len(request.prompt_token_ids) + len(request.scored_token_ids or request.forced_token_ids or ())
    tokens += 0 if request.forced_token_ids or request.scored_token_ids else request.sampling.max_tokens
    mask = _MASK if wants_kept(request) else 0
    return _FRAME + tokens * ((request.sampling.logprobs + 2) * _CANDIDATE + mask)


def completion_of(
    request: Request, content: Any, max_model_len: int | None, vocabulary: int | None = None,
    names: Collection[str] | None = None,
) -> Completion:  # fmt: skip
    """What a server answered to one request, where that is what a server answers to it.

    `vocabulary` is how many token ids there are, `names` what the model may be called; None is not known. Raises EngineError,
    in one line that names the part, for an answer that lacks what was asked for, contradicts it or itself, or cannot be read.
    """
    choice = choices_of(content, 1)[0]
    if not isinstance(reason := choice.get("finish_reason"), str):
        raise _unlike("choices[0].finish_reason", reason, "a text")
    model = content.get("model")
    if model is not None and names is not None and not (isinstance(model, str) and model in names):
        raise EngineError(f"the server answers with another model than was asked for: {shown(model)}, not {min(names)!r}")
    top = 2**31 if vocabulary is None else vocabulary
    _check_prompt(request, choice, top)
    if request.scored_token_ids is not None:
        scored = _scored(request, choice, top)
        _check_usage(request, content, None)
        return scored
    ids = choice.get("token_ids")
    if ids is None:
        raise EngineError(
            "the server answers without token ids: vLLM gives them for return_token_ids from 0.10.2 on; text alone does not "
            "say which tokens it was"
        )
    _check_ids("token_ids", ids, top)
    logprobs = choice.get("logprobs")
    rows = _rows(logprobs, top) if isinstance(logprobs, Mapping) else None
    if rows is None:
        raise EngineError("the server answers without logprobs, which were asked for (logprobs=K)")
    if len(rows) != len(ids):
        raise EngineError(f"the server answers with {len(ids)} tokens and {len(rows)} logprobs")
    room = math.inf if max_model_len is None else max_model_len - len(request.prompt_token_ids)
    wanted = min(request.sampling.max_tokens if request.forced_token_ids is None else len(request.forced_token_ids), room)
    if reason == "length" and len(ids) < wanted:
        raise EngineError(f"the server stopped after {len(ids)} of {wanted:.0f} tokens, and says that this was asked for")
    if len(ids) > wanted:
        raise EngineError(f"the server answers with {len(ids)} tokens, {wanted:.0f} were asked for")
    _check_usage(request, content, len(ids))
    completion = _completion(ids, rows, request.sampling.logprobs, reason)
    return dataclasses.replace(completion, kept=kept_of(request, len(ids), None, _mask(choice, len(ids), top)))


def _mask(choice: Mapping[str, Any], tokens: int, top: int) -> list[list[int]] | None:
    """The sampling mask of an answer: for each token the ids that truncation kept; None where it has none."""
    mask = choice.get("sampling_mask")
    if mask is None:
        return None
    if not isinstance(mask, list) or len(mask) != tokens:
        raise _unlike("sampling_mask", mask, f"a list of {tokens} lists of token ids")
    for place, ids in enumerate(mask):
        _check_ids(f"sampling_mask[{place}]", ids, top)
    return mask


def choices_of(content: Any, count: int) -> list[Mapping[str, Any]]:
    """The `count` choices of an answer in the order of their indices. Raises EngineError where they are others or none."""
    choices = content.get("choices") if isinstance(content, Mapping) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, Mapping) for choice in choices):
        raise EngineError(f"the server answers with no completion: {shown(content)}")
    if len(choices) != count:
        raise EngineError(f"the server answers with {len(choices)} choices, {count} asked for")
    found: dict[int, Mapping[str, Any]] = {}
    for place, choice in enumerate(choices):
        index = choice.get("index")
        if not _is_whole(index, 0, count - 1):
            raise _unlike(f"choices[{place}].index", index, f"a whole number from 0 to {count - 1}", "index" in choice)
        if index in found:
            raise EngineError(f"the server answers with two choices of index {index}")
        found[index] = choice
    return [found[index] for index in range(count)]


def _unlike(name: str, value: Any, expected: str, is_there: bool = True) -> EngineError:
    """What is said of a part of an answer that is not what vLLM writes there."""
    got = f"is {shown(value):.80}" if is_there else "is missing"
    return EngineError(f"the server's answer is no completion as vLLM writes them: {name} {got}, expected {expected}")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _check_ids(name: str, ids: Any, top: int) -> None:
    if not isinstance(ids, list):
        raise _unlike(name, ids, "a list of token ids")
    for place, token in enumerate(ids):
        if not _is_whole(token, 0, top - 1):
            raise _unlike(f"{name}[{place}]", token, f"a token id from 0 to {top - 1}")


def _check_prompt(request: Request, choice: Mapping[str, Any], top: int) -> None:
    sent = [*request.prompt_token_ids, *(request.scored_token_ids or ())]
    got = choice.get("prompt_token_ids")
    if got is None:
        return
    _check_ids("prompt_token_ids", got, top)
    if got != sent:
        place = next((i for i, (a, b) in enumerate(zip(got, sent, strict=False)) if a != b), min(len(got), len(sent)))
        raise EngineError(
            f"the server took another prompt than was sent: {len(got)} tokens, {len(sent)} were sent; they differ from "
            f"position {place} on"
        )


def _check_usage(request: Request, content: Mapping[str, Any], tokens: int | None) -> None:
    """Hold the counts of an answer, where it has any, against what was sent and what came: `tokens`, None for a prefill's."""
    usage = content.get("usage")
    if usage is None:
        return
    if not isinstance(usage, Mapping):
        raise _unlike("usage", usage, "a table of counts")
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    for name, count in counts.items():
        if count is not None and not _is_whole(count, 0, 2**53):
            raise _unlike(f"usage.{name}", count, "a whole number")
    sent = len(request.prompt_token_ids) + len(request.scored_token_ids or ())
    prompt, written, total = counts.values()
    for name, count, expected in (
        ("prompt_tokens", prompt, sent),
        ("completion_tokens", written, tokens),
        ("total_tokens", total, None if prompt is None or written is None else prompt + written),
    ):
        if count is not None and expected is not None and count != expected:
            raise EngineError(f"the server contradicts itself: usage.{name} is {count}, {expected} by the rest of the answer")


#: One position: the chosen token's logprob and rank (0: unknown), and the candidates, the chosen one among them.
_Row = tuple[float, int, list[tuple[int, float]]]


def _rows(logprobs: Mapping[str, Any], top: int) -> list[_Row] | None:
    """The rows of either route; None where there are none. Raises EngineError for token texts in place of ids."""
    if isinstance(content := logprobs.get("content"), list):
        return [_generated(f"logprobs.content[{i}]", at, top) for i, at in enumerate(content)]
    chosen, tops = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    if not isinstance(chosen, list) or not isinstance(tops, list):
        return None
    if len(chosen) != len(tops):
        raise EngineError(f"the server answers with {len(chosen)} token_logprobs and {len(tops)} top_logprobs")
    rows: list[_Row] = []
    for i, (value, candidates) in enumerate(zip(chosen, tops, strict=True)):
        name = f"logprobs.top_logprobs[{i}]"
        if candidates is not None and not isinstance(candidates, Mapping):
            raise _unlike(name, candidates, "a table of logprobs")
        pairs = [(_token_of(key, name, top), _number(f"{name}[{key[:40]!r}]", v)) for key, v in (candidates or {}).items()]
        if len({token for token, _ in pairs}) < len(pairs):
            raise EngineError(f"the server names a token twice in {name}")
        rows.append((_number(f"logprobs.token_logprobs[{i}]", value), 0, pairs))
    return rows


def _generated(name: str, at: Any, top: int) -> _Row:
    """One position of the generate route, which has ranks."""
    others = at.get("top_logprobs") if isinstance(at, Mapping) else None
    if not isinstance(others, list):
        raise _unlike(name, at, "a token with its top_logprobs")
    pairs = []
    for place, entry in enumerate(others):
        where = f"{name}.top_logprobs[{place}]"
        if not isinstance(entry, Mapping) or not _is_whole(entry.get("token_id"), 0, top - 1):
            raise _unlike(where, entry, f"a table with a token_id from 0 to {top - 1}")
        pairs.append((int(entry["token_id"]), _ranked(where, entry)))
    return _ranked(name, at), _rank(name, at), pairs


def _token_of(key: str, name: str, top: int) -> int:
    """The token id of a key such as `token_id:7`."""
    if not _TOKEN_KEY.fullmatch(key):
        raise EngineError(
            f"the server answers with texts in place of token ids in {name.rpartition('.')[2].partition('[')[0]} "
            f"({key[:40]!r}): it ignores return_tokens_as_token_ids"
        )
    token = int(key.removeprefix(_TOKEN))
    if token >= top:
        raise _unlike(name, key, f"token ids from 0 to {top - 1}")
    return token


def _completion(ids: Sequence[int], rows: Sequence[_Row], k: int, reason: str) -> Completion:
    """The columns of a completion. `logprobs=k` gives k candidates, or k + 1 where the chosen token is none of the top k."""
    length = len(ids)
    logprobs = np.full(length, np.nan, np.float32)
    ranks = np.zeros(length, np.int32)
    tops: list[Sequence[tuple[int, float]]] = []
    for i, (token, (value, rank, candidates)) in enumerate(zip(ids, rows, strict=True)):
        logprobs[i] = value
        among = len(candidates) <= k and rank <= k
        top = sorted((c for c in candidates if among or c[0] != token), key=lambda c: -c[1])[:k]
        if not rank and among and any(c[0] == token for c in top):
            rank = sum(c[1] >= value for c in top)
        ranks[i] = rank
        tops.append(top)
    top_ids, top_logprobs = top_k_columns(tops, k)
    return Completion(
        token_ids=np.asarray(ids, np.int32),
        logprobs=logprobs,
        ranks=ranks,
        top_token_ids=top_ids,
        top_logprobs=top_logprobs,
        finish_reason=reason,
    )


def _scored(request: Request, choice: Mapping[str, Any], top: int) -> Completion:
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
    tops: list[Sequence[tuple[int, float]]] = []
    first = len(request.prompt_token_ids)
    for i, (token, position) in enumerate(zip(tokens, positions[first:], strict=True)):
        found = _candidates(f"prompt_logprobs[{first + i}]", position, top)
        if token in found:
            logprobs[i], ranks[i] = found[token]
        best = sorted(found.items(), key=lambda item: (item[1][1], -item[1][0]))[:k]
        tops.append([(t, value) for t, (value, _) in best])
    top_ids, top_logprobs = top_k_columns(tops, k)
    return Completion(
        token_ids=np.asarray(tokens, np.int32),
        logprobs=logprobs,
        ranks=ranks,
        top_token_ids=top_ids,
        top_logprobs=top_logprobs,
        finish_reason="unknown",
    )


def _candidates(name: str, position: Any, top: int) -> dict[int, tuple[float, int]]:
    """Token id -> (logprob, rank) of one position of `prompt_logprobs`."""
    if position is not None and not isinstance(position, Mapping):
        raise _unlike(name, position, "a table of logprobs by token id")
    found = {}
    for key, entry in (position or {}).items():
        where = f"{name}[{key[:40]!r}]"
        if not isinstance(entry, Mapping) or "logprob" not in entry:
            raise _unlike(where, entry, "a table with a logprob")
        token = _token_of(key, name, top)
        if token in found:
            raise EngineError(f"the server names a token twice in {name}")
        found[token] = (_number(f"{where}.logprob", entry["logprob"]), _rank(where, entry))
    return found


def _rank(name: str, entry: Mapping[str, Any]) -> int:
    rank = entry.get("rank")
    if rank is not None and not _is_whole(rank, 0, 2**31 - 1):
        raise _unlike(f"{name}.rank", rank, "a whole number")
    return rank or 0


def _ranked(name: str, entry: Mapping[str, Any]) -> float:
    """A logprob of the generate route, which writes NaN as -inf without a rank."""
    value = _number(f"{name}.logprob", entry.get("logprob"))
    return math.nan if value == -math.inf and entry.get("rank") is None else value


def _number(name: str, value: Any) -> float:
    """A logprob of the wire: null is what JSON makes of NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _unlike(name, value, "a number")
    if value > _ROUNDING:
        raise _unlike(name, value, "a logprob, 0 or below")
    return -math.inf if value <= MINUS_INFINITY else float(value)
