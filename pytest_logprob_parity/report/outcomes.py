"""How a check ended, in which order outcomes are listed, and what each is called. Only the standard library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from ..errors import Kind

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


def counts_of(content: Mapping[str, Any]) -> dict[Outcome, int]:
    """How many checks there are of each outcome, worst first; only those that occur."""
    outcomes = [check["outcome"] for check in content["checks"]]
    return {name: outcomes.count(name) for name in OUTCOMES if name in outcomes}


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
