"""Engines that somebody else built: an `LLM`, or an `AsyncLLM` in its event loop. What computes in another process is asked
with a limit in time, and ends in order when the interpreter does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import inspect
import itertools
import logging
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from ...errors import EngineError
from ..event_loop import ask_in_loop
from ..time_limits import no_answer

_NUMBERS: Final = itertools.count()
#: How long vLLM may take to end an engine core, in seconds; it kills one that does not end within 5.
_END_SECONDS: Final = 30


def is_async(llm: Any) -> bool:
    """Whether this is vLLM's `AsyncLLM`, or a client like it."""
    return hasattr(llm, "engine_core") and inspect.isasyncgenfunction(getattr(type(llm), "generate", None))


def face_of(llm: Any, seconds: float) -> Any:
    """`llm` as something with the methods of an `LLM`, each of which may take `seconds` (0: no limit).

    An `LLM` that computes in this process is its own face: nothing in here could end what it does.
    """
    if is_async(llm):
        end_at_exit(llm)
        return AsyncFace(llm, seconds)
    core = getattr(llm.llm_engine, "engine_core", None)
    if core is None or hasattr(core, "engine_core"):
        return llm
    end_at_exit(llm)
    return Face(llm, seconds)


class Face:
    """An `LLM` whose methods, and those of its engine, are called in a thread that is waited for.

    Raises EngineError for a call that takes longer than `seconds`, and for every one after it: the engine core is ended then,
    for whatever else asks it would hang, be it pytest that shows the `LLM` in a failure.
    """

    def __init__(self, target: Any, seconds: float) -> None:
        self._target = target
        self._seconds = seconds
        self._silent: EngineError | None = None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return functools.partial(self._call, name, value) if inspect.isroutine(value) else value

    @functools.cached_property
    def llm_engine(self) -> Any:
        """The engine of the `LLM`, with the same limit."""
        return Face(self._target.llm_engine, self._seconds)

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._silent is not None:
            raise self._silent
        try:
            return self._ask(functools.partial(method, *args, **kwargs))
        except _LateError:
            engine = getattr(self._target, "llm_engine", self._target)
            end = threading.Thread(target=_shut_down, args=(engine,), daemon=True)
            end.start()
            end.join(_END_SECONDS)
            told = "its engine core was ended, for every other call would hang, too: build another"
            self._silent = no_answer(f"own engine ({type(self._target).__name__})", repr(name), self._seconds, "call", told)
            raise self._silent from None

    def _ask(self, call: Callable[[], Any]) -> Any:
        answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

        def run() -> None:
            try:
                answers.put((call(), None))
            except BaseException as error:
                answers.put((None, error))

        threading.Thread(target=run, name="logprob-parity own engine", daemon=True).start()
        try:
            value, error = answers.get(timeout=self._seconds or None)
        except queue.Empty:
            raise _LateError from None
        if error is not None:
            raise error
        return value


class _LateError(Exception):
    """An answer that did not come in time."""


class AsyncFace(Face):
    """An `AsyncLLM` as an `LLM`, for threads beside its event loop: the loop that it was built in, or that asked it first."""

    @functools.cached_property
    def llm_engine(self) -> Any:
        """The `AsyncLLM` itself: it has the methods of an engine, too."""
        return self

    def generate(self, prompts: Sequence[Any], params: Sequence[Any], lora_request: Any = None, use_tqdm: bool = False) -> Any:
        """The final outputs of all requests, in their order."""
        return self._call("generate", self._generate, prompts, params, lora_request)

    def has_unfinished_requests(self) -> bool:
        """None of those that `generate` sent: it ends them all before it raises."""
        return False

    def _ask(self, call: Callable[[], Any]) -> Any:
        async def ask() -> Any:
            answer = call()
            return await answer if inspect.isawaitable(answer) else answer

        try:
            return ask_in_loop(self._owner(), ask, self._seconds)
        except TimeoutError:
            raise _LateError from None

    def _owner(self) -> asyncio.AbstractEventLoop | None:
        """The loop that this engine's tasks run in; None where it has none yet."""
        resources = getattr(self._target.engine_core, "resources", None)
        for task in (getattr(resources, "output_queue_task", None), getattr(self._target, "output_handler", None)):
            if task is not None:
                loop: asyncio.AbstractEventLoop = task.get_loop()
                return loop
        return None

    async def _generate(self, prompts: Sequence[Any], params: Sequence[Any], lora_request: Any) -> list[Any]:
        """Send all requests before the engine looks at the first, as an `LLM` does: its batches are the same every time."""
        llm = self._target
        names = [f"logprob-parity-{next(_NUMBERS)}" for _ in prompts]
        sent: list[str] = []
        try:
            async with _held(llm):
                outputs = []
                for name, prompt, parameters in zip(names, prompts, params, strict=True):
                    parameters.output_kind = type(parameters.output_kind).FINAL_ONLY
                    outputs.append(await llm.add_request(name, prompt, parameters, lora_request=lora_request))
                    sent.append(name)
            return [await output.get() for output in outputs]
        except BaseException:
            for name in sent:
                await llm.abort(name)
            raise


@contextlib.asynccontextmanager
async def _held(llm: Any) -> Any:
    """An engine that schedules nothing meanwhile, where it can be held and is not already; requests under way go on after."""
    if not hasattr(llm, "pause_generation") or await llm.is_paused():
        yield
        return
    parameters = inspect.signature(llm.pause_generation).parameters
    if "mode" not in parameters:  # an early one, which would abort what runs
        yield
        return
    await llm.pause_generation(mode="keep", clear_cache=False)
    try:
        yield
    finally:
        await llm.resume_generation()


# -- the end ----------------------------------------------------------------------------------------------------------


def end_at_exit(llm: Any) -> None:
    """Shut the engine core of an adopted engine down when the interpreter ends, should nobody have done so before.

    Left to vLLM's own exit handlers it is ended under its client, which then reports a death; and their log goes to the
    stream that pytest captured and closed. Whoever built the engine has had the whole run to end it.
    """
    atexit.register(_end, llm)


def _end(llm: Any) -> None:
    logger = logging.getLogger("vllm")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and getattr(handler.stream, "closed", False):
            handler.stream = sys.stderr  # setStream would flush the closed one
            logger.setLevel(logging.ERROR)  # on a busy machine it warns that it waits no longer
    _shut_down(getattr(llm, "llm_engine", llm))


def _shut_down(engine: Any) -> None:
    with contextlib.suppress(Exception):  # it may be shut down, or dead
        engine.engine_core.shutdown()
