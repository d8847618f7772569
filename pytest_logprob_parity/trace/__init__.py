"""Traces: what an engine reports about tokens, as columns with their meaning; and the file format that holds them."""

from .columns import (
    COLUMNS,
    FINISH_REASONS,
    MINUS_INFINITY,
    NO_SEED,
    BoolArray,
    FinishReason,
    FloatArray,
    IntArray,
    LongArray,
    empty_top_k,
    finish_code,
    offsets_of,
    rows_of,
    top_k_columns,
)
from .labels import FORCINGS, Forcing, LogprobsMode, ReplayPath, TracePath
from .routing import completion_rows
from .segments import Segment
from .trace import Trace

__all__ = [
    "COLUMNS",
    "FINISH_REASONS",
    "FORCINGS",
    "MINUS_INFINITY",
    "NO_SEED",
    "BoolArray",
    "FinishReason",
    "FloatArray",
    "Forcing",
    "IntArray",
    "LogprobsMode",
    "LongArray",
    "ReplayPath",
    "Segment",
    "Trace",
    "TracePath",
    "completion_rows",
    "empty_top_k",
    "finish_code",
    "offsets_of",
    "rows_of",
    "top_k_columns",
]
