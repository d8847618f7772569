"""Hooks that a downstream repo can implement in a conftest or a plugin of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..comparison.result import Comparison


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


class Hooks:
    """What this plugin calls. All are optional, and what they raise is an error of the test, or of the run's end."""

    def pytest_parity_collected(
        self, session: pytest.Session, golden_dir: Path, gone: Sequence[str], unasked: Sequence[str] | None
    ) -> None:
        """Tests were collected, and these goldens below `golden_dir` are unused, as paths from the root.

        `gone` are the goldens of wholly collected test files that no test claims. `unasked` are those that no check of their
        test asked for when it last passed here; None where pytest's cache remembers no run. The cache is a file that anybody
        may have written: look at what stands at a path before you remove it.
        """

    def pytest_parity_recorded(self, item: pytest.Item, name: str, path: Path, comparison: Comparison) -> None:
        """A golden was recorded.

        `name` is the check's name ("" for a test's only one), `path` the golden's file; `comparison` is the golden held
        against itself, with the notes on what it can show. Under pytest-xdist this runs in the worker.
        """

    def pytest_parity_judged(self, item: pytest.Item, name: str, path: Path, comparison: Comparison) -> None:
        """A check was judged: `comparison.verdict` is `pass`, `fail` or `unverified`.

        It is called before a failing check raises, and after a diagnosis, whose findings `comparison` has. A check that could
        not compare (no golden, another model, no engine) is not judged. Under pytest-xdist this runs in the worker.
        """

    def pytest_parity_summary(self, config: pytest.Config, records: Sequence[Mapping[str, Any]]) -> Sequence[str] | None:
        """Lines that the run's summary shows below its own, or None.

        `records` has one mapping for each check, as junitxml has it. Under pytest-xdist this runs in the controller, for the
        checks of all workers.
        """
