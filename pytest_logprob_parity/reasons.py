"""Why an engine or a library failed, in one line: its own reason, and a fix where one is known."""

from __future__ import annotations

import re
from typing import Final

from .machine import installed_version

#: Packages that are built for the same CUDA as torch; pip mixes them where only torch is of PyTorch's index.
_BESIDE: Final = ("torchvision", "torchaudio", "torchcodec")
#: How it shows: `operator torchvision::nms does not exist`, `libc10_cuda.so: cannot open shared object file`.
_SIGNS: Final = re.compile(rf"{'|'.join(_BESIDE)}|\.so[.\d]*: cannot open shared object file")
#: How many characters of an engine's own reason a message shows.
_REASON_WIDTH: Final = 300


class RemoteError(Exception):
    """What an engine in another process died of; its text is that of `reason_of` there."""


def reason_of(error: BaseException) -> str:
    """The engine's own reason, in one line: the innermost cause's type and first telling line, and a fix that is known."""
    if isinstance(error, RemoteError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError" and len(lines) > 1:  # pydantic: a count, then fields with their reasons below
        lines = [": ".join(lines[1:3])] if not lines[1].startswith(" ") and len(lines) > 2 else lines[1:]
    text = " ".join(lines[0].split(" [type=")[0].split()) if lines else "no message"
    return f"{type(error).__name__}: {text}"[:_REASON_WIDTH] + mixed_builds(text)


def mixed_builds(reason: str) -> str:
    """What to do about an error whose reason is that torch is a build for CPUs and a package beside it is not; else ""."""
    torch = installed_version("torch") or ""
    if not torch.endswith("+cpu") or not _SIGNS.search(reason):
        return ""
    versions = {name: installed_version(name) for name in _BESIDE}
    others = [name for name, version in versions.items() if version and not version.endswith("+cpu")]
    if not others:
        return ""
    named = ", ".join(f"{name} {versions[name]}" for name in others)
    fix = f"pip uninstall {' '.join(others)}"
    return f"; torch {torch} is a build for CPUs, {named} are for CUDA, and text needs none of them: {fix}"
