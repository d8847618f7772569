"""What can happen to running requests when an engine takes new weights: the outcomes that a trace is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple


class Part(NamedTuple):
    """A part of a model that an update can miss: a layer by its number, a tensor outside of the layers by name, or one kind of
    tensors in all layers.
    """

    name: str
    layer: int | None = None
    kind: bool = False

    @property
    def key(self) -> str:
        """The text that the names of its tensors contain."""
        return f".{self.name}." if self.layer is None else f".layers.{self.layer}."

    def __str__(self) -> str:
        return f"every {self.name}" if self.kind else self.name if self.layer is None else f"{self.name} {self.layer}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one update did to the running requests.

    - `came`: the new weights arrived, `later` tokens after the token that the trace says (before it, if negative)
    - `cleared`: the keys and values of earlier tokens were computed again under the new weights; else they were kept
    - `stale_parts`: the parts that still have the old weights
    - `swapped`: two kinds of tensors that have each other's weights
    - `prompt_block`: the whole blocks of this many tokens at the start of the prompt were read from a prefix cache of the old
      weights
    """

    came: bool = True
    cleared: bool = False
    later: int = 0
    stale_parts: tuple[Part, ...] = ()
    prompt_block: int = 0
    swapped: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "stale_parts": [str(part) for part in self.stale_parts]}

    def __str__(self) -> str:
        if not self.came:
            return "the old weights throughout"
        if self.stale_parts:
            return f"{' and '.join(map(str, self.stale_parts))} still as before the update"
        if self.swapped:
            return f"every {self.swapped[0]} swapped with its {self.swapped[1]}"
        if self.prompt_block:
            return f"old keys and values of the prompt, in blocks of {self.prompt_block}"
        cache = "keys and values computed again" if self.cleared else "old keys and values kept"
        arrived = f", arrived {abs(self.later)} tokens {'later' if self.later > 0 else 'earlier'}" if self.later else ""
        return f"{cache} under the new weights{arrived}"


KEPT: Final = Outcome()
CLEARED: Final = Outcome(cleared=True)
NEVER: Final = Outcome(came=False)
#: The outcomes that every trace is compared with.
PLAIN: Final = (KEPT, CLEARED, NEVER)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How well each outcome explains a trace.

    - `rms`: the RMS difference (nats) that each outcome leaves
    - `asked`: the outcome that was asked for; `best`: the outcome that explains the trace best
    - `shows_arrival`: the trace can tell an update from none
    - `shows_cache`: the trace can tell kept keys and values from those computed again
    """

    rms: Mapping[Outcome, float]
    asked: Outcome
    best: Outcome
    shows_arrival: bool
    shows_cache: bool

    def __str__(self) -> str:
        ranked = sorted(self.rms.items(), key=lambda item: item[1])
        return "; ".join(f"{outcome}: RMS {rms:.2g} nats" for outcome, rms in ranked[:4])
