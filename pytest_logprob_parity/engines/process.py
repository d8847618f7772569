"""An engine in a process of its own: for one that cannot start beside its predecessors, and for GPUs' memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final

from ..checkpoint.adapter import Adapter
from ..checkpoint.weight_update import WeightUpdate
from ..errors import EngineError
from ..reasons import RemoteError
from ..spec import EngineSpec
from . import child
from .backend import Completion, Request, ResolvedConfig
from .prefork import Forked, fork
from .time_limits import TimeLimits, no_answer

#: How long a child that was told to end may take to do so, and one that was killed, in seconds.
_CLOSE_SECONDS: Final = 20
_KILL_SECONDS: Final = 20
#: How much of its log a message shows: lines, and characters of them.
_LAST_LINES: Final = 3
_LAST_CHARACTERS: Final = 300


class ProcessBackend:
    """The far end of an engine that lives in a child process. If either process dies, the other one learns of it; a child
    that does not answer within the limits is ended.
    """

    def __init__(
        self, process: subprocess.Popen[bytes] | Forked, connection: Connection[Any, Any], log: Any, name: str
    ) -> None:
        self._process = process
        self._connection = connection
        self._log = log
        self._name = name
        self._seconds: float = 0
        self.config: ResolvedConfig

    @classmethod
    def start(
        cls,
        spec: EngineSpec,
        model: Path,
        tokenizer: Path,
        adapter: Adapter | None = None,
        limits: TimeLimits | None = None,
        *,
        forked: bool = False,
    ) -> ProcessBackend:
        """Start the engine of `spec` in a child process, `forked` from one that has imported vLLM. Raises what starting it
        there raised, and EngineError where that takes longer than its limit.
        """
        ours, theirs = Pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process does
        process = fork(theirs.fileno(), log.fileno()) if forked else _start(theirs.fileno(), log)
        theirs.close()
        backend = cls(process, ours, log, str(spec))
        limits = limits or TimeLimits()
        backend._seconds = limits.start
        try:
            backend.config = backend._ask("start", spec, model, tokenizer, adapter)
        except BaseException:
            backend.close()
            raise
        backend._seconds = limits.call
        return backend

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """See Backend.run."""
        completions: list[Completion] = self._ask("run", list(requests))
        return completions

    def run_through(self, requests: Sequence[Request], update: WeightUpdate) -> tuple[list[Completion], list[int]]:
        """See VllmBackend.run_through."""
        answer: tuple[list[Completion], list[int]] = self._ask("run_through", list(requests), update)
        return answer

    def update_weights(self, update: WeightUpdate) -> None:
        """See VllmBackend.update_weights."""
        self._ask("update_weights", update)

    def sleep(self, level: int) -> None:
        """See Engine.sleep."""
        self._ask("sleep", level)

    def wake_up(self, tags: list[str] | None) -> None:
        """See Engine.wake_up."""
        self._ask("wake_up", tags)

    def weight_checksums(self) -> dict[str, str]:
        """See VllmBackend.weight_checksums; none of an engine that has no such thing."""
        try:
            sums: dict[str, str] = self._ask("weight_checksums")
        except RemoteError:
            return {}
        return sums

    def close(self) -> None:
        """See Backend.close. A child that was stopped goes on first: it would not learn that it is to end."""
        self._connection.close()  # the child reads the end of the line, shuts its engine down and exits
        if self._process.poll() is None:
            self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_SECONDS)
        self._signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may sit in a driver that does not let go
            self._process.wait(_KILL_SECONDS)
        self._log.close()

    def _ask(self, *message: Any) -> Any:
        late = threading.Event()

        def end() -> None:
            late.set()
            self._signal(signal.SIGKILL)  # the line breaks, whichever end of it waits

        timer = threading.Timer(self._seconds, end)
        timer.daemon = True
        if self._seconds:
            timer.start()
        try:
            self._connection.send(message)
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            if not late.is_set():
                code = self._process.wait()
                raise EngineError(f"the engine's process died (exit status {code}): {self._last_words()}") from None
        finally:
            timer.cancel()
        if late.is_set():
            verb, *arguments = message
            many = f" of {len(arguments[0])} requests" if verb.startswith("run") else ""
            told = f"its process was ended, whose last lines are: {self._last_words()}"
            raise no_answer(self._name, f"{verb!r}{many}", self._seconds, "start" if verb == "start" else "call", told)
        if error is not None:
            raise error
        return answer

    def _signal(self, number: int) -> None:
        """Send a signal to the whole group of the child; it begins with its own process, which nobody has waited for yet."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return " / ".join(lines[-_LAST_LINES:])[-_LAST_CHARACTERS:] if lines else "it left no message"


def _start(descriptor: int, log: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", child.__name__, str(descriptor)],
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C is ours to handle; close() ends the whole group
    )
