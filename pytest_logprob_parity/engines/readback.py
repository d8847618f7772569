"""What was asked of an engine, held against what the started engine says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from ..errors import EngineError
from ..spec.engine_arguments import is_secret
from ..trace import FORCINGS, Forcing

#: What stands for a secret among the values of a configuration.
_SECRET: Final = "..."


def forcing_of(told: str) -> tuple[Forcing | None, str]:
    """What a worker or a server tells of forcing, `sampler`, `native` or a reason: the key, or None and the reason."""
    return next(((forcing, "") for forcing in FORCINGS if told == forcing), (None, told))


def check_readback(asked: Mapping[str, Any], got: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Compare what was asked with what was read back; returns the settings that could not be read back.

    Raises EngineError naming the setting, what was asked and what came.
    """
    unverified = []
    for setting, value in asked.items():
        if setting not in got:
            unverified.append(setting)
        elif not _same_setting(value, got[setting]):
            if is_secret(setting):
                raise EngineError(f"{name} did not take {setting}: the started engine uses another value")
            uses = json_value(got[setting])
            if isinstance(value, Mapping) and isinstance(uses, Mapping):
                uses = {key: uses.get(key) for key in value}
            raise EngineError(f"{name} did not take {setting}: asked for {value!r}, the started engine uses {uses!r}")
    return tuple(sorted(unverified))


def _same_setting(asked: Any, got: Any) -> bool:
    """Whether a value as given is the one that is used: enums by value or name, dtypes by name, objects by their fields."""
    if asked == "auto" or asked is None:
        return True
    if isinstance(asked, Mapping):
        fields = got if isinstance(got, Mapping) else getattr(got, "__dict__", {})
        return all(key in fields and _same_setting(value, fields[key]) for key, value in asked.items())
    if isinstance(asked, (list, tuple)) and isinstance(got, (list, tuple, set)):
        return len(asked) == len(got) and all(_same_setting(a, g) for a, g in zip(asked, got, strict=True))
    if isinstance(asked, bool) or isinstance(got, bool):
        return asked is got
    names = (got, getattr(got, "value", got), getattr(got, "name", got), str(got), str(got).removeprefix("torch."))
    return any(asked == name or str(asked) == str(name) for name in names)


def json_value(value: Any) -> Any:
    """A configuration value as JSON: dtypes and enums by name, objects by their fields, secrets as `...`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "name", value)
    if isinstance(value, Mapping):
        return {str(k): _SECRET if v and is_secret(str(k)) else json_value(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json_value({f.name: getattr(value, f.name, None) for f in dataclasses.fields(value) if f.init})
    return getattr(value, "name", str(value).removeprefix("torch."))
