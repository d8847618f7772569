"""EngineSpec: which engine and model to run, and with which settings. No engine, no file, no pytest."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from ..errors import UsageError
from ..suggest import nearest
from .engine_arguments import is_secret
from .engine_kinds import ENGINE_KINDS
from .profiles import PROFILES, profile_pins
from .server_settings import SERVER_SETTINGS, SERVERS, server_settings

#: A model's dtype; `auto` is what its config.json says.
Dtype: TypeAlias = Literal["auto", "float64", "float32", "bfloat16", "float16"]
DTYPES: Final[tuple[Dtype, ...]] = get_args(Dtype)


@dataclass(frozen=True, slots=True, init=False)
class EngineSpec:
    """What to run: engine kind, model, dtype, seed, a profile of pinned defaults, and settings on top.

    `adapter` is a LoRA adapter's folder, as PEFT writes it: every request is answered with it.

    Frozen and hashable: equal specs share one engine. Keyword arguments that are not fields are engine arguments
    (`EngineSpec(model=..., max_model_len=512)`) and must be JSON values.

    Raises UsageError for an unknown engine kind, profile or dtype, and for a setting that is not JSON.
    """

    model: str
    engine: str
    dtype: str
    seed: int
    profile: str
    revision: str | None
    tokenizer: str | None
    adapter: str | None
    settings_json: str

    def __init__(
        self,
        model: str,
        *,
        engine: str = "vllm",
        dtype: str = "auto",
        seed: int = 0,
        profile: str = "rl",
        revision: str | None = None,
        tokenizer: str | None = None,
        adapter: str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if isinstance(adapter, os.PathLike):
            adapter = os.fspath(adapter)
        if not isinstance(model, str) or not model:
            raise UsageError(f"EngineSpec(model={model!r}): the model is a folder or a hub id, as a string")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise UsageError(f"EngineSpec(seed={seed!r}): must be a whole number")
        for field, value in (("revision", revision), ("tokenizer", tokenizer), ("adapter", adapter)):
            if value is not None and not isinstance(value, str):
                raise UsageError(f"EngineSpec({field}={value!r}): must be a string")
        for field, value, known in (
            ("engine", engine, ENGINE_KINDS),
            ("profile", profile, PROFILES),
            ("dtype", dtype, DTYPES),
        ):
            if not isinstance(value, str) or value not in known:
                raise UsageError(f"EngineSpec({field}={value!r}): known are {', '.join(known)}{nearest(str(value), known)}")
        if engine in SERVERS:
            if adapter is not None:
                raise UsageError(f"EngineSpec(adapter={adapter!r}): not over a server; merge it, or take engine='vllm'")
            settings["url"] = server_settings(settings, engine).url
        try:
            settings_json = json.dumps(settings, sort_keys=True)
        except TypeError as error:
            raise UsageError(f"EngineSpec: settings must be JSON values ({error})") from None
        values = (model, engine, dtype, seed, profile, revision, tokenizer, adapter, settings_json)
        for field_, value_ in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field_.name, value_)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the fields; every other setting is an engine argument."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "settings_json")

    @property
    def settings(self) -> dict[str, Any]:
        """The engine arguments on top of the profile's."""
        loaded: dict[str, Any] = json.loads(self.settings_json)
        return loaded

    def claims(self) -> dict[str, Any]:
        """The settings that describe the engine: all but those that say how to reach a server."""
        return {k: v for k, v in self.settings.items() if self.engine not in SERVERS or k not in SERVER_SETTINGS}

    def pins(self, *, cpu: bool) -> dict[str, Any]:
        """Every engine argument that is asked for: the profile's, then the settings, which win."""
        profile = profile_pins(self.profile, cpu=cpu)
        return profile | {"seed": self.seed} | ({} if self.dtype == "auto" else {"dtype": self.dtype}) | self.claims()

    def replace(self, **changes: Any) -> EngineSpec:
        """This spec with other fields or engine arguments."""
        fields = {name: getattr(self, name) for name in self.field_names()}
        return EngineSpec(**(fields | self.settings | changes))

    def without(self, setting: str) -> EngineSpec:
        """This spec without one of its engine arguments."""
        fields = {name: getattr(self, name) for name in self.field_names()}
        return EngineSpec(**fields, **{name: value for name, value in self.settings.items() if name != setting})

    def __str__(self) -> str:
        parts = [self.engine, self.model, self.dtype, self.profile]
        parts += [f"adapter={self.adapter}"] if self.adapter else []
        parts += [f"{k}={'...' if is_secret(k) else v}" for k, v in self.settings.items()]
        return " ".join(parts)
