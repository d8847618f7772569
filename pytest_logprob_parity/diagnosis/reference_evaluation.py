"""A reference evaluation: what an independent implementation reads of the golden's tokens says which of two sides has changed.

It knows the weights as the checkpoint holds them now. Where it agrees with the golden, the weights are the golden's and the
engine under test computes something else from them; where it agrees with the engine, the checkpoint is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ..comparison.alignment import align
from ..comparison.findings import PathCause
from ..comparison.result import Finding
from ..trace import Trace

#: A side is off when it is so many times as far from the reference as the other side,
_FURTHER: Final = 2.0
#: and further than this share of the outlier limit: of what matters to no update, a ratio says nothing.
_MATTERS: Final = 0.1
#: Fewer sequences than this share carry the difference: a cache, a batch or a replica, not the arithmetic of all.
_FEW: Final = 0.5
#: A sequence carries it with at least this share of the RMS that the worst one has, each token cut off at so many nats.
_CARRIES, _CUT = 0.03, 3.0
_OF_ALL: Final[tuple[PathCause, ...]] = ("engine_build", "attention_backend", "kv_cache_dtype", "compilation")
_OF_FEW: Final[tuple[PathCause, ...]] = ("prefix_cache", "batch_shape", "parallelism", "engine_build")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceDistances:
    """How far, in RMS over the tokens that differ most between golden and now (nats), each side is from the reference.

    `share` is the share of sequences (0 to 1) that carry the difference; less than `matters` (nats) accuses no side.
    """

    golden: float
    now: float
    share: float
    matters: float = 0.0

    @property
    def off(self) -> Literal["golden", "now", ""]:
        """The side that the reference disagrees with; empty where it sides with neither."""
        if self.now > max(_FURTHER * self.golden, self.matters):
            return "now"
        return "golden" if self.golden > max(_FURTHER * self.now, self.matters) else ""

    def __str__(self) -> str:
        return f"RMS to a reference evaluation of the checkpoint: golden {self.golden:.2g}, now {self.now:.2g} nats"


def read_against(expected: Trace, actual: Trace, reference: Trace, outlier: float) -> ReferenceDistances:
    """Hold both sides against a reference of the same tokens.

    Over the tokens that are more than `outlier` (nats) apart, where there are some, for the rest is noise: it would drown
    what a few tokens say.
    """
    rows = align(expected, actual)
    places, others = np.arange(expected.num_tokens)[rows.expected], np.arange(actual.num_tokens)[rows.actual]
    columns = (expected.logprobs[places], actual.logprobs[others], reference.logprobs[places])
    golden, now, truth = (column.astype(np.float64) for column in columns)
    known = np.isfinite(golden) & np.isfinite(now) & np.isfinite(truth)
    with np.errstate(invalid="ignore"):
        apart = np.abs(now - golden)
    cut = min(outlier, float(np.quantile(apart[known], 0.9))) if known.any() else outlier
    telling = known & (apart >= cut) & (apart > 0)
    owner = expected.sequence_of_token[places]
    squares = np.bincount(owner[known], np.minimum(apart[known], _CUT) ** 2)
    sizes = np.sqrt(squares / np.maximum(np.bincount(owner[known]), 1))[np.unique(owner[known])]
    carry = float(np.mean(sizes > _CARRIES * sizes.max())) if len(sizes) and sizes.max() > 0 else 1.0
    golden, now, truth = golden[telling], now[telling], truth[telling]
    return ReferenceDistances(golden=_rms(golden - truth), now=_rms(now - truth), share=carry, matters=_MATTERS * outlier)


def _rms(d: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(d**2))) if len(d) else 0.0


def weigh(findings: Sequence[Finding], reference: ReferenceDistances, *, other_build: bool = False) -> list[Finding]:
    """The findings with what a reference adds: the layer where nothing was named, the ranking where candidates were.

    `other_build` says that the golden is of another engine or version: where it is off, that may have computed otherwise from
    the same checkpoint.
    """
    if any(finding.cause for finding in findings if finding.layer in ("semantic", "head") or finding.cause == "adapter"):
        return list(findings)
    if reference.off == "now":
        candidates = _OF_ALL if reference.share > _FEW else _OF_FEW
        text = f"this run computes something else from the weights of the checkpoint, as the golden did not; {reference}"
        if reference.share <= _FEW:
            text += f"; {reference.share:.0%} of the sequences carry it"
        path = Finding(layer="path", cause=None, evidence=text, candidates=candidates)
        stale = Finding(
            layer="weights",
            cause=None,
            evidence="an engine whose weights or cache in memory are not those of the checkpoint would "
            "look the same; load them anew to rule that out",
            candidates=("stale_kv_cache", "stale_weights"),
        )
        kept = [f for f in findings if f.layer == "semantic"]
        named = [f for f in findings if f.layer == "path" and f.cause]
        return [*kept, *(named or [path]), stale]
    if reference.off == "golden":
        text = f"the checkpoint of now gives the numbers of this run, and not the golden's; {reference}"
        kept = [f for f in findings if f.layer == "semantic"]
        if other_build:
            text += ": another checkpoint, or the golden's engine computed something else from this one"
            return [
                Finding(
                    layer="path", cause=None, evidence=text, candidates=("engine_build", "weights_differ", "stale_weights")
                ),
                *kept,
            ]
        return [Finding(layer="weights", cause="weights_differ", evidence=text), *kept]
    return list(findings)
