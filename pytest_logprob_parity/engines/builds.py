"""Whether torch and the packages beside it are builds of one kind; pip mixes them where only torch is of PyTorch's index."""

from __future__ import annotations

import re
from typing import Final

from ..golden.fingerprint import installed_version

_BESIDE: Final = ("torchvision", "torchaudio", "torchcodec")
#: How it shows: `operator torchvision::nms does not exist`, `libc10_cuda.so: cannot open shared object file`.
_SIGNS: Final = re.compile(rf"{'|'.join(_BESIDE)}|\.so[.\d]*: cannot open shared object file")


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
