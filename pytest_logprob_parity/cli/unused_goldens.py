"""The goldens that no test asks for, found by collecting all tests of a repo."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..errors import UsageError
from ..golden import SUFFIX, claims_in


@dataclass(frozen=True, slots=True)
class Unused:
    """Goldens that no test asks for, as paths from the root.

    `gone` are those whose test is gone. `unasked` are those that no check of their test asked for when it last passed here;
    None where pytest's cache remembers no run.
    """

    gone: tuple[str, ...]
    unasked: tuple[str, ...] | None

    def all(self) -> list[str]:
        """Both."""
        return sorted({*self.gone, *(self.unasked or ())})


class _Collector:
    """A pytest plugin that takes from a collection the goldens that are unused."""

    def __init__(self) -> None:
        self.found: Unused | None = None
        self.root = Path()

    @pytest.hookimpl(optionalhook=True)  # a repo may have turned the plugin off
    def pytest_parity_collected(
        self, session: pytest.Session, golden_dir: Path, gone: Sequence[str], unasked: Sequence[str] | None
    ) -> None:
        self.root = root = session.config.rootpath
        goldens = {claim.path.resolve() for folder in _folders(golden_dir) for claim in claims_in(folder)}
        if unasked is not None:  # anybody may have written the cache's file: only goldens are removed, nothing else
            unasked = tuple(path for path in unasked if (root / path).resolve() in goldens)
        if not session.testsfailed:
            self.found = Unused(tuple(gone), unasked)


def _folders(golden_dir: Path) -> list[Path]:
    return sorted({path.parent for path in golden_dir.rglob(f"*{SUFFIX}")})


def find_unused(root: Path) -> tuple[Unused, Path]:
    """The goldens that no test of the repo at `root` asks for, and pytest's root, at which their paths begin.

    All tests are collected, and none runs. Raises UsageError where not everything could be collected: nothing is known then.
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
