"""From logits to logprobs and tokens in numpy and float64, in vLLM's order: for engines that hand over all their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..spec import Sampling
from .backend import Completion, Request

Logits: TypeAlias = npt.NDArray[np.float64]


def process(
    logits: Logits, sampling: Sampling, prompt: Sequence[int], written: Sequence[int], end_ids: frozenset[int]
) -> Logits:
    """Logits [V] after minimum length, penalties, temperature and truncation: -inf where a token is excluded."""
    logits = penalize(logits, sampling, prompt, written, end_ids)
    return logits if sampling.greedy else truncate(logits / sampling.temperature, sampling)


def penalize(
    logits: Logits, sampling: Sampling, prompt: Sequence[int], written: Sequence[int], end_ids: frozenset[int]
) -> Logits:
    """Logits [V] after minimum length and penalties."""
    logits = logits.copy()
    if len(written) < sampling.min_tokens:
        logits[sorted(end_ids | set(sampling.stop_token_ids))] = -np.inf
    if sampling.repetition_penalty != 1:
        seen = sorted({*prompt, *written})
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if written and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = np.unique(written, return_counts=True)
        logits[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return logits


def truncate(logits: Logits, sampling: Sampling) -> Logits:
    """Logits [V] after min-p, top-k and top-p."""
    if sampling.min_p > 0:
        logits = np.where(logits < logits.max() + np.log(sampling.min_p), -np.inf, logits)
    if 0 < sampling.top_k < len(logits):
        logits = np.where(logits < np.partition(logits, -sampling.top_k)[-sampling.top_k], -np.inf, logits)
    if sampling.top_p < 1:
        order = np.argsort(logits, kind="stable")  # ascending: the tail whose mass stays within 1 - top_p goes
        tail = np.cumsum(np.exp(log_softmax(logits[order]))) <= 1 - sampling.top_p
        tail[-1] = False
        logits[order[tail]] = -np.inf
    return logits


def log_softmax(logits: Logits) -> Logits:
    """Logprobs [..., V] of logits [..., V]."""
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs: Logits = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logprobs


@dataclass(kw_only=True)
class Sequenced:
    """One request while it is answered: what was written, and its rows; `end_ids` end it, `longest` bounds prompt and all."""

    request: Request
    processed: bool
    end_ids: frozenset[int]
    longest: int
    written: list[int] = field(default_factory=list)
    rows: list[tuple[float, int, Any, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.request.seed or 0)

    def take(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token, of its logits [V]: the forced one, or a sampled one."""
        request, exact = self.request, logits.astype(np.float64)
        scores = process(exact, request.sampling, request.prompt_token_ids, self.written, self.end_ids)
        if request.forced_token_ids is not None:
            token = int(request.forced_token_ids[len(self.written)])
        elif request.sampling.greedy:
            token = int(scores.argmax())
        else:
            mass = np.cumsum(np.exp(log_softmax(scores)))
            token = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        self.written.append(token)
        self.rows.append(row_of(log_softmax(scores if self.processed else exact), token, request.sampling.logprobs))
        return token

    def finish_reason(self, text: str | None = None) -> str:
        """Why it has ended, "" while it has not; `text` is what was written, where the request has stop strings."""
        sampling, written = self.request.sampling, self.written
        if self.request.forced_token_ids is not None:
            return "length" if len(written) == len(self.request.forced_token_ids) else ""
        if len(written) >= sampling.min_tokens:
            if written[-1] in sampling.stop_token_ids or (written[-1] in self.end_ids and not sampling.ignore_eos):
                return "stop"
            if text is not None and any(stop in text for stop in sampling.stop):
                return "stop"
        full = len(written) + len(self.request.prompt_token_ids) >= self.longest
        return "length" if len(written) == sampling.max_tokens or full else ""


def row_of(logprobs: Logits, token: int, k: int) -> tuple[float, int, Any, Any]:
    """Of logprobs [V]: those of `token`, its rank from 1 on, and the k best, ids and logprobs."""
    best = np.argsort(-logprobs, kind="stable")[:k]
    return float(logprobs[token]), int((logprobs > logprobs[token]).sum()) + 1, best, logprobs[best]


def completion_of(tokens: Sequence[int], rows: Sequence[tuple[float, int, Any, Any]], reason: str) -> Completion:
    """The columns of a completion, of its rows."""
    logprobs, ranks, ids, best = zip(*rows, strict=True)
    return Completion(
        token_ids=np.asarray(tokens, np.int32),
        logprobs=np.asarray(logprobs, np.float32),
        ranks=np.asarray(ranks, np.int32),
        top_token_ids=np.asarray(ids, np.int32),
        top_logprobs=np.asarray(best, np.float32),
        finish_reason=reason,
    )
