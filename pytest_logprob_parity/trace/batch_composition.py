"""Batch compositions: which requests an engine computes together, and how a replay samples them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError

#: The largest size of a batch, and the largest number of blocks.
_MOST: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCompositions:
    """The distribution from which a replay samples the composition of each of its batches.

    The sequences form `blocks` fixed blocks (sequence number modulo `blocks`). Each repeat of a noise floor, and each later
    replay, shuffles every block and cuts it into batches, whose sizes are sampled from `batch_sizes` with `weights`. A share
    `alone` of the batches runs without other requests. Beside each of the others run 1 to `fillers` requests of other blocks,
    whose answers are dropped. `seed` starts the random numbers.

    Raises UsageError for a distribution that is none.
    """

    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4)
    alone: float = 0.5
    fillers: int = 8
    blocks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for number in (*self.batch_sizes, self.fillers, self.blocks, self.seed):
            if type(number) is not int or not 0 <= number <= _MOST:
                raise UsageError(
                    f"BatchCompositions: sizes, fillers, blocks and seed are whole numbers up to {_MOST:,}, not {number!r:.30}"
                )
        if len(self.batch_sizes) != len(self.weights) or min(self.batch_sizes, default=0) < 1:
            raise UsageError("BatchCompositions: batch_sizes are 1 or more, each with its weight")
        if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-9 or self.fillers < 1 or self.blocks < 1:
            raise UsageError("BatchCompositions: weights add up to 1, fillers and blocks are 1 or more")
        if not 0 <= self.alone <= 1:
            raise UsageError("BatchCompositions: alone is a share from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BatchCompositions:
        """The inverse of `to_json`. Raises UsageError, TypeError and ValueError for anything else."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**fields)
