"""llama.cpp as an engine kind. Light: what it starts is imported when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ... import machine

if TYPE_CHECKING:
    from ...checkpoint.adapter import Adapter
    from ...spec import EngineSpec
    from ..backend import Backend


class _Kind:
    distributions: Final = ("llama-cpp-py-sync",)
    may_live_apart: Final = False

    def hardware(self) -> dict[str, Any]:
        """See KnowsHardware."""
        return machine.cpu(machine.default_threads())

    def start(self, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None) -> Backend:
        from .backend import LlamaCppBackend

        return LlamaCppBackend.start(spec, model, tokenizer, adapter)


LLAMA_CPP: Final = _Kind()
