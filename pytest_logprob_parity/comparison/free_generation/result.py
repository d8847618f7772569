"""What came of free generation: how many turns diverged, and where. Data only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Divergence:
    """Where free generation first leaves the golden. `gap` is the golden's top-2 gap there (nats; NaN without a top-2)."""

    sequence: int
    turn: int
    position: int
    expected: str
    actual: str
    gap: float
    near_tie: bool

    def __str__(self) -> str:
        gap = f"top-2 gap {self.gap:.3g} nats" if math.isfinite(self.gap) else "top-2 gap not recorded"
        return f"sequence {self.sequence}, position {self.position}: {self.expected} became {self.actual} ({gap}" + (
            ", a near tie)" if self.near_tie else ")"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeRun:
    """How many turns were written again, how many of them diverged, and how many only ended elsewhere.

    `relabelled` counts those that end with an end token at the last allowed place, and have the other of both reasons.
    `ends` are those of `stops_changed` where one side wrote its end token and the other went on.
    `likelihood_shift` is how much likelier its tokens are than the golden's, in nats a token on average over turns, and
    `shift_p` how often chance alone does that (paired t): both runs are draws from one distribution, whatever the seeds.
    `distinct` counts the different completions (`distinct_p`: how often chance leaves so few now), `not_likeliest` the
    tokens that were not the likeliest, in the golden and now.
    """

    turns: int
    diverged: int
    stops_changed: int
    divergences: tuple[Divergence, ...]
    likelihood_shift: float = 0.0
    shift_p: float = 1.0
    distinct: tuple[int, int] = (0, 0)
    not_likeliest: tuple[int, int] = (0, 0)
    relabelled: int = 0
    distinct_p: float = 1.0
    ends: tuple[Divergence, ...] = ()

    @property
    def same(self) -> bool:
        """Whether every turn came back as it was, its end included."""
        return self.diverged == 0 and self.stops_changed == 0 and self.relabelled == 0

    def to_json(self) -> dict[str, Any]:
        """The counts and the first divergences, as JSON values."""
        return {
            "turns": self.turns,
            "diverged": self.diverged,
            "stops_changed": self.stops_changed,
            "relabelled": self.relabelled,
            "first": [str(d) for d in self.divergences[:10]],
            "likelihood_shift": self.likelihood_shift,
            "shift_p": self.shift_p,
            "distinct": list(self.distinct),
            "not_likeliest": list(self.not_likeliest),
        }

    def __str__(self) -> str:
        first = str(self.divergences[0]) if self.divergences else ""
        return in_words(self.turns, self.diverged, self.stops_changed, self.relabelled, first)


def in_words(turns: int, diverged: int, stops_changed: int, relabelled: int, first: str) -> str:
    """The counts of a free generation in a sentence; a turn that the engine writes is a completion. `first`: a divergence."""
    if not diverged and not stops_changed and not relabelled:
        if turns == 1:
            return "the completion has the golden's tokens and stops at the same position"
        return f"all {turns} completions have the golden's tokens and stop at the same positions"
    text = f"{diverged} of {turns} completions have other tokens"
    if stops_changed:
        text += f", {stops_changed} stop at another position"
    if relabelled:
        text += f", {relabelled} report the other of two finish reasons that both hold"
    return text + (f"; first at {first}" if first else "")
