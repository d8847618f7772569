"""What the schema of results.json cannot say: columns of one length, edges that rise, names that go together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..errors import UsageError
from .results_schema import DRIFTING

#: Characters of token texts in a page, which shows each token of a sequence by its text; a check has about a thousand.
_MOST_TEXT: Final = 2**24
_COLUMNS: Final = ("ids", "golden", "now", "diff", "golden_ranks", "now_ranks", "golden_top", "now_top")


def check_consistency(content: Mapping[str, Any]) -> None:
    """Raise UsageError unless the parts of a results.json, which has the schema's shape, go together."""
    for check in content["checks"]:
        for sequence in check["sequences"]:
            _check_columns(sequence, check["node_id"])
        _check_plots(check["plots"] or {}, check["node_id"])
        _check_history(check.get("history"), check["node_id"])
    _check_texts(content["checks"])


def _check_columns(sequence: Mapping[str, Any], test: str) -> None:
    """Raise UsageError unless the columns of a sequence have one length."""
    lengths = {name: len(sequence[name]) for name in _COLUMNS}
    if len(set(lengths.values())) > 1:
        raise UsageError(f"sequence {sequence['sequence']} of {test!r:.80} has columns of lengths {lengths}")


def _check_plots(plots: Mapping[str, Any], test: str) -> None:
    """Raise UsageError unless what belongs together in a plot has as many items, and edges rise."""
    for name, plot in plots.items():
        if not isinstance(plot, Mapping):
            continue
        edges = plot.get("edges")
        if edges is not None and (len(edges) < 2 or any(low >= high for low, high in itertools.pairwise(edges))):
            raise UsageError(f"plot {name!r} of {test!r:.80} has edges that do not rise")
        columns = [plot.get(column) for column in ("counts", "floor", "positions", "median", "p95", "max")]
        lengths = {len(column) for column in columns if isinstance(column, list)}
        if len(lengths) > 1 or (name != "scatter" and edges is not None and lengths != {len(edges) - 1}):
            raise UsageError(f"plot {name!r} of {test!r:.80} has columns of different lengths")
        if name == "scatter" and any(len(cell) != 3 for cell in plot["cells"]):
            raise UsageError(f"plot {name!r} of {test!r:.80} has cells that are not [x, y, count]")
        if name == "scatter" and any(len(point) != 2 for point in plot["points"]):
            raise UsageError(f"plot {name!r} of {test!r:.80} has points that are not [x, y]")


def _check_history(history: Mapping[str, Any] | None, test: str) -> None:
    """Raise UsageError unless the columns of a history have one length, and its bands are of them."""
    if history is None:
        return
    columns = [history["created"], history["engine"], history["digest"], *history["values"].values()]
    if len({len(column) for column in columns}) > 1 or not history["created"]:
        raise UsageError(f"history of {test!r:.80} has no runs, or columns of different lengths")
    names = {*history["values"]}
    unknown = (names - {*DRIFTING}) | ({*history["bands"]} - names) | ({*history["outside"]} - {*history["bands"]})
    if unknown:
        raise UsageError(f"history of {test!r:.80} has {min(unknown)!r:.40}, which is no number that drifts or has no values")


def _check_texts(checks: Sequence[Mapping[str, Any]]) -> None:
    """Raise UsageError where the page would repeat long token texts until it is many times as large as the file."""
    shown = 0
    for check in checks:
        lengths = {token: len(text) for token, text in check["token_texts"].items()}
        tokens = (str(token) for s in check["sequences"] for column in ("prompt", "ids") for token in s[column])
        shown += sum(lengths.get(token, 0) for token in tokens)
    if shown > _MOST_TEXT:
        raise UsageError(f"its tokens have texts of {shown:,} characters together (limit: {_MOST_TEXT:,})")
