"""The JSON that verbs print or write. docs/reference/json.md has its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..report.finite_json import finite
from ..visible_text import visible_json

#: The number of each schema: 1 higher where a key is removed, or changes its meaning. A new key does not raise it.
SCHEMAS: Final[Mapping[str, int]] = {"show": 1, "diff": 1, "selftest": 2, "matrix": 1, "history": 1}


def to_text(verb: str, content: Mapping[str, Any]) -> str:
    """The content with the name and number of its schema. What is not a finite number becomes null."""
    told = {"schema": f"logprob-parity {verb} {SCHEMAS[verb]}", **content}
    return visible_json(finite(told))
