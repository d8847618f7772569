"""Runs in vLLM's worker: what truncation left at each step, seen in the decode that reports the truncated logprobs.

Under top-p, top-k and min-p the logprobs of a decode are those of the kept tokens alone. The logits are the same with and
without truncation, so one decode tells both: the logprob of the chosen token before truncation, and which tokens were kept.

Whoever sends a request gives it a number of its own, and takes what was kept under it. A step is kept under its position, so a
request that is preempted, or whose prompt comes in chunks, writes over what it wrote before. What nobody takes is dropped.
"""

from __future__ import annotations

import base64
import functools
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

#: Key in `SamplingParams.extra_args`: the number under which a request's steps are kept; `take` takes them away.
WATCHED: Final = "logprob_parity_watched"
_STORE: Final = "_logprob_parity_kept"
#: vLLM divides by 1 where a temperature is less.
_LEAST_TEMPERATURE: Final = 1e-5
#: A request that wrote nothing for so many seconds was aborted, or its client has left.
_LONGEST_SECONDS: Final = 3600.0
#: Token ids in the store, at most: 512 MiB.
_MOST_IDS: Final = 2**27
#: Bytes of one answer of `take`, about; it has one whole request at least.
_MOST_BYTES: Final = 8 * 2**20

#: One request, each as base64: logprobs before truncation (float32), counts and token ids (int32), little-endian.
Packed = tuple[str, str, str]


@dataclass(slots=True)
class _Request:
    """The steps of one request by position: the logprob before truncation and the ids that were kept."""

    steps: dict[int, tuple[float, Any]] = field(default_factory=dict)
    ids: int = 0
    touched: float = 0.0


class Store:
    """What one worker keeps of the requests that are watched."""

    def __init__(self) -> None:
        self._requests: dict[int, _Request] = {}
        self._ids = 0

    def __len__(self) -> int:
        return len(self._requests)

    def keep(self, keys: Sequence[tuple[int, int]], logprobs: Sequence[float], counts: Sequence[int], ids: Any) -> None:
        """Keep one step: for each (number, position) its logprob, and its `counts` of the `ids` [sum of counts]."""
        now, start = time.monotonic(), 0
        for (number, position), logprob, count in zip(keys, logprobs, counts, strict=True):
            request = self._requests.get(number)
            if request is None and position == 0:  # a later position is of a request that was dropped
                self._drop_old(now)
                request = self._requests[number] = _Request()
            if request is not None:
                before = request.steps.get(position)
                added = count if before is None else count - len(before[1])
                request.steps[position] = (logprob, ids[start : start + count])
                request.ids += added
                request.touched = now
                self._ids += added
            start += count
        while self._ids > _MOST_IDS:
            self._pop(next(iter(self._requests)))

    def take(self, numbers: Sequence[int]) -> dict[str, Packed]:
        """What was kept under these numbers, as far as one answer goes; see `take`."""
        taken: dict[str, Packed] = {}
        size = 0
        for number in numbers:
            if size > _MOST_BYTES:
                break
            if number in self._requests:
                taken[str(number)] = packed = _packed(self._pop(number).steps)
                size += sum(map(len, packed))
        return taken

    def _drop_old(self, now: float) -> None:
        for number in [n for n, request in self._requests.items() if now - request.touched > _LONGEST_SECONDS]:
            self._pop(number)

    def _pop(self, number: int) -> _Request:
        request = self._requests.pop(number)
        self._ids -= request.ids
        return request


def _packed(steps: dict[int, tuple[float, Any]]) -> Packed:
    whole = [steps[position] for position in range(len(steps)) if position in steps]
    if len(whole) < len(steps):  # a hole
        whole = []
    ids = [kept for _, kept in whole]
    columns = (
        np.array([logprob for logprob, _ in whole], "<f4"),
        np.array([len(kept) for kept in ids], "<i4"),
        np.concatenate(ids or [np.empty(0)]).astype("<i4"),
    )
    logprobs, counts, flat = (base64.b64encode(column.tobytes()).decode() for column in columns)
    return logprobs, counts, flat


class Watch:
    """One step of the requests that are watched: `rows` of the batch, and their logprobs [rows, V] before truncation."""

    def __init__(self, runner: Any, rows: list[int], keys: list[tuple[int, int]], free: Any) -> None:
        self._runner = runner
        self._rows = rows
        self._keys = keys
        self._free = free

    @classmethod
    def of_step(cls, runner: Any, sampler: Any, logits: Any, metadata: Any) -> Watch | None:
        """Look at the logits [B, V] of a step before the sampler changes them; None where no request of it is watched."""
        if getattr(metadata, "temperature", None) is None:  # all of them are greedy
            return None
        rows: list[int] = []
        keys: list[tuple[int, int]] = []
        for row, request_id in enumerate(runner.input_batch.req_ids):
            request = runner.requests[request_id]
            extra = getattr(request.sampling_params, "extra_args", None)
            if isinstance(extra, dict) and type(number := extra.get(WATCHED)) is int:
                rows.append(row)
                keys.append((number, len(request.output_token_ids)))
        if not rows:
            return None
        temperature = metadata.temperature
        if len(rows) < len(logits):
            logits, temperature = logits[rows], temperature[rows]
        return cls(runner, rows, keys, _before_truncation(sampler, logits, temperature))

    def keep(self, sampled: Any, processed: Any) -> None:
        """Keep what `processed` logprobs [B, V] say is left, and the logprobs of the `sampled` tokens [B]."""
        whole = len(self._rows) == len(sampled)
        chosen = sampled if whole else sampled[self._rows]
        logprobs = self._free.gather(-1, chosen.long().unsqueeze(-1)).squeeze(-1)
        left = (processed if whole else processed[self._rows]) > float("-inf")
        ids = left.nonzero()[:, 1].int().cpu().numpy()
        store = self._runner.__dict__.setdefault(_STORE, Store())
        store.keep(self._keys, logprobs.tolist(), left.sum(-1).tolist(), ids)


def _before_truncation(sampler: Any, logits: Any, temperature: Any) -> Any:
    """The logprobs [B, V] of logits that are divided by the temperature [B] and not truncated, by the sampler's own functions
    where it has them: what is wrong with those is wrong here, too.
    """
    import torch

    apply, compute = getattr(sampler, "apply_temperature", None), getattr(sampler, "compute_logprobs", None)
    if apply is None or compute is None or not _can_be_greedy(apply):
        temperature = torch.where(temperature < _LEAST_TEMPERATURE, 1.0, temperature)
        return (logits / temperature.unsqueeze(1)).log_softmax(dim=-1, dtype=torch.float32)
    return compute(apply(logits.clone(), temperature, False))


@functools.lru_cache(maxsize=8)
def _can_be_greedy(apply_temperature: Any) -> bool:
    """Whether this version's function leaves rows alone whose temperature is 0."""
    return "all_random" in inspect.signature(apply_temperature).parameters


def take(worker: Any, numbers: Sequence[int]) -> dict[str, Packed]:
    """What was kept of the requests of these numbers, by the number as text: they are no longer kept then.

    Large answers come in parts: ask again for the numbers that an answer lacks, until one has none. A request with a hole
    between its positions has no tokens.
    """
    store: Store | None = getattr(worker.model_runner, _STORE, None)
    whole_numbers = [number for number in numbers if type(number) is int] if isinstance(numbers, (list, tuple)) else []
    return {} if store is None else store.take(whole_numbers)
