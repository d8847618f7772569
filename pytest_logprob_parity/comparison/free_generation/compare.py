"""Compare what an engine generated freely with the golden: did it write the same tokens, and stop where it stopped?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ...trace import FINISH_REASONS, Segment, Trace
from .argmax import below_the_largest, gap_to
from .draws import fewer_distinct, likelihood_shift
from .result import Divergence, FreeRun

_STOP: Final = FINISH_REASONS.index("stop")
IntArray = npt.NDArray[Any]
#: A completion whose last allowed token ends it ended for both reasons; versions of vLLM differ in which one they give.
_AT_THE_LIMIT: Final = {FINISH_REASONS.index("stop"), FINISH_REASONS.index("length")}


def compare_free_run(expected: Trace, actual: Trace, near_tie: float) -> FreeRun:
    """Compare a regenerated trace (one sequence for each turn of the golden, in the golden's order) with its golden.

    `near_tie` (nats) is the largest gap between two tokens that noise may turn: under greedy decoding either may be taken,
    and a token no further below the largest logprob counts as the likeliest. Sampled tokens have no near ties: what decides
    there is the gap after the random numbers are added.

    A turn whose tokens agree as far as both sides go and that ended elsewhere is a stop. So is one that diverged only by the
    end token: one side wrote its end token where the other went on.
    """
    segments = list(expected.segments())
    turns = _turns(expected, actual, segments)
    diverged = [turn for turn in turns if turn.place is not None]
    ends, divergences = (
        sorted(
            (turn.divergence(near_tie) for turn in diverged if turn.one_side_ended is ended),
            key=lambda d: (d.position, d.sequence),
        )
        for ended in (True, False)
    )
    otherwise = [turn.ended_otherwise for turn in turns]
    shift, p_value = likelihood_shift(expected, segments, actual)
    return FreeRun(
        turns=len(segments),
        diverged=len(divergences),
        stops_changed=otherwise.count("elsewhere") + len(ends),
        divergences=tuple(divergences),
        likelihood_shift=shift,
        shift_p=p_value,
        distinct=(len({turn.expected_ids.tobytes() for turn in turns}), len({turn.actual_ids.tobytes() for turn in turns})),
        not_likeliest=_not_likeliest(expected, segments, actual, near_tie),
        relabelled=otherwise.count("relabelled"),
        distinct_p=fewer_distinct(expected, segments, actual),
        ends=tuple(ends),
    )


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: cached_property needs a dict
class _Turn:
    """One turn on both sides: `segment` of the expected trace, sequence `index` of the actual one."""

    expected: Trace
    actual: Trace
    segment: Segment
    index: int
    is_last: bool

    @functools.cached_property
    def expected_ids(self) -> IntArray:
        """Its tokens in the golden."""
        return self.expected.token_ids[self.segment.start : self.segment.stop]

    @functools.cached_property
    def actual_ids(self) -> IntArray:
        """Its tokens as they were generated."""
        return self.actual.token_ids[slice(*self.actual.bounds(self.index))]

    @functools.cached_property
    def place(self) -> int | None:
        """The first place where the tokens differ; None where they agree as far as both sides go."""
        common = min(len(self.expected_ids), len(self.actual_ids))
        differs = np.flatnonzero(self.expected_ids[:common] != self.actual_ids[:common])
        return int(differs[0]) if len(differs) else None

    @property
    def reasons(self) -> tuple[int, int]:
        """The finish reasons of the sequence in the golden, and of the turn as it was generated."""
        return int(self.expected.finish_reasons[self.segment.sequence]), int(self.actual.finish_reasons[self.index])

    @property
    def ended_otherwise(self) -> Literal["", "elsewhere", "relabelled"]:
        """How a turn whose tokens agree ended otherwise: elsewhere, or there for the other of two reasons that both hold."""
        if self.place is not None:
            return ""
        expected, actual = self.reasons
        lengths = len(self.expected_ids), len(self.actual_ids)
        known = self.is_last and FINISH_REASONS[expected] != "unknown"
        if lengths[0] == lengths[1] and not (known and expected != actual):
            return ""
        both_hold = lengths[0] == lengths[1] == self.expected.sampling.max_tokens and {expected, actual} == _AT_THE_LIMIT
        return "relabelled" if both_hold else "elsewhere"

    @property
    def one_side_ended(self) -> bool:
        """Whether, where the tokens diverge, one side wrote its end token and the other went on."""
        expected, actual = self.reasons
        expected_ended = (expected if self.is_last else _STOP) == _STOP and self.place == len(self.expected_ids) - 1
        actual_ended = actual == _STOP and self.place == len(self.actual_ids) - 1
        return expected_ended != actual_ended

    def divergence(self, near_tie: float) -> Divergence:
        """Where a turn that diverges leaves the golden."""
        place = self.place
        assert place is not None
        expected_id, actual_id = int(self.expected_ids[place]), int(self.actual_ids[place])
        gap = gap_to(self.expected, self.segment.start + place, actual_id)
        if not np.isfinite(gap):  # the context is the same on both sides, and so is what the other side says of it
            gap = gap_to(self.actual, self.actual.bounds(self.index)[0] + place, expected_id)
        return Divergence(
            sequence=self.segment.sequence,
            turn=self.segment.turn,
            position=self.segment.start + place - self.expected.bounds(self.segment.sequence)[0],
            expected=repr(self.expected.text(expected_id)),
            actual=repr(self.actual.text(actual_id)),
            gap=gap,
            near_tie=self.expected.sampling.greedy and gap <= near_tie,
        )


def _turns(expected: Trace, actual: Trace, segments: Sequence[Segment]) -> list[_Turn]:
    last = {segment.sequence: segment.turn for segment in segments}
    return [
        _Turn(expected=expected, actual=actual, segment=segment, index=index, is_last=segment.turn == last[segment.sequence])
        for index, segment in enumerate(segments)
    ]


def _not_likeliest(expected: Trace, segments: Sequence[Segment], actual: Trace, near_tie: float) -> tuple[int, int]:
    """How many tokens were not the likeliest, in the golden and as generated."""
    least = near_tie if expected.sampling.greedy else 0.0
    below = below_the_largest(expected)
    return (
        sum(int(np.count_nonzero(below[s.start : s.stop] > least)) for s in segments),
        int(np.count_nonzero(below_the_largest(actual) > least)),
    )
