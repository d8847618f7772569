"""Hold JSON against the shape that it should have: for files that others wrote, and may have cut, edited or made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import UsageError

#: A finite number or null.
NUMBER: Final = (int, float, type(None))


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


@dataclass(frozen=True)
class Optional:
    """The shape of a key that a mapping may lack."""

    shape: Any


@dataclass(frozen=True)
class UpTo:
    """A list of at most `most` items of a shape: one whose length is how much somebody draws, or makes room for."""

    shape: Any
    most: int


@dataclass(frozen=True)
class Within:
    """A number from `low` to `high`, whole ones only where `whole`."""

    low: float
    high: float
    whole: bool = False


#: A whole number that a JavaScript reader has exactly: ids, counts, places.
WHOLE: Final = Within(-(2**53), 2**53, whole=True)
#: One that counts.
COUNT: Final = Within(0, 2**53, whole=True)


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise UsageError, naming the place below `where`, unless `value` has the shape.

    A shape is a type or a tuple of types (`object`: anything); `[shape]`, a list of any length; `{"key": shape, ...}`, a
    mapping with these keys and any others; `{str: shape}`, a mapping of any keys; a Maybe, an UpTo, a Within; for a key's an
    Optional.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, where)
    elif isinstance(shape, Within):
        check_shape(value, int if shape.whole else (int, float), where)
        _need(shape.low <= value <= shape.high, where, f"from {shape.low:g} to {shape.high:g}", value)
    elif isinstance(shape, UpTo):
        _need(isinstance(value, list), where, "a list", value)
        if len(value) > shape.most:
            raise UsageError(f"{where} has {len(value)} items (limit: {shape.most})")
        check_shape(value, [shape.shape], where)
    elif isinstance(shape, list):
        _need(isinstance(value, list), where, "a list", value)
        for index, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, Mapping):
        _need(isinstance(value, Mapping), where, "a mapping", value)
        for key, inner in shape.items():
            if key is str:
                for name, item in value.items():
                    check_shape(item, inner, f"{where}[{name!r:.40}]")
            elif isinstance(inner, Optional):
                if key in value:
                    check_shape(value[key], inner.shape, f"{where}.{key}")
            else:
                _need(key in value, where, f"a mapping with {key!r}", value)
                check_shape(value[key], inner, f"{where}.{key}")
    else:
        types = shape if isinstance(shape, tuple) else (shape,)
        fits = isinstance(value, types) and (not isinstance(value, bool) or bool in types or object in types)
        _need(fits, where, " or ".join("null" if t is type(None) else t.__name__ for t in types), value)


def _need(fits: bool, where: str, expected: str, value: Any) -> None:
    if not fits:
        raise UsageError(f"{where} is not {expected} but {value!r:.40}")
