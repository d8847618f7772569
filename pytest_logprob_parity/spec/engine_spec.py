"""What to run and how to sample: EngineSpec, Sampling and the profiles. No engine, no file, no pytest."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError
from ..registry import Registry
from .engine_arguments import is_secret
from .server_settings import SERVER, SERVER_SETTINGS, server_settings

_PROFILES_AT_HAND: Final[Mapping[str, Mapping[str, Any]]] = {
    "rl": {
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "enforce_eager": True,
    },
    "serving": {},
    "own": {},  # an engine that somebody else built
}
#: Pinned runtime defaults by profile name. `rl` is what makes a rollout's logprobs mean what a trainer takes them for;
#: `serving` pins nothing: vLLM's own defaults, as they resolve. Training frameworks register profiles of their names, and
#: other distributions theirs, by entry points of this group.
PROFILES: Final[Registry[Mapping[str, Any]]] = Registry(
    "profile", "logprob_parity.profiles", fits=lambda thing: isinstance(thing, Mapping), at_hand=_PROFILES_AT_HAND
)

#: What every profile that pins something pins besides, on CPUs: a prompt prefilled in chunks kills the CPU build when
#: requests carry seeds.
RL_ON_CPU: Final[Mapping[str, Any]] = {"enable_chunked_prefill": False}

ENGINES: Final = ("vllm", "transformers", SERVER)
DTYPES: Final = ("auto", "float64", "float32", "bfloat16", "float16")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint for a misspelt name: `, did you mean 'x'?`, or nothing where no known name is near (`cutoff`, 0 to 1)."""
    import difflib  # only a mistake needs it

    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f", did you mean {matches[0]!r}?" if matches else ""


@dataclass(frozen=True, init=False)
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
            ("engine", engine, ENGINES),
            ("profile", profile, PROFILES),
            ("dtype", dtype, DTYPES),
        ):
            if not isinstance(value, str) or value not in known:
                raise UsageError(f"EngineSpec({field}={value!r}): known are {', '.join(known)}{nearest(str(value), known)}")
        if engine == SERVER:
            if adapter is not None:
                raise UsageError(f"EngineSpec(adapter={adapter!r}): not over a server; merge it, or take engine='vllm'")
            settings["url"] = server_settings(settings).url
        try:
            settings_json = json.dumps(settings, sort_keys=True)
        except TypeError as error:
            raise UsageError(f"EngineSpec: settings must be JSON values ({error})") from None
        values = (model, engine, dtype, seed, profile, revision, tokenizer, adapter, settings_json)
        for field_, value_ in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field_.name, value_)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names that are fields; every other setting is an engine argument."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name != "settings_json")

    @property
    def settings(self) -> dict[str, Any]:
        """The engine arguments given on top of the profile."""
        loaded: dict[str, Any] = json.loads(self.settings_json)
        return loaded

    def claims(self) -> dict[str, Any]:
        """Those of the settings that are about the engine: all, but for how to talk to a server."""
        return {k: v for k, v in self.settings.items() if self.engine != SERVER or k not in SERVER_SETTINGS}

    def pins(self, *, cpu: bool) -> dict[str, Any]:
        """Every engine argument that is asked for: the profile's, then the settings, which win."""
        profile = dict(PROFILES[self.profile])
        if cpu and profile:
            profile |= RL_ON_CPU
        return profile | {"seed": self.seed} | ({} if self.dtype == "auto" else {"dtype": self.dtype}) | self.claims()

    def replace(self, **changes: Any) -> EngineSpec:
        """This spec with other fields or engine arguments."""
        fields = {name: getattr(self, name) for name in self.field_names()}
        return EngineSpec(**(fields | self.settings | changes))

    def __str__(self) -> str:
        parts = [self.engine, self.model, self.dtype, self.profile]
        parts += [f"adapter={self.adapter}"] if self.adapter else []
        parts += [f"{k}={'...' if is_secret(k) else v}" for k, v in self.settings.items()]
        return " ".join(parts)


#: SamplingParams fields that change how a completion is handed over, not which tokens it has: taken and ignored.
_OUTPUT_ONLY: Final = (
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "flat_logprobs",
    "include_stop_str_in_output", "stream_interval", "skip_clone", "output_text_buffer_length",
)  # fmt: skip
_GREEDY_BELOW: Final = 1e-5
#: Engine kinds whose SamplingParams raise a temperature above 0 to at least the one below (vllm/sampling_params.py).
_VLLM: Final = ("vllm", SERVER)
_VLLM_LEAST_TEMPERATURE: Final = 0.01


def _whole(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _several(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


#: Field type -> how a value of a like type (numpy's, a list) becomes it, and what to call it.
_AS_GIVEN: Final[Mapping[type, Any]] = {float: _number, int: _whole, bool: _flag, tuple: _several}
_KIND: Final = {float: "a number", int: "a whole number", bool: "True or False", tuple: "a list"}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample, in vLLM's names and units. `seed` is the seed of the first sequence; every other has its own.

    `n` completions are sampled for every prompt (a GRPO group). `logprobs` is the number of top logprobs kept for each
    token beside the chosen one. `temperature=0` is greedy decoding.

    Raises UsageError for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 64
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    n: int = 1
    logprobs: int = 5

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, _AS_GIVEN[type(field.default)](value))
            except (TypeError, ValueError):
                raise UsageError(f"Sampling({field.name}={value!r}): must be {_KIND[type(field.default)]}") from None
        object.__setattr__(self, "stop_token_ids", tuple(_whole(t) for t in self.stop_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        for ok, what in (
            (0 <= self.temperature < float("inf"), f"temperature={self.temperature}: must be 0 (greedy) or more"),
            (0 <= self.seed < 2**62, f"seed={self.seed}: must be 0 or more, and small enough to count on from it"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: must be from 0 to 1"),
            (self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty}: must be above 0"),
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: must be 1 or more"),
            (0 <= self.min_tokens <= self.max_tokens, f"min_tokens={self.min_tokens}: must be from 0 to max_tokens"),
            (self.n >= 1, f"n={self.n}: must be 1 or more"),
            (self.logprobs >= 1, f"logprobs={self.logprobs}: must be 1 or more; they are what is compared"),
            (max(self.top_k, self.max_tokens, self.n, self.logprobs) < 2**31, "no number of tokens or samples is 2^31 or more"),
        ):
            if not ok:
                raise UsageError(f"Sampling({what})")

    @classmethod
    def of(cls, value: Any) -> Sampling:
        """A Sampling from a Sampling, a mapping, a `vllm.SamplingParams`, or None for the defaults.

        Raises UsageError naming the field that is unknown or not supported, instead of dropping it.
        """
        if value is None:
            return cls()
        if isinstance(value, Sampling):
            return value
        names = {f.name for f in dataclasses.fields(cls)}
        if isinstance(value, Mapping):
            unknown = [str(k) for k in value if k not in names]
            if unknown:
                raise UsageError(f"Sampling has no field {unknown[0]!r}{nearest(unknown[0], names)}")
            return cls(**{k: v for k, v in value.items() if not (k in {"stop", "stop_token_ids"} and v is None)})
        fields = getattr(type(value), "__struct_fields__", None)
        if fields is None:
            raise UsageError(
                "sampling is a Sampling, a dict or a vllm.SamplingParams, not "
                f"{type(value).__module__}.{type(value).__qualname__}"
            )
        given: dict[str, Any] = {}
        default = type(value)()
        for name in fields:
            new = getattr(value, name)
            if name.startswith("_") or name in _OUTPUT_ONLY:
                continue
            if name in names:
                given[name] = new
            elif new != getattr(default, name):
                raise UsageError(f"SamplingParams({name}={new!r}) is not supported: a golden cannot replay it")
        if given.get("seed") is None:
            given["seed"] = 0
        if given.get("logprobs") is None:
            given["logprobs"] = cls.logprobs
        if given.get("max_tokens") is None:
            raise UsageError("SamplingParams(max_tokens=None): a golden needs a bound on its length")
        return cls.of(given)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; temperature and truncation then play no part."""
        return self.temperature < _GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p excludes tokens."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether a penalty moves the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def raw_is_processed(self) -> bool:
        """Whether raw and processed logprobs coincide under this sampling."""
        scaled = not self.greedy and self.temperature != 1
        return not (scaled or self.truncates or self.penalizes or self.min_tokens > 0)

    def as_run_by(self, engine: str) -> Sampling:
        """This sampling as an engine of the kind `engine` runs it: vLLM raises temperatures between 0 and 0.01 to 0.01."""
        if engine in _VLLM and 0 < self.temperature < _VLLM_LEAST_TEMPERATURE:
            return dataclasses.replace(self, temperature=_VLLM_LEAST_TEMPERATURE)
        return self

    def untruncated(self) -> Sampling:
        """The same temperature and penalties, without top-p, top-k and min-p."""
        return dataclasses.replace(self, top_p=1.0, top_k=0, min_p=0.0)

    def steps(self) -> dict[str, float]:
        """What processed logprobs went through, by field: penalties, the temperature (0: greedy), then truncation.

        Values have six digits, so that a temperature which came by way of float32 is the same one.
        """
        steps: dict[str, float] = {
            name: getattr(self, name)
            for name, neutral in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0))
            if getattr(self, name) != neutral
        }
        steps["temperature"] = 0.0 if self.greedy else self.temperature
        if self.truncates:
            on = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
            steps |= {name: getattr(self, name) for name in on if on[name]}
        return {name: float(f"{value:.6g}") for name, value in steps.items()}

    def processing(self) -> str:
        """What processed logprobs went through, in words: `T=0.7, top-p 0.9`."""
        parts = (
            []
            if not self.penalizes
            else [
                f"{name} {value}"
                for name, value, neutral in (
                    ("repetition penalty", self.repetition_penalty, 1),
                    ("presence penalty", self.presence_penalty, 0),
                    ("frequency penalty", self.frequency_penalty, 0),
                )
                if value != neutral
            ]
        )
        parts.append("greedy" if self.greedy else f"T={self.temperature:g}")
        if self.truncates:
            parts += [
                f"{name} {value:g}"
                for name, value, on in (
                    ("top-k", self.top_k, self.top_k > 0),
                    ("top-p", self.top_p, self.top_p < 1),
                    ("min-p", self.min_p, self.min_p > 0),
                )
                if on
            ]
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
