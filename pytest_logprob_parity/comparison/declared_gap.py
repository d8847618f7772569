"""A comparison under a declared gap: what the gap allows, and whether the engine has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..notes import Note
from .headline import Headline
from .precision_gaps import GAPS
from .result import Comparison


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
    headline = comparison.headline
    if comparison.gates:
        text = f"{headline} (declared gap: {gap.title})"
        headline = Headline(headline.key, text) if isinstance(headline, Headline) else text
    return dataclasses.replace(comparison, headline=headline, notes=(*notes, *comparison.notes))
