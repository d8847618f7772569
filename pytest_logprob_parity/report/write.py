"""Write a report: results.json, index.html and summary.md in one folder."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .. import atomic
from .finite_json import to_text
from .folder import check_library, check_ours, ignore, unwritable
from .github import repository
from .markdown import render_markdown
from .results_file import NAME, fitting, make_results

PAGE: Final = "index.html"
SUMMARY: Final = "summary.md"


def results_of(
    checks: Sequence[Mapping[str, Any]], root: Path, unused: Sequence[str] = (), created: str = ""
) -> dict[str, Any]:
    """The content of results.json for the checks of a run whose root is `root`, which ended at `created` or now."""
    return make_results(checks, created=created or now(), project=project_of(root), prefix=_prefix(root), unused=unused)


def now() -> str:
    """The time as results and histories have it: ISO 8601, UTC, whole seconds."""
    return dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def project_of(root: Path) -> str:
    """What the project is called: `owner/name` on GitHub, else the folder of its root."""
    return repository() or root.name


def write_report(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the report of a results.json's content; gives the page's path.

    Raises UsageError where the report's library is missing or the folder cannot be written; an older report then stays.
    """
    check_library()
    check_ours(folder)
    content, _ = fitting(content)
    from .page import render_page

    texts = {NAME: to_text(content), PAGE: render_page(content), SUMMARY: render_markdown(content)}
    try:
        atomic.replace_all({folder / name: text.encode("utf-8") for name, text in texts.items()})
        ignore(folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    return folder / PAGE


def _prefix(root: Path) -> str:
    """Where `root` is below the repository's own: "" at its top or outside of one, else with a slash at the end."""
    for folder in (root, *root.parents):
        if (folder / ".git").exists():
            inside = root.relative_to(folder).as_posix()
            return "" if inside == "." else f"{inside}/"
    return ""
