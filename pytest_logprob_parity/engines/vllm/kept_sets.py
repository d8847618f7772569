"""Runs in vLLM's worker: what truncation left at each step, seen in the decode that reports the truncated logprobs.

Under top-p, top-k and min-p the logprobs of a decode are those of the kept tokens alone. The logits are the same with and
without truncation, so one decode tells both: the logprob of the chosen token before truncation, and which tokens were kept.
"""

from __future__ import annotations

from typing import Any, Final

from .watched_rows import rows_of_step

#: Key in `SamplingParams.extra_args`: the number under which a request's steps are kept; it is taken away by `take`.
WATCHED: Final = "logprob_parity_watched"
_STORE: Final = "_logprob_parity_kept"
#: vLLM divides by 1 where a temperature is less.
_LEAST_TEMPERATURE: Final = 1e-5


class Watch:
    """One step of the requests that are watched: `rows` of the batch, and their logprobs [rows, V] before truncation."""

    def __init__(self, runner: Any, rows: list[int], keys: list[tuple[int, int]], free: Any, metadata: Any) -> None:
        self._runner = runner
        self._rows = rows
        self._keys = keys
        self._free = free
        self._metadata = metadata

    @classmethod
    def of_step(cls, runner: Any, logits: Any, metadata: Any) -> Watch | None:
        """Look at the logits [B, V] of a step before the sampler changes them; None where no request of it is watched."""
        import torch

        rows, keys = rows_of_step(runner, WATCHED)
        if not rows or metadata.temperature is None:
            return None
        temperature = metadata.temperature
        temperature = torch.where(temperature < _LEAST_TEMPERATURE, 1.0, temperature)
        scaled = logits if len(rows) == len(logits) else logits[rows]
        scaled = scaled / (temperature if len(rows) == len(logits) else temperature[rows]).unsqueeze(1)
        return cls(runner, rows, keys, scaled.log_softmax(dim=-1, dtype=torch.float32), metadata)

    def keep(self, sampled: Any, processed: Any) -> None:
        """Keep what `processed` logprobs [B, V] say is left, and the logprobs of the `sampled` tokens [B]."""
        whole = len(self._rows) == len(sampled)
        chosen = sampled if whole else sampled[self._rows]
        logprobs = self._free.gather(-1, chosen.long().unsqueeze(-1)).squeeze(-1)
        left = (processed if whole else processed[self._rows]) > float("-inf")
        counts = left.sum(-1)
        ids = left.nonzero()[:, 1]
        store = self._runner.__dict__.setdefault(_STORE, {})
        start = 0
        for (number, position), logprob, count in zip(self._keys, logprobs.tolist(), counts.tolist(), strict=True):
            store.setdefault(number, {})[position] = (logprob, ids[start : start + count].cpu())
            start += count


def take(worker: Any) -> dict[str, tuple[list[float], list[int], list[int]]]:
    """What was kept since the last time, by the number of the request: logprobs before truncation, how many tokens were kept at
    each position, and their ids, one position after the other. Positions that are missing end it.
    """
    store = getattr(worker.model_runner, _STORE, {})
    taken = {}
    for number, steps in store.items():
        logprobs: list[float] = []
        counts: list[int] = []
        ids: list[int] = []
        for position in range(len(steps)):
            if position not in steps:
                break
            logprob, kept = steps[position]
            logprobs.append(logprob)
            counts.append(len(kept))
            ids += kept.tolist()
        taken[str(number)] = (logprobs, counts, ids)
    store.clear()
    return taken
