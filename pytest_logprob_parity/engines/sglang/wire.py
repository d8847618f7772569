"""Requests and answers of SGLang's own route, `/generate`, as SGLang 0.5.23's sources write them.

A request has `input_ids`, `return_logprob`, `logprob_start_len` and `top_logprobs_num` (managers/io_struct.py,
GenerateReqInput). The answer's `meta_info.input_token_logprobs` has one `[logprob, token id, text]` for each token from
`logprob_start_len` on, and the first one's logprob is null (managers/scheduler_components/logprob_result_processor.py).
They are the log-softmax of the logits as they are, whatever the temperature. NaN arrives as null (orjson).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from ...errors import EngineError
from ...trace import MINUS_INFINITY, top_k_columns
from ..backend import Completion, Request
from ..server.answer import shown

GENERATE: Final = "/generate"
#: Bytes that an answer takes at most for one candidate of one token, and for what stands around them all.
_CANDIDATE: Final = 128
_FRAME: Final = 2**20
#: A logprob so far above 0 (nats) is rounding.
_ROUNDING: Final = 1e-3


def post_of(request: Request) -> tuple[str, dict[str, Any]]:
    """The path and body that ask for the logprobs of one request's scored tokens. Nothing is generated."""
    prompt, tokens = list(request.prompt_token_ids), list(request.scored_token_ids or ())
    body = {
        "input_ids": [int(token) for token in (*prompt, *tokens)],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt) - 1,
        "top_logprobs_num": request.sampling.logprobs,
        "return_text_in_logprobs": False,
        "stream": False,
    }
    return GENERATE, body


def largest_answer(request: Request) -> int:
    """A bound on the bytes of the answer to a request."""
    return _FRAME + (len(request.scored_token_ids or ()) + 1) * (request.sampling.logprobs + 1) * _CANDIDATE


def completion_of(request: Request, content: Any, vocabulary: int | None) -> Completion:
    """What a server answered to one request. `vocabulary` is how many token ids there are; None is not known.

    Raises EngineError, in one line that names the part, for an answer that lacks what was asked for or contradicts it.
    """
    about = content.get("meta_info") if isinstance(content, Mapping) else None
    if not isinstance(about, Mapping):
        raise EngineError(f"the server answers with no meta_info: {shown(content)}")
    tokens = [int(token) for token in request.scored_token_ids or ()]
    sent = len(request.prompt_token_ids) + len(tokens)
    if about.get("prompt_tokens") not in (None, sent):
        raise EngineError(f"the server took another prompt than was sent: {about['prompt_tokens']} tokens, {sent} were sent")
    rows = _rows(about, "input_token_logprobs", len(tokens) + 1)
    tops = _rows(about, "input_top_logprobs", len(tokens) + 1)
    ids = [int(request.prompt_token_ids[-1]), *tokens]
    logprobs, ranks, best = [], [], []
    for place, (token, row, top) in enumerate(zip(ids, rows, tops, strict=True)):
        name = f"meta_info.input_token_logprobs[{place}]"
        value, told = _pair(name, row)
        # SGLang writes 0 in place of the last ids of its vocabulary, which it takes for images' placeholders.
        if told != token and not (told == 0 and vocabulary is not None and token >= vocabulary - 1):
            raise EngineError(f"the server scored other tokens than were sent: {name} is of token {told}, not of {token}")
        if place == 0:
            continue
        pairs = _candidates(f"meta_info.input_top_logprobs[{place}]", top)
        logprobs.append(value)
        best.append(pairs[: request.sampling.logprobs])
        ranks.append(next((n + 1 for n, (other, _) in enumerate(pairs) if other == token), 0))
    top_ids, top_logprobs = top_k_columns(best, request.sampling.logprobs)
    return Completion(
        token_ids=np.asarray(tokens, np.int32),
        logprobs=np.asarray(logprobs, np.float32),
        ranks=np.asarray(ranks, np.int32),
        top_token_ids=top_ids,
        top_logprobs=top_logprobs,
        finish_reason="unknown",
    )


def _rows(about: Mapping[str, Any], name: str, count: int) -> Sequence[Any]:
    rows = about.get(name)
    if not isinstance(rows, list):
        raise EngineError(f"the server answers without meta_info.{name}, which was asked for (return_logprob)")
    if len(rows) != count:
        raise EngineError(
            f"the server answers with {len(rows)} {name}, {count} were asked for: one for each token from logprob_start_len on"
        )
    return rows


def _candidates(name: str, top: Any) -> list[tuple[int, float]]:
    """The candidates of one position, most likely first."""
    if not isinstance(top, list):
        raise EngineError(f"the server's answer is not as SGLang writes it: {name} is {shown(top):.80}, expected a list")
    pairs = [(token, value) for value, token in (_pair(f"{name}[{i}]", entry) for i, entry in enumerate(top))]
    if len({token for token, _ in pairs}) < len(pairs):
        raise EngineError(f"the server names a token twice in {name}")
    return sorted(pairs, key=lambda pair: -pair[1])


def _pair(name: str, entry: Any) -> tuple[float, int]:
    """The logprob and the token id of an entry `[logprob, token id, text]`."""
    if not isinstance(entry, list) or len(entry) < 2 or type(entry[1]) is not int or not 0 <= entry[1] < 2**31:
        raise EngineError(
            f"the server's answer is not as SGLang writes it: {name} is {shown(entry):.80}, expected [logprob, token id, text]"
        )
    value = entry[0]
    if value is None:
        return math.nan, entry[1]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value > _ROUNDING:
        raise EngineError(
            f"the server's answer is not as SGLang writes it: {name} has {shown(value):.80}, expected a logprob, 0 or below"
        )
    return -math.inf if value <= MINUS_INFINITY else float(value), entry[1]
