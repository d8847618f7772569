"""The schema of results.json. Every number in the file is finite or null.

Lists by whose length something is drawn, or memory is taken, have a largest length.
"""

from __future__ import annotations

from typing import Final

from ..json_shape import COUNT, NUMBER, WHOLE, Maybe, Optional, UpTo

FORMAT: Final = "logprob-parity results"
#: Raised where a reader of the last one would go wrong.
SCHEMA: Final = 2

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
