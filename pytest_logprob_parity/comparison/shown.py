"""What a comparison says of other prompts, in numbers and in words."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

from ..grammar import counted
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
    """What a comparison says of other prompts, and what would not have passed."""
    if shown.prompts == 1:
        return ("shown: all sequences have the same prompt; nothing is shown of other prompts",)
    off = f"with an RMS difference above {number_in_words(shown.threshold)} nats"
    sequences = shown.sequences_allowed + 1
    caught = f"{counted(shown.tokens_allowed + 1, 'sequences')} with an outlier token, or {counted(sequences, 'sequences')}"
    if shown.reach < 1:
        caught += (
            f" {off}; a fault that does this to {shown.reach:.1%} of the prompts is found with a probability of {POWER:.0%}"
        )
    have = "has" if shown.bad_prompts == 1 else "have"
    return (
        f"shown ({CONFIDENCE:.0%} confidence, {counted(shown.prompts, 'prompts')}): at most {shown.share:.1%} of such prompts "
        f"have a sequence {off} (its largest token left out); {shown.bad_prompts} of these prompts {have} one",
        f"would not have passed: {caught}",
    )
