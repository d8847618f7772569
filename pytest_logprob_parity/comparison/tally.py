"""How many comparisons this process has made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass
class Tally:
    """How many comparisons this process has `made`: a test that leaves the number as it was has compared nothing."""

    made: int = 0


TALLY: Final = Tally()
