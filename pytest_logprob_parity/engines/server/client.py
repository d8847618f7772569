"""HTTP to one server: bounded concurrency, retries of what is safe to retry, time-outs, cancellation. Knows no engine."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from ...errors import EngineError, UsageError
from ...spec.server_settings import ServerSettings
from .answer import BACK_OFF, Answer, answer_of, one_line, retry_after

_T = TypeVar("_T")

#: What passes by itself: too many requests, and gateways whose server is away or busy.
_PASSING: Final = (429, 502, 503, 504)
#: A time-out has cost its time already: it is worth one more try.
_TIMEOUT_RETRIES: Final = 1
_CONNECT_SECONDS: Final = 5.0
#: A whole answer may take so much longer, in seconds, than any part of it: a connection that fails is then told as one.
_GRACE: Final = 0.1
#: Below the 5 s after which vLLM closes a connection that nobody uses.
_KEEP_ALIVE_SECONDS: Final = 2.0
_PROGRESS_SECONDS: Final = 10.0
#: The variable whose value is sent as the key; vLLM's server reads its own from it.
KEY_VARIABLE: Final = "VLLM_API_KEY"
#: The largest answer that is read, in bytes, where the caller states no other bound.
_LARGEST: Final = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Why a request failed: what kind it is, the reason in words, and whether another try may help."""

    kind: Literal["down", "slow", "lost", "refused", "status"]
    reason: str
    again: bool = True
    #: Seconds after which the server wants to be asked again, where it says.
    after: float | None = None


class DownError(EngineError):
    """Nobody answers at the address."""


class Client:
    """Talks to one server. Requests of `post_all` may be sent twice: none changes anything there. All others are sent once.

    `retried` counts what was sent again, by reason, and `waited` are the seconds before that, since they were last taken
    (several requests wait at a time). Not for several threads at a time.
    """

    def __init__(
        self, url: str, notify: Callable[[str], None] | None = None, *,
        serves: str = "an OpenAI-compatible vLLM server", key: str = KEY_VARIABLE,
    ) -> None:  # fmt: skip
        try:
            import httpx
        except ImportError:
            raise EngineError(
                "httpx, which talks to servers, is not installed; install pytest-logprob-parity[server]"
            ) from None
        self.url = url
        self._serves, self._key = serves, key
        self.retried: collections.Counter[str] = collections.Counter()
        self.waited = 0.0
        self._notify = notify
        self._httpx = httpx
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: Any = None

    def ask(
        self, method: str, path: str, body: Any = None, *, timeout: float = 30.0, largest: int = _LARGEST
    ) -> Answer:  # fmt: skip
        """One request, sent once. Raises DownError where nobody answers, EngineError for a time-out."""
        return self.drive(lambda: self.send(method, path, body, timeout=timeout, largest=largest))

    async def send(
        self, method: str, path: str, body: Any = None, *, timeout: float = 30.0, largest: int = _LARGEST
    ) -> Answer:  # fmt: skip
        """The same, for work that `drive` runs."""
        return await self._send(method, path, body, ServerSettings(url=self.url, timeout=timeout, retries=0), largest)

    @contextlib.asynccontextmanager
    async def opened(self, path: str, body: Any, timeout: float) -> AsyncIterator[Any]:
        """The response to one POST while it still comes, for work that `drive` runs. Raises as `ask`, also from its body."""
        limits = self._httpx.Timeout(timeout, connect=min(_CONNECT_SECONDS, timeout))
        request = self._session.build_request("POST", path, json=body, timeout=limits)
        try:
            response = await self._session.send(request, stream=True)
            try:
                yield response
            finally:
                await response.aclose()
        except self._httpx.ConnectError as error:
            raise self._given_up(_no_connection(str(error)), path, "") from None
        except self._httpx.TimeoutException:
            failure = _Failure(kind="slow", reason=f"no answer within {timeout:g} s")
            raise self._given_up(failure, path, "") from None
        except self._httpx.TransportError as error:
            raise self._given_up(_lost(error), path, "") from None

    def post_all(
        self, posts: Sequence[tuple[str, Any]], read: Callable[[int, Any], _T], settings: ServerSettings,
        largest: int = _LARGEST,
    ) -> list[_T]:  # fmt: skip
        """Post (path, body) pairs in their order, at most `settings.concurrency` at a time: what `read` makes of each one's
        number and JSON, in order. The first failure cancels the rest; an answer has `largest` bytes at most.

        Raises EngineError for an answer that is no success, and what `read` raises.
        """
        return self.drive(lambda: self._post_all(posts, read, settings, largest))

    def take_retried(self) -> str:
        """What was sent again since this was last asked, in words; "" for nothing."""
        told = ", ".join(f"{count} for {reason}" for reason, count in self.retried.items())
        told += f"; {self.waited:.1f} s waited before them" if told else ""
        self.retried.clear()
        self.waited = 0.0
        return told

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
        self, posts: Sequence[tuple[str, Any]], read: Callable[[int, Any], _T], settings: ServerSettings, largest: int
    ) -> list[_T]:
        results: dict[int, _T] = {}
        waiting = iter(range(len(posts)))
        told = time.monotonic()

        async def work() -> None:
            nonlocal told
            for number in waiting:
                path, body = posts[number]
                answer = await self._send("POST", path, body, settings, largest)
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

    async def _send(self, method: str, path: str, body: Any, settings: ServerSettings, largest: int = _LARGEST) -> Answer:
        """One request, sent again as often as `settings.retries` allows."""
        began, timeouts, tries, waited = time.monotonic(), 0, 0, 0.0
        limits = self._httpx.Timeout(settings.timeout, connect=min(_CONNECT_SECONDS, settings.timeout))
        while True:
            tries += 1
            answer = None
            try:
                request = self._session.build_request(method, path, json=body, timeout=limits)
                answer, after = await asyncio.wait_for(self._receive(request, path, largest), settings.timeout + _GRACE)
                failure = _Failure(
                    kind="status", reason=f"status {answer.status}", again=answer.status in _PASSING, after=after
                )
            except self._httpx.ConnectError as error:
                failure = _no_connection(str(error))
            except (self._httpx.TimeoutException, asyncio.TimeoutError) as error:
                timeouts += 1
                again = timeouts <= _TIMEOUT_RETRIES
                if isinstance(error, self._httpx.ConnectTimeout):
                    failure = _Failure(kind="down", reason=f"no connection within {limits.connect:g} s", again=again)
                else:
                    failure = _Failure(kind="slow", reason=f"no answer within {limits.read:g} s", again=again)
            except self._httpx.TransportError as error:
                failure = _lost(error)
            if not failure.again or tries > settings.retries:
                effort = f" after {tries} tries in {time.monotonic() - began:.1f} s" if tries > 1 else ""
                if answer is None:
                    raise self._given_up(failure, path, effort)
                return dataclasses.replace(answer, effort=effort and f"{effort}, {waited:.1f} s of it waited")
            pause = min(BACK_OFF[0] * 2 ** (tries - 1), BACK_OFF[1])
            if failure.after is not None:
                pause = min(failure.after, settings.timeout)
            self.retried[failure.reason] += 1
            self.waited += pause
            waited += pause
            await asyncio.sleep(pause)

    async def _receive(self, request: Any, path: str, largest: int) -> tuple[Answer, float | None]:
        """One answer, and the seconds after which the server wants to be asked again. Raises EngineError for a body of more
        than `largest` bytes and for one that cannot be read.
        """
        response = await self._session.send(request, stream=True)
        try:
            coding = response.headers.get("content-encoding", "identity").strip().lower()
            if coding not in ("", "identity", "gzip"):
                raise self._unreadable(path, coding, "it was asked for as it is")
            inflate = zlib.decompressobj(wbits=31) if coding == "gzip" else None
            body = bytearray()
            async for chunk in response.aiter_raw():
                # Neither is a chunk unpacked beyond the bound: a few bytes can stand for very many.
                body += inflate.decompress(chunk, largest + 1 - len(body)) if inflate else chunk
                if len(body) > largest:
                    raise EngineError(
                        f"the server at {self.url} answers {path} with more than {largest:,} bytes: that is "
                        "no answer to what was asked"
                    )
        except zlib.error as error:
            raise self._unreadable(path, "gzip", str(error)) from None
        finally:
            await response.aclose()
        return answer_of(response.status_code, body), retry_after(response.headers.get("retry-after"))

    def _unreadable(self, path: str, coding: str, reason: str) -> EngineError:
        text = f"the server at {self.url} answers {path} with a body that cannot be read"
        return EngineError(f"{text} (Content-Encoding {coding[:40]!r}: {reason}); is that a proxy's?")

    def _given_up(self, failure: _Failure, path: str, effort: str) -> EngineError:
        if failure.kind == "down":
            return DownError(f"no server answers at {self.url}: {failure.reason}{effort}")
        hint = "; timeout=SECONDS allows more" if failure.kind == "slow" else ""
        at = "" if failure.kind == "refused" else f"{path}: "
        return EngineError(f"the server at {self.url}: {at}{failure.reason}{effort}{hint}")

    def success(self, answer: Answer, path: str) -> Any:
        """The JSON of an answer that is a success. Raises EngineError, UsageError where the server refuses what was asked."""
        where = f"the server at {self.url}"
        if answer.status in (401, 403):
            given = "the one in" if os.environ.get(self._key) else "none is in"
            raise EngineError(f"{where} wants another key for {path} (status {answer.status}): {given} {self._key}")
        if answer.status == 404:
            raise EngineError(f"{where} has no {path} (status 404: {answer.reason()}): is that {self._serves}?")
        if answer.status in (400, 422):
            raise UsageError(f"{where} refuses a request to {path}: {answer.reason()}")
        if not 200 <= answer.status < 300:
            raise EngineError(f"{where} failed at {path} (status {answer.status}){answer.effort}: {answer.reason()}")
        if answer.problem:
            raise EngineError(f"{where} answers {path} with {answer.problem}: {answer.text!r}")
        return answer.content

    # -- the loop. Not anyio's blocking portal: its thread keeps the interpreter from ending where nobody closed the client.

    def drive(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run `work` on this client's loop; in a thread where the caller is inside of another one. Leaves nothing running."""
        if self._loop is None:
            self._session = self._open()
            self._loop = asyncio.new_event_loop()
        loop = self._loop
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return _run(loop, work())
        return _run_in_thread(loop, work)

    def _open(self) -> Any:
        key = os.environ.get(self._key)
        if key and not (key.isascii() and key.isprintable()):
            raise UsageError(f"{self._key} holds what cannot be sent as a key: a line break, or letters beyond ASCII")
        host = self._httpx.URL(self.url).host
        return self._httpx.AsyncClient(
            base_url=self.url,
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
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


def _lost(error: Exception) -> _Failure:
    return _Failure(kind="lost", reason=f"connection lost ({one_line(str(error)) or type(error).__name__})")


def _no_connection(error: str) -> _Failure:
    """Why there is none, by what httpx says of it."""
    if "SSL" in error:
        return _Failure(kind="refused", reason=f"no TLS there, or a certificate that is not trusted ({error})", again=False)
    if error.startswith("[Errno"):  # the resolver's
        return _Failure(kind="down", reason=f"no such host ({error.partition('] ')[2]})")
    return _Failure(kind="down", reason="connection refused")
