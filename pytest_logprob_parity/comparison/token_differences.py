"""What two sides differ by, token by token, and what is known of the noise: what effects and outliers are measured from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..trace import Trace
from . import metrics as m

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Differences:
    """The n tokens that have a finite logprob on both sides, in order.

    `d` is actual - expected, `sequences` and `prompts` the number of each token's sequence and distinct prompt,
    `expected_error` and `actual_error` what the two sides are from the reference (NaN where there is none). Nats.
    """

    d: m.Doubles
    sequences: Integers
    prompts: Integers
    expected_error: m.Doubles
    actual_error: m.Doubles

    @property
    def clusters(self) -> Integers:
        """What the intervals count: prompts, or the sequences where there is one prompt."""
        return self.prompts if self.prompts.max(initial=0) > 0 else self.sequences

    @property
    def known(self) -> npt.NDArray[np.bool_]:
        """Where there is a reference."""
        return np.asarray(np.isfinite(self.actual_error) & np.isfinite(self.expected_error))

    @property
    def fresh_noise(self) -> float:
        """The share of the golden's error that is not the same now (0 to 1): d^2 over the sum of both errors' squares.

        Errors of two builds that have nothing in common give 1. An engine that computes as the golden did has the golden's
        error and whatever is wrong with it besides, and gives the share of that alone.
        """
        known = self.known
        both = float(np.square(self.actual_error[known]).sum() + np.square(self.expected_error[known]).sum())
        return min(float(np.square(self.d[known]).sum()) / both, 1.0) if both else 0.0

    def where(self, kept: npt.NDArray[np.bool_]) -> Differences:
        """The rows that are kept."""
        return Differences(
            d=self.d[kept],
            sequences=self.sequences[kept],
            prompts=self.prompts[kept],
            expected_error=self.expected_error[kept],
            actual_error=self.actual_error[kept],
        )

    def by_sequence(self) -> Differences:
        """One row for each sequence: the means of its tokens."""
        names, rows = np.unique(self.sequences, return_inverse=True)
        counts = np.bincount(rows)

        def mean(values: m.Doubles) -> m.Doubles:
            return np.asarray(np.bincount(rows, values) / counts, np.float64)

        first = np.unique(rows, return_index=True)[1]
        return Differences(
            d=mean(self.d),
            sequences=names,
            prompts=self.prompts[first],
            expected_error=mean(self.expected_error),
            actual_error=mean(self.actual_error),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is known of the noise: the dtype of both sides, how much the temperature enlarges it, and whether tokens are routed
    to experts.
    """

    expected_dtype: str
    enlarged: float
    routed: bool | None
    actual_dtype: str

    def nats(self, by_dtype: dict[str, float]) -> float:
        """What is listed for the coarser of both dtypes, enlarged by the temperature where it is one of half precision."""
        known = [{"float64": "float32"}.get(dtype, dtype) for dtype in (self.expected_dtype, self.actual_dtype)]
        listed = [by_dtype.get(dtype, by_dtype["bfloat16"]) for dtype in known]
        return max(listed) * (1.0 if set(known) == {"float32"} else self.enlarged)

    @property
    def fine(self) -> bool:
        """Whether the dtype is float32 or finer."""
        return self.expected_dtype in ("float32", "float64")

    @property
    def coarser_actual(self) -> bool:
        """Whether a golden in float32 is held against half precision: that is what it has to say, and no noise of its own."""
        return self.fine and self.actual_dtype not in ("float32", "float64")

    @property
    def half(self) -> bool:
        """Whether the dtype is one of half precision, or not known."""
        return not self.fine


def setting_of(expected: Trace, routed: bool | None, actual_dtype: str) -> Setting:
    """What is known of the noise of these tokens, where the actual side's dtype is `actual_dtype`.

    Noise of logits is divided by the temperature, where that is below 1 and the logprobs are processed by it.
    """
    temperature = expected.sampling.temperature
    low = expected.logprobs_mode == "processed_logprobs" and 0 < temperature < 1
    return Setting(
        expected_dtype=expected.dtype, enlarged=1 / temperature if low else 1.0, routed=routed, actual_dtype=actual_dtype
    )
