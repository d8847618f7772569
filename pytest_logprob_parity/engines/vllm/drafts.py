"""Runs in vLLM's worker: which tokens of a request were accepted drafts, seen in the rejection sampler of speculative decoding.

A step of a request writes the drafts that were accepted, and one token more: one that is drawn in place of the first draft that
was rejected, or, where all were accepted, one more of the engine's own. An error in the sampler would end the engine for every
request in it, so nothing here changes what it returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..backend import ACCEPTED, REPLACED

#: Key in `SamplingParams.extra_args`: the number under which a request's steps are kept; they are taken away by `take`.
WATCHED: Final = "logprob_parity_drafts"
_STORE: Final = "_logprob_parity_drafts"
_MARK: Final = "_logprob_parity_original_forward"


def watch(worker: Any) -> bool:
    """Note the steps of requests that carry WATCHED from now on; False where this worker has no rejection sampler to look at.

    Doing it twice does nothing.
    """
    runner = getattr(worker, "model_runner", None)
    sampler = getattr(runner, "rejection_sampler", None)
    if runner is None or not hasattr(sampler, "forward") or not hasattr(runner, "input_batch"):
        return False
    assert sampler is not None
    if not hasattr(sampler, _MARK):
        original = sampler.forward
        setattr(sampler, _MARK, original)

        def forward(metadata: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(metadata, *args, **kwargs)
            proposed = list(metadata.num_draft_tokens)
            written = (output.sampled_token_ids >= 0).sum(-1).tolist()
            store = runner.__dict__.setdefault(_STORE, {})
            for request_id, count, drafts in zip(runner.input_batch.req_ids, written, proposed, strict=False):
                request = runner.requests[request_id]
                extra = getattr(request.sampling_params, "extra_args", None)
                number = extra.get(WATCHED) if isinstance(extra, dict) else None
                if type(number) is int:
                    store.setdefault(number, []).append((len(request.output_token_ids), count - 1, drafts))
            return output

        sampler.forward = forward
    return True


def take(worker: Any) -> dict[str, list[tuple[int, int, int]]]:
    """What was noted since the last time, by the number of the request: where a step begins, and how many drafts were accepted
    of how many.
    """
    store = worker.model_runner.__dict__.get(_STORE, {})
    taken = {str(number): list(steps) for number, steps in store.items()}
    store.clear()
    return taken


def mark(params: Sequence[Any]) -> None:
    """Have the worker note the steps of these requests (SamplingParams), by their place among them."""
    for place, parameters in enumerate(params):
        parameters.extra_args = {**(parameters.extra_args or {}), WATCHED: place}


def drafted(noted: Sequence[Mapping[str, Sequence[Sequence[int]]]], place: int, length: int) -> npt.NDArray[np.uint8]:
    """How each of the `length` tokens of the request at `place` came about, by what the workers noted: codes [L], see
    `Completion.drafted`.
    """
    found = np.zeros(length, np.uint8)
    for taken in noted:
        for start, accepted, proposed in taken.get(str(place), ()):
            found[start : start + accepted] = ACCEPTED
            if accepted < proposed:
                found[start + accepted : start + accepted + 1] = REPLACED
    return found
