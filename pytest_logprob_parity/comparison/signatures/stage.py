"""One step of processing that the two sides do not share, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..result import Finding

ON_GOLDEN: Final = "applied to the golden and not to this run"
ON_NOW: Final = "applied to this run and not to the golden"
OR_TWICE: Final = ", or twice to this run"


@dataclass(frozen=True)
class Stage:
    """One step of processing that one side has and the other has not. `on_golden` says which, `recorded` whether it is
    what the recorded sampling asks for; `finding` says it in words.
    """

    finding: Finding
    on_golden: bool
    recorded: bool
