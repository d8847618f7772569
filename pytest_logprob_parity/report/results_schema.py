"""The schema of results.json. Every number in the file is finite or null.

Lists by whose length something is drawn, or memory is taken, have a largest length.
"""

from __future__ import annotations

from typing import Final

from ..json_shape import COUNT, NUMBER_OR_NULL, WHOLE, Closed, Items, OneOf, OptionalKey, OrNull
from .outcomes import OUTCOMES

FORMAT: Final = "logprob-parity results"
#: Raised where a reader of the last one would go wrong.
SCHEMA: Final = 2

#: Edges of a histogram, and of a side of the scatter, which has as many cells as the square of their number.
_EDGES: Final = Items((int, float), 512)
_SIDE: Final = Items((int, float), 257)
_HISTOGRAM: Final = {"edges": _EDGES, "counts": Items(NUMBER_OR_NULL, 511)}
_CELL: Final = Items(COUNT, 3, least=3)
_POINT: Final = Items((int, float), 2, least=2)
_PLACES: Final = Items(NUMBER_OR_NULL, 1024)
#: Logprobs in nats, d = now - golden; `edges` are one more than `counts`, and rise.
PLOTS: Final = {
    "subtracted": bool,
    "scatter": OrNull({"edges": _SIDE, "cells": Items(_CELL, 256**2), "points": Items(_POINT, 1000)}),
    "by_position": OrNull({
        "positions": Items(COUNT, 1024, least=1), "median": _PLACES, "p95": _PLACES, "max": _PLACES, "floor": NUMBER_OR_NULL,
    }),
    "histogram": OrNull({**_HISTOGRAM, "floor": OrNull(Items(NUMBER_OR_NULL, 511))}),
    "ratio": OrNull({**_HISTOGRAM, "clip": (int, float), "outside": NUMBER_OR_NULL}),
    "divergence": OrNull({**_HISTOGRAM, "turns": COUNT, "diverged": COUNT}),
}  # fmt: skip
_TOKENS: Final = 4096
_IDS: Final = Items(WHOLE, _TOKENS)
_NATS: Final = Items(NUMBER_OR_NULL, _TOKENS)
_TOP: Final = Items(Items(NUMBER_OR_NULL, 128), _TOKENS)
#: One sequence token by token, from its token `start` on: columns of one length, top-k as [id, logprob, id, logprob, ...].
SEQUENCE: Final = {
    "sequence": COUNT, "group": WHOLE, "sample": WHOLE, "start": COUNT, "length": COUNT, "rms": NUMBER_OR_NULL,
    "max": NUMBER_OR_NULL, "prompt": _IDS, "ids": _IDS, "golden": _NATS, "now": _NATS, "diff": _NATS, "golden_ranks": _IDS,
    "now_ranks": _IDS, "golden_top": _TOP, "now_top": _TOP, "states": {str: str},
}  # fmt: skip
#: One number that decides; `errors` is the same of the distances to the reference, where there is one.
GATE: Final = {
    **dict.fromkeys(("key", "name", "unit", "outcome"), str), "ok": bool,
    **dict.fromkeys(("value", "limit", "fail_limit", "low", "bound", "threshold"), NUMBER_OR_NULL),
    "errors": OrNull({**dict.fromkeys(("golden", "actual", "limit"), NUMBER_OR_NULL), str: NUMBER_OR_NULL}),
}  # fmt: skip
#: The numbers that drift over runs (nats; `share_outside_clip` from 0 to 1).
DRIFTING: Final = ("mean_diff", "rms_diff", "max_abs_diff", "k3", "share_outside_clip")
_RUNS: Final = 1000
_RUN_TEXTS: Final = Items(str, _RUNS, least=1)
_BAND: Final = {"runs": COUNT, "median": (int, float), "low": (int, float), "high": (int, float)}
#: The newest runs of a check, oldest first, and the bands that the last one is held against, by metric: a warning, no verdict.
HISTORY: Final = {
    "created": _RUN_TEXTS, "engine": _RUN_TEXTS, "digest": _RUN_TEXTS,
    "values": Closed(dict.fromkeys(DRIFTING, OptionalKey(Items(NUMBER_OR_NULL, _RUNS)))),
    "bands": {str: _BAND}, "outside": [OneOf(DRIFTING)],
}  # fmt: skip
CHECK: Final = {
    "node_id": str,
    "name": str,
    "file": str,  # below the root of the run, with `line` from 1; "" and 0 where there is no test
    "line": COUNT,
    "outcome": OneOf(OUTCOMES),
    "headline": str,
    "message": str,  # the whole failure; "" for a pass
    "golden": {"path": str, "digest": str, "about": [str]},
    "now": str,
    "verdict": OrNull(str),  # from here to `logged`: as `logprob-parity diff --json` prints them; null where nothing was judged
    "level": OrNull(str),
    "objective": OrNull(str),
    "shown": OrNull({str: NUMBER_OR_NULL}),
    "setup": OrNull(str),
    "difference": OrNull({"different": (bool, type(None)), "text": str, "p_value": NUMBER_OR_NULL, "decided": bool}),
    "findings": [{"layer": str, "cause": OrNull(str), "candidates": [str], "evidence": str, "values": {str: object}}],
    "metrics": {str: NUMBER_OR_NULL},
    "policy_metrics": {str: NUMBER_OR_NULL},
    "gates": [GATE],
    "shows": [str],
    "notes": [{"key": str, "text": str}],
    "free_run": OrNull(
        {**dict.fromkeys(("turns", "diverged", "stops_changed", "relabelled"), OptionalKey(COUNT)), "first": [str]}
    ),
    "logged": OrNull({"framework": str, "metrics": {str: NUMBER_OR_NULL}, "lines": [str]}),
    "fingerprint_differences": [{"name": str, "expected": object, "actual": object}],
    "obtained": str,  # the trace's path below the root, "" where none was kept
    "refusal": str,  # why it cannot be accepted, "" where it can
    # `from` is the folder they are called from, below the root, and `for_all` the same for all checks of the run.
    "commands": [{"what": str, "command": str, "from": OptionalKey(str), "for_all": OptionalKey(str)}],
    "plots": OrNull(PLOTS),
    "sequences": [SEQUENCE],
    "token_texts": {str: str},
    "outlier": NUMBER_OR_NULL,  # the |d| (nats) that the tokens' colours are scaled to
    "made_by": OptionalKey({str: str}),  # engine, dtype, torch and hardware of the numbers now
    "history": OptionalKey(HISTORY),  # of runs with `parity_history`
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
