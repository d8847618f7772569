"""The known name that is nearest to a misspelt one, as error messages suggest it."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint for a misspelt name: `, did you mean 'x'?`, or "" where no known name is near (`cutoff`, 0 to 1)."""
    import difflib  # only a mistake needs it

    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f", did you mean {matches[0]!r}?" if matches else ""
