"""Gaps that are there on purpose: rollouts in fewer bits than the trainer or the golden, with limits of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..errors import UsageError
from ..notes import Note
from ..suggest import nearest

if TYPE_CHECKING:
    from .result import Comparison


@dataclass(frozen=True)
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
        "fp8 rollouts",
        {
            "mean_diff": 0.01, "k3": 0.015, "noise_rms": 0.09, "clip_share": 0.04, "outlier": 3.0, "sequence_rms": 0.25,
            "support_flips": 0.03, "support_depth": 0.2, "near_tie": 0.5,
        },
        "NeMo-RL's limit for fp8, token_mult_prob_error < 1.08, is what d of this RMS gives; prime-rl's KL for a new model",
        ("fp8", "e4m3", "e5m2"),
    ),
    "int8": Gap(
        "int8 rollouts",
        {
            "mean_diff": 0.003, "k3": 0.0018, "noise_rms": 0.06, "clip_share": 0.02, "outlier": 0.75, "sequence_rms": 0.15,
            "support_flips": 0.015, "support_depth": 0.15, "near_tie": 0.35,
        },
        "NeMo-RL's limit for all rollouts, token_mult_prob_error < 1.05, is what d of this RMS gives",
        ("int8", "w8a8", "compressed-tensors", "gptq", "awq"),
    ),
}  # fmt: skip


def gap_of(name: str) -> Gap:
    """The gap of this name. Raises UsageError."""
    if name not in GAPS:
        raise UsageError(f"tolerance={name!r}: declared gaps are {', '.join(GAPS)}{nearest(name, GAPS)}")
    return GAPS[name]


def with_gap(comparison: Comparison, tolerance: Any, config: Mapping[str, Any] | None = None) -> Comparison:
    """A comparison with a note of the gap that `tolerance` declares, and whether the engine says in `config` that it has it."""
    if not isinstance(tolerance, str) or tolerance not in GAPS:
        return comparison
    gap = GAPS[tolerance]
    limits = ", ".join(f"{name} {value:g}" for name, value in gap.limits.items())
    notes = [Note("declared_gap", f"declared gap: {gap.title}; limits {limits} ({gap.reason})")]
    says = [str((config or {}).get(name)) for name in ("quantization", "kv_cache_dtype")]
    if config is not None and not any(mark in text.lower() for mark in gap.marks for text in says):
        text = (
            f"a gap was declared, but the engine reports none: its quantization is {says[0]}, its kv_cache_dtype {says[1]}; "
            "without it narrower limits would hold"
        )
        notes.append(Note("gap_not_there", text))
    if comparison.metrics.get("n_tokens") and not comparison.metrics.get("n_changed"):
        text = "a gap was declared, but every logprob is bit-identical to the other side's, as without it"
        notes.append(Note("gap_not_there", text))
    headline = f"{comparison.headline} (declared gap: {gap.title})" if comparison.gates else comparison.headline
    return dataclasses.replace(comparison, headline=headline, notes=(*notes, *comparison.notes))
