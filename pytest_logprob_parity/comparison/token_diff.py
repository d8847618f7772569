"""One token as both sides have it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenDiff:
    """One token on both sides: `sequence` and `position` in the golden, logprobs in nats, ranks from 1 (0: unknown)."""

    sequence: int
    group: int
    sample: int
    position: int
    token_id: int
    text: str
    expected: float
    actual: float
    expected_rank: int
    actual_rank: int

    @property
    def diff(self) -> float:
        """actual - expected."""
        return self.actual - self.expected
