"""transformers' continuous batching (`generate_batch`, which TRL uses) as an engine, forced along tokens where it samples.

Its scheduler, paged cache, attention and logits processors are used as they are. Its model runner calls `_sample` with the
processed logits of all requests that get a token; here that takes the forced token in place of a sampled one, and reports the
logprob in the way in which the engine does (the logarithm of a softmax in float32).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from ...errors import EngineError, UsageError
from ...reasons import reason_of
from ...spec import EngineSpec, Sampling
from ..backend import Completion, Request
from .backend import TransformersBackend, completion_of_rows, gather, generator_of

#: Tokens in a page of the cache, which is what transformers takes by itself.
_PAGE: Final = 256
#: Tokens in one forward pass, at most.
_BATCH_TOKENS: Final = 2048
#: How long one step may take until it is looked whether the engine's thread is alive, in seconds.
_LOOK: Final = 1.0
#: Fields of Sampling that continuous batching has no logits processor or stop for.
_REFUSED: Final[Mapping[str, Any]] = {
    "min_tokens": 0, "stop": (), "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0,
}  # fmt: skip


class ContinuousBackend(TransformersBackend):
    """A transformers model in this process, which decodes by continuous batching. A prefill is an ordinary forward pass."""

    def __init__(self, model: Any, tokenizer: Any, spec: EngineSpec) -> None:
        super().__init__(model, tokenizer, spec)
        self._batch = 1 << 30  # its own scheduler makes the batches

    def values_of(self, asked: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The values of an ordinary engine, with what continuous batching really uses in their place."""
        if values["dtype"] == "float64":
            raise UsageError("continuous_batching=True: not in float64, its logits are float32")
        self._asked = {
            "allow_block_sharing": asked.get("enable_prefix_caching", True),
            "use_async_batching": asked.get("async_scheduling"),
            "use_cuda_graph": False if asked.get("enforce_eager") else None,
            "max_requests_per_batch": int(values["max_num_seqs"]),
        }
        manager = self._manager([Request(prompt_token_ids=[0], sampling=Sampling(max_tokens=1))], 1)
        try:
            used = manager.continuous_batching_config
            attention = self._model.config._attn_implementation
        finally:
            self._shut(manager)
        return {
            **values,
            "continuous_batching": True,
            "logprobs_mode": "processed_logprobs",  # it keeps no others
            "enable_prefix_caching": bool(used.allow_block_sharing),
            "async_scheduling": bool(used.use_async_batching),
            "enforce_eager": not any(used.cuda_graph_booleans) and not used.default_compile_level,
            "attn_implementation": attention,
            "page_size": used.page_size,
        }

    def decode(self, requests: Sequence[Request]) -> list[Completion]:
        """Forced or sampled completions: one run of the engine for each sampling among the requests."""
        answers: dict[int, Completion] = {}
        by_sampling: dict[tuple[Sampling, bool], list[int]] = {}
        for number, request in enumerate(requests):
            by_sampling.setdefault((_without_counts(request.sampling), request.forced_token_ids is None), []).append(number)
        for numbers in by_sampling.values():
            answers |= zip(numbers, self._run_manager([requests[n] for n in numbers]), strict=True)
        return [answers[number] for number in range(len(requests))]

    def _run_manager(self, requests: Sequence[Request]) -> list[Completion]:
        sampling = requests[0].sampling
        for name, neutral in _REFUSED.items():
            if getattr(sampling, name) != neutral:
                raise UsageError(f"transformers' continuous batching has no {name}: it would drop {getattr(sampling, name)!r}")
        lengths = [self._most(request) for request in requests]
        manager = self._manager(requests, max(lengths))
        steps = _Steps(requests, self._model.device)
        try:
            with _forced(manager, steps):
                manager.start()
                ends = self._ends(requests[0])
                for number, (request, length) in enumerate(zip(requests, lengths, strict=True)):
                    ids = [int(token) for token in request.prompt_token_ids]
                    manager.add_request(ids, request_id=str(number), max_new_tokens=length, eos_token_id=ends or -1)
                for _ in requests:
                    self._wait(manager)
        finally:
            self._shut(manager)
        return [
            completion_of_rows(tokens, rows, "stop" if tokens[-1] in ends else "length")
            for tokens, rows in zip(steps.written, steps.rows, strict=True)
        ]

    def _wait(self, manager: Any) -> None:
        """Wait until one more request has ended. Raises EngineError where it failed, or the engine's thread ended."""
        while (result := manager.get_result(timeout=_LOOK)) is None:
            if not manager.is_running():
                error = manager.background_thread_status.fatal_error
                raise EngineError(f"transformers' continuous batching ended at work: {error and reason_of(error)}")
        if result.error is not None:
            raise EngineError(f"transformers' continuous batching failed at a request: {result.error}")

    def _ends(self, request: Request) -> list[int]:
        """The token ids that end a completion; none where tokens are forced."""
        if request.forced_token_ids is not None:
            return []
        own = () if request.sampling.ignore_eos else self._stop_ids
        return sorted({*own, *request.sampling.stop_token_ids})

    def _most(self, request: Request) -> int:
        """How many tokens a request writes at most."""
        if request.forced_token_ids is not None:
            return len(request.forced_token_ids)
        left = (self.config.max_model_len or 1 << 60) - len(request.prompt_token_ids)
        return max(min(request.sampling.max_tokens, left), 1)

    def _manager(self, requests: Sequence[Request], most: int) -> Any:
        """The engine's manager for these requests, which are given to it later. Raises EngineError where it does not start."""
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        sampling = requests[0].sampling
        longest = max(len(request.prompt_token_ids) for request in requests) + most
        blocks = min(len(requests), self._asked["max_requests_per_batch"]) * (-(-longest // _PAGE) + 1) + 1
        steps = {} if sampling.greedy else {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k,
        }  # fmt: skip
        generation = GenerationConfig(do_sample=not sampling.greedy, max_new_tokens=most, eos_token_id=-1, **steps)
        batching = ContinuousBatchingConfig(
            return_logprobs=True, num_blocks=blocks, page_size=_PAGE, max_batch_tokens=_BATCH_TOKENS, seed=0, **self._asked
        )
        try:
            manager = self._model.init_continuous_batching(generation, batching)
            manager.warmup()
        except Exception as error:
            raise EngineError(f"transformers' continuous batching did not start: {reason_of(error)}") from error
        return manager

    @staticmethod
    def _shut(manager: Any) -> None:
        """Stop the engine's thread, and give the model its attention back."""
        if manager.is_running():
            manager.stop(block=True, timeout=5)
        manager.destroy()


def _without_counts(sampling: Sampling) -> Sampling:
    """What two requests must share to be in one run: all but the counts and seeds, which are each request's own."""
    return dataclasses.replace(sampling, n=1, seed=0, max_tokens=max(sampling.min_tokens, 1), logprobs=1)


class _Steps:
    """What each request has written: tokens, and the row of each."""

    def __init__(self, requests: Sequence[Request], device: Any) -> None:
        self._requests = requests
        self.written: list[list[int]] = [[] for _ in requests]
        self.rows: list[list[Any]] = [[] for _ in requests]
        self._generators = [generator_of(request, device) for request in requests]

    def take(self, number: int, scores: Any) -> int:
        """The next token of a request, of its processed logits [V]."""
        import torch

        request, written = self._requests[number], self.written[number]
        probabilities = scores.softmax(-1)
        if request.forced_token_ids is not None:
            token = int(request.forced_token_ids[min(len(written), len(request.forced_token_ids) - 1)])
        elif request.sampling.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(probabilities, 1, generator=self._generators[number]))
        chosen = torch.tensor([token], device=scores.device)
        self.rows[number].append(gather(probabilities.log()[None], chosen, request.sampling.logprobs))
        written.append(token)
        return token


@contextlib.contextmanager
def _forced(manager: Any, steps: _Steps) -> Iterator[None]:
    """Have the engine take its tokens from `steps`. Raises EngineError where this transformers samples in another place."""
    runner = manager.batch_processor.model_runner
    if not callable(getattr(runner, "_sample", None)) or not hasattr(runner, "inputs_and_outputs"):
        raise EngineError("this transformers does not sample in ModelRunner._sample: its continuous batching cannot be forced")
    beyond = runner.inputs_and_outputs

    def sample(scores: Any, output_ids: Any) -> None:
        import torch

        states = [future.state for future in beyond.requests_in_batch if future.has_new_token]
        tokens = [steps.take(int(state.request_id), row) for state, row in zip(states, scores[0], strict=False)]
        output_ids[0, : len(tokens)].copy_(torch.tensor(tokens, dtype=output_ids.dtype))

    runner._sample = sample
    try:
        yield
    finally:
        del runner._sample
