"""Requests under numbers of our own: what vLLM's worker keeps of each beside its logprobs, and how it is taken back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

#: Numbers below 2^53, which JSON keeps whole.
_BITS: Final = 52
#: Numbers of one question.
_AT_ONCE: Final = 4096

#: Asks the worker for numbers.
Ask = Callable[[list[int]], Mapping[str, Any]]


def numbers_of(wanted: Sequence[bool]) -> list[int | None]:
    """A number for each request of which something is wanted, None for the others: no two runs have one in common, on whatever
    side of a server they are.
    """
    first = secrets.randbits(_BITS)
    return [first + place if is_wanted else None for place, is_wanted in enumerate(wanted)]


def take(numbers: Sequence[int | None], ask: Ask, unpacked: Callable[[Any], _T]) -> dict[int | None, _T]:
    """What the worker kept under these numbers, each `unpacked`; those that it does not have are left out. Raises what
    `unpacked` raises for an answer that is none.
    """
    wanted = [number for number in numbers if number is not None]
    found: dict[int | None, _T] = {}
    for start in range(0, len(wanted), _AT_ONCE):
        waiting = wanted[start : start + _AT_ONCE]
        while waiting:  # a large answer comes in parts
            answer = ask(waiting)
            told = [number for number in waiting if str(number) in answer]
            found.update((number, unpacked(answer[str(number)])) for number in told)
            waiting = [number for number in waiting if number not in found] if told else []
    return found
