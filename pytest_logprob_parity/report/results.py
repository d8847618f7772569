"""results.json: what a run found, in one versioned file from which everything else is rendered. Only the standard library.

The file is ASCII, and every number in it is finite or null. `CHECK` is the schema of a check. Whoever reads it is safe from
what others made of it: the file has a largest size, and so has every list in it by which something is drawn or made room for.
"""

from __future__ import annotations

import itertools
import json
import math
import posixpath
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from .._version import __version__
from ..bounded import parse_json, read_text
from ..comparison.findings import one_of
from ..errors import Kind, UsageError
from ..json_shape import COUNT, NUMBER, WHOLE, Maybe, Optional, UpTo, check_shape
from ..visible_text import visible_token

FORMAT: Final = "logprob-parity results"
#: Raised where a reader of the last one would go wrong.
SCHEMA: Final = 2
NAME: Final = "results.json"
#: Bytes that are read, and written: 700 checks that fail with every plot, 30,000 that pass. Parsing takes ten times the memory.
LARGEST: Final = 64 * 2**20

#: How a check ended.
Outcome: TypeAlias = Kind | Literal["unverified", "warned", "expected", "recorded", "passed"]
#: A check that was not met in a test that expects it: under xfail, in pytest.raises.
EXPECTED: Final = "expected"
#: A check that is unverified where `parity_unverified = warn` lets it pass.
WARNED: Final = "warned"
#: From what needs somebody's attention to what does not.
OUTCOMES: Final[tuple[Outcome, ...]] = (
    "failed", "engine", "golden", "incomparable", "usage", "unverified", WARNED, EXPECTED, "recorded", "passed",
)  # fmt: skip
#: Those that fail nobody's run.
GOOD: Final[tuple[Outcome, ...]] = (WARNED, EXPECTED, "recorded", "passed")
#: What an outcome is called, for people.
IN_WORDS: Final[Mapping[Outcome, str]] = {
    "failed": "fail", "engine": "engine error", "golden": "no golden", "incomparable": "incomparable",
    "usage": "misused", "unverified": "unverified", WARNED: "unverified, only warned of",
    EXPECTED: "expected to fail", "recorded": "recorded", "passed": "pass",
}  # fmt: skip

#: Edges of a histogram, and of a side of the scatter, whose picture has as many cells as their square.
_EDGES: Final = UpTo((int, float), 512)
_SIDE: Final = UpTo((int, float), 257)
_HISTOGRAM: Final = {"edges": _EDGES, "counts": UpTo(NUMBER, 511)}
_PLACES: Final = UpTo(NUMBER, 1024)
#: Logprobs in nats, d = now - golden; `edges` are one more than `counts`, and rise.
PLOTS: Final = {
    "subtracted": bool,
    "scatter": Maybe({"edges": _SIDE, "cells": UpTo(UpTo(COUNT, 3), 256**2), "points": UpTo(UpTo((int, float), 2), 1000)}),
    "by_position": Maybe({"positions": UpTo(COUNT, 1024), "median": _PLACES, "p95": _PLACES, "max": _PLACES, "floor": NUMBER}),
    "histogram": Maybe({**_HISTOGRAM, "floor": Maybe(UpTo(NUMBER, 511))}),
    "ratio": Maybe({**_HISTOGRAM, "clip": (int, float), "outside": NUMBER}),
    "divergence": Maybe({**_HISTOGRAM, "turns": COUNT, "diverged": COUNT}),
}
_TOKENS: Final = 4096
_TOP: Final = UpTo(UpTo(NUMBER, 128), _TOKENS)
#: One sequence token by token, from its token `start` on: columns of one length, top-k as [id, logprob, id, logprob, ...].
SEQUENCE: Final = {
    "sequence": COUNT, "group": WHOLE, "sample": WHOLE, "start": COUNT, "length": COUNT, "rms": NUMBER, "max": NUMBER,
    "prompt": UpTo(WHOLE, _TOKENS), "ids": UpTo(WHOLE, _TOKENS), "golden": UpTo(NUMBER, _TOKENS), "now": UpTo(NUMBER, _TOKENS),
    "diff": UpTo(NUMBER, _TOKENS), "golden_ranks": UpTo(WHOLE, _TOKENS), "now_ranks": UpTo(WHOLE, _TOKENS),
    "golden_top": _TOP, "now_top": _TOP, "states": {str: str},
}  # fmt: skip
#: Characters of token texts in a page, which shows each token of a sequence by its text; a check has about a thousand.
_MOST_TEXT: Final = 2**24
_COLUMNS: Final = ("ids", "golden", "now", "diff", "golden_ranks", "now_ranks", "golden_top", "now_top")
#: One number that decides; `errors` is the same of the distances to the reference, where there is one.
GATE: Final = {
    "key": str, "name": str, "value": NUMBER, "limit": NUMBER, "fail_limit": NUMBER, "unit": str, "outcome": str, "ok": bool,
    "low": NUMBER, "bound": NUMBER, "threshold": NUMBER,
    "errors": Maybe({"golden": NUMBER, "actual": NUMBER, "limit": NUMBER, str: NUMBER}),
}  # fmt: skip
#: The numbers that drift over runs (nats; `share_outside_clip` from 0 to 1).
DRIFTING: Final = ("mean_diff", "rms_diff", "max_abs_diff", "k3", "share_outside_clip")
_RUNS: Final = 1000
#: The newest runs of a check, oldest first, and the bands that the last one is held against, by metric: a warning, no verdict.
HISTORY: Final = {
    "created": UpTo(str, _RUNS), "engine": UpTo(str, _RUNS), "digest": UpTo(str, _RUNS), "values": {str: UpTo(NUMBER, _RUNS)},
    "bands": {str: {"runs": COUNT, "median": (int, float), "low": (int, float), "high": (int, float)}}, "outside": [str],
}  # fmt: skip
CHECK: Final = {
    "node_id": str,
    "name": str,
    "file": str,  # below the root of the run, with `line` from 1; "" and 0 where there is no test
    "line": COUNT,
    "outcome": str,
    "headline": str,
    "message": str,  # the whole failure; "" for a pass
    "golden": {"path": str, "digest": str, "about": [str]},
    "now": str,
    "verdict": Maybe(str),  # from here to `logged`: as `logprob-parity diff --json` prints them; null where nothing was judged
    "level": Maybe(str),
    "objective": Maybe(str),
    "shown": Maybe({str: NUMBER}),
    "setup": Maybe(str),
    "difference": Maybe({"different": (bool, type(None)), "text": str, "p_value": NUMBER, "decided": bool}),
    "findings": [{"layer": str, "cause": Maybe(str), "candidates": [str], "evidence": str, "values": {str: object}}],
    "metrics": {str: NUMBER},
    "policy_metrics": {str: NUMBER},
    "gates": [GATE],
    "shows": [str],
    "notes": [{"key": str, "text": str}],
    "free_run": Maybe({**dict.fromkeys(("turns", "diverged", "stops_changed", "relabelled"), Optional(COUNT)), "first": [str]}),
    "logged": Maybe({"framework": str, "metrics": {str: NUMBER}, "lines": [str]}),
    "fingerprint_differences": [{"name": str, "expected": object, "actual": object}],
    "obtained": str,  # the trace's path below the root, "" where none was kept
    "refusal": str,  # why it cannot be accepted, "" where it can
    # `from` is the folder they are called from, below the root, and `for_all` the same for all checks of the run.
    "commands": [{"what": str, "command": str, "from": Optional(str), "for_all": Optional(str)}],
    "plots": Maybe(PLOTS),
    "sequences": [SEQUENCE],
    "token_texts": {str: str},
    "outlier": NUMBER,  # the |d| (nats) that the tokens' colours are scaled to
    "made_by": Optional({str: str}),  # engine, dtype, torch and hardware of the numbers now
    "history": Optional(HISTORY),  # of runs with `parity_history`
}
RESULTS: Final = {
    "format": str,
    "schema": int,
    "version": str,
    "created": str,
    "project": str,
    "prefix": str,  # the run's root below the repository's, "" where they are one; else with a slash at the end
    "checks": [CHECK],
    "unused": [str],
}


def make_results(
    checks: Sequence[Mapping[str, Any]], *, created: str, project: str, prefix: str = "", unused: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of results.json, worst check first, every number in it finite or None."""
    about = {"format": FORMAT, "schema": SCHEMA, "version": __version__, "created": created, "project": project}
    content = {**about, "prefix": prefix, "checks": worst_first(checks), "unused": sorted(unused)}
    return dict(finite(content))


def fitting(content: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The content with as many checks without plots and tokens, the best ones, as make its file small enough to be read again.

    Gives their number too. Raises UsageError where the file would be too large even so.
    """
    checks = list(content["checks"])
    sizes = [len(to_text(check)) + 1 for check in checks]
    spare = LARGEST - len(to_text({**content, "checks": []})) - sum(sizes)
    bare = 0
    for index in reversed(range(len(checks))):
        if spare >= 0:
            break
        checks[index] = {**checks[index], "plots": None, "sequences": [], "token_texts": {}}
        spare += sizes[index] - len(to_text(checks[index])) - 1
        bare += 1
    if spare < 0:
        raise UsageError(
            f"{NAME} of {len(checks)} checks would be larger than {LARGEST / 2**20:g} MiB: report fewer tests at once"
        )
    return {**content, "checks": checks}, bare


def worst_first(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By outcome, then by how far the worst number is beyond its limit, then by name."""

    def key(check: Mapping[str, Any]) -> tuple[int, float, str, str]:
        order = OUTCOMES.index(check["outcome"]) if check["outcome"] in OUTCOMES else 0
        return order, -excess(check), check["node_id"], check["name"]

    return sorted(checks, key=key)


def excess(check: Mapping[str, Any]) -> float:
    """How many times its limit the worst number is; inf where the limit is 0, or where nothing could be subtracted."""
    worst = 0.0 if check["gates"] or not check["findings"] else math.inf
    for gate in check["gates"]:
        value, limit = gate["value"], gate["limit"]
        if gate["errors"] is not None:
            value, limit = gate["errors"].get("actual"), gate["errors"].get("limit")
        if value is None:
            worst = math.inf
        elif limit is not None and value:
            worst = max(worst, value / limit if limit else math.inf)
    return worst


def finite(value: Any) -> Any:
    """A JSON value with None in place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_text(content: Any) -> str:
    """JSON as we write it: ASCII, so that lone surrogates survive, and without NaN. Raises ValueError for one."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises UsageError, in one line, for what is none, is no regular file or is larger than `LARGEST`."""
    try:
        content = parse_json(read_text(path, LARGEST))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; pytest --parity-report=DIR writes it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(
            f"{path}: cut short, or no results.json ({error}); write it again: pytest --parity-report=DIR"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path}: no results.json of pytest-logprob-parity; give one that pytest --parity-report=DIR wrote")
    if content.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: schema {content.get('schema')!r:.20}, this version of pytest-logprob-parity reads {SCHEMA}: render it "
            f"with the version that wrote it ({content.get('version')!r:.20})"
        )
    try:
        check_shape(content, RESULTS, "it")
        for index, check in enumerate(content["checks"]):
            if check["outcome"] not in OUTCOMES:
                raise UsageError(f"it.checks[{index}].outcome is not one of {', '.join(OUTCOMES)} but {check['outcome']!r:.40}")
            for sequence in check["sequences"]:
                _check_columns(sequence, check["node_id"])
            _check_plots(check["plots"] or {}, check["node_id"])
            _check_history(check.get("history"), check["node_id"])
        _check_texts(content["checks"])
    except UsageError as error:
        raise UsageError(f"{path}: not as pytest-logprob-parity writes it: {error}; write it again") from None
    return content


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


def merge(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> dict[str, Any]:
    """One content of several: CI's shards, or engines side by side.

    Raises UsageError for results of different projects, and for one golden in two states: two revisions.
    """
    (first_path, first), *_ = results
    if len({content["prefix"] for _, content in results}) > 1:
        results = [(path, from_the_top(content)) for path, content in results]
    digests: dict[str, tuple[str, Path]] = {}
    for path, content in results:
        if content["project"] != first["project"]:
            raise UsageError(
                f"{path} is of project {content['project']!r}, {first_path} of {first['project']!r}: render them apart"
            )
        for check in content["checks"]:
            golden = check["golden"]
            known, where = digests.setdefault(golden["path"], (golden["digest"], path))
            if golden["digest"] and known and golden["digest"] != known:
                raise UsageError(
                    f"{visible_token(golden['path'])} is one golden in {where} and another in {path}: two revisions; render "
                    "them apart"
                )
    every = [check for _, content in results for check in content["checks"]]
    checks = list({to_text(check): check for check in every}.values())  # one file that was brought along twice
    unused = {name for _, content in results for name in content["unused"]}
    newest = max(content["created"] for _, content in results)
    prefix = results[0][1]["prefix"]
    return make_results(checks, created=newest, project=first["project"], prefix=prefix, unused=sorted(unused))


def from_the_top(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same results with paths, node ids and commands from the top of the repository: roots below it can be told apart."""
    prefix = content["prefix"]
    checks = [
        {
            **check,
            **{name: _below(prefix, check[name]) for name in ("node_id", "file", "obtained")},
            "golden": {**check["golden"], "path": _below(prefix, check["golden"]["path"])},
            "commands": [_called_below(prefix, command) for command in check["commands"]],
        }
        for check in content["checks"]
    ]
    return {**content, "prefix": "", "checks": checks, "unused": [_below(prefix, path) for path in content["unused"]]}


def _called_below(prefix: str, command: Mapping[str, Any]) -> dict[str, Any]:
    """A command, `from` whose folder below the root it is to be called, as one to call from the top."""
    folder = posixpath.normpath(prefix + str(command.get("from", ".")))
    if not prefix or folder == ".":
        return dict(command)
    called = {name: f"(cd {shlex.quote(folder)} && {command[name]})" for name in ("command", "for_all") if name in command}
    return {**command, "from": ".", **called}


def _below(prefix: str, path: str) -> str:
    """A path, or a node id, of a run whose root is at `prefix`; "" and absolute ones stay."""
    file, colons, rest = path.partition("::")
    return posixpath.normpath(prefix + file) + colons + rest if file and not file.startswith("/") else path


def cause_of(check: Mapping[str, Any]) -> str:
    """The cause in a few words: the first that is named, else all candidates as such (`one of adapter, ...`); or ""."""
    named = [f"{finding['layer']}: {finding['cause']}" for finding in check["findings"] if finding["cause"]]
    candidates = dict.fromkeys(name for finding in check["findings"] for name in finding["candidates"])
    return named[0] if named else one_of(candidates) if candidates else ""


def title_of(check: Mapping[str, Any]) -> str:
    """Which check it is: its test and its name, or its golden where there is no test."""
    name = f" [{check['name']}]" if check["name"] else ""
    return str(check["node_id"] or check["golden"]["path"]) + name


def counts_of(content: Mapping[str, Any]) -> dict[Outcome, int]:
    """How many checks there are of each outcome, worst first; only those that occur."""
    outcomes = [check["outcome"] for check in content["checks"]]
    return {name: outcomes.count(name) for name in OUTCOMES if name in outcomes}
