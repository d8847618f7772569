"""Check JSON or TOML against the shape that it should have: files and answers that others wrote, cut, edited or made up.

    check_shape(json.loads(text), {"checks": [{"name": str, "line": COUNT}]}, path)
    # UsageError: results.json: checks[1].line is "7", expected a whole number from 0 to 2**53

A shape is one of
- a type, or a tuple of types: `str`, `(int, float)`; `object` is anything, and a bool is no number;
- `[shape]`: a list; `Items` where it has a largest or a smallest length;
- `{"key": shape}`: a mapping with these keys and any others, `{str: shape}`: with any keys; `Closed` where no others may be;
- `OrNull`, `OptionalKey`, `Number`, `OneOf`, `Fits`: see there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from .errors import ParityError, UsageError
from .grammar import counted
from .suggest import nearest

#: Characters that an actual value, or a key, is shown with, at most.
_SHOWN: Final = 40
#: Floating-point numbers have every whole number up to here.
_EXACT: Final = 2**53
_WORDS: Final[Mapping[type, str]] = {
    str: "a string", bool: "true or false", int: "a whole number", float: "a number", type(None): "null", list: "a list",
    dict: "a mapping", Mapping: "a mapping",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class OrNull:
    """A shape, or null."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class OptionalKey:
    """The shape of a key that a mapping may lack."""

    shape: Shape


@dataclass(frozen=True, slots=True)
class Items:
    """A list of `least` to `most` items of a shape. Files of others need `most` wherever a list takes memory or is drawn."""

    shape: Shape
    most: int | None = None
    least: int = 0


@dataclass(frozen=True, slots=True)
class Number:
    """A number from `low` to `high` (None: without an end), of the whole ones alone with `whole`. NaN is none of them."""

    low: float | None = None
    high: float | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few strings."""

    values: Collection[str]


@dataclass(frozen=True, slots=True)
class Closed:
    """A mapping with no other keys than these."""

    keys: Mapping[Any, Shape]


@dataclass(frozen=True, slots=True)
class Fits:
    """A value that passes a test; `expected` says in words which one: `a number above 0`."""

    expected: str
    test: Callable[[Any], bool]


Shape: TypeAlias = (
    "type | tuple[type, ...] | list[Any] | Mapping[Any, Any] | OrNull | OptionalKey | Items | Number | OneOf | Closed | Fits"
)

#: A number or null: what a file of ours has in place of NaN and infinities.
NUMBER_OR_NULL: Final = (int, float, type(None))
#: A whole number that a reader in JavaScript has exactly: ids, places.
WHOLE: Final = Number(-_EXACT, _EXACT, whole=True)
#: Such a number that counts.
COUNT: Final = Number(0, _EXACT, whole=True)


def check_shape(
    value: Any, shape: Shape, place: object, *, key: str = "", error: type[ParityError] = UsageError, advice: str = ""
) -> None:
    """Raise `error` unless the value has the shape: `PLACE: KEY is ACTUAL, expected EXPECTED; ADVICE`.

    `place` is the file or whoever the value is from, `key` where the value is in it, `advice` what the reader can do.
    """
    try:
        _check(value, shape)
    except _MisfitError as misfit:
        where = _joined(key, reversed(misfit.keys))
        parts = [f"{where or 'its content'} {misfit.actual}, expected {misfit.expected}", misfit.hint, advice]
        raise error("; ".join(part for part in parts if part), place) from None


class _MisfitError(Exception):
    """A value that does not have its shape. `keys` is filled on the way out: the innermost key comes first."""

    def __init__(self, expected: str, actual: str, *keys: str | int, hint: str = "") -> None:
        super().__init__(expected)
        self.expected, self.actual, self.keys, self.hint = expected, actual, list(keys), hint


def _check(value: Any, shape: Shape) -> None:
    if isinstance(shape, (type, tuple)):
        types = shape if isinstance(shape, tuple) else (shape,)
        if type(value) in types:
            return None
        fits = isinstance(value, types) and (not isinstance(value, bool) or object in types)
    elif isinstance(shape, (list, Items)):
        return _check_items(value, shape if isinstance(shape, Items) else Items(shape[0]))
    elif isinstance(shape, (Mapping, Closed)):
        return _check_mapping(value, shape.keys if isinstance(shape, Closed) else shape, closed=isinstance(shape, Closed))
    elif isinstance(shape, (OrNull, OptionalKey)):
        return None if value is None and isinstance(shape, OrNull) else _check(value, shape.shape)
    elif isinstance(shape, Number):
        fits = _is_number(value, shape)
    elif isinstance(shape, OneOf):
        fits = isinstance(value, str) and value in shape.values
    else:
        fits = shape.test(value)
    if not fits:
        raise _MisfitError(_in_words(shape), f"is {_shown(value)}")
    return None


def _check_items(value: Any, shape: Items) -> None:
    if not isinstance(value, list):
        raise _MisfitError("a list", f"is {_shown(value)}")
    if len(value) < shape.least or (shape.most is not None and len(value) > shape.most):
        raise _MisfitError(_length_in_words(shape), f"has {counted(len(value), 'items')}")
    _check_each(enumerate(value), shape.shape)


def _check_mapping(value: Any, keys: Mapping[Any, Shape], *, closed: bool) -> None:
    if not isinstance(value, Mapping):
        raise _MisfitError("a mapping", f"is {_shown(value)}")
    if closed and (unknown := [key for key in value if key not in keys]):
        hint = nearest(str(unknown[0])[:_SHOWN], keys).removeprefix(", ")
        raise _MisfitError(f"no other keys than {', '.join(keys)}", f"has the key {_shown(unknown[0])}", hint=hint)
    for key, shape in keys.items():
        if key is str:
            _check_each(value.items(), shape)
        elif key in value:
            _check_each([(key, value[key])], shape)
        elif not isinstance(shape, OptionalKey):
            raise _MisfitError(_in_words(shape), "is missing", key)


def _check_each(items: Iterable[tuple[Any, Any]], shape: Shape) -> None:
    for key, item in items:
        try:
            _check(item, shape)
        except _MisfitError as misfit:
            misfit.keys.append(key)
            raise


def _is_number(value: Any, shape: Number) -> bool:
    kinds = int if shape.whole else (int, float)
    return (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and (-math.inf if shape.low is None else shape.low) <= value <= (math.inf if shape.high is None else shape.high)
    )


def _in_words(shape: Shape) -> str:
    """What a shape asks for."""
    if isinstance(shape, (type, tuple)):
        types = shape if isinstance(shape, tuple) else (shape,)
        return " or ".join(_WORDS.get(kind, "a value") for kind in types if kind is not int or float not in types)
    if isinstance(shape, (OrNull, OptionalKey)):
        return _in_words(shape.shape) + (" or null" if isinstance(shape, OrNull) else "")
    if isinstance(shape, Number):
        return _range_in_words(shape)
    if isinstance(shape, OneOf):
        return f"one of {', '.join(shape.values)}"
    if isinstance(shape, Fits):
        return shape.expected
    return "a list" if isinstance(shape, (list, Items)) else "a mapping"


def _range_in_words(shape: Number) -> str:
    kind = "a whole number" if shape.whole else "a number"
    if shape.low is None:
        return kind if shape.high is None else f"{kind}, at most {_bound(shape.high)}"
    return (
        f"{kind}, {_bound(shape.low)} or more"
        if shape.high is None
        else f"{kind} from {_bound(shape.low)} to {_bound(shape.high)}"
    )


def _bound(number: float) -> str:
    return f"{number}" if abs(number) != _EXACT else "2**53" if number > 0 else "-2**53"


def _length_in_words(shape: Items) -> str:
    if shape.most is None:
        return f"at least {shape.least}"
    return (
        f"at most {shape.most}"
        if not shape.least
        else f"{shape.least} to {shape.most}"
        if shape.least < shape.most
        else f"{shape.most}"
    )


def _shown(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    if isinstance(value, (list, Mapping)):
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {counted(len(value), 'items')}"
    text = json.dumps(value[:_SHOWN] if isinstance(value, str) else value, default=repr)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _joined(place: str, keys: Iterable[str | int]) -> str:
    """Keys below a place: `checks[0].metrics["a b"]`."""
    for key in keys:
        if isinstance(key, int):
            place += f"[{key}]"
        elif key.isidentifier() and len(key) <= _SHOWN:
            place += f".{key}" if place else key
        else:
            place += f"[{_shown(key)}]"
    return place
