"""Faults of the report: the engine computes as it should, and some columns of its answer are wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .fault import Fault

if TYPE_CHECKING:
    from ..check.ask import Answers
    from ..trace import Trace
    from .engine_under_test import EngineUnderTest


def report_faults() -> list[Fault]:
    """The faults of the report."""
    return [
        _fault("logprobs one token late", "all", _shifted),
        _fault("logprobs of the neighbouring row", "all", lambda trace: {"logprobs": _of_neighbour(trace)}),
        _fault("logprobs of the neighbouring row", "one pair of rows", lambda trace: {"logprobs": _of_neighbour(trace, 2)}),
        _fault("top-k and ranks one token late", "all", _top_k_shifted),
        _fault("logprobs in base 2", "all", lambda trace: {"logprobs": trace.logprobs / np.float32(np.log(2))}),
        _fault("logprobs rounded to bfloat16", "all", lambda trace: {"logprobs": _in_bfloat16(trace.logprobs)}),
        _fault("NaN for some tokens", "1 in 100", _some_nan),
    ]


def _fault(name: str, size: str, columns: Callable[[Trace], Mapping[str, Any]]) -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        yield under_test.with_column(**columns(under_test.clean))

    return Fault(name=name, size=size, kind="report", plant=plant)


def _one_back(trace: Trace, column: Any) -> Any:
    """A column [N, ...] with each token's value one token later; the first of each completion keeps its own."""
    first = trace.sequence_offsets[:-1]
    moved = np.roll(column, 1, axis=0)
    moved[first] = column[first]
    return moved


def _shifted(trace: Trace) -> Mapping[str, Any]:
    return {"logprobs": _one_back(trace, trace.logprobs)}


def _top_k_shifted(trace: Trace) -> Mapping[str, Any]:
    return {name: _one_back(trace, getattr(trace, name)) for name in ("ranks", "top_token_ids", "top_logprobs")}


def _of_neighbour(trace: Trace, rows: int | None = None) -> Any:
    """Logprobs [N] where sequences change places in pairs, as far as both go; of the first `rows` sequences alone if given."""
    swapped = trace.logprobs.copy()
    for i in range(0, (trace.num_sequences if rows is None else min(rows, trace.num_sequences)) - 1, 2):
        (a, b), (c, d) = trace.bounds(i), trace.bounds(i + 1)
        n = min(b - a, d - c)
        swapped[a : a + n], swapped[c : c + n] = trace.logprobs[c : c + n], trace.logprobs[a : a + n]
    return swapped


def _in_bfloat16(logprobs: Any) -> Any:
    """Float32 numbers rounded to the nearest bfloat16, ties to even; infinities stay."""
    bits = np.asarray(logprobs, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(logprobs), rounded, logprobs).astype(np.float32)


def _some_nan(trace: Trace) -> Mapping[str, Any]:
    logprobs = trace.logprobs.copy()
    logprobs[::100] = np.nan
    return {"logprobs": logprobs}
