"""What sentences call the two sides of a comparison."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

Side: TypeAlias = Literal["expected", "actual"]

#: What the two sides of a comparison are called, unless they are others: a rollout and a trainer, say.
SIDES: Final = ("golden", "this run")


class Names(NamedTuple):
    """What sentences call the two sides of a comparison."""

    expected: str = "the golden"
    actual: str = "this run"


def names_of(sides: tuple[str, str]) -> Names:
    """The names of two sides in a sentence: those of Names, or of sides that are called otherwise."""
    return Names() if sides == SIDES else Names(*(f"the {side}" for side in sides))
