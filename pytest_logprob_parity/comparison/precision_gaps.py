"""Gaps that are there on purpose: rollouts in fewer bits than the trainer or the golden, with limits of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..errors import UsageError
from ..suggest import nearest

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Gap:
    """What a declared gap allows: `limits` as in Tolerance, where they are wider than those that would hold, and why.

    `marks` are what an engine says of its settings that has the gap: parts of its `quantization` or `kv_cache_dtype`.
    """

    title: str
    limits: Mapping[str, float]
    reason: str
    marks: tuple[str, ...]


GAPS: Final[Mapping[str, Gap]] = {
    # The mean of d is -KL where d is noise, half its square: 0.004 at this RMS. A cache in e4m3 puts single tokens far off, 1
    # to 7 in 2,400 by more than 1.25 nats on the tiny model (3 is a ratio of 20), which k3 counts in full: up to 0.006.
    # prime-rl lets a new model have a mismatch KL of 0.015.
    "fp8": Gap(
        title="fp8 rollouts",
        limits={
            "mean_diff": 0.01, "k3": 0.015, "noise_rms": 0.09, "clip_share": 0.04, "outlier": 3.0, "sequence_rms": 0.25,
            "support_flips": 0.03, "support_depth": 0.2, "near_tie": 0.5,
        },
        reason="NeMo-RL's limit for fp8, token_mult_prob_error < 1.08, is what d of this RMS gives; prime-rl's KL for a new "
        "model",
        marks=("fp8", "e4m3", "e5m2"),
    ),
    "int8": Gap(
        title="int8 rollouts",
        limits={
            "mean_diff": 0.003, "k3": 0.0018, "noise_rms": 0.06, "clip_share": 0.02, "outlier": 0.75, "sequence_rms": 0.15,
            "support_flips": 0.015, "support_depth": 0.15, "near_tie": 0.35,
        },
        reason="NeMo-RL's limit for all rollouts, token_mult_prob_error < 1.05, is what d of this RMS gives",
        marks=("int8", "w8a8", "q8_0", "compressed-tensors", "gptq", "awq"),
    ),
}  # fmt: skip


def gap_of(name: str) -> Gap:
    """The gap of this name. Raises UsageError."""
    if name not in GAPS:
        raise UsageError(f"tolerance={name!r}: declared gaps are {', '.join(GAPS)}{nearest(name, GAPS)}")
    return GAPS[name]
