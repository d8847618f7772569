"""The answer to "is it different", whether or not it matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

#: What an answer rests on.
DifferenceKey: TypeAlias = Literal[
    "not_asked", "nothing_compared", "bits", "headline", "not_reproduced", "no_floor", "server_batches", "no_engine",
    "still_floor", "few_blocks", "permutation_test",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The answer to "is it different", whether or not it matters.

    `different` is None where it is not known; `p_value` is that of the block permutation test (NaN where none was made);
    `decided` says that the headline of a failure is the reason; `key` is the reason for code.
    """

    different: bool | None
    reason: str
    p_value: float = float("nan")
    decided: bool = False
    key: DifferenceKey = "not_asked"

    def __str__(self) -> str:
        return f"{ {True: 'yes', False: 'no', None: 'not known'}[self.different] }: {self.reason}"


NOT_ASKED: Final = Difference(different=None, reason="not asked")
