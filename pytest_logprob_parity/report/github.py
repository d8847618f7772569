"""What GitHub Actions reads: annotations on the failing tests, and the step summary. Only the standard library."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ..visible_text import visible
from .markdown import render_markdown
from .outcomes import GOOD, IN_WORDS
from .titles import cause_of, title_of

#: GitHub shows ten errors and ten warnings of a step; ours are the worst.
_MOST: Final = 10
_SUMMARY: Final = "GITHUB_STEP_SUMMARY"


def workflow_commands(content: Mapping[str, Any]) -> Iterator[str]:
    """A workflow command for each check that fails the run, worst first: `::error file=...,line=...,title=...::headline`."""
    bad = [check for check in content["checks"] if check["outcome"] not in GOOD]
    for check in bad[:_MOST]:
        file = posixpath.normpath(content["prefix"] + check["file"])  # tests may lie outside of the root of their run
        place = f"file={_property(file)},line={check['line']}," if check["file"] else ""
        title = f"{title_of(check)}: {IN_WORDS.get(check['outcome'], check['outcome'])}"
        cause = cause_of(check)
        text = check["headline"] + (f"\n{cause}" if cause else "")
        text += "".join(f"\n{command['what']}: {command['command']}" for command in check["commands"])
        yield f"::error {place}title={_property(title)}::{_data(text)}"


def add_to_summary(content: Mapping[str, Any]) -> Path | None:
    """Append the Markdown to the step's summary, where there is one; gives its path. Raises OSError."""
    name = os.environ.get(_SUMMARY)
    if not name:
        return None
    path = Path(name)
    with path.open("a", encoding="utf-8") as file:
        file.write(render_markdown(content))
    return path


def no_summary(error: OSError) -> str:
    """The one line for a step summary that cannot be written."""
    return f"logprob-parity: no step summary: {os.environ.get(_SUMMARY)} cannot be written: {error.strerror or error}"


def on_github() -> bool:
    """Whether this runs in GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def repository() -> str:
    """`owner/name` where GitHub Actions says so, else ""."""
    return os.environ.get("GITHUB_REPOSITORY", "") if on_github() else ""


def _data(text: str) -> str:
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
