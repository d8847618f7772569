"""How two fingerprints compare."""

from __future__ import annotations

from typing import Literal, TypeAlias

#: All that a golden was recorded with is the same; model and prompts are; there are no two fingerprints to compare.
Setup: TypeAlias = Literal["same", "compatible", "unknown"]
