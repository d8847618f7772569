"""SGLang as an engine kind. Light: what connects is imported when it connects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ...checkpoint.adapter import Adapter
    from ...spec import EngineSpec
    from ..backend import Backend


class _Kind:
    distributions: Final = ("sglang",)
    may_live_apart: Final = False

    def start(self, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None) -> Backend:
        from .backend import SglangBackend

        return SglangBackend.connect(spec, model)


SGLANG: Final = _Kind()
