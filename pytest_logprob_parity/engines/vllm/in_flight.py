"""Requests on a vLLM in this process, step by step, with a weight update between two of the steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoint.weight_update import WeightUpdate
from ...errors import EngineError


def run_through(
    llm: Any,
    prompts: Sequence[Any],
    params: Sequence[Any],
    update: WeightUpdate,
    take: Callable[[Any], None],
    lora_request: Any = None,
) -> tuple[list[Any], list[int]]:
    """Run all requests, with the update on the way: their outputs, and how many tokens each had written by then.

    `take` puts the update's weights in; `lora_request` is the adapter that the requests are for.

    Under `abort` the outputs are what was written until then, with the finish reason `abort`. Raises EngineError where this
    vLLM cannot do it.
    """
    engine = llm.llm_engine
    _check_lives_here(engine)
    names = [f"logprob-parity-{number}" for number in range(len(prompts))]
    numbers = {name: n for n, name in enumerate(names)}
    for number, (prompt, parameters) in enumerate(zip(prompts, params, strict=True)):
        parameters.output_kind = type(parameters.output_kind).CUMULATIVE  # so that every step says how far each request is
        # Some versions give a request a name of their own.
        own = engine.add_request(names[number], prompt, parameters, lora_request=lora_request)
        numbers[own or names[number]] = number
    outputs: list[Any] = [None] * len(names)
    before: list[int] | None = None

    def written() -> list[int]:
        return [0 if output is None else len(output.outputs[0].token_ids) for output in outputs]

    while engine.has_unfinished_requests():
        if before is None and update.mode != "wait" and max(written(), default=0) >= update.at_token:
            before = written()
            running = [name for name, output in zip(names, outputs, strict=True) if not _ended(output)]
            apply_update(llm, update, take, running)
            if update.mode == "abort":
                break
        for output in engine.step():
            outputs[numbers[output.request_id]] = output
    if before is None:
        before = written()
        apply_update(llm, update, take)
    if update.mode == "abort":
        for output in outputs:
            if output is None:
                raise EngineError("mode='abort' before a request had written its first token: nothing came of it")
            if not _ended(output):
                output.outputs[0].finish_reason = "abort"
    return outputs, before


def apply_update(llm: Any, update: WeightUpdate, take: Callable[[Any], None], running: Sequence[str] = ()) -> None:
    """Have `take` load the update's weights between two steps, as its mode says, with `running` requests in the engine."""
    engine = llm.llm_engine
    if update.mode == "abort" and running:
        engine.abort_request(list(running))
    core: Any = getattr(getattr(engine, "engine_core", None), "engine_core", None)
    pause = getattr(core, "pause_scheduler", None)
    if pause is not None and update.mode != "v0":
        pause(mode="abort" if update.mode == "abort" else "keep", clear_cache=update.clear_cache)
    elif update.clear_cache:
        _clear(llm, running if update.mode == "keep" else ())
    try:
        take(update.weights)
    finally:
        if pause is not None and update.mode != "v0":
            core.resume_scheduler()


def load(llm: Any, weights: Path | Mapping[str, Any]) -> None:
    """Put a checkpoint's weights, or tensors by checkpoint names, in place of those that the workers have."""
    llm.collective_rpc(_load, args=(str(weights) if isinstance(weights, Path) else dict(weights),))


def _load(worker: Any, weights: Any) -> None:
    """On the worker."""
    reload = getattr(worker.model_runner, "reload_weights", None)
    if reload is not None and "weights_path" in inspect.signature(reload).parameters:
        reload(weights_path=weights) if isinstance(weights, str) else reload(weights_iterator=iter(weights.items()))
        return
    if isinstance(weights, str):
        from safetensors.torch import load_file

        weights = {name: t for file in sorted(Path(weights).glob("*.safetensors")) for name, t in load_file(file).items()}
    worker.model_runner.model.load_weights(iter(weights.items()))


def _clear(llm: Any, running: Sequence[str]) -> None:
    reset = llm.llm_engine.reset_prefix_cache
    if not running:
        reset()
        return
    if "reset_running_requests" not in inspect.signature(reset).parameters:
        raise EngineError("this vLLM cannot throw away the keys and values of running requests: use mode='wait' or 'abort'")
    reset(reset_running_requests=True)


def _check_lives_here(engine: Any) -> None:
    core = getattr(engine, "engine_core", None)
    if core is not None and not hasattr(core, "engine_core"):
        raise EngineError(
            "weight updates in flight need an engine in this process: an LLM built under VLLM_ENABLE_V1_MULTIPROCESSING=0"
        )


def _ended(output: Any) -> bool:
    return output is not None and bool(output.finished)
