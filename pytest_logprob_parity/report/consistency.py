"""What the schema of results.json cannot say: columns of one length, edges that rise, names that go together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

#: Characters of token texts in a page, which shows each token of a sequence by its text; a check has about a thousand.
_MOST_TEXT: Final = 2**24
_COLUMNS: Final = ("ids", "golden", "now", "diff", "golden_ranks", "now_ranks", "golden_top", "now_top")


def inconsistencies(content: Mapping[str, Any]) -> Iterator[str]:
    """What does not go together in a results.json of the schema's shape: the key, and what is wrong with it."""
    for index, check in enumerate(content["checks"]):
        key = f"checks[{index}]"
        for number, sequence in enumerate(check["sequences"]):
            lengths = {name: len(sequence[name]) for name in _COLUMNS}
            if len(set(lengths.values())) > 1:
                yield f"{key}.sequences[{number}] has columns of lengths {lengths}, expected one length"
        for name, plot in (check["plots"] or {}).items():
            if isinstance(plot, Mapping):
                yield from _of_plot(f"{key}.plots.{name}", plot)
        if "history" in check:
            yield from _of_history(f"{key}.history", check["history"])
    yield from _of_texts(content["checks"])


def _of_plot(key: str, plot: Mapping[str, Any]) -> Iterator[str]:
    edges = plot.get("edges")
    if edges is not None and (len(edges) < 2 or any(low >= high for low, high in itertools.pairwise(edges))):
        yield f"{key}.edges do not rise, expected 2 or more edges that do"
        return
    names = ("counts", "floor", "positions", "median", "p95", "max")
    lengths = {name: len(plot[name]) for name in names if isinstance(plot.get(name), list)}
    expected = {len(edges) - 1} if edges is not None and "counts" in plot else set(lengths.values())
    if not set(lengths.values()) <= expected or len(expected) > 1:
        yield f"{key} has columns of different lengths: {lengths}, expected one length" + (
            f", {len(edges) - 1} for {len(edges)} edges" if edges is not None else ""
        )


def _of_history(key: str, history: Mapping[str, Any]) -> Iterator[str]:
    columns = [history["created"], history["engine"], history["digest"], *history["values"].values()]
    if len({len(column) for column in columns}) > 1:
        yield f"{key} has columns of different lengths, expected one length"
    for part, of in (("bands", "values"), ("outside", "bands")):
        for name in history[part]:
            if name not in history[of]:
                yield f"{key}.{part} has {name!r:.40}, expected only what is in {of}"


def _of_texts(checks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The page repeats the text of each token: it would be many times as large as the file."""
    shown = 0
    for check in checks:
        lengths = {token: len(text) for token, text in check["token_texts"].items()}
        tokens = (str(token) for s in check["sequences"] for column in ("prompt", "ids") for token in s[column])
        shown += sum(lengths.get(token, 0) for token in tokens)
    if shown > _MOST_TEXT:
        yield f"the tokens have texts of {shown:,} characters together, expected at most {_MOST_TEXT:,}"
