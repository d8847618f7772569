"""The noise floor: repeated replays of the golden's own tokens in sampled batch compositions. Data and its summary only."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..trace.batch_composition import BatchCompositions

#: How often recording replays its tokens by default.
REPEATS: Final = 5


@dataclass(frozen=True, eq=False)  # without slots: what is computed from the repeats is kept in it
class NoiseFloor:
    """R repeats of a decode replay of N tokens on the recording engine, in batches sampled from `compositions`.

    `logprobs` is float32 [R, N] in nats, NaN where the trace masks a token, -inf where truncation excluded it in that
    repeat. The generating run is not among them. `reproduces` says whether a replay on the golden's own schedule was
    bit-identical.

    Raises UsageError for fewer than 2 repeats.
    """

    logprobs: npt.NDArray[np.float32]
    compositions: BatchCompositions
    reproduces: bool

    def __post_init__(self) -> None:
        if self.logprobs.ndim != 2 or len(self.logprobs) < 2 or self.logprobs.dtype != np.float32:
            raise UsageError(f"a noise floor is float32 [2 or more repeats, tokens], not {self.logprobs.dtype} "
                             f"{list(self.logprobs.shape)}")  # fmt: skip

    @property
    def repeats(self) -> int:
        """R: how often the tokens were replayed."""
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
        """Tokens that truncation excludes in one repeat, on average: nucleus flips of an engine that did not change."""
        return float(np.isneginf(self.logprobs).sum()) / self.repeats

    def to_json(self) -> dict[str, Any]:
        """The summary and the batch compositions as JSON values; the repeats are in the file."""
        names = ("repeats", "reproduces", "rms", "mean_abs", "max_abs", "changed", "flips")
        return {name: getattr(self, name) for name in names} | {"shapes": self.compositions.to_json()}

    def describe(self) -> str:
        """A description of the noise floor for people, in a line."""
        text = f"noise floor of {self.repeats} repeats: "
        if self.changed == 0:
            text += "bit-identical in all batch compositions tried; another version may still differ"
        else:
            text += (
                f"two repeats differ by RMS {self.rms:.2g} nats, at most {self.max_abs:.2g} nats; {self.changed:.1%} of the "
                "logprobs are not the same in all repeats"
            )
        text += f"; {self.flips:.1f} nucleus flips in each repeat on average" if self.flips else ""
        return text + ("" if self.reproduces else "; a replay in the golden's own batches is not bit-identical")
