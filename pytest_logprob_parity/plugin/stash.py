"""What hooks and fixtures share: the stash of a run and of its tests, its engines, and the records of its checks."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .. import progress
from ..engines.time_limits import TimeLimits
from ..errors import ParityError
from ..spec.server_settings import SERVER
from ..visible_text import visible_line

if TYPE_CHECKING:
    from ..comparison.result import Comparison
    from ..comparison.vocabulary import Level
    from ..engines.pool import Pool
    from ..golden import Claim
    from ..spec import EngineSpec

PROPERTY: Final = "logprob_parity"
MARKER: Final = "logprob_parity"
#: An exception's attribute: RAISED where it came out of a fixture of ours, NOTED where a check has left its record.
ORIGIN: Final = "logprob_parity_origin"
RAISED: Final = "raised"
NOTED: Final = "noted"


@dataclass(kw_only=True)
class Session:
    """What the plugin knows of this run: options as they were given, and what has happened so far.

    `report` is where checks leave their parts of the report, below its folder, `history` the file that the run is added to.
    """

    update: str
    golden_dir: Path
    ini_settings: dict[str, Any]
    set_settings: dict[str, Any]
    level: Level
    repeats: int
    objective: str
    reference: str
    report: Path | None = None
    history: Path | None
    keep_candidates: bool
    server: str
    warn_unverified: bool
    unchecked: str
    variant: str
    root: Path
    limits: TimeLimits
    node_ids: dict[str, Path] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    uncompared: set[str] = field(default_factory=set)
    subtests: set[str] = field(default_factory=set)
    claims: dict[Path, list[Claim]] = field(default_factory=dict)

    def shown(self, path: Path) -> str:
        """A path as people see it: from the root, where it lies below."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)

    def goldens_of(self, node_id: str) -> list[Path]:
        """The goldens that a test's checks have; the files of a folder are looked at once."""
        try:
            if not self.golden_dir.is_dir():
                return []
        except OSError:  # its checks will say so
            return []
        from ..golden import claims_in, golden_path, is_there

        place = golden_path(self.golden_dir, node_id)
        folder = place.parent
        if folder not in self.claims:
            self.claims[folder] = claims_in(folder)
        own = [claim.path for claim in self.claims[folder] if claim.is_of(self.golden_dir, node_id)]
        return own if place in own or not is_there(place) else [place, *own]  # one that cannot be read is its, too

    def point(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A vLLM's settings as those of the server that --parity-server names, where it names one."""
        if not self.server or settings.get("engine", "vllm") not in ("vllm", SERVER):
            return settings
        return {**settings, "engine": SERVER, "url": self.server}


@dataclass(frozen=True, slots=True)
class ItemSettings:
    """What one marked test asks for: its spec (None: no model named), or what is wrong with its marker; `objective` is "" where
    the marker names none.
    """

    spec: EngineSpec | None
    error: ParityError | None
    objective: str = ""


SESSION: Final = pytest.StashKey[Session]()
ITEM: Final = pytest.StashKey[ItemSettings]()
NODE_ID: Final = pytest.StashKey[str]()
POOL: Final = pytest.StashKey["Pool"]()
#: How the test itself ended (`passed`, `skipped`, "" for anything else), which goldens it asked for, and how many comparisons
#: had been made when it began.
ENDED: Final = pytest.StashKey[str]()
ASKED: Final = pytest.StashKey[set[Path]]()
TALLIED: Final = pytest.StashKey[int]()
#: How many `pytest.raises` blocks ran when the test began.
RAISES: Final = pytest.StashKey[int]()
#: In pytest's cache: goldens that no check of their test asked for, when it last passed here.
UNCOMPARED: Final = "logprob-parity/uncompared"
EXPECTS: Final = pytest.StashKey["Expected"]()


class Expected:
    """A failure that a test waits for; `error` is the one that came in its `with` block, `comparison` its numbers."""

    def __init__(self) -> None:
        self.failed = False
        self.over = False
        self.error: ParityError | None = None

    @property
    def comparison(self) -> Comparison | None:
        """What was measured; None where nothing was."""
        return getattr(self.error, "comparison", None)

    def __enter__(self) -> Expected:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        __tracebackhide__ = True
        self.over = True  # what fails after its block was not waited for
        if isinstance(error, ParityError) and self.failed:
            self.error = error
            return True
        if error is None and not self.failed:
            raise ParityError("golden_trace.expect_failure(): no check failed in it")
        return False


def node_id_of(item: pytest.Item) -> str:
    """A test's node id from the root, whatever its run was asked for.

    pytest's own of a file that is not below the root depends on the argument that named it (`::test`, `test_it.py::test`);
    here it is `../tests/test_it.py::test`.
    """
    root = item.config.rootpath
    if item.path.is_relative_to(root):
        return item.nodeid
    try:
        file = os.path.relpath(item.path, root).replace(os.sep, "/")
    except ValueError:  # another drive
        file = item.path.as_posix()
    return file + "::" + item.nodeid.partition("::")[2]


def pool_of(config: pytest.Config) -> Pool:
    """The engines of this run. One that somebody else put into the stash is used, and closed by whoever made it."""
    if POOL not in config.stash:
        from ..engines.pool import Pool

        limits = config.stash[SESSION].limits
        config.stash[POOL] = pool = Pool(config.rootpath, lambda line: tell(config, line), limits.start, limits.call)
        config.add_cleanup(pool.close)
    return config.stash[POOL]


def tell(config: pytest.Config, line: str) -> None:
    """A line on the terminal, past the capturing; nowhere in an xdist worker, which has no terminal."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    if terminal is None:
        return
    progress.clear()
    with contextlib.nullcontext() if capture is None else capture.global_and_fixture_disabled():
        if capture is not None:
            terminal.ensure_newline()
        terminal.write_line(f"logprob-parity: {visible_line(line)}")
        terminal.flush()  # into a pipe, too: it is progress


@contextlib.contextmanager
def progress_shown(config: pytest.Config) -> Iterator[None]:
    """Show progress below what pytest has written, past the capturing, where that is a terminal."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    capture = config.pluginmanager.get_plugin("capturemanager")
    released = contextlib.nullcontext if capture is None else capture.global_and_fixture_disabled

    def write(text: str) -> None:
        assert terminal is not None
        with released():
            terminal.ensure_newline()
            sys.stderr.write(text)
            sys.stderr.flush()

    with released():
        wanted = terminal is not None and terminal.isatty and progress.is_wanted(sys.stderr)
    with progress.shown_on(write if wanted else None):
        yield


def note_outcome(item: pytest.Item, record: dict[str, Any]) -> None:
    """Leave the record of one check: it goes to junitxml, and across xdist to the controller."""
    item.user_properties.append((PROPERTY, json.dumps(record, sort_keys=True)))
