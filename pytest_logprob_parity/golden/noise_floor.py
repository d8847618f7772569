"""The noise floor: the golden's own tokens, replayed several times in other batch shapes. Data and its summary only."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

#: How often recording replays its tokens, unless told otherwise.
REPEATS: Final = 5
#: No batch is larger, and no trace is cut into more blocks.
_MOST: Final = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The distribution from which every block of every repeat draws its shape, and any later replay draws its own.

    The sequences form `blocks` fixed blocks (sequence number modulo `blocks`). In each repeat each block is shuffled and
    cut into batches, each of a size drawn from `batch_sizes` with `weights`. A share `alone` of the batches has no company;
    beside the others run 1 to `fillers` requests of other blocks, their answers thrown away. `seed` starts the random
    numbers.

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
                    f"Shapes: sizes, fillers, blocks and seed are whole numbers up to {_MOST:,}, not {number!r:.30}"
                )
        if len(self.batch_sizes) != len(self.weights) or min(self.batch_sizes, default=0) < 1:
            raise UsageError("Shapes: batch_sizes are 1 or more, each with its weight")
        if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-9 or self.fillers < 1 or self.blocks < 1:
            raise UsageError("Shapes: weights add up to 1, fillers and blocks are 1 or more")
        if not 0 <= self.alone <= 1:
            raise UsageError("Shapes: alone is a share from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Shapes:
        """The inverse of `to_json`. Raises UsageError, TypeError and ValueError for anything else."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class NoiseFloor:
    """R repeats of a decode replay of N tokens on the recording engine, each block in a shape drawn from `shapes`.

    `logprobs` is float32 [R, N] in nats, NaN where the trace masks a token, -inf where truncation excluded it in that
    repeat. The generating run is not among them. `reproduces` says whether a replay on the golden's own schedule gave
    every bit back.

    Raises UsageError for fewer than 2 repeats.
    """

    logprobs: npt.NDArray[np.float32]
    shapes: Shapes
    reproduces: bool

    def __post_init__(self) -> None:
        if self.logprobs.ndim != 2 or len(self.logprobs) < 2 or self.logprobs.dtype != np.float32:
            raise UsageError(f"a noise floor is float32 [2 or more repeats, tokens], not {self.logprobs.dtype} "
                             f"{list(self.logprobs.shape)}")  # fmt: skip

    @property
    def repeats(self) -> int:
        """R."""
        return len(self.logprobs)

    @functools.cached_property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Tokens [N] that have a finite logprob in every repeat."""
        return np.asarray(np.isfinite(self.logprobs).all(axis=0))

    @functools.cached_property
    def spread(self) -> npt.NDArray[np.float64]:
        """Variance [N] of each token's logprob over the repeats (R - 1 in the denominator); 0 where it is not finite."""
        spread = np.zeros(self.logprobs.shape[1])
        spread[self.finite] = self.logprobs[:, self.finite].var(axis=0, ddof=1, dtype=np.float64)
        return spread

    @functools.cached_property
    def rms(self) -> float:
        """Root mean square (nats) of the difference between two repeats, over all tokens and pairs."""
        return float(np.sqrt(2 * self.spread[self.finite].mean())) if self.finite.any() else float("nan")

    @functools.cached_property
    def mean_abs(self) -> float:
        """Mean absolute difference (nats) between two repeats."""
        if not self.finite.any():
            return float("nan")
        return float(np.mean([np.abs(a - b).mean() for a, b in itertools.combinations(self.logprobs[:, self.finite], 2)]))

    @functools.cached_property
    def max_abs(self) -> float:
        """Largest difference (nats) of one token between two repeats."""
        return float(np.ptp(self.logprobs[:, self.finite], axis=0).max()) if self.finite.any() else float("nan")

    @functools.cached_property
    def changed(self) -> float:
        """Share of tokens (0 to 1) whose logprob is not the same in all repeats."""
        return float(np.mean(self.spread[self.finite] > 0)) if self.finite.any() else float("nan")

    @functools.cached_property
    def flips(self) -> float:
        """Tokens that truncation excludes in one repeat, on average: support flips of an engine that did not change."""
        return float(np.isneginf(self.logprobs).sum()) / self.repeats

    def to_json(self) -> dict[str, Any]:
        """The summary and the shapes as JSON values; the repeats are in the file."""
        names = ("repeats", "reproduces", "rms", "mean_abs", "max_abs", "changed", "flips")
        return {name: getattr(self, name) for name in names} | {"shapes": self.shapes.to_json()}

    def describe(self) -> str:
        """The floor in a line, for people."""
        text = f"noise floor of {self.repeats} repeats: "
        if self.changed == 0:
            text += "no other batch composition moved a bit, so it says nothing of other builds"
        else:
            text += (
                f"RMS {self.rms:.2g} nats between two of them, max {self.max_abs:.2g}, {self.changed:.1%} of the tokens move"
            )
        text += f", {self.flips:.1f} nucleus flips a replay" if self.flips else ""
        return text + ("" if self.reproduces else "; its own schedule does not reproduce bit for bit")
