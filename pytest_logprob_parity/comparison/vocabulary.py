"""The closed vocabularies of a verdict: what it is, and what level was set."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

Verdict: TypeAlias = Literal["pass", "fail", "unverified"]
#: What fails: any bit that differs; any difference larger than the noise floor; an effect that matters for an RL update.
Level: TypeAlias = Literal["bitwise", "noise", "rl"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
