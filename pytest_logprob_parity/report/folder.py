"""The folder of a report: made before the run begins, filled by every process that checks, swept by the one that reports.

    DIR/index.html, results.json, summary.md     the report
    DIR/.gitignore                               in a folder that holds nothing else: it ignores itself
    DIR/.parts/<run>/                            while runs are under way: the checks of each, and a file that it has locked

Runs one after the other replace each other's report. Runs at the same time share one: each merges its results with those of the
runs that have ended beside it, and the last one sweeps. The lock goes with its process, so a killed run is known to be dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..atomic import write_whole
from ..bounded import parse_json, read_text
from ..errors import UsageError
from .results_file import LARGEST, NAME
from .results_schema import FORMAT

try:
    import fcntl
except ImportError:  # Windows: runs at the same time are not told apart there
    fcntl = None  # type: ignore[assignment]

_PARTS: Final = ".parts"
_LOCK: Final = "lock"
_IGNORE: Final = ".gitignore"
#: What a report's folder holds. One that holds anything else may be somebody's, and is not ignored.
_OURS: Final = frozenset({"index.html", NAME, "summary.md", _PARTS, _IGNORE})


class Run:
    """A run that is to report: `path` is where its checks leave their parts, below the report's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = report_of(path)
        self._lock: int | None = _locked(path / _LOCK)

    def end(self) -> None:
        """Remove what is left of this run, where it did not report."""
        if self._lock is not None:
            with in_turn(self.folder):
                self.leave(None)

    def leave(self, results: str | None) -> None:
        """Let the run be over, in its turn: the last one sweeps, an earlier one leaves `results` (a results.json) to those.

        Raises OSError where these cannot be written.
        """
        if results is not None and _alive(self.folder, besides=self.path):
            write_whole(self.path / NAME, results.encode("ascii"))
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if not _alive(self.folder):
            shutil.rmtree(self.folder / _PARTS, ignore_errors=True)


def is_part(path: Path) -> bool:
    """Whether a file is what a run that is under way has left."""
    return _PARTS in path.parts


def report_of(run: Path) -> Path:
    """The report's folder, for that of a run."""
    return run.parent.parent


def prepare(folder: Path) -> Run:
    """Make the folder of a report, so that a run learns of a wrong one before it has spent its time.

    Raises UsageError where the report's library is missing or where nothing can be written there.
    """
    check_library()
    check_ours(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_turn(folder):
            if not _alive(folder):  # what a killed run has left
                shutil.rmtree(folder / _PARTS, ignore_errors=True)
            path = folder / _PARTS / uuid.uuid4().hex
            path.mkdir(parents=True)
            run = Run(path)
            ignore(folder)
        remove_part(path, write_part(path, {}))
    except OSError as error:
        raise unwritable(folder, error) from None
    return run


def ended_beside(run: Path) -> tuple[list[Path], int]:
    """The results of runs that have ended since `run` began or were under way then, and how many runs were killed meanwhile."""
    found, killed = [], 0
    for other in sorted((report_of(run) / _PARTS).iterdir()):
        if other == run or _holds(other):
            continue
        if (other / NAME).is_file():
            found.append(other / NAME)
        else:
            killed += any(other.glob("*.json"))
    return found, killed


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows, or the folder is gone
        yield
        return
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _locked(path: Path) -> int:
    """A file that this process alone has locked until it ends; a child that it forks does not."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _holds(run: Path) -> bool:
    """Whether the process of a run, another one than this, is alive."""
    if fcntl is None:
        return False
    try:
        handle = os.open(run / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(handle)


def _alive(folder: Path, besides: Path | None = None) -> bool:
    parts = folder / _PARTS
    return parts.is_dir() and any(_holds(run) for run in parts.iterdir() if run != besides)


def ignore(folder: Path) -> None:
    """Let a folder that holds a report and nothing else ignore itself in git. Raises OSError."""
    if not {path.name for path in folder.iterdir()} - _OURS and not (folder / _IGNORE).exists():
        (folder / _IGNORE).write_text("*\n", "utf-8")


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
        raise UsageError(f"{folder / there[0]} exists, and no report wrote it: name another folder")


def check_library() -> None:
    """Raise UsageError where the library that renders reports is missing."""
    if find_spec("jinja2") is None:
        raise UsageError("a report needs Jinja2: pip install 'pytest-logprob-parity[report]'")


def unwritable(folder: Path, error: OSError) -> UsageError:
    """The one line for a report that cannot be written."""
    return UsageError(f"the report's folder {folder} cannot be written: {error.strerror or error}; name another one")


def write_part(run: Path, entry: Mapping[str, Any]) -> str:
    """Leave the entry of one check for the process that reports; gives its name. Raises OSError."""
    name = f"{uuid.uuid4().hex}.json"
    write_whole(run / name, json.dumps(entry, allow_nan=False).encode("ascii"))
    return name


def read_part(run: Path, name: str) -> dict[str, Any] | None:
    """The entry of that name; None where it did not get here (a worker on another machine, a full disk)."""
    try:
        return dict(json.loads((run / name).read_text("ascii")))
    except (OSError, ValueError):
        return None


def remove_part(run: Path, name: str) -> None:
    """Remove the part of a check that does not count after all."""
    with contextlib.suppress(OSError):
        (run / name).unlink()


def unnamed_parts(run: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The parts besides `names`, of tests that have none there: their checks ended, and then their worker or the run did."""
    others = sorted({path.name for path in run.glob("*.json")} - set(names))
    if not others:
        return {}
    told = {entry["node_id"] for name in names if (entry := read_part(run, name)) is not None}
    found = {name: entry for name in others if (entry := read_part(run, name)) is not None}
    return {name: entry for name, entry in found.items() if entry["node_id"] not in told}
