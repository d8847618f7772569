"""Write a report: results.json, index.html and summary.md in one folder."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .. import atomic
from ..errors import UsageError
from .folder import check_library, check_ours, ignore, is_part, unwritable
from .github import repository
from .markdown import render_markdown
from .results import NAME, fitting, make_results, merge, read_results, to_text

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


def find_results(places: Sequence[Path]) -> list[Path]:
    """The results.json files that are meant: files themselves, folders of reports, folders that hold such at any depth.

    Raises UsageError for a place without any.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            here = (
                [place / NAME]
                if (place / NAME).is_file()
                else sorted(file for file in place.rglob(NAME) if not is_part(file.relative_to(place)))
            )
            if not here:
                raise UsageError(f"{place}: no {NAME} in it; pytest --parity-report=DIR writes one")
            found += here
        else:
            found.append(place)
    return list(dict.fromkeys(path.absolute() for path in found)) if len(found) > 1 else found


def read_all(places: Sequence[Path]) -> dict[str, Any]:
    """One content of all results that are meant. Raises UsageError."""
    results = [(path, read_results(path)) for path in find_results(places)]
    return results[0][1] if len(results) == 1 else merge(results)


def _prefix(root: Path) -> str:
    """Where `root` is below the repository's own: "" at its top or outside of one, else with a slash at the end."""
    for folder in (root, *root.parents):
        if (folder / ".git").exists():
            inside = root.relative_to(folder).as_posix()
            return "" if inside == "." else f"{inside}/"
    return ""
