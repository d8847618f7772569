"""What hooks and fixtures share: the stash of a run and of its tests, its engines, and the records of its checks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from .errors import ParityError
from .server_settings import SERVER
from .time_limits import TimeLimits

if TYPE_CHECKING:
    from .comparison.result import Level
    from .pool import Pool
    from .spec import EngineSpec

PROPERTY: Final = "logprob_parity"
#: An exception's attribute: RAISED where it came out of a fixture of ours, NOTED where a check has left its record.
ORIGIN: Final = "logprob_parity_origin"
RAISED: Final = "raised"
NOTED: Final = "noted"


@dataclass
class Session:
    """What the plugin knows of this run: options as they were given, and what has happened so far."""

    update: str
    golden_dir: Path
    ini_settings: dict[str, Any]
    set_settings: dict[str, Any]
    level: Level
    repeats: int
    report: Path | None = None
    keep_candidates: bool = True
    server: str = ""
    objective: str = "token"
    reference: str = "auto"
    warn_unverified: bool = False
    limits: TimeLimits = field(default_factory=TimeLimits)
    node_ids: dict[str, Path] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)

    def point(self, settings: dict[str, Any]) -> dict[str, Any]:
        """A vLLM's settings as those of the server that --parity-server names, where it names one."""
        if not self.server or settings.get("engine", "vllm") not in ("vllm", SERVER):
            return settings
        return {**settings, "engine": SERVER, "url": self.server}


@dataclass(frozen=True)
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
        from .pool import Pool

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
    if capture is None:
        terminal.write_line(f"logprob-parity: {line}")
        terminal.flush()
        return
    with capture.global_and_fixture_disabled():
        terminal.ensure_newline()
        terminal.write_line(f"logprob-parity: {line}")
        terminal.flush()  # into a pipe, too: it is progress


def note_outcome(item: pytest.Item, record: dict[str, Any]) -> None:
    """Leave the record of one check: it goes to junitxml, and across xdist to the controller."""
    item.user_properties.append((PROPERTY, json.dumps(record, sort_keys=True)))
