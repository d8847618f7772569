"""What an engine kind must do: take requests in one batched call, and say what it really runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import EngineError
from ..spec import PROFILES, Sampling
from ..spec.engine_arguments import is_secret
from ..trace import FORCINGS, Forcing
from .builds import mixed_builds


@dataclass(frozen=True)
class Request:
    """One sequence to write, to be forced along, or to score.

    `sampling` is read for one sequence (`n` and its own `seed` play no part); `seed` is None where no random numbers
    are drawn for it. With `forced_token_ids` the engine decodes, and each step takes the token that stands there. With
    `scored_token_ids` it says the logprobs of those tokens in one prefill instead.
    """

    prompt_token_ids: Sequence[int]
    sampling: Sampling
    seed: int | None = None
    forced_token_ids: Sequence[int] | None = None
    scored_token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Completion:
    """What an engine wrote for one request, L tokens: `token_ids`, `logprobs` and `ranks` [L], the top-k [L, K]."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_token_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]
    finish_reason: str


@dataclass(frozen=True)
class ResolvedConfig:
    """What a started engine really uses, read back from it.

    `values` are JSON values under engine-argument names; `unverified` names settings that were asked for and that the
    engine does not tell; `forcing` is how decode replay forces tokens, None where it cannot, and then `unforced` says why.
    `libraries` are the engine's, {} where it tells none, None where they are this process's. `vocabulary` is how many token
    ids it has logits for, from 0 on; None where it does not tell.
    """

    engine: str
    version: str
    dtype: str
    values: Mapping[str, Any]
    unverified: tuple[str, ...] = ()
    forcing: Forcing | None = "sampler"
    unforced: str = ""
    hardware: Mapping[str, Any] = field(default_factory=dict)
    libraries: Mapping[str, str] | None = None
    vocabulary: int | None = None

    @property
    def forces(self) -> bool:
        """Whether decode replay can force tokens."""
        return self.forcing is not None

    @property
    def logprobs_mode(self) -> str:
        """`processed_logprobs` or `raw_logprobs`: what decode logprobs mean."""
        return str(self.values.get("logprobs_mode", "raw_logprobs"))

    @property
    def max_model_len(self) -> int | None:
        """The longest prompt and completion together, in tokens."""
        value = self.values.get("max_model_len")
        return None if value is None else int(value)

    def differences_from_rl(self) -> dict[str, tuple[Any, Any]]:
        """Where the engine differs from profile `rl`: setting -> (what `rl` pins, what the engine uses)."""
        pins = PROFILES["rl"]
        return {k: (v, self.values[k]) for k, v in pins.items() if k in self.values and self.values[k] != v}


def forcing_of(told: str) -> tuple[Forcing | None, str]:
    """What a worker or a server tells of forcing, `sampler`, `native` or a reason: the key, or None and the reason."""
    return next(((forcing, "") for forcing in FORCINGS if told == forcing), (None, told))


class Backend(Protocol):
    """A started engine."""

    config: ResolvedConfig

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests in one batched call, in their order. Raises EngineError; the engine is then dead."""
        ...

    def close(self) -> None:
        """Shut down and leave nothing behind. Safe to call twice."""
        ...


#: What stands for a secret among the values of a configuration.
_SECRET: Final = "..."
#: How many characters of an engine's own reason a message shows.
_REASON_WIDTH: Final = 300


class RemoteError(Exception):
    """What an engine in another process died of; its text is that of `reason_of` there."""


def reason_of(error: BaseException) -> str:
    """The engine's own reason, in one line: the innermost cause's type and first telling line, and a fix that is known."""
    if isinstance(error, RemoteError):
        return str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    if type(error).__name__ == "ValidationError" and len(lines) > 1:  # pydantic: a count, then fields with their reasons below
        lines = [": ".join(lines[1:3])] if not lines[1].startswith(" ") and len(lines) > 2 else lines[1:]
    text = " ".join(lines[0].split(" [type=")[0].split()) if lines else "no message"
    return f"{type(error).__name__}: {text}"[:_REASON_WIDTH] + mixed_builds(text)


def no_answer(engine: object, what: str, seconds: float, kind: Literal["start", "call"], told: str) -> EngineError:
    """The error of an engine that did not answer in time: `told` is what is known of it and what became of it."""
    more = f"ini parity_{kind}_timeout (without pytest: {kind}_timeout=) allows more, 0 sets no limit"
    return EngineError(f"{engine}: no answer to {what} within {seconds:g} s; {told}; {more}")


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
