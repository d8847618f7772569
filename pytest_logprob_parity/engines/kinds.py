"""Engine kinds: how an engine of each kind starts. Other distributions add kinds by entry points (see spec/engine_kinds.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..errors import UsageError
from ..spec import EngineSpec
from ..spec.engine_kinds import ENGINE_KINDS

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from .backend import Backend


class EngineKind(Protocol):
    """What an engine kind must do: start an engine, and say how many of its engines fit where.

    `distributions` are those whose version is the engine's: the first that is installed. `may_live_apart` says whether an
    engine may start in a process of its own: where one of its kind lives in this process already, or where a GPU's memory must
    be given back.
    """

    distributions: tuple[str, ...]
    may_live_apart: bool

    def start(self, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None) -> Backend:
        """Start the engine of `spec` in this process. Raises UsageError and EngineError."""
        ...


@runtime_checkable
class KnowsHardware(Protocol):
    """An engine kind that computes elsewhere than torch would: on CPUs, beside a GPU."""

    def hardware(self) -> dict[str, Any]:
        """What its engines compute on, before one has started."""
        ...


@runtime_checkable
class LeavesTraces(Protocol):
    """An engine kind some of whose engines change this process for good, so that they get one of their own."""

    def must_live_apart(self, spec: EngineSpec) -> bool:
        """Whether the engine of `spec` does."""
        ...


def kind_of(spec: EngineSpec) -> EngineKind:
    """The engine kind of a spec. Raises UsageError where it cannot be imported."""
    kind: EngineKind = ENGINE_KINDS[spec.engine]
    return kind


def start_in_process(spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None = None) -> Backend:
    """Start the engine of `spec` in this process. Raises UsageError and EngineError."""
    backend = kind_of(spec).start(spec, model, tokenizer, adapter)
    if backend.config.engine != spec.engine:
        raise UsageError(f"the engine kind {spec.engine!r} started an engine that calls itself {backend.config.engine!r}")
    return backend
