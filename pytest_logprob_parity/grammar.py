"""Numbers and the things that they count, as people write them."""

from __future__ import annotations


def counted(count: int, things: str) -> str:
    """`1 sequence`, `2 sequences`: a number before the plural of what it counts."""
    return f"{count:,} {things.removesuffix('s') if count == 1 else things}"


def is_or_are(count: int) -> str:
    """The verb that goes with a number of things."""
    return "is" if count == 1 else "are"
