"""HTTP to one server: bounded concurrency, retries of what is safe to retry, time-outs, cancellation. Knows no engine."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from ...errors import EngineError, UsageError
from ...server_settings import ServerSettings

_T = TypeVar("_T")

#: What passes by itself: too many requests, and gateways whose server is away or busy.
_PASSING: Final = (429, 502, 503, 504)
#: A time-out has cost its time already: it is worth one more try.
_TIMEOUT_RETRIES: Final = 1
_CONNECT_SECONDS: Final = 5.0
#: A whole answer may take so much longer, in seconds, than any part of it: a connection that fails is then told as one.
_GRACE: Final = 0.1
#: Seconds before the first retry; doubled for every further one, up to the second number.
_BACK_OFF: Final = (0.1, 5.0)
#: Below the 5 s after which vLLM closes a connection that nobody uses.
_KEEP_ALIVE_SECONDS: Final = 2.0
_PROGRESS_SECONDS: Final = 10.0
#: The variable whose value is sent as the key; vLLM's server reads its own from it.
KEY_VARIABLE: Final = "VLLM_API_KEY"
_SHOWN: Final = 200


@dataclass(frozen=True)
class _Failure:
    """Why a request failed: what kind it is, the reason in words, and whether another try may help."""

    kind: Literal["down", "slow", "lost", "refused", "status"]
    reason: str
    again: bool = True


class DownError(EngineError):
    """Nobody answers at the address."""


@dataclass(frozen=True)
class Answer:
    """What came back: the status, and its body as JSON; `text` is what it begins with, for messages."""

    status: int
    content: Any
    text: str


class Client:
    """Talks to one server. All its requests may be sent twice: none changes anything there.

    `retried` counts what was sent again, by reason, since it was last taken. Not for several threads at a time.
    """

    def __init__(self, url: str, notify: Callable[[str], None] | None = None) -> None:
        try:
            import httpx
        except ImportError:
            raise EngineError(
                "httpx, which talks to servers, is not installed; install pytest-logprob-parity[server]"
            ) from None
        self.url = url
        self.retried: collections.Counter[str] = collections.Counter()
        self._notify = notify
        self._httpx = httpx
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Any = None

    def ask(self, method: str, path: str, body: Any = None, *, timeout: float = 30.0) -> Answer:
        """One request, sent once. Raises DownError where nobody answers, EngineError for a time-out."""
        settings = ServerSettings(self.url, timeout=timeout, retries=0)
        return self._drive(lambda: self._send(method, path, body, settings))

    def post_all(self, posts: Sequence[tuple[str, Any]], read: Callable[[int, Any], _T], settings: ServerSettings) -> list[_T]:
        """Post (path, body) pairs in their order, at most `settings.concurrency` at a time: what `read` makes of each one's
        number and JSON, in order. The first failure cancels the rest.

        Raises EngineError for an answer that is no success, and what `read` raises.
        """
        return self._drive(lambda: self._post_all(posts, read, settings))

    def close(self) -> None:
        """Close all connections; nothing of it is left, no thread either. The next request opens new ones."""
        loop, session, self._loop, self._session = self._loop, self._session, None, None
        if loop is None:
            return
        try:
            with contextlib.suppress(Exception):
                _run(loop, session.aclose())
            _run(loop, loop.shutdown_default_executor())  # names are resolved there
        finally:
            loop.close()

    # -- requests

    async def _post_all(
        self, posts: Sequence[tuple[str, Any]], read: Callable[[int, Any], _T], settings: ServerSettings
    ) -> list[_T]:
        results: dict[int, _T] = {}
        waiting = iter(range(len(posts)))
        told = time.monotonic()

        async def work() -> None:
            nonlocal told
            for number in waiting:
                path, body = posts[number]
                answer = await self._send("POST", path, body, settings)
                results[number] = read(number, self.success(answer, path))
                if self._notify is not None and time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    self._notify(f"{self.url}: {len(results):,} of {len(posts):,} requests")

        workers = [asyncio.ensure_future(work()) for _ in range(min(settings.concurrency, len(posts)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [results[number] for number in range(len(posts))]

    async def _send(self, method: str, path: str, body: Any, settings: ServerSettings) -> Answer:
        """One request, sent again as often as `settings.retries` allows."""
        began, timeouts, tries = time.monotonic(), 0, 0
        limits = self._httpx.Timeout(settings.timeout, connect=min(_CONNECT_SECONDS, settings.timeout))
        while True:
            tries += 1
            answer = None
            try:
                request = self._session.request(method, path, json=body, timeout=limits)
                answer = _answer(await asyncio.wait_for(request, settings.timeout + _GRACE))
                failure = _Failure("status", f"status {answer.status}", answer.status in _PASSING)
            except self._httpx.ConnectError as error:
                failure = _no_connection(str(error))
            except (self._httpx.TimeoutException, asyncio.TimeoutError) as error:
                timeouts += 1
                again = timeouts <= _TIMEOUT_RETRIES
                if isinstance(error, self._httpx.ConnectTimeout):
                    failure = _Failure("down", f"no connection within {limits.connect:g} s", again)
                else:
                    failure = _Failure("slow", f"no answer within {limits.read:g} s", again)
            except self._httpx.DecodingError as error:
                text = f"the server at {self.url} answers {path} with a body that cannot be read"
                raise EngineError(f"{text} (Content-Encoding: {error}); is that a proxy's?") from None
            except self._httpx.TransportError as error:
                failure = _Failure("lost", f"connection lost ({str(error) or type(error).__name__})")
            if answer is not None and not failure.again:
                return answer
            if not failure.again or tries > settings.retries:
                if answer is not None:
                    return answer
                raise self._given_up(failure, tries, time.monotonic() - began)
            self.retried[failure.reason] += 1
            await asyncio.sleep(min(_BACK_OFF[0] * 2 ** (tries - 1), _BACK_OFF[1]))

    def _given_up(self, failure: _Failure, tries: int, seconds: float) -> EngineError:
        after = f" after {tries} tries in {seconds:.1f} s" if tries > 1 else ""
        if failure.kind == "down":
            return DownError(f"no server answers at {self.url}: {failure.reason}{after}")
        hint = "; timeout=SECONDS allows more" if failure.kind == "slow" else ""
        return EngineError(f"the server at {self.url}: {failure.reason}{after}{hint}")

    def success(self, answer: Answer, path: str) -> Any:
        """The JSON of an answer that is a success. Raises EngineError, UsageError where the server refuses what was asked."""
        where = f"the server at {self.url}"
        if answer.status in (401, 403):
            given = "the one in" if os.environ.get(KEY_VARIABLE) else "none is in"
            raise EngineError(f"{where} wants another key (status {answer.status}): {given} {KEY_VARIABLE}")
        if answer.status == 404:
            raise EngineError(
                f"{where} has no {path} (status 404: {_reason(answer)}): is that an OpenAI-compatible vLLM server?"
            )
        if answer.status in (400, 422):
            raise UsageError(f"{where} refuses a request: {_reason(answer)}")
        if not 200 <= answer.status < 300:
            raise EngineError(f"{where} failed at {path} (status {answer.status}): {_reason(answer)}")
        if answer.content is None:
            raise EngineError(f"{where} answers {path} with something that is no JSON: {answer.text!r}")
        return answer.content

    # -- the loop

    def _drive(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run `work` on this client's loop; in a thread where the caller is inside of another one. Leaves nothing running."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._session = self._open()
        loop = self._loop
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return _run(loop, work())
        return _run_in_thread(loop, work)

    def _open(self) -> Any:
        key = os.environ.get(KEY_VARIABLE)
        host = self._httpx.URL(self.url).host
        return self._httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=self._httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_SECONDS),
            trust_env=host not in ("localhost", "::1") and not host.startswith("127."),  # no proxy on the way to oneself
        )


def _run(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> _T:
    task = loop.create_task(work)
    try:
        return loop.run_until_complete(task)
    except BaseException:  # a Ctrl-C arrives between two steps of the loop
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            loop.run_until_complete(task)
        raise


def _run_in_thread(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """The same in a thread that is over when this returns."""
    results: list[_T] = []
    errors: list[BaseException] = []
    tasks: list[asyncio.Task[_T]] = []

    def run() -> None:
        try:
            tasks.append(loop.create_task(work()))
            results.append(loop.run_until_complete(tasks[0]))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="logprob-parity-client")
    thread.start()
    try:
        thread.join()
    except BaseException:
        if tasks:
            loop.call_soon_threadsafe(tasks[0].cancel)
        thread.join()
        raise
    if errors:
        raise errors[0]
    return results[0]


def _no_connection(error: str) -> _Failure:
    """Why there is none, by what httpx says of it."""
    if "SSL" in error:
        return _Failure("refused", f"no TLS there, or a certificate that is not trusted ({error})", again=False)
    if error.startswith("[Errno"):  # the resolver's
        return _Failure("down", f"no such host ({error.partition('] ')[2]})")
    return _Failure("down", "connection refused")


def _answer(response: Any) -> Answer:
    text = " ".join(response.text[:_SHOWN].split())
    try:
        return Answer(response.status_code, json.loads(response.content), text)
    except (ValueError, RecursionError):
        return Answer(response.status_code, None, text)


def _reason(answer: Answer) -> str:
    """A server's own reason, in one line."""
    content = answer.content
    for name in ("error", "message", "detail"):
        while isinstance(content, dict) and content.get(name):
            content = content[name]
    return " ".join(str(content).split())[:_SHOWN] if content and content is not answer.content else answer.text or "no reason"
