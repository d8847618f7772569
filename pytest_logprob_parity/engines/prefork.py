"""Processes for engines, forked from one that has imported torch and vLLM already: each import takes seconds.

Only for engines on CPUs: whether a fork is safe where a GPU's driver is loaded has not been tried.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

#: What is imported before the first fork; after the first, those that a version of vLLM does not have are left out.
_MODULES: Final = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.registry",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.layers.quantization.compressed_tensors.utils",
)
#: Environment variables that may differ between the preloaded process and a fork: no library reads them while it is imported,
#: or the engine's start sets them.
_MAY_DIFFER: Final = (
    "PYTEST_",
    "GITHUB_",
    "PY_COLORS",
    "HOME",
    "USERPROFILE",
    "PWD",
    "OLDPWD",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_API_KEY",
    "VLLM_DIST_IDENT",  # another one for each engine that starts in the owner's process
)
#: How many preloaded processes wait for the next engine, each of another environment.
_KEPT: Final = 2
#: How long a fork may take to show that it can compute, in seconds.
_PROBE_SECONDS: Final = 20
_FDS: Final = 3
#: What is told of a child: by itself when it has begun, by the preloaded process when it has ended.
_BEGUN: Final = re.compile(rb"begun (\d+)\n")
_ENDED: Final = re.compile(rb"ended (-?\d+)\n")


class Forked:
    """A child of the preloaded process. It has what `subprocess.Popen` has, as far as ProcessBackend needs it."""

    def __init__(self, preloaded: Preloaded, report: socket.socket) -> None:
        self._preloaded = preloaded
        self._report = report
        self._told = b""
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """The child's process id; that of the preloaded process as long as there is no child yet."""
        self._read(0)
        begun = _BEGUN.search(self._told)
        return int(begun[1]) if begun else self._preloaded.process.pid

    def poll(self) -> int | None:
        """The exit status, or None while the child runs. It is -9 where nobody is left to tell."""
        return self._read(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the child's end. Raises subprocess.TimeoutExpired."""
        code = self._read(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("forked engine", timeout or 0)
        return code

    def kill(self) -> None:
        """Send SIGKILL."""
        self._read(None, until=_BEGUN)
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def _read(self, timeout: float | None, until: re.Pattern[bytes] | None = None) -> int | None:
        """Read what is told, for `timeout` seconds, to the exit status or until a line has come."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None and not (until and until.search(self._told)):
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._report], [], [], left)[0]:
                break
            told = self._report.recv(64)
            self._told += told
            if ended := _ENDED.search(self._told):
                self.returncode = int(ended[1])
            elif not told:
                self.returncode = -signal.SIGKILL
        return self.returncode


@dataclass(frozen=True, slots=True, kw_only=True)
class Preloaded:
    """The preloaded process as its owner sees it. It ends with its owner, and after its last child."""

    process: subprocess.Popen[bytes]
    line: socket.socket
    owner: int
    key: tuple[Any, ...]

    @classmethod
    def start(cls, key: tuple[Any, ...]) -> Preloaded:
        """Start it; its imports go on while the first engine is asked for."""
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        return cls(process=process, line=ours, owner=os.getpid(), key=key)

    def fits(self, key: tuple[Any, ...]) -> bool:
        """Whether a fork of it is what a new process would be."""
        return self.owner == os.getpid() and self.key == key and self.process.poll() is None

    def fork(self, connection: int, log: int) -> Forked:
        """A child that answers on `connection` and logs to `log`; both are file descriptors."""
        ours, theirs = socket.socketpair()
        loose = {name: value for name, value in os.environ.items() if name.startswith(_MAY_DIFFER)}
        message = pickle.dumps((loose, str(Path.cwd())))
        socket.send_fds(self.line, [len(message).to_bytes(4, "big")], [connection, log, theirs.fileno()])
        self.line.sendall(message)
        theirs.close()
        return Forked(self, ours)

    def close(self) -> None:
        """Let it end."""
        self.line.close()


_lock = threading.Lock()
_preloaded: list[Preloaded] = []


def fork(connection: int, log: int) -> Forked:
    """Fork a process for an engine, as `python -m pytest_logprob_parity.engines.child` would be one; see Preloaded.fork.

    The first call of a process, and the first after its environment has changed, takes the imports' time.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_MAY_DIFFER)}
    key = (environment, os.sched_getaffinity(0), sys.executable)
    with _lock:
        fitting = next((preloaded for preloaded in _preloaded if preloaded.fits(key)), None)
        if fitting is None:
            _forget(_KEPT - 1)
            _preloaded.append(fitting := Preloaded.start(key))
        return fitting.fork(connection, log)


def _forget(but: int = 0) -> None:
    """Let all end but the newest."""
    while len(_preloaded) > but:
        _preloaded.pop(0).close()


atexit.register(_forget)


# -- in the preloaded process -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Server:
    line: socket.socket
    #: Whether children go on from here; if not, they start anew.
    is_fit: bool
    reports: dict[int, socket.socket] = field(default_factory=dict)

    def serve(self) -> None:
        """Fork children and tell of their ends, until the owner's end of the line is closed and all children are gone."""
        ended, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        is_open = True
        while is_open or self.reports:
            line = self.line.fileno()
            ready, _, _ = select.select([ended, line] if is_open else [ended], [], [])
            if ended in ready:
                os.read(ended, 4096)
                self._reap()
            if line in ready:
                is_open = self._answer((ended, wake))

    def _reap(self) -> None:
        while self.reports:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.reports.pop(pid) as report, contextlib.suppress(OSError):  # nobody may be left to hear it
                report.sendall(b"ended %d\n" % os.waitstatus_to_exitcode(status))

    def _answer(self, to_close: tuple[int, ...]) -> bool:
        """Fork one child; False where no more are wanted."""
        length, fds, _, _ = socket.recv_fds(self.line, 4, _FDS)
        if len(fds) < _FDS:
            return False
        size, message = int.from_bytes(length, "big"), b""
        while len(message) < size:
            message += self.line.recv(size - len(message))
        connection, log, report = fds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of a BLAS, which know of forks
            pid = os.fork()
        if not pid:
            self._become_child(to_close, connection, log, report, message)
        os.close(connection)
        os.close(log)
        self.reports[pid] = socket.socket(fileno=report)
        return True

    def _become_child(self, to_close: tuple[int, ...], connection: int, log: int, report: int, message: bytes) -> None:
        """Be an engine's process to the end."""
        from . import child

        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            os.write(report, b"begun %d\n" % os.getpid())
            os.dup2(log, 1)
            os.dup2(log, 2)
            for fd in (*to_close, log, report, self.line.fileno(), *(other.fileno() for other in self.reports.values())):
                os.close(fd)
            loose, folder = pickle.loads(message)
            for name in [name for name in os.environ if name.startswith(_MAY_DIFFER)]:
                del os.environ[name]
            os.environ.update(loose)
            os.chdir(folder)
            if not self.is_fit:
                os.set_inheritable(connection, True)
                os.execv(sys.executable, [sys.executable, "-m", child.__name__, str(connection)])
            sys.path[0] = folder
            _engine = child.main(connection, last=True)  # held to the end
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _preload() -> bool:
    """Import what engines need; whether forks can go on from here."""
    from .vllm.start import set_defaults

    set_defaults()
    try:
        importlib.import_module(_MODULES[0])
        for name in _MODULES[1:]:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    except Exception:
        return False  # a new process finds out why, and tells
    gc.collect()
    gc.freeze()  # a fork's collector need not look through, and so copy, all of this
    return threading.active_count() == 1 and _forks_compute()


def _forks_compute() -> bool:
    """Whether a fork can use all cores: OpenMP hangs in one whose parent has done so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        import torch

        signal.alarm(_PROBE_SECONDS)
        torch.ones(1 << 20).exp_().sum()
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def main(descriptor: int) -> None:
    """The preloaded process."""
    line = socket.socket(fileno=descriptor)
    _Server(line, is_fit=_preload()).serve()
    os._exit(0)  # nothing of it is worth tidying up


if __name__ == "__main__":
    main(int(sys.argv[1]))
