"""Traces: what an engine said of tokens, as columns with their meaning; and the file format that holds them."""

from .trace import (
    COLUMNS,
    FINISH_REASONS,
    FORCINGS,
    MINUS_INFINITY,
    NO_SEED,
    BoolArray,
    FloatArray,
    Forcing,
    ReplayPath,
    Segment,
    Trace,
    TracePath,
    offsets_of,
)

__all__ = [
    "COLUMNS",
    "FINISH_REASONS",
    "FORCINGS",
    "MINUS_INFINITY",
    "NO_SEED",
    "BoolArray",
    "FloatArray",
    "Forcing",
    "ReplayPath",
    "Segment",
    "Trace",
    "TracePath",
    "offsets_of",
]
