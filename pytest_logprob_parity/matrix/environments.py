"""Virtual environments for engine versions: made from pins on first use, kept, and never used when incomplete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..atomic import write_whole
from ..checkpoint.digests import digest_of
from ..errors import EngineError
from .installer import CommandError, DiskFullError, clean_variables, installer_of, run_command
from .releases import requirements_of

_READY: Final = "logprob-parity.json"
#: What the worker needs beside the engine: an environment that had it and has it no more is not whole.
_NEEDED: Final = ("numpy", "safetensors")
_INSTALLED: Final = """
import importlib.metadata
print(sorted(f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What an engine version is installed from.

    Either `python`, an interpreter of the user's that is used as it is, or pins: `requirements` (texts of requirement
    files) and `packages` are installed without their dependencies, `resolved` with them; of a `release`
    (`package==version`) the dependencies are what its own metadata requires. `after_install` has Python files by name, texts
    too: the environment's own Python runs them, in this order, when everything is installed. `variables` are set for the
    engine's process.
    """

    name: str
    requirements: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    resolved: tuple[str, ...] = ()
    release: str = ""
    after_install: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """16 hex digits that identify everything it is made of, and the version of Python."""
        parts = [self.requirements, self.packages, self.resolved, list(sys.version_info[:2])]
        later = {"release": self.release, "after_install": list(self.after_install.values())}
        return digest_of([*parts, later] if any(later.values()) else parts)


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
    environment: Environment,
    home: Path,
    notify: Callable[[str], None],
    stop: threading.Event | None = None,
    failed: dict[str, str] | None = None,
) -> Path:
    """The interpreter of an environment, which is made first where there is none yet. `stop` ends that from another thread.

    `failed` remembers, by digest, why environments could not be made: they are not tried again.

    Raises EngineError, in one line, where it cannot be made, DiskFullError for want of disk; what was half-made is removed.
    """
    stop = stop or threading.Event()
    failed = {} if failed is None else failed
    if environment.python:
        return _users_python(environment)
    folder = home / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', environment.name)}-{environment.digest[:8]}"
    python = folder / "bin" / "python"
    with _locked(folder):
        if _is_whole(folder, environment):
            return python
        if why := failed.get(environment.digest):
            raise EngineError(why)
        notify(f"making the environment {environment.name} (kept in {folder})")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            _make(environment, folder, python, stop)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (OSError, EngineError)):
                told = _not_made(environment, error, folder)
                if not isinstance(told, DiskFullError) and not stop.is_set():
                    failed[environment.digest] = str(told)
                raise told from None
            raise
    return python


def _users_python(environment: Environment) -> Path:
    """The interpreter that an environment names. Raises EngineError where it is none."""
    found = shutil.which(environment.python)
    if found is None:
        raise EngineError(f"environment {environment.name}: there is no interpreter {environment.python}")
    if _ask(found, "print('Python')").stdout.strip() != "Python":
        raise EngineError(f"environment {environment.name}: {environment.python} is not a Python interpreter")
    return Path(found)


def _not_made(environment: Environment, error: OSError | EngineError, folder: Path) -> EngineError:
    told = f"environment {environment.name} was not made: "
    if isinstance(error, EngineError):
        return type(error)(f"{told}{error}")
    return _kind_of(error)(f"{told}{error.strerror or error} ({folder})")


def _kind_of(error: OSError) -> type[EngineError]:
    return DiskFullError if error.errno == errno.ENOSPC else EngineError


def _is_whole(folder: Path, environment: Environment) -> bool:
    try:
        made = json.loads((folder / _READY).read_text("utf-8"))
        return bool(made["digest"] == environment.digest) and set(made.get("imports", _NEEDED)) <= set(_imports(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _imports(folder: Path) -> list[str]:
    """The modules that the worker needs and that can be imported."""
    return [name for name in _NEEDED if not _ask(folder / "bin" / "python", f"import {name}").returncode]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an environment's folder: one process makes it, others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(folder.name + ".lock").open("w")
    except OSError as error:
        raise _kind_of(error)(f"environments cannot be kept in {folder.parent}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(environment: Environment, folder: Path, python: Path, stop: threading.Event) -> None:
    """Make an environment in an empty folder, its ready file last."""
    packages, resolved = environment.packages, environment.resolved
    if environment.release:
        packages = (*packages, environment.release)
        resolved = (*requirements_of(environment.release, folder, stop), *resolved)
    run_command([sys.executable, "-m", "venv", str(folder)], folder, stop)  # by both: with pip, and what comes with it
    installer = installer_of(python, own_files=bool(environment.after_install))
    install = functools.partial(run_command, folder=folder, stop=stop, installer=installer)
    pins = folder / "requirements.txt"
    for text in environment.requirements:
        pins.write_text(text, "utf-8")
        install([*installer.command, "--no-deps", "-r", str(pins)])
    if packages:
        install([*installer.command, "--no-deps", *packages])
    if resolved:
        install([*installer.command, *resolved])
    made = {
        "digest": environment.digest,
        "name": environment.name,
        "after_install": _after_install(environment, folder, python, stop),
        "imports": _imports(folder),
    }
    write_whole(folder / _READY, json.dumps(made).encode())


def _after_install(environment: Environment, folder: Path, python: Path, stop: threading.Event) -> list[str]:
    """Run what comes after an install; the lines that it printed."""
    printed = []
    script = folder / "after_install.py"
    for name, code in environment.after_install.items():
        script.write_text(code, "utf-8")
        try:
            printed += run_command([str(python), str(script)], folder, stop).splitlines()
        except CommandError as error:
            raise CommandError(f"after_install {name}: {error}") from None
    script.unlink(missing_ok=True)
    return printed


def _ask(python: str | Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-c", code]
    return subprocess.run(command, env=clean_variables(), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
