"""What a check is called, and its cause in a few words. Only the standard library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..comparison.findings import one_of


def title_of(check: Mapping[str, Any]) -> str:
    """Which check it is: its test and its name, or its golden where there is no test."""
    name = f" [{check['name']}]" if check["name"] else ""
    return str(check["node_id"] or check["golden"]["path"]) + name


def cause_of(check: Mapping[str, Any]) -> str:
    """The cause in a few words: the first that is named, else all candidates as such (`one of adapter, ...`); or ""."""
    named = [f"{finding['layer']}: {finding['cause']}" for finding in check["findings"] if finding["cause"]]
    candidates = dict.fromkeys(name for finding in check["findings"] for name in finding["candidates"])
    return named[0] if named else one_of(candidates) if candidates else ""
