"""Hold JSON against the shape that it should have: for files that others wrote, and may have cut, edited or made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError

#: A finite number or null.
NUMBER: Final = (int, float, type(None))


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Any


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Raise UsageError, naming the place below `where`, unless `value` has the shape.

    A shape is a type or a tuple of types (`object`: anything); `[shape]`, a list of any length; `{"key": shape, ...}`, a
    mapping with these keys and any others; `{str: shape}`, a mapping of any keys; a Maybe.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, where)
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
