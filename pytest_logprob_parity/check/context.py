"""What goes into a check from its caller, and what the caller may keep of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..comparison.result import Comparison
    from ..comparison.tolerance import Tolerance
    from ..golden import Golden


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Caller-supplied context of one check: where it belongs, what to show people, and standing settings.

    `orphans` gives goldens that no test asks for: a missing one may be among them. `beside` gives the command that records a
    variant of this name.
    """

    node_id: str = ""
    name: str = ""
    shown_path: str = ""
    accept: str = "check_golden(..., update=True)"
    tolerance_lines: tuple[str, ...] = ()
    max_megabytes: float | None = None
    metrics: str = ""
    objective: str = "token"
    reference: str = "auto"
    observe: Callable[[Checked], None] | None = None
    orphans: Callable[[], Sequence[Path]] = tuple
    beside: Callable[[str], str] | None = None
    golden_dir: str = "golden"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a check saw: for whoever runs it to keep, or to report.

    `differences` are those of the two fingerprints (dotted name, the golden's value, the value now), `fingerprint` is the
    engine's, {} for a trace in hand, `policy_logprobs` [N] are without truncation, where both sides have them; `limits`
    are those that it was judged by.
    """

    golden: Golden
    comparison: Comparison
    differences: Sequence[tuple[str, Any, Any]] = ()
    fingerprint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    policy_logprobs: Any = None
    limits: Tolerance | None = None
