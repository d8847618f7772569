"""Blocking work beside a running event loop: in a thread, whose calls of an `AsyncLLM` go back to the loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from ..errors import EngineError, ParityError, UsageError

_T = TypeVar("_T")


class Caller:
    """A task that waits for blocking work: the event loop it runs in, and what the work has asked of that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._asked: set[concurrent.futures.Future[Any]] = set()
        self._cancelled = False
        self._lock = threading.Lock()

    def ask(self, work: Coroutine[Any, Any, _T], loop: asyncio.AbstractEventLoop) -> concurrent.futures.Future[_T]:
        """Run a coroutine in a loop; it ends with the task. Raises EngineError where the task has been cancelled."""
        with self._lock:
            if self._cancelled:
                work.close()
                raise EngineError("the check was cancelled")
            future = asyncio.run_coroutine_threadsafe(work, loop)
            self._asked.add(future)
        future.add_done_callback(self._asked.discard)
        return future

    def cancel(self) -> None:
        """End what the work waits for; it will ask for no more."""
        with self._lock:
            self._cancelled = True
        for future in list(self._asked):
            future.cancel()


#: Who waits for the work of this thread.
CALLER: Final[contextvars.ContextVar[Caller | None]] = contextvars.ContextVar("logprob_parity_caller", default=None)


async def beside_the_loop(work: Callable[[], _T], name: str) -> _T:
    """Run `work` in a thread and wait for it; the running event loop goes on meanwhile. Raises what the work raises.

    A cancelled task waits until the work has ended: the engine would be asked by two. Raises UsageError outside of asyncio.
    """
    __tracebackhide__ = True
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise UsageError(
            f"{name} needs an event loop of asyncio (anyio's plugin: a fixture anyio_backend that is 'asyncio')"
        ) from None
    ended: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()
    caller = Caller(loop)
    context = contextvars.copy_context()
    context.run(CALLER.set, caller)

    def run() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = context.run(work)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
            loop.call_soon_threadsafe(ended.set_result, (value, error))

    # A thread of our own: closing a loop waits for those of its executor, be they stuck or not.
    threading.Thread(target=run, name=f"logprob-parity {name}", daemon=True).start()
    try:
        value, error = await asyncio.shield(ended)
    except asyncio.CancelledError:
        caller.cancel()
        await asyncio.wait([ended])
        raise
    if error is not None:
        raise error.with_traceback(None) if isinstance(error, ParityError) else error
    found: _T = value
    return found


def ask_in_loop(owner: asyncio.AbstractEventLoop | None, work: Callable[[], Coroutine[Any, Any, _T]], seconds: float) -> _T:
    """Run a coroutine in the event loop `owner`, or where there is none yet in that of the task that waits for this thread.

    Raises UsageError where this thread would stop that loop or where the loop does not run, TimeoutError after `seconds`
    (0: never).
    """
    caller = CALLER.get()
    loop = owner or (None if caller is None else caller.loop)
    if loop is None or runs_here() or (caller is None and not loop.is_running()):
        raise UsageError(
            "an AsyncLLM answers in its event loop, which a blocking call would stop: `await golden_trace.check_async(...)` in "
            "an async test, or `await asyncio.to_thread(engine.generate, ...)`"
        )
    if not loop.is_running():
        state = "closed" if loop.is_closed() else "not running"
        raise UsageError(
            f"this AsyncLLM belongs to another event loop, which is {state}: let its fixture and its tests share one "
            "(pytest-asyncio: loop_scope='session' for both; anyio: a session-scoped anyio_backend)"
        )
    future = asyncio.run_coroutine_threadsafe(work(), loop) if caller is None else caller.ask(work(), loop)
    try:
        return future.result(seconds or None)
    except concurrent.futures.TimeoutError:
        if future.done():  # the engine's own
            raise
        future.cancel()
        raise TimeoutError from None
    except concurrent.futures.CancelledError:
        raise EngineError("the check was cancelled") from None


def runs_here() -> bool:
    """Whether an event loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
