"""What a check knows beyond two traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..golden.noise_floor import NoiseFloor
from ..golden.reference import Reference
from ..golden.setup import Setup
from ..trace import FloatArray
from .free_generation.result import FreeRun
from .sides import SIDES


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a check knows beyond two traces.

    `floor` and `reference` are the golden's, `routed` says whether its model routes tokens to experts; `draw` asks the engine
    for its logprobs [N] in batch compositions drawn as the floor's were; `setup` says how the fingerprints compare;
    `same_stream` that nothing which random numbers come from has changed; `same_schedule` that equal requests run in equal
    batches; `policy_logprobs` [N] are the engine's without truncation; `sides` is what the two are called.
    """

    floor: NoiseFloor | None = None
    reference: Reference | None = None
    routed: bool | None = None
    draw: Callable[[], FloatArray] | None = None
    setup: Setup = "unknown"
    same_stream: bool = False
    same_schedule: bool = True
    free_run: FreeRun | None = None
    policy_logprobs: Any = None
    sides: tuple[str, str] = SIDES
