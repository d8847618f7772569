"""What a run of the catalogue is to do: sizes, objective, dtypes, and which faults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_logprob_parity.selftest.truth import Objective

from .fault import Case


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run of the catalogue is to do: `only` are texts of which a fault's name has to contain one, () for all faults.

    `sequences` x `tokens` is the size of the goldens. `runs` is a folder that keeps the answers of engine and reference, for
    another run of the same catalogue.
    """

    other_step: Path | None = None
    sequences: int = 200
    tokens: int = 64
    objective: Objective = "token"
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    only: tuple[str, ...] = ()
    runs: Path | None = None

    def chosen(self, fault: Case) -> bool:
        """Whether the fault is asked for."""
        return not self.only or any(part in fault.name for part in self.only)
