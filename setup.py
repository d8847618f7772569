"""What the metadata makes of the repo's address, which pyproject.toml says in one place: its URLs, and the README's links."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import setup

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent


def readme_for(text: str, repository: str) -> str:
    """The README as it works outside of the repo: links to files are absolute, or plain text while no address is known."""
    link = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)\s]+)\)")
    return link.sub(rf"[\1]({repository}/blob/main/\2)" if repository else r"\1", text)


def urls_of(repository: str) -> dict[str, str]:
    """Addresses for the metadata; none while no address is known."""
    pages = {
        "Homepage": "",
        "Documentation": "/blob/main/docs/index.md",
        "Changelog": "/blob/main/CHANGELOG.md",
        "Issues": "/issues",
    }
    return {name: repository + page for name, page in pages.items()} if repository else {}


if __name__ == "__main__":
    repository = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))["tool"]["pytest-logprob-parity"]["repository"]
    setup(
        long_description=readme_for((HERE / "README.md").read_text("utf-8"), repository.rstrip("/")),
        long_description_content_type="text/markdown",
        project_urls=urls_of(repository.rstrip("/")),
    )
