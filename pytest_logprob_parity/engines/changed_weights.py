"""Engines whose weights were updated: who did it, and how another user of the same engine gets its checkpoint's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..checkpoint.weight_update import WeightUpdate, tied_heads
from ..errors import EngineError, UsageError
from ..spec.server_settings import SERVER
from .backend import take_weights
from .engine import Engine

if TYPE_CHECKING:
    from ..spec import EngineSpec
    from .backend import Backend
    from .model_folders import ModelFolders


class ChangedWeights:
    """The engines that have other weights than their checkpoint's, by who changed them."""

    def __init__(self) -> None:
        self._engines: dict[EngineSpec, Engine] = {}

    def record(self, engine: Engine) -> None:
        """`engine` has updated the weights of the engine behind it."""
        self._engines[engine.spec] = engine

    def by(self, spec: EngineSpec) -> Engine | None:
        """Who changed the weights of the engine of a spec. A server is the same one whatever else specs say of it."""
        same = (engine for other, engine in self._engines.items() if _same_server(other, spec))
        return self._engines.get(spec) or next(same, None)

    def check_not_lost(self, asker: Engine) -> None:
        """Raise EngineError where `asker` has updated an engine that is no longer there."""
        if self.by(asker.spec) is not asker:
            return
        updates = f"its {asker.weight_version} weight updates"
        if asker.spec.engine == SERVER:
            raise EngineError(f"{asker.spec} failed since {updates}: nobody knows what it has now; take a new engine")
        raise EngineError(
            f"{asker.spec} is down, and {updates} with it: it would start with its checkpoint's weights; take a new engine"
        )

    def forget(self, engine: Engine) -> None:
        """The engine behind `engine` has its checkpoint's weights again, or is gone."""
        self._engines.pop(engine.spec, None)


def give_back(backend: Backend, changed: Engine, spec: EngineSpec, models: ModelFolders) -> None:
    """Load the checkpoint of `spec`, and its adapter, into an engine that `changed` updated. Raises where that cannot be."""
    if tied_heads(models.folders(spec)[0]):
        raise UsageError("vLLM on CPUs keeps a packed copy of a tied head, which such an update does not reach")
    if changed.took_adapter and spec.adapter is None:
        raise UsageError("an adapter is on top that the spec does not have")
    adapter = models.adapter(spec)  # what is loaded now is what its folder holds now
    for weights in (models.folders(spec)[0], *(() if adapter is None else (adapter.folder,))):
        take_weights(backend, WeightUpdate(weights=weights, mode="keep", clear_cache=True))


def _same_server(one: EngineSpec, other: EngineSpec) -> bool:
    return one.engine == other.engine == SERVER and one.settings["url"] == other.settings["url"]
