"""Numbers for machines and for people: JSON values, and three digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def json_value(value: Any) -> Any:
    """A value of a finding as a JSON value; what is not a number becomes None."""
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return finite_or_none(value) if isinstance(value, float) else value


def finite_or_none(value: float) -> float | None:
    """A number as a JSON value; None for NaN and infinity."""
    return float(value) if abs(value) < float("inf") else None


def number_in_words(value: float) -> str:
    """A number as people read it: three digits, `no bound` for infinity."""
    return f"{value:.3g}" if math.isfinite(value) else "no bound"
