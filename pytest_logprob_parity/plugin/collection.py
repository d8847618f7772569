"""Collection: the settings of marked tests, the order of tests, and goldens that no test claims."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..errors import ParityError, UsageError
from ..spec.settings import make_spec, marker_settings
from .options import OBJECTIVES
from .stash import ITEM, MARKER, NODE_ID, SESSION, UNCOMPARED, ItemSettings, node_id_of


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Stable ids for parametrised engines: `dtype=bfloat16-max_num_seqs=1`."""
    if argname == "parity_engine" and isinstance(val, dict):
        return "-".join(f"{key}={value}" for key, value in sorted(val.items())) or "default"
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Take a test's node id now, which later plugins may edit, and a marked one's settings."""
    marks = [
        (node.name or "the session", m.args, m.kwargs)
        for node in item.listchain()
        for m in node.own_markers
        if m.name == MARKER
    ]
    uses_engine = "parity_engine" in getattr(item, "fixturenames", ())
    session = item.config.stash[SESSION]
    item.stash[NODE_ID] = node_id = node_id_of(item)
    other = session.node_ids.setdefault(node_id, item.path)
    if other != item.path and "golden_trace" in getattr(item, "fixturenames", ()):
        error = UsageError(f"{other} and {item.path} both have a test {node_id}, which would share a golden: rename one")
        item.stash[ITEM] = ItemSettings(None, error)
        return
    if not marks and not uses_engine:
        return
    try:
        parameter = getattr(getattr(item, "callspec", None), "params", {}).get("parity_engine", {})
        if not isinstance(parameter, dict):
            raise UsageError(f"parametrize('parity_engine', ..., indirect=True) takes dicts of settings, not {parameter!r}")
        settings = {**session.ini_settings, **marker_settings(marks), **parameter, **session.set_settings}
        objective = settings.pop("objective", "")
        if objective not in ("", *OBJECTIVES):
            raise UsageError(f"objective={objective!r}: known are {', '.join(OBJECTIVES)}")
        item.stash[ITEM] = ItemSettings(make_spec(session.point(settings)), None, objective)
    except ParityError as error:
        item.stash[ITEM] = ItemSettings(None, error)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Bring the tests of one engine together, in order of first appearance; other tests keep their places."""
    slots = [i for i, item in enumerate(items) if (s := item.stash.get(ITEM, None)) is not None and s.spec is not None]
    first: dict[Any, int] = {}
    for i in slots:
        first.setdefault(items[i].stash[ITEM].spec, i)
    ordered = sorted((items[i] for i in slots), key=lambda item: first[item.stash[ITEM].spec])
    for i, item in zip(slots, ordered, strict=True):
        items[i] = item
    _find_unused(session, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tell those who implement the hook which goldens no test asks for."""
    own, cache = session.config.stash[SESSION], getattr(session.config, "cache", None)
    unasked = None if cache is None else cache.get(UNCOMPARED, None)
    session.config.hook.pytest_parity_collected(
        session=session,
        golden_dir=own.golden_dir,
        gone=sorted(own.unused),
        unasked=[path for path in unasked if isinstance(path, str)] if isinstance(unasked, list) else None,
    )


def _find_unused(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Goldens of wholly collected files that no test claims; silent where not everything was collected."""
    config = session.config
    partial = any("::" in str(argument) for argument in config.args) or config.getoption("lf", False)
    own = config.stash[SESSION]
    if partial or session.testsfailed or not _is_dir(own.golden_dir):
        return
    from ..golden import goldens_without_file, unused_goldens

    files = {node_id.partition("::")[0] for node_id in own.node_ids}
    gone = [*unused_goldens(own.golden_dir, files, own.node_ids), *goldens_without_file(own.golden_dir, own.root)]
    own.unused |= {own.shown(path) for path in gone}


def _is_dir(folder: Path) -> bool:
    """Whether a folder is there and can be looked at: one that cannot is what its checks tell of."""
    try:
        return folder.is_dir()
    except OSError:
        return False
