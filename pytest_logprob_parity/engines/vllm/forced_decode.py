"""Runs in vLLM's worker: makes the sampler take given tokens in place of the ones it drew.

The logprobs are computed as ever; only then is the drawn token exchanged. A request says which tokens in
`SamplingParams.extra_args[FORCED]`, so nothing is kept here that could go stale. An error in the sampler would end the engine
for every request in it: what is no token id forces nothing, and whoever asked finds another token in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ...machine import hardware
from .eager_ranks import count_ranks_eagerly
from .kept_sets import Packed, Watch, take
from .lm_head import applied_head
from .routing import PackedRouting, keep_routing, take_routing, watch_routers

#: Key in `SamplingParams.extra_args`: the token ids to decode, in order.
FORCED: Final = "logprob_parity_forced"
#: The name under which a vLLM that somebody else starts takes WorkerExtension: a public one.
EXTENSION: Final = "pytest_logprob_parity.engines.forced_decode.WorkerExtension"

_MARK: Final = "_logprob_parity_original_sample"


def forced_token(parameters: Any, position: int, vocabulary: int) -> int | None:
    """The token id that a request's SamplingParams force at `position` of its completion; None where they force none there, or
    what they have there is no id below `vocabulary`, the width of the logits. Never raises.
    """
    extra = getattr(parameters, "extra_args", None)
    forced = extra.get(FORCED) if isinstance(extra, dict) else None
    if not isinstance(forced, (list, tuple)) or position >= len(forced):
        return None
    token = forced[position]
    return token if type(token) is int and 0 <= token < vocabulary else None


def install(worker: Any) -> str:
    """Wrap the sampler of this worker's model runner. Returns how tokens will be forced, or why they cannot be.

    Given to `collective_rpc`, or called through WorkerExtension. Doing it twice does nothing.
    """
    count_ranks_eagerly(worker)
    runner = getattr(worker, "model_runner", None)
    sampler = getattr(runner, "sampler", None)
    if type(runner).__module__.startswith("vllm.worker."):
        return _install_v0()
    if runner is None or not hasattr(sampler, "sample") or not hasattr(runner, "input_batch"):
        return f"{type(runner).__name__} has no sampler that can be wrapped"
    assert sampler is not None
    if getattr(runner, "speculative_config", None) is not None:
        return "speculative decoding draws its tokens past the sampler"
    watch_routers(runner)
    if not hasattr(sampler, _MARK):
        original = sampler.sample
        setattr(sampler, _MARK, original)

        def sample(logits: Any, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            keep_routing(runner)
            watch = Watch.of_step(runner, sampler, logits, sampling_metadata)
            result = original(logits, sampling_metadata, *args, **kwargs)
            sampled = result[0] if isinstance(result, tuple) else result  # up to 0.10 the tokens alone
            rows: list[int] = []
            tokens: list[int] = []
            for row, request_id in enumerate(runner.input_batch.req_ids):
                request = runner.requests[request_id]
                token = forced_token(request.sampling_params, len(request.output_token_ids), logits.shape[-1])
                if token is not None:
                    rows.append(row)
                    tokens.append(token)
            if len(rows) == len(sampled):
                sampled = sampled.new_tensor(tokens)
            elif rows:
                sampled[rows] = sampled.new_tensor(tokens)
            if watch is not None and isinstance(result, tuple) and result[1] is not None:
                watch.keep(sampled, result[1])
            return (sampled, *result[1:]) if isinstance(result, tuple) else sampled

        sampler.sample = sample
    return "sampler"


def _install_v0() -> str:
    """The same for the V0 engine (up to 0.10), whose sampler looks the drawn tokens' logprobs up after drawing them."""
    from vllm.model_executor.layers import sampler as module

    if not hasattr(module, _MARK):
        original = module._sample
        setattr(module, _MARK, original)

        def sample(probs: Any, logprobs: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
            drawn, tensor = original(probs, logprobs, metadata, *args, **kwargs)
            for place, group in enumerate(metadata.seq_groups):
                if group.do_sample:
                    position = group.seq_data[group.seq_ids[0]].get_output_len()
                    token = forced_token(group.sampling_params, position, probs.shape[-1])
                    if token is not None:
                        drawn[place] = ([token], drawn[place][1])
            return drawn, tensor

        module._sample = sample
    return "sampler"


class WorkerExtension:
    """For `worker_extension_cls`: makes functions of ours reachable by name where functions cannot be sent."""

    def logprob_parity_install(self) -> str:
        """Wrap the sampler of this worker; see `install`."""
        return install(self)

    def logprob_parity_kept(self, numbers: Sequence[int]) -> dict[str, Packed]:
        """What truncation kept of the requests of these numbers; see `kept_sets.take`."""
        return take(self, numbers)

    def logprob_parity_routing(self, numbers: Sequence[int]) -> dict[str, PackedRouting]:
        """The experts of the requests of these numbers; see `take_routing`."""
        return take_routing(self, numbers)

    def logprob_parity_hardware(self) -> dict[str, Any]:
        """What this worker computes on; see `fingerprint.hardware`."""
        return hardware()

    def logprob_parity_head(self) -> str | None:
        """The precision of this worker's head; see `applied_head`."""
        return applied_head(self)
