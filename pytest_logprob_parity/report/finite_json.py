"""JSON without NaN and infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """A JSON value with None in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_text(content: Any) -> str:
    """JSON as we write it: ASCII, so that lone surrogates survive, and without NaN. Raises ValueError for one."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)
