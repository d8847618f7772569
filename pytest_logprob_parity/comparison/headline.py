"""A headline: the one line that says why a verdict is what it is, with the key that code finds it by."""

from __future__ import annotations

from typing import Literal, TypeAlias

HeadlineKey: TypeAlias = Literal[
    # passes
    "bit_identical", "within_tolerance",
    # fails: the columns, the sizes, the bits
    "contradiction", "other_meanings", "wrong_label", "nan", "not_close", "other_experts", "another_scale",
    "bits_not_reproduced", "tokens_missing", "not_bit_identical", "other_tokens", "beyond_noise",
    # fails: free generation
    "generates_other_tokens", "stops_elsewhere", "not_the_likeliest", "sampler_changed", "diverges_too_often",
    # unverified
    "nothing_compared", "mostly_excluded", "low_coverage", "difference_unknown", "few_sequences", "unsure",
]  # fmt: skip


class Headline(str):
    """The line itself; `key` says which one it is."""

    __slots__ = ("key",)
    key: HeadlineKey

    def __new__(cls, key: HeadlineKey, text: str) -> Headline:
        """`text` under `key`."""
        headline = super().__new__(cls, text)
        headline.key = key
        return headline

    def __getnewargs__(self) -> tuple[HeadlineKey, str]:  # type: ignore[override]
        """For copies, and for other processes."""
        return self.key, str(self)
