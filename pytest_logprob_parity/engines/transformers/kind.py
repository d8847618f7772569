"""transformers as an engine kind. Light: what it starts is imported when it starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...checkpoint.adapter import Adapter
    from ...spec import EngineSpec
    from ..backend import Backend


class _Kind:
    distributions: Final = ("transformers",)
    may_live_apart: Final = False

    def start(self, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None) -> Backend:
        if spec.settings.get("continuous_batching"):
            from .continuous import ContinuousBackend

            return ContinuousBackend.start(spec, model, tokenizer, adapter)
        from .backend import TransformersBackend

        return TransformersBackend.start(spec, model, tokenizer, adapter)


TRANSFORMERS: Final = _Kind()
