"""The folder of a report: made before the run begins, filled by every process that checks, swept by the one that reports."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError
from .reading import parse_json, read_text
from .results import FORMAT, LARGEST, NAME

_PARTS: Final = ".parts"


def prepare(folder: Path) -> None:
    """Make the folder of a report, so that a run learns of a wrong one before it has spent its time.

    Raises UsageError where the report's libraries are missing or where nothing can be written there.
    """
    check_libraries()
    check_ours(folder)
    try:
        shutil.rmtree(folder / _PARTS, ignore_errors=True)
        (folder / _PARTS).mkdir(parents=True)
        remove_part(folder, write_part(folder, {}))
    except OSError as error:
        raise unwritable(folder, error) from None


def check_ours(folder: Path) -> None:
    """Raise UsageError where the folder holds files by a report's names that no report wrote, or where nobody can tell."""
    try:
        there = [name for name in ("index.html", "results.json", "summary.md") if (folder / name).exists()]
    except OSError as error:
        raise unwritable(folder, error) from None
    if not there:
        return
    try:
        ours = parse_json(read_text(folder / NAME, LARGEST))["format"] == FORMAT
    except (OSError, UsageError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UsageError(f"{folder / there[0]} is there already, and is no report's: name another folder")


def check_libraries() -> None:
    """Raise UsageError where a library that renders reports is missing."""
    missing = [name for name, module in (("Jinja2", "jinja2"), ("matplotlib", "matplotlib")) if find_spec(module) is None]
    if missing:
        raise UsageError(f"a report needs {' and '.join(missing)}: pip install 'pytest-logprob-parity[report]'")


def unwritable(folder: Path, error: OSError) -> UsageError:
    """The one line for a report that cannot be written."""
    return UsageError(f"the report's folder {folder} cannot be written: {error.strerror or error}; name another one")


def write_part(folder: Path, entry: Mapping[str, Any]) -> str:
    """Leave the entry of one check for the process that reports; gives its name. Raises OSError."""
    name = f"{uuid.uuid4().hex}.json"
    partial = folder / _PARTS / f"{name}.part"
    partial.write_text(json.dumps(entry, allow_nan=False), "ascii")
    os.replace(partial, folder / _PARTS / name)
    return name


def read_part(folder: Path, name: str) -> dict[str, Any] | None:
    """The entry of that name; None where it did not get here (a worker on another machine, a full disk)."""
    try:
        return dict(json.loads((folder / _PARTS / name).read_text("ascii")))
    except (OSError, ValueError):
        return None


def remove_part(folder: Path, name: str) -> None:
    """Remove the part of a check that does not count after all."""
    with contextlib.suppress(OSError):
        (folder / _PARTS / name).unlink()


def unnamed_parts(folder: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The parts besides `names`, of tests that have none there: their checks ended, and then their worker or the run did."""
    others = sorted({path.name for path in (folder / _PARTS).glob("*.json")} - set(names))
    if not others:
        return {}
    told = {entry["node_id"] for name in names if (entry := read_part(folder, name)) is not None}
    found = {name: entry for name in others if (entry := read_part(folder, name)) is not None}
    return {name: entry for name, entry in found.items() if entry["node_id"] not in told}


def sweep(folder: Path) -> None:
    """Remove what prepare() and the checks left beside the report."""
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
