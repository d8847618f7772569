"""A contradiction in a record: which columns, on which side, how many; and what a comparison makes of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ...notes import Note
from ..findings import Finding
from ..sides import Side

Key = Literal[
    "top_k_shifted", "no_distribution", "above_zero", "mass_above_one", "chosen_and_top_k", "above_the_largest",
    "rank_and_top_k", "top_k_differs", "ranks_differ", "probability_one", "tokens_shifted", "no_logprob",
]  # fmt: skip

#: How a headline begins; other contradictions are of one side with itself.
_TITLES: Final[Mapping[Key, str]] = {
    "probability_one": "The logprobs are not sampling probabilities",
    "tokens_shifted": "Tokens are out of place",
    "no_logprob": "Logprobs are missing",
}
_OF_ITSELF: Final = "The record contradicts itself"
#: What causes read off the top-k (`signatures.misreported_logprobs`) say of the same tokens, in more words.
_SAID_BY: Final[Mapping[str, frozenset[Key]]] = {
    "wrong_values": frozenset({"above_zero", "mass_above_one", "chosen_and_top_k", "above_the_largest"}),
    "wrong_token": frozenset({"chosen_and_top_k", "above_the_largest"}),
    "shifted_positions": frozenset({"top_k_shifted", "chosen_and_top_k", "above_the_largest"}),
}
#: What else these leave behind would be taken for a truncation, a temperature, a penalty.
_EXPLAIN: Final[frozenset[Key]] = frozenset({"probability_one", "tokens_shifted", "no_distribution", "top_k_shifted"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Contradiction(Finding):
    """A finding that columns of a record contradict each other, at `count` of `of` places of `side`.

    `new` says that the comparison must not pass for it: it is on the actual side, and not on the expected one in like number.
    """

    key: Key = "chosen_and_top_k"
    side: Side = "actual"
    count: int = 0
    of: int = 0
    new: bool = True


@dataclass(frozen=True, slots=True)
class Record:
    """All contradictions of two aligned records."""

    contradictions: tuple[Contradiction, ...] = ()

    @property
    def new(self) -> tuple[Contradiction, ...]:
        """Those for which the comparison fails."""
        return tuple(c for c in self.contradictions if c.new)

    def beside(self, findings: Iterable[Finding]) -> list[Contradiction]:
        """The new ones, without those that findings read off the top-k have said already."""
        said: frozenset[Key] = frozenset().union(*(_SAID_BY.get(f.cause or "", frozenset()) for f in findings))
        return [c for c in self.new if c.key not in said]

    @property
    def headline(self) -> str:
        """The verdict's one line; empty where nothing is new."""
        if not self.new:
            return ""
        first = self.new[0]
        return f"{_TITLES.get(first.key, _OF_ITSELF)}: {first.evidence}"

    def accounts_for(self, count: int) -> bool:
        """Whether so many tokens without a number are tokens that the engine said nothing of."""
        return any(c.key == "no_logprob" and c.count == count for c in self.new)

    @property
    def explains(self) -> bool:
        """Whether what the top-k seem to say of temperature, truncation and penalties is not to be read."""
        return any(c.key in _EXPLAIN for c in self.new)

    @property
    def notes(self) -> tuple[Note, ...]:
        """What is to be said of contradictions that are not new: they do not decide."""
        others = [c.evidence for c in self.contradictions if not c.new]
        return tuple(Note("contradiction", f"a contradiction that does not change the verdict: {text}") for text in others)
