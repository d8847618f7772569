"""A matrix's rows as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparison.findings import one_of
from .run import Row


def page(rows: Sequence[Row], reference: str) -> list[str]:
    """A Markdown table: one line for each cell and dtype, one column for each sampling."""
    samplings = list(dict.fromkeys(row.sampling for row in rows))
    lines = [f"Compared with the reference, {reference}.", "", "| engine | dtype | " + " | ".join(samplings) + " |"]
    lines.append("|---" * (2 + len(samplings)) + "|")
    keys = list(dict.fromkeys((row.cell, row.dtype) for row in rows))
    for cell, dtype in keys:
        texts = [
            _short(row) for name in samplings for row in rows if (row.cell, row.dtype, row.sampling) == (cell, dtype, name)
        ]
        lines.append(f"| {cell} | {dtype} | " + " | ".join(texts) + " |")
    reasons = [*_not_run(rows), *(_reason(row) for row in rows if _is_bare(row))]
    return [*lines, *(["", *reasons] if reasons else [])]


def _is_bare(row: Row) -> bool:
    """Whether only the headline says why a row does not pass."""
    return row.verdict in ("unverified", "fail") and not row.findings


def _not_run(rows: Sequence[Row]) -> list[str]:
    """A line for each cell and reason. Dtypes that did not run for the same reason share a line."""
    dtypes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.verdict == "not run":
            named = dtypes.setdefault((row.cell, row.headline), [])
            named += [row.dtype] if row.dtype not in named else []
    return [f"- {cell} ({', '.join(named)}) did not run: {why}" for (cell, why), named in dtypes.items()]


def _reason(row: Row) -> str:
    return f"- {row.cell} ({row.dtype}), {row.sampling}, {row.verdict}: {row.headline}"


def _short(row: Row) -> str:
    if row.verdict == "not run":
        return "not run"
    if _is_bare(row):
        return f"**{row.verdict}**"
    if row.verdict == "pass":
        rms = (row.metrics or {}).get("rms_diff", 0.0)
        return f"pass (RMS {rms:.1g})"
    cause = row.findings[0].cause or one_of(row.findings[0].candidates)
    more: list[str] = [f.cause for f in row.findings[1:] if f.cause]
    if not row.findings[0].cause and not more:  # where nothing singles a cause out, the layers stand side by side
        more = [f"{f.layer}: {one_of(f.candidates)}" for f in row.findings[1:] if f.candidates]
    return f"**{row.verdict}** {row.findings[0].layer}: {cause}" + (f" ({', '.join(more)})" if more else "")
