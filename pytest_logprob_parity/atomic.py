"""Write files whole or not at all: under another name first, then in place of the old file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from .bounded import open_without_waiting

#: How the name of a file that is being written ends.
PART: Final = ".part"
#: Seconds in which a new file may not be locked yet by the process that writes it.
_MOMENT: Final = 60.0


def write_whole(path: Path, data: bytes | bytearray) -> None:
    """Write a file into a folder that is there: whole or not at all, with the permissions of any new file.

    Raises OSError where the file cannot be written; an old file then stays.
    """
    _replace({path: data})


def write_new(path: Path, text: str) -> None:
    """Write a small file where nothing stands, not even a link that leads elsewhere. Raises OSError."""
    if not os.path.lexists(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)


def replace_all(files: Mapping[Path, bytes | bytearray]) -> None:
    """Write several files: each whole or not at all, and none of them before all are on the disk.

    Folders that are missing are made, and the unfinished files of killed runs in them are removed. Raises OSError where a
    file cannot be written; all old files then stay, or are put back.
    """
    for folder in dict.fromkeys(path.parent for path in files):
        folder.mkdir(parents=True, exist_ok=True)
        _clear_parts(folder)
    _replace(files)


def _replace(files: Mapping[Path, bytes | bytearray]) -> None:
    """Write each file under another name, all of them, and then put each in its place."""
    umask = os.umask(0)
    os.umask(umask)
    staged: dict[Path, str] = {}
    before: dict[Path, str | None] = {}
    with contextlib.ExitStack() as open_files:  # open, and so locked, until all have their places
        try:
            for path, data in files.items():
                handle, staged[path] = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
                file = open_files.enter_context(os.fdopen(handle, "wb"))
                fcntl.flock(file, fcntl.LOCK_SH)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(staged[path], 0o666 & ~umask)  # mkstemp makes files that only their owner may read
            for path, name in staged.items():
                before[path] = _other_name(path, name) if len(staged) > 1 else None
                os.replace(name, path)
        except BaseException:
            for path, name in staged.items():
                with contextlib.suppress(OSError):
                    if path in before and not Path(name).exists():  # it has its place already
                        _put_back(path, before[path])
                    else:
                        os.unlink(name)
            raise
        finally:
            for old in filter(None, before.values()):
                with contextlib.suppress(OSError):
                    os.unlink(old)


def _other_name(path: Path, name: str) -> str | None:
    """Another name of the file that is replaced, to put it back; None where there is none."""
    old = f"{name.removesuffix(PART)}.old{PART}"
    try:
        os.link(path, old)
    except FileNotFoundError:
        return None
    except OSError:  # no links here
        shutil.copy2(path, old)
    return old


def _put_back(path: Path, old: str | None) -> None:
    """Give a file its old content again, or remove it where there was none."""
    if old is None:
        path.unlink()
    else:
        os.replace(old, path)


def _clear_parts(folder: Path) -> None:
    """Remove the unfinished files of killed runs: no process has them locked, and they are older than a minute."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError), open(part, "rb", opener=open_without_waiting) as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _MOMENT:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
