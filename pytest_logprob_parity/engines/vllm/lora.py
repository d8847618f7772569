"""The adapter of a vLLM engine: loaded when it starts, sent with every request, exchanged for the next step's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...checkpoint.adapter import Adapter
from ...errors import EngineError, UsageError

#: The ranks that all versions of vLLM can be told to make room for.
_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)
#: The id under which a worker keeps the one adapter that there is.
_ID: Final = 1


def arguments(adapter: Adapter, settings: dict[str, Any]) -> dict[str, Any]:
    """The engine arguments that an adapter needs, less what `settings` say. Raises UsageError where these forbid it."""
    if settings.get("enable_lora", True) is not True:
        raise UsageError(f"enable_lora={settings['enable_lora']!r} with adapter {adapter.folder}: leave one of them out")
    room = settings.get("max_lora_rank") or next((rank for rank in _RANKS if rank >= adapter.rank), _RANKS[-1])
    if adapter.rank > room:
        raise UsageError(f"adapter {adapter.folder}: has rank {adapter.rank}, max_lora_rank is {room}")
    return {"enable_lora": True, "max_lora_rank": room}


class Lora:
    """What an engine's requests are sent with: `request` is vLLM's LoRARequest, None where there is no adapter."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._adapter: Adapter | None = None
        self.request: Any = None

    def load(self, adapter: Adapter) -> None:
        """Load an adapter in place of the one that is there; running requests go on with it.

        The worker finds adapters by their id alone and ignores new files under one that it knows, so the old one is removed
        first. The prefix cache finds keys and values by name and folder: the content is part of the name.

        Raises UsageError where the engine takes none, EngineError where it takes this one not.
        """
        from vllm.lora.request import LoRARequest

        engine = self._llm.llm_engine
        room = getattr(engine.vllm_config, "lora_config", None)
        if room is None:
            raise UsageError(
                f"adapter {adapter.folder}: this engine was started without; give EngineSpec(adapter=...) or enable_lora=True"
            )
        if adapter.rank > room.max_lora_rank:
            raise UsageError(
                f"adapter {adapter.folder}: has rank {adapter.rank}, the engine room for {room.max_lora_rank} (max_lora_rank)"
            )
        if self.request is not None:
            engine.remove_lora(_ID)
        self.request = LoRARequest(f"{adapter.folder.name}-{adapter.digest}", _ID, str(adapter.folder))
        self._adapter = adapter
        self._add()

    def restore(self) -> None:
        """Load it once more, after the engine has taken other weights beneath, which throws adapters away."""
        if self.request is not None:
            self._llm.llm_engine.remove_lora(_ID)
            self._add()

    def check_moves(self, logprobs: Callable[[Any], npt.NDArray[np.float32]]) -> None:
        """Raise EngineError where the adapter changes nothing: `logprobs(request)` [N] of some tokens, with and without.

        An engine that finds no layer for it serves the base model, and says so in a debug line.
        """
        adapter = self._adapter
        if adapter is None or adapter.is_zero:
            return
        if (logprobs(self.request) == logprobs(None)).all():
            raise EngineError(
                f"adapter {adapter}: the engine loaded it and gives every logprob as without it: it found no layer to put it "
                f"on (it changes {', '.join(sorted({m.rpartition('.')[2] for m in adapter.modules}))}), or its B is as good "
                "as zero"
            )

    def _add(self) -> None:
        if not self._llm.llm_engine.add_lora(self.request):
            raise EngineError(f"adapter {self._adapter}: the engine did not take it, and gives no reason")
