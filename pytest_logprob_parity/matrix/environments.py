"""Virtual environments made from pins: on first use, kept, whole or not at all, and never the user's own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..atomic import write_whole
from ..checkpoint.digests import digest_of
from ..errors import EngineError

_READY: Final = "logprob-parity.json"
#: What the worker needs beside the engine: an environment that had it and has it no more is not whole.
_NEEDED: Final = ("numpy", "safetensors")
#: How often one that waits for pip looks whether it is to stop, in seconds.
_LOOK: Final = 0.1
#: What a full disk is called, here and in what pip and workers print; with less than so many bytes left a disk is full.
FULL: Final = "No space left on device"
_NOTHING_LEFT: Final = 8_000_000
_INSTALLED: Final = """
import importlib.metadata
print(sorted(f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()))
"""


class DiskFullError(EngineError):
    """There is no disk left for an environment: that says nothing of what was to be installed."""


@dataclass(frozen=True)
class Environment:
    """What an engine version is installed from.

    Either `python`, an interpreter of the user's that is used as it is, or pins: `requirements` (texts of requirement
    files) and `packages` are installed without their dependencies, `resolved` with them. `after_install` has Python files
    by name, texts too: the environment's own Python runs them, in this order, when everything is installed. `variables`
    are set for the engine's process.
    """

    name: str
    requirements: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    resolved: tuple[str, ...] = ()
    after_install: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hex digits of what it is made of."""
        parts = [self.requirements, self.packages, self.resolved, list(sys.version_info[:2])]
        return digest_of([*parts, list(self.after_install.values())] if self.after_install else parts)


def installed_in(environment: Environment) -> str:
    """16 hex digits of what is installed now where an environment's `python` is the user's; empty where it cannot be asked."""
    try:
        done = _ask(environment.python, _INSTALLED) if environment.python else None
    except OSError:
        return ""
    return "" if done is None or done.returncode else digest_of(done.stdout)


def default_home() -> Path:
    """Where environments are kept unless told otherwise: LOGPROB_PARITY_ENVIRONMENTS, or the user's cache folder."""
    named = os.environ.get("LOGPROB_PARITY_ENVIRONMENTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "logprob-parity" / "environments"


def python_of(
    environment: Environment, home: Path, notify: Callable[[str], None], stop: threading.Event | None = None
) -> Path:  # fmt: skip
    """The interpreter of an environment, which is made first where there is none yet. `stop` ends that from another thread.

    Raises EngineError, in one line, where it cannot be made, DiskFullError for want of disk; what was half-made is removed.
    """
    stop = stop or threading.Event()
    if environment.python:
        given = shutil.which(environment.python)
        if given is None:
            raise EngineError(f"environment {environment.name}: there is no interpreter {environment.python}")
        if _ask(given, "print('Python')").stdout.strip() != "Python":
            raise EngineError(f"environment {environment.name}: {environment.python} is no Python")
        return Path(given)
    folder = home / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', environment.name)}-{environment.digest[:8]}"
    python = folder / "bin" / "python"
    with _locked(folder):
        if _is_whole(folder, environment):
            return python
        notify(f"making the environment {environment.name} (kept in {folder})")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            _make(environment, folder, python, stop)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                why = error.strerror or str(error)
                raise _kind_of(error)(f"environment {environment.name} was not made: {why} ({folder})") from None
            raise
    return python


def _kind_of(error: OSError) -> type[EngineError]:
    return DiskFullError if error.errno == errno.ENOSPC else EngineError


def _is_whole(folder: Path, environment: Environment) -> bool:
    try:
        made = json.loads((folder / _READY).read_text("utf-8"))
        return bool(made["digest"] == environment.digest) and set(made.get("imports", _NEEDED)) <= set(_imports(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _imports(folder: Path) -> list[str]:
    """What of that which the worker needs can be imported."""
    return [name for name in _NEEDED if not _ask(folder / "bin" / "python", f"import {name}").returncode]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One maker at a time; others wait, and find it made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(folder.name + ".lock").open("w")
    except OSError as error:
        raise _kind_of(error)(f"environments cannot be kept in {folder.parent}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(environment: Environment, folder: Path, python: Path, stop: threading.Event) -> None:
    run = functools.partial(_run, environment, folder, stop)
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", "install"]
    for text in environment.requirements:
        pins = folder / "requirements.txt"
        pins.write_text(text, "utf-8")
        run([*pip, "--no-deps", "-r", str(pins)])
    if environment.packages:
        run([*pip, "--no-deps", *environment.packages])
    if environment.resolved:
        run([*pip, *environment.resolved])
    printed = []
    for name, code in environment.after_install.items():
        script = folder / "after_install.py"
        script.write_text(code, "utf-8")
        printed += run([str(python), str(script)], f"after_install {name}: ").splitlines()
        script.unlink()
    made = {"digest": environment.digest, "name": environment.name, "after_install": printed, "imports": _imports(folder)}
    write_whole(folder / _READY, json.dumps(made).encode())


def _run(environment: Environment, folder: Path, stop: threading.Event, command: Sequence[str], step: str = "") -> str:
    """What a command printed. Raises EngineError where it fails, DiskFullError for want of disk; `step` is for the message."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=_variables(), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not stop.wait(_LOOK):
                pass
        finally:
            ended_by_us = process.poll() is None
            if ended_by_us:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        output.seek(0)
        said = output.read()
    if ended_by_us:
        raise EngineError(f"environment {environment.name} was not made: the run was interrupted")
    if status:
        full = shutil.disk_usage(folder.parent).free < _NOTHING_LEFT  # venv does not say why its ensurepip ended
        why = FULL if full else _last_error(said)
        kind = DiskFullError if FULL in why else EngineError
        raise kind(f"environment {environment.name} was not made: {step}{why}")
    return said


def _ask(python: str | Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-c", code]
    return subprocess.run(command, env=_variables(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def _variables() -> dict[str, str]:
    """The user's environment, without what it says of Python."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _last_error(output: str) -> str:
    """The line of pip's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "Error" in line]
    errors = [line for line in errors if FULL in line] or errors
    text = (errors or lines or ["pip failed without a word"])[-1]
    return re.sub(r"^ERROR:\s*", "", text)[:300]
