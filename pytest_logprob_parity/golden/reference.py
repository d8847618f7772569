"""The reference column: the model's logprobs of the golden's tokens in float32. bfloat16 is judged by its distance to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..grammar import counted
from ..trace import Trace


@dataclass(frozen=True, eq=False, slots=True)
class Reference:
    """Logprobs of the golden's N tokens in float32 arithmetic, processed as the golden's are.

    `logprobs` is float32 [N] in nats: NaN for a token without a reference (masked, or of a sequence that was left out), -inf
    where truncation excludes the token. `source` names the code that computed it, `sequences` is how many sequences it covers.

    Raises UsageError for another dtype or shape.
    """

    logprobs: npt.NDArray[np.float32]
    source: str
    sequences: int = 0

    def __post_init__(self) -> None:
        if self.logprobs.ndim != 1 or self.logprobs.dtype != np.float32:
            raise UsageError(f"a reference is float32 [tokens], not {self.logprobs.dtype} {list(self.logprobs.shape)}")

    def to_json(self) -> dict[str, Any]:
        """Everything but the column, as JSON values."""
        return {"source": self.source, "sequences": self.sequences}

    @classmethod
    def from_json(cls, logprobs: npt.NDArray[np.float32], value: Mapping[str, Any]) -> Reference:
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError and UsageError for anything else."""
        return cls(logprobs, str(value["source"]), int(value["sequences"]))

    def errors(self, logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """logprobs - reference [N]; NaN where one of them is not finite."""
        with np.errstate(invalid="ignore"):
            errors: npt.NDArray[np.float64] = np.subtract(logprobs, self.logprobs, dtype=np.float64)
        errors[~np.isfinite(errors)] = np.nan
        return errors

    def share_of(self, golden: Trace) -> float:
        """The share (0 to 1) of the golden's tokens that the reference covers."""
        return int(np.count_nonzero(~np.isnan(self.logprobs))) / max(int(np.count_nonzero(golden.mask)), 1)

    def describe(self, golden: npt.NDArray[Any]) -> str:
        """A description of the reference for people, in a line: how far the golden's logprobs [N] are from it."""
        errors = self.errors(golden)
        known = errors[np.isfinite(errors)]
        if not len(known):
            return f"reference ({self.source}): no token in common"
        return (
            f"reference ({self.source}, {counted(self.sequences, 'sequences')}): the golden differs from it by RMS "
            f"{float(np.sqrt(np.mean(known**2))):.2g} nats, at most {float(np.abs(known).max()):.2g} nats"
        )
