"""The free run beside its golden: did the engine write the same tokens again, and stop where it stopped?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..trace import FINISH_REASONS, Trace


@dataclass(frozen=True)
class Divergence:
    """Where a free run first leaves the golden. `gap` is the golden's top-2 gap there (nats; NaN without a top-2)."""

    sequence: int
    turn: int
    position: int
    golden: str
    now: str
    gap: float
    near_tie: bool

    def __str__(self) -> str:
        gap = f"top-2 gap {self.gap:.3g} nats" if np.isfinite(self.gap) else "top-2 gap not recorded"
        return f"sequence {self.sequence}, position {self.position}: {self.golden} became {self.now} ({gap}" + (
            ", a near tie)" if self.near_tie else ")"
        )


@dataclass(frozen=True)
class FreeRun:
    """How many turns were written again, how many of them diverged, and how many only ended elsewhere."""

    turns: int
    diverged: int
    stops_changed: int
    divergences: tuple[Divergence, ...]

    @property
    def same(self) -> bool:
        """Whether every turn came back as it was, its end included."""
        return self.diverged == 0 and self.stops_changed == 0

    def to_json(self) -> dict[str, Any]:
        """The counts and the first divergences, as JSON values."""
        return {
            "turns": self.turns,
            "diverged": self.diverged,
            "stops_changed": self.stops_changed,
            "first": [str(d) for d in self.divergences[:10]],
        }

    def __str__(self) -> str:
        if self.same:
            return f"all {self.turns} came back token for token and stopped where they stopped"
        text = f"{self.diverged} of {self.turns} wrote other tokens"
        if self.stops_changed:
            text += f", {self.stops_changed} stopped elsewhere"
        return text + (f"; first at {self.divergences[0]}" if self.divergences else "")


def compare_free_run(golden: Trace, regenerated: Trace, near_tie: float) -> FreeRun:
    """Hold a regenerated trace (one sequence for each turn of the golden, in the golden's order) against its golden.

    `near_tie` (nats): greedy decoding may take either of two tokens whose gap is no larger. Sampled tokens have no near
    ties: what decides there is the gap after the random numbers are added.
    """
    divergences, stops = [], 0
    segments = list(golden.segments())
    last_turn = {segment.sequence: segment.turn for segment in segments}
    for index, segment in enumerate(segments):
        expected = golden.token_ids[segment.start : segment.stop]
        start, stop = regenerated.bounds(index)
        actual = regenerated.token_ids[start:stop]
        common = min(len(expected), len(actual))
        differs = np.flatnonzero(expected[:common] != actual[:common])
        if len(differs) == 0:
            reason, reason_now = int(golden.finish_reasons[segment.sequence]), int(regenerated.finish_reasons[index])
            told = segment.turn == last_turn[segment.sequence] and FINISH_REASONS[reason] != "unknown"
            stops += len(expected) != len(actual) or (told and reason != reason_now)
            continue
        place = int(differs[0])
        row = segment.start + place
        top = golden.top_logprobs[row]
        gap = float(top[0] - top[1]) if len(top) > 1 else float("nan")
        start_of_sequence, _ = golden.bounds(segment.sequence)
        divergences.append(
            Divergence(
                sequence=segment.sequence,
                turn=segment.turn,
                position=row - start_of_sequence,
                golden=repr(golden.text(int(expected[place]))),
                now=repr(regenerated.text(int(actual[place]))),
                gap=gap,
                near_tie=golden.sampling.greedy and gap <= near_tie,
            )
        )
    divergences.sort(key=lambda d: (d.position, d.sequence))
    return FreeRun(len(segments), len(divergences), stops, tuple(divergences))
