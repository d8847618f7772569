"""One step of processing that the two sides do not share, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass

from ..findings import Finding
from ..sides import Names


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessingStep:
    """One step of processing that one side has and the other has not.

    `on_expected` says which, `recorded` whether it is what the recorded sampling asks for; `finding` says it in words, `name`
    is the step alone (`temperature 0.7`), `twice` that the numbers would look the same had the other side taken it twice.
    """

    finding: Finding
    on_expected: bool
    recorded: bool
    name: str = ""
    twice: bool = False


def applied(step: str, names: Names, *, on_expected: bool, twice: bool = False) -> str:
    """That one side took a step and the other did not: `top-p 0.9 was applied to the golden and not to this run`."""
    one, other = names if on_expected else reversed(names)
    return f"{step} was applied to {one} and not to {other}{f', or twice to {one}' if twice else ''}"
