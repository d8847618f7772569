"""What to run and how to sample: EngineSpec, Sampling and the profiles. No engine, no file, no pytest."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import UsageError

#: Pinned runtime defaults by profile name. `rl` is what makes a rollout's logprobs mean what a trainer takes them for;
#: `serving` pins nothing: vLLM's own defaults, as they resolve.
PROFILES: Final[Mapping[str, Mapping[str, Any]]] = {
    "rl": {
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "enforce_eager": True,
    },
    "serving": {},
}

#: What profile `rl` pins besides, on CPUs: a prompt prefilled in chunks kills the CPU build when requests carry seeds.
RL_ON_CPU: Final[Mapping[str, Any]] = {"enable_chunked_prefill": False}

ENGINES: Final = ("vllm", "transformers")
DTYPES: Final = ("auto", "float64", "float32", "bfloat16", "float16")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: `, did you mean 'x'?`, or nothing where no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {matches[0]!r}?" if matches else ""


@dataclass(frozen=True, init=False)
class EngineSpec:
    """What to run: engine kind, model, dtype, seed, a profile of pinned defaults, and settings on top.

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
        **settings: Any,
    ) -> None:
        if not isinstance(model, str) or not model:
            raise UsageError(f"EngineSpec(model={model!r}): the model is a folder or a hub id, as a string")
        for field, value, known in (
            ("engine", engine, ENGINES),
            ("profile", profile, PROFILES),
            ("dtype", dtype, DTYPES),
        ):
            if value not in known:
                raise UsageError(f"EngineSpec({field}={value!r}): known are {', '.join(known)}{nearest(str(value), known)}")
        try:
            settings_json = json.dumps(settings, sort_keys=True)
        except TypeError as error:
            raise UsageError(f"EngineSpec: settings must be JSON values ({error})") from None
        values = (model, engine, dtype, seed, profile, revision, tokenizer, settings_json)
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

    def pins(self, *, cpu: bool) -> dict[str, Any]:
        """Every engine argument that is asked for: the profile's, then the settings, which win."""
        profile = dict(PROFILES[self.profile])
        if cpu and self.profile == "rl":
            profile |= RL_ON_CPU
        return profile | {"seed": self.seed} | ({} if self.dtype == "auto" else {"dtype": self.dtype}) | self.settings

    def replace(self, **changes: Any) -> EngineSpec:
        """This spec with other fields or engine arguments."""
        fields = {name: getattr(self, name) for name in self.field_names()}
        return EngineSpec(**(fields | self.settings | changes))

    def __str__(self) -> str:
        parts = [self.engine, self.model, self.dtype, self.profile]
        parts += [f"{k}={v}" for k, v in self.settings.items()]
        return " ".join(parts)


#: SamplingParams fields that change how a completion is handed over, not which tokens it has: taken and ignored.
_OUTPUT_ONLY: Final = (
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "flat_logprobs",
    "include_stop_str_in_output", "stream_interval", "skip_clone", "output_text_buffer_length",
)  # fmt: skip
_GREEDY_BELOW: Final = 1e-5


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
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if self.seed is None or isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UsageError(f"Sampling(seed={self.seed!r}): give a whole number; without one no run can be repeated")
        for ok, what in (
            (self.temperature >= 0, f"temperature={self.temperature}: must be 0 (greedy) or more"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: must be from 0 to 1"),
            (self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty}: must be above 0"),
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: must be 1 or more"),
            (0 <= self.min_tokens <= self.max_tokens, f"min_tokens={self.min_tokens}: must be from 0 to max_tokens"),
            (self.n >= 1, f"n={self.n}: must be 1 or more"),
            (self.logprobs >= 1, f"logprobs={self.logprobs}: must be 1 or more; they are what is compared"),
        ):
            if not ok:
                raise UsageError(f"Sampling({what}")

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

    def untruncated(self) -> Sampling:
        """The same temperature and penalties, without top-p, top-k and min-p."""
        return dataclasses.replace(self, top_p=1.0, top_k=0, min_p=0.0)

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
