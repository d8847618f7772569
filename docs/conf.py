"""How Sphinx builds the site: `make docs`. Pages are Markdown; tables of what the code has come from the code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import from_code  # noqa: E402
from sphinx.addnodes import pending_xref  # noqa: E402

import pytest_logprob_parity  # noqa: E402

project = "pytest-logprob-parity"
version = release = pytest_logprob_parity.__version__
project_copyright = "its maintainers, Apache-2.0"

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_static"]
highlight_language = "none"
nitpicky = True

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

copybutton_prompt_text = "$ "  # of a block with commands and what they print, the commands alone
copybutton_line_continuation_character = "\\"

html_theme = "furo"
html_title = f"{project} {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_use_index = False
html_theme_options = {"top_of_page_buttons": []}


def fill(app: Any, docname: str, source: list[str]) -> None:
    """Put what the code says in place of `<!-- generated: NAME ... -->`."""
    source[0] = from_code.fill(source[0])


def name_folders(app: Any, doctree: Any) -> None:
    """Links to folders of the repo, which work where it is browsed, are their names in the site."""
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(doctree.findall(pending_xref)):
        target = (here / link["reftarget"]).resolve()
        if link["reftype"] == "myst" and target.is_dir() and target.is_relative_to(DOCS.parent):
            link.replace_self(link.children)


def setup(app: Any) -> dict[str, Any]:
    """Register both."""
    app.connect("source-read", fill)
    app.connect("doctree-read", name_folders)
    return {"parallel_read_safe": True}
