"""The closed vocabularies of a verdict: what it is, and what level was set."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

Verdict: TypeAlias = Literal["pass", "fail", "unverified"]
#: What fails: any other bit; any difference beyond what other batch compositions do; an effect that matters to an RL update.
Level: TypeAlias = Literal["bitwise", "noise", "rl"]
LEVELS: Final[tuple[Level, ...]] = get_args(Level)
