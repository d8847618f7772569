"""One run as its history keeps it: a line of JSON with a few numbers of each check. Made by a run, or of a results.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from ..._version import __version__
from ...json_shape import NUMBER_OR_NULL, OrNull
from ..finite_json import finite
from ..results_schema import DRIFTING

if TYPE_CHECKING:
    from ...check.context import Checked
    from ...comparison.result import Comparison

FORMAT: Final = "logprob-parity history"
#: Raised where a reader of the last one would go wrong.
SCHEMA: Final = 1
#: The numbers that drift, and how many tokens they are of.
METRICS: Final = (*DRIFTING, "n_tokens")
#: Who computed: "vllm 0.32.0", "bfloat16", "2.13.0", the device; "" where nobody knows.
MADE_BY: Final = ("engine", "dtype", "torch", "hardware")
_TEXTS: Final = ("node_id", "name", "golden", "digest", "outcome", *MADE_BY)
#: A check of a run; the last three are null where nothing was judged.
CHECK_RECORD: Final = {
    **dict.fromkeys(_TEXTS, str),
    **dict.fromkeys(("verdict", "level", "objective"), OrNull(str)),
    "metrics": {str: NUMBER_OR_NULL},
}
RUN_RECORD: Final = {"format": str, "schema": int, "created": str, "version": str, "project": str, "checks": [CHECK_RECORD]}


def made_by(comparison: Comparison | None, checked: Checked | None) -> dict[str, str]:
    """Who computed the numbers of a check."""
    prints: Mapping[str, Any] = {} if checked is None else checked.fingerprint
    told = dict.fromkeys(MADE_BY, "")
    if comparison is not None:
        trace = comparison.actual
        told |= {"engine": f"{trace.engine} {trace.engine_version}".strip(), "dtype": trace.dtype}
    told["torch"] = str(prints.get("libraries", {}).get("torch", ""))
    told["hardware"] = str(prints.get("hardware", {}).get("device", ""))
    return told


def check_record(
    about: Mapping[str, str], outcome: str, judged: Mapping[str, Any], metrics: Mapping[str, Any], by: Mapping[str, str]
) -> dict[str, Any]:
    """A check as a line has it; `about` has its node_id, name, golden (a path) and digest, `judged` may have a verdict.

    A recording has compared nothing.
    """
    if outcome == "recorded":
        judged, metrics = {}, {}
    return {
        **{name: about[name] for name in ("node_id", "name", "golden")},
        "digest": about["digest"][:16],
        "outcome": outcome,
        **{name: judged.get(name) for name in ("verdict", "level", "objective")},
        **{name: by.get(name, "") for name in MADE_BY},
        "metrics": finite({name: metrics[name] for name in METRICS if metrics.get(name) is not None}),
    }


def check_record_of_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A check of a results.json as a line has it."""
    about = {"node_id": entry["node_id"], "name": entry["name"], **{n: entry["golden"][n] for n in ("path", "digest")}}
    about["golden"] = about.pop("path")
    return check_record(about, entry["outcome"], entry, entry["metrics"], entry.get("made_by", {}))


def run_record(records: Iterable[Mapping[str, Any]], created: str, project: str, version: str = __version__) -> dict[str, Any]:
    """A run; `format` comes first, so that the file's first bytes say what it is."""
    about = {"format": FORMAT, "schema": SCHEMA, "created": created, "version": version, "project": project}
    return {**about, "checks": list(records)}


def run_record_of_results(content: Mapping[str, Any]) -> dict[str, Any]:
    """A run, from its results.json."""
    records = [check_record_of_entry(entry) for entry in content["checks"]]
    return run_record(records, content["created"], content["project"], content["version"])
