"""Runs in vLLM's worker: which rows of a step belong to requests that ask for something to be kept."""

from __future__ import annotations

from typing import Any


def rows_of_step(runner: Any, name: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The rows of this step's batch whose requests have a number in `extra_args[name]`; and for each (number, position in its
    completion).
    """
    rows: list[int] = []
    keys: list[tuple[int, int]] = []
    for row, request_id in enumerate(runner.input_batch.req_ids):
        request = runner.requests[request_id]
        extra = getattr(request.sampling_params, "extra_args", None)
        number = extra.get(name) if isinstance(extra, dict) else None
        if type(number) is int:
            rows.append(row)
            keys.append((number, len(request.output_token_ids)))
    return rows, keys
