"""The folder of the goldens: which are there, which check each says that it belongs to, and which no test claims."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..atomic import PART, write_new
from ..errors import GoldenError
from ..trace import file_format
from .names import SUFFIX, VARIANT, golden_path, variant_path


def is_there(path: Path) -> bool:
    """Whether something stands at a path, also where it may not be looked at: reading it then says so."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):  # ValueError: a NUL, or what no file system can name
        return True
    return True


def ignore_parts(folder: Path) -> None:
    """Keep the unfinished files of killed runs out of git: a .gitignore in the folder of the goldens, where it has none."""
    ignore = folder / ".gitignore"
    with contextlib.suppress(OSError):  # the goldens are written, and that is what counts
        write_new(ignore, f".*{PART}\n")


def variants_at(path: Path) -> list[Path]:
    """The golden at `path` and its variants, as far as they are there."""
    stem = glob.escape(path.name.removesuffix(SUFFIX))
    return [*([path] if is_there(path) else []), *_files(path.parent, f"{stem}{VARIANT}*{SUFFIX}")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A golden's file, and the check that it says it belongs to. The path decides: the check that asks for it has it.

    `golden` is false for a trace that stands there.
    """

    path: Path
    node_id: str
    name: str
    golden: bool = True

    def is_of(self, root: Path, node_id: str) -> bool:
        """Whether a check of this test, by this golden's name, asks for this file, or for the golden whose variant it is."""
        return golden_path(root, node_id, self.name) == variant_path(self.path, "")


def claims_in(folder: Path) -> list[Claim]:
    """The claims of the goldens in one folder; files that cannot be read are left out."""
    found = []
    for path in _goldens_in(folder):
        try:
            about = file_format.read_metadata(path).get("golden", {})
            node_id, name = about.get("node_id", ""), about.get("name", "")
        except (GoldenError, AttributeError):
            continue
        if isinstance(node_id, str) and isinstance(name, str):
            found.append(Claim(path=path, node_id=node_id, name=name, golden=bool(about)))
    return found


def unused_goldens(root: Path, files: Iterable[str], node_ids: Iterable[str]) -> list[Path]:
    """The goldens below `root` of these test files whose path no test has; files that cannot be read are left out."""
    collected: dict[str, list[str]] = {file: [] for file in files}
    for node_id in node_ids:
        collected.setdefault(node_id.partition("::")[0], []).append(node_id)
    unused: list[Path] = []
    for file in sorted(collected):
        found = claims_in(golden_path(root, f"{file}::x").parent)
        names = {claim.name for claim in found}
        theirs = {golden_path(root, node_id, name) for node_id in collected[file] for name in names}
        unused += [claim.path for claim in found if claim.node_id and variant_path(claim.path, "") not in theirs]
    return unused


def goldens_without_file(root: Path, tests: Path) -> list[Path]:
    """The goldens below `root` whose test file is gone from `tests`: that of their folder, and the one that they name."""
    gone: list[Path] = []
    for folder in sorted({path.parent for path in _goldens_in(root, "**/")}):
        if not is_there((tests / folder.relative_to(root)).with_suffix(".py")):
            gone += [c.path for c in claims_in(folder) if c.node_id and not is_there(tests / c.node_id.partition("::")[0])]
    return gone


def _goldens_in(folder: Path, below: str = "") -> list[Path]:
    return _files(folder, f"{below}*{SUFFIX}")


def _files(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that match, in order; none where the folder is missing or cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
