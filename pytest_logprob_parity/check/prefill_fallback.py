"""What a check can say of an engine that cannot be forced along the golden's tokens: a prefill of them, or nothing."""

from __future__ import annotations

import dataclasses

from ..comparison.difference import Difference
from ..comparison.result import Comparison
from ..notes import Note
from ..trace import Trace


def as_unforced(comparison: Comparison, golden: Trace, reason: str) -> Comparison:
    """A comparison with a prefill that was to be with a decode: `unverified` where the golden's logprobs are not raw."""
    note = Note("prefill_for_decode", f"not decoded, scored by a prefill: {reason}")
    if golden.is_raw:
        return dataclasses.replace(comparison, notes=(note, *comparison.notes))
    return dataclasses.replace(
        comparison,
        verdict="unverified",
        headline=(
            f"The server cannot be forced along the golden's tokens, and what is left, a prefill, gives raw logprobs: the "
            f"golden's are {golden.distribution()}"
        ),
        findings=(),
        gates=(),
        shown=None,
        difference=Difference(different=None, reason="raw logprobs say nothing of processed ones"),
        notes=(Note("to_verify", f"to verify: {reason}"), *comparison.notes),
    )
