"""Goldens whose test was renamed or is gone: move them to the test's new name, or remove what no test asks for."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from ..atomic import replace_all
from ..errors import GoldenError, UsageError
from ..plugin.stash import SESSION, UNCOMPARED
from ..trace import file_format
from .golden import SUFFIX, Claim, claims_in, golden_path, variant_of, variant_path

#: A test's place in a command: `FILE::TEST`.
_COLONS: Final = "::"


@dataclass(frozen=True)
class Move:
    """One golden's file, where it goes, and the check that has it there."""

    old: Path
    new: Path
    node_id: str
    name: str


def moves(old: str, new: str, name: str | None, root: Path, golden_dir: Path) -> list[Move]:
    """What moving the goldens of `old` to `new` means.

    `old` is a golden's file, a test (`FILE::TEST`) or a test file; `new` a test, or a test file for a test file. `name` is the
    check's name there, where it is another one. Variants move with their golden.

    Raises UsageError for what is no such place, or where goldens stand already.
    """
    if old.endswith(SUFFIX):
        path = variant_path(root / old, "")
        found = [claim for claim in claims_in(path.parent) if variant_path(claim.path, "") == path and claim.golden]
        if not found:
            raise UsageError(f"move: {old} is no golden that can be read")
    else:
        found = _claims_of(old, root / golden_dir)
        if not found:
            raise UsageError(f"move: no golden below {golden_dir} belongs to {old}; --golden-dir names another folder")
    if _COLONS not in new and (old.endswith(SUFFIX) or _COLONS in old):
        raise UsageError(f"move: {new!r} is no test; give it as pytest names it: tests/test_it.py::test_it")
    if name is not None and len({claim.name for claim in found}) > 1:
        raise UsageError(f"move: --name goes with one check, and {old} has {len(found)} goldens")
    made = []
    for claim in found:
        node_id = new if _COLONS in new else f"{new}{_COLONS}{claim.node_id.partition(_COLONS)[2]}"
        label = claim.name if name is None else name
        target = variant_path(golden_path(root / golden_dir, node_id, label), variant_of(claim.path))
        if target.exists():
            raise UsageError(f"move: {target} is there already, and stays: nothing was moved")
        made.append(Move(claim.path, target, node_id, label))
    return made


def _claims_of(old: str, folder: Path) -> list[Claim]:
    """The goldens of a test, or of a test file, by their paths, or by what they say of themselves."""
    test = old if _COLONS in old else f"{old}{_COLONS}x"
    found = claims_in(golden_path(folder, test).parent)
    if _COLONS not in old:
        return [claim for claim in found if claim.node_id]
    own = [claim for claim in found if claim.is_of(folder, old)]
    return own or [claim for claim in found if claim.node_id == old]


def move(made: Sequence[Move]) -> None:
    """Write all goldens at their new places, each with its test's name in it, and then remove the old files.

    Raises GoldenError where one cannot be read or written: nothing has been moved then.
    """
    files = {}
    for step in made:
        columns, metadata = file_format.read(step.old)
        about = {**metadata["golden"], "node_id": step.node_id, "name": step.name}
        files[step.new] = file_format.packed(columns, {**metadata, "golden": about})
    try:
        replace_all(files)
    except OSError as error:
        raise GoldenError(f"not written ({error.strerror or error}); nothing was moved", error.filename) from None
    for step in made:
        step.old.unlink()
        with contextlib.suppress(OSError):  # other goldens are in it
            step.old.parent.rmdir()


# -- what nobody asks for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unused:
    """Goldens that nobody asks for, as paths from the root: of tests that are `gone`, and `unasked` ones of tests that are
    there, as the last run of these tests here knows; None where no run is remembered.
    """

    gone: tuple[str, ...]
    unasked: tuple[str, ...] | None

    def all(self) -> list[str]:
        """Both."""
        return sorted({*self.gone, *(self.unasked or ())})


class _Collector:
    """Takes from a collection what the plugin found unused."""

    def __init__(self) -> None:
        self.found: Unused | None = None
        self.root = Path()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        own, cache = session.config.stash[SESSION], getattr(session.config, "cache", None)
        remembered = None if cache is None else cache.get(UNCOMPARED, None)
        self.root = own.root
        goldens = {claim.path.resolve() for folder in _folders(own.golden_dir) for claim in claims_in(folder)}
        unasked = None  # the cache is a file that anybody may have written: goldens are what is removed, and nothing else
        if isinstance(remembered, list):
            unasked = tuple(p for p in remembered if isinstance(p, str) and (own.root / p).resolve() in goldens)
        if not session.testsfailed:
            self.found = Unused(tuple(sorted(own.unused)), unasked)


def _folders(golden_dir: Path) -> list[Path]:
    return sorted({path.parent for path in golden_dir.rglob(f"*{SUFFIX}")})


def find_unused(root: Path) -> tuple[Unused, Path]:
    """Collect all tests of the repo at `root`, without running any: the goldens that nobody asks for, and the root they are of.

    Raises UsageError where not everything could be collected: nothing is known then.
    """
    collector, out = _Collector(), io.StringIO()
    with _inside(root), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = pytest.main(["--collect-only", "-q", "-p", "no:randomly"], plugins=[collector])
        except SystemExit:  # a conftest's
            status = pytest.ExitCode.INTERNAL_ERROR
    if collector.found is None or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        lines = [line for line in out.getvalue().splitlines() if line.startswith(("ERROR", "E "))]
        why = f": {lines[0]}" if lines else ""
        raise UsageError(f"prune: not all tests could be collected, so nothing is known{why}; run pytest --collect-only")
    return collector.found, collector.root


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
