"""The EngineSpec of a test from markers, parameters, ini lines and --parity-set: which one wins, and which is misspelt."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ..errors import UsageError
from ..suggest import nearest
from .engine_spec import EngineSpec
from .server_settings import SERVER, SERVER_SETTINGS


def parse_settings(lines: Iterable[str], source: str) -> dict[str, Any]:
    """`KEY=VALUE` lines as settings; a value is JSON where it can be read as JSON, else text. Raises UsageError."""
    settings: dict[str, Any] = {}
    for line in lines:
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{source}: {line!r} is not KEY=VALUE")
        settings[key.strip()] = parse_value(value.strip())
    return settings


def parse_value(text: str) -> Any:
    """The value that a text stands for: JSON, with Python's spelling of true, false and null allowed; else the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def marker_settings(marks: Iterable[tuple[str, tuple[Any, ...], Mapping[str, Any]]]) -> dict[str, Any]:
    """Settings merged along (place, args, kwargs) of markers, later ones winning. Raises UsageError for positional ones."""
    merged: dict[str, Any] = {}
    for place, args, kwargs in marks:
        if args:
            raise UsageError(f"@pytest.mark.logprob_parity on {place} takes keywords only, not {args[0]!r}")
        merged |= kwargs
    return merged


#: How near a name must be to a known one to be a misspelling, and not an argument of another release (difflib's ratio: one
#: letter more or less is 0.95; the removed argument `disable_log_requests` has 0.81 to `disable_log_stats`).
_SLIP: Final = 0.9


def check_slips(settings: Mapping[str, Any]) -> None:
    """Raise UsageError for a name that misspells an argument of the installed vLLM. Other names may be of other releases."""
    from .engine_arguments import vllm_engine_arguments

    if not (arguments := vllm_engine_arguments()):
        return
    known = {*EngineSpec.field_names(), *arguments, *SERVER_SETTINGS}
    for name in settings:
        if name not in known and (hint := nearest(name, known, _SLIP)):
            raise UsageError(f"{name!r} is no engine argument of the installed vLLM{hint}")


def make_spec(settings: Mapping[str, Any]) -> EngineSpec | None:
    """The spec that settings describe; None where they name no model. Raises UsageError for an unknown setting.

    Nothing heavy is imported: the engine arguments of the installed vLLM are read from its source.
    """
    from .engine_arguments import vllm_engine_arguments

    fields = EngineSpec.field_names()
    kind = settings.get("engine", "vllm")
    known = vllm_engine_arguments() if kind in ("vllm", SERVER) else frozenset()
    if known and kind == SERVER:
        known |= {*SERVER_SETTINGS}
    for name in settings:
        hint = nearest(name, [*fields, *known])
        if name not in fields and (name not in known if known else hint):
            raise UsageError(f"{name!r} is neither a field of EngineSpec ({', '.join(fields)}) nor an engine argument{hint}")
    return EngineSpec(**settings) if "model" in settings else None
