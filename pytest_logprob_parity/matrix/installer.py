"""Install packages into an environment: by uv where it is installed, else by pip, from what pip is configured for."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import EngineError
from .install_failure import FULL, why_it_failed

#: How often a wait for an installer looks whether it is to stop, in seconds.
_LOOK: Final = 0.1
#: With fewer bytes left a disk is full.
_NOTHING_LEFT: Final = 8_000_000
#: What pip reads from its configuration, and the option of uv that says the same: once for each value.
_OPTIONS: Final[Mapping[str, str]] = {
    "index-url": "--index-url", "extra-index-url": "--extra-index-url", "find-links": "--find-links",
    "constraint": "--constraint", "trusted-host": "--allow-insecure-host", "only-binary": "--only-binary",
    "no-binary": "--no-binary",
}  # fmt: skip
_PATHS: Final = ("find-links", "constraint")
#: Settings of pip that are on or off.
_SWITCHES: Final[Mapping[str, Sequence[str]]] = {"no-index": ("--no-index",), "pre": ("--prerelease", "allow")}
#: The same as variables of uv's environment.
_VARIABLES: Final[Mapping[str, str]] = {
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
#: Who sets one of these has told uv itself where packages are.
_UVS_OWN: Final = ("UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX")


class DiskFullError(EngineError):
    """There is no disk left for an environment: that says nothing about what was to be installed."""


class CommandError(EngineError):
    """A command failed; the text says why."""


@dataclass(frozen=True, slots=True)
class Installer:
    """A command that installs requirements into one environment, from the folder that it has to run in.

    `variables` are set for it; without a `folder` it runs where the user is.
    """

    command: tuple[str, ...]
    variables: Mapping[str, str]
    folder: Path | None = None


def find_uv() -> tuple[str, ...]:
    """The command that runs uv: the one on PATH, or the one that this Python has; empty where there is none that runs."""
    commands: list[tuple[str, ...]] = [(found,)] if (found := shutil.which("uv")) else []
    if importlib.util.find_spec("uv") is not None:
        commands.append((sys.executable, "-m", "uv"))
    return next((command for command in commands if _runs([*command, "--version"])), ())


def find_pip() -> tuple[str, ...]:
    """The command that runs pip for this Python: its own, or one that uv brings. Raises EngineError where there is neither."""
    if importlib.util.find_spec("pip") is not None:
        return (sys.executable, "-m", "pip")
    if uv := find_uv():
        return (*uv, "tool", "run", "--quiet", "--python", sys.executable, "pip")
    raise EngineError(f"neither pip nor uv is installed for {sys.executable}: install one of them")


def installer_of(python: Path, *, own_files: bool) -> Installer:
    """What installs into the environment of this Python; with `own_files` no file is linked to a cache or an environment.

    uv runs in the environment's own folder: where the user is, it would obey the settings of the user's project.
    """
    if not (uv := find_uv()):
        quiet = ("--disable-pip-version-check", "--no-input", "--progress-bar", "off")
        return Installer((str(python), "-m", "pip", "install", *quiet), {})
    settings, variables = uv_settings(_pip_configuration())
    options = ["--python", str(python), "--no-progress", "--color", "never"]
    options += ["--index-strategy", "unsafe-best-match"]  # as pip: the best version of all indexes, whichever has it
    options += ["--link-mode", "copy"] if own_files else []
    return Installer((*uv, "pip", "install", *options, *settings), variables, python.parent.parent)


def uv_settings(configuration: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """What pip is configured for (the output of `pip config list`), as options and variables of uv, which does not read it."""
    values: dict[str, str] = {}
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.*)$", configuration, re.MULTILINE)
    for section in ("global", "install", ":env:"):  # the later ones win
        values |= {name: str(ast.literal_eval(text)) for part, name, text in found if part == section}
    own = any(os.environ.get(name) for name in _UVS_OWN)
    places = ("index-url", "extra-index-url", "find-links", "no-index")
    values = {name: value for name, value in values.items() if not (own and name in places)}
    options = [
        part
        for name, option in _OPTIONS.items()
        for value in values.get(name, "").split()
        for part in (option, str(Path(value).absolute()) if name in _PATHS and Path(value).exists() else value)
    ]
    for name, switch in _SWITCHES.items():
        if values.get(name, "").lower() in ("1", "true", "yes", "on"):
            options += switch
    variables = {variable: values[name] for name, variable in _VARIABLES.items() if name in values}
    return tuple(options), {name: value for name, value in variables.items() if not os.environ.get(name)}


def run_command(
    command: Sequence[str], folder: Path, stop: threading.Event, installer: Installer | None = None
) -> str:  # fmt: skip
    """What a command printed that writes to `folder`. It runs as if no Python environment were active.

    Raises CommandError where it fails, and where `stop` is set meanwhile, which ends it; DiskFullError for want of disk.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env={**clean_variables(), **(installer.variables if installer else {})},
            cwd=installer.folder if installer else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
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
        printed = output.read()
    if ended_by_us:
        raise CommandError("the run was interrupted")
    if status:
        full = shutil.disk_usage(folder).free < _NOTHING_LEFT  # venv does not say why its ensurepip ended
        why = FULL if full else why_it_failed(printed)
        raise (DiskFullError if FULL in why else CommandError)(why)
    return printed


def clean_variables() -> dict[str, str]:
    """The user's environment variables, without those that say which Python environment is active."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _pip_configuration() -> str:
    """The output of `pip config list`; empty where there is no pip to ask."""
    if importlib.util.find_spec("pip") is None:
        return ""
    command = [sys.executable, "-m", "pip", "config", "list"]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL).stdout


def _runs(command: Sequence[str]) -> bool:
    try:
        return not subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False
