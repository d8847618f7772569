"""What a comparison says of other prompts, in numbers and in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from .json_values import finite_or_none, number_in_words

#: What is said of other prompts holds with this probability.
CONFIDENCE: Final = 0.95
#: A fault is said to be found where it is found with this probability.
POWER: Final = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What a comparison says of other prompts, exact whatever the noise (Clopper-Pearson over distinct prompts).

    `bad_prompts` of `prompts` hold a sequence whose RMS is above `threshold` (nats), so with CONFIDENCE no more than `share`
    (0 to 1) of such prompts do. A fault that moves the sequences of a prompt by more than `threshold` does not pass with
    probability POWER where it hits `reach` of the prompts (1: wherever it hits them all).
    """

    prompts: int
    sequences: int
    threshold: float
    bad_prompts: int
    share: float
    reach: float
    tokens_allowed: int
    sequences_allowed: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        return {field.name: finite_or_none(getattr(self, field.name)) for field in dataclasses.fields(self)}


def shown_lines(shown: Shown) -> tuple[str, ...]:
    """What a comparison says of other prompts, what would not have passed, and how rare a fault it would have found."""
    if shown.prompts == 1:
        return ("shown: nothing about other prompts, because all sequences have the same prompt",)
    threshold = f"{number_in_words(shown.threshold)} nats"
    have = "has" if shown.bad_prompts == 1 else "have"
    lines = [
        f"shown: {shown.bad_prompts} of {shown.prompts} prompts {have} a sequence with an RMS difference above {threshold} "
        f"(over all its tokens but the one that differs most). With {CONFIDENCE:.0%} confidence, at most {shown.share:.1%} of "
        "similar prompts have one",
        f"no check passes, in any setup, with: {shown.tokens_allowed + 1} or more sequences with an outlier token, or "
        f"{shown.sequences_allowed + 1} or more sequences with an RMS difference above {threshold}",
    ]
    if shown.reach < 1:
        lines.append(
            f"power: a fault that changes a sequence by more than RMS {threshold} in {shown.reach:.1%} of all prompts is found "
            f"with a probability of {POWER:.0%}"
        )
    return tuple(lines)
