"""Sampling: how an engine samples completions, in vLLM's names and units. No engine, no file, no pytest."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..errors import UsageError
from ..grammar import counted
from ..suggest import nearest
from .server_settings import SERVER

#: Fields of SamplingParams that change how a completion is returned, not which tokens it has: accepted and ignored.
_OUTPUT_ONLY: Final = (
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "flat_logprobs",
    "include_stop_str_in_output", "stream_interval", "skip_clone", "output_text_buffer_length",
)  # fmt: skip
_GREEDY_BELOW: Final = 1e-5
#: Engine kinds whose SamplingParams raise a temperature above 0 to at least the one below (vllm/sampling_params.py).
_VLLM: Final = ("vllm", SERVER)
_VLLM_LEAST_TEMPERATURE: Final = 0.01

#: Fields that change logits before the temperature does, and the value that changes nothing.
_PENALTIES: Final = {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
#: Fields that name tokens or texts whose logits are changed or excluded; absent from a stored sampling where they are empty.
_NAMED_TOKENS: Final = ("logit_bias", "bad_words", "allowed_token_ids")
#: The largest bias of a logit that vLLM and OpenAI's API take.
_MOST_BIAS: Final = 100.0
#: Fields that exclude tokens, and the value that excludes none.
_TRUNCATIONS: Final = {"top_k": 0, "top_p": 1, "min_p": 0}


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


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(sorted({_whole(token) for token in _several(value)}))


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """A logit bias as (token id, bias) in order of the ids, from a mapping or pairs; ids may be texts, as in JSON."""
    pairs = dict(value if isinstance(value, Mapping) else _several(value))
    return tuple(sorted((int(t) if isinstance(t, str) else _whole(t), _number(bias)) for t, bias in pairs.items()))


#: Fields for which None is the same as nothing.
_LISTS: Final = ("stop", "stop_token_ids", *_NAMED_TOKENS)
#: Field type -> how a value of a similar type (numpy's, a list) is converted to it, and the type's name in messages.
_CONVERSIONS: Final[Mapping[type, Any]] = {float: _number, int: _whole, bool: _flag, tuple: _several}
_TYPE_NAMES: Final = {float: "a number", int: "a whole number", bool: "True or False", tuple: "a list"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample, in vLLM's names and units. `seed` is the seed of the first sequence; every other has its own.

    `n` completions are sampled for every prompt (a GRPO group). `logprobs` is the number of top logprobs kept for each
    token beside the chosen one. `temperature=0` is greedy decoding. `logit_bias` maps token ids to what is added to their
    logits (kept as pairs, in order of the ids); `bad_words` are texts, and `allowed_token_ids` ids, of tokens that are excluded
    or the only ones left.

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
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            convert, kind = _CONVERSIONS[type(field.default)], _TYPE_NAMES[type(field.default)]
            if field.name == "logit_bias":
                convert, kind = _biases, "a mapping of token ids to numbers"
            elif field.name == "allowed_token_ids":
                convert, kind = _ids, "a list of token ids"
            try:
                object.__setattr__(self, field.name, convert(value))
            except (TypeError, ValueError):
                raise UsageError(f"Sampling({field.name}={value!r}): must be {kind}") from None
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
            (
                all(abs(b) <= _MOST_BIAS for _, b in self.logit_bias),
                f"logit_bias: a bias is from -{_MOST_BIAS:g} to {_MOST_BIAS:g}",
            ),
            (all(t >= 0 for t, _ in self.logit_bias), "logit_bias: token ids are 0 or more"),
            (all(isinstance(w, str) and w.strip() for w in self.bad_words), "bad_words: each is a text, not an empty one"),
            (all(t >= 0 for t in self.allowed_token_ids), "allowed_token_ids: token ids are 0 or more"),
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
            return cls(**{k: v for k, v in value.items() if not (k in _LISTS and v is None)})
        if (fields := getattr(type(value), "__struct_fields__", None)) is None:
            raise UsageError(
                "sampling is a Sampling, a dict or a vllm.SamplingParams, not "
                f"{type(value).__module__}.{type(value).__qualname__}"
            )
        return cls.of(_values_of_vllm(value, fields, names))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken; temperature and truncation then have no effect."""
        return self.temperature < _GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p excludes tokens."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)

    @property
    def penalizes(self) -> bool:
        """Whether a penalty changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def names_tokens(self) -> bool:
        """Whether logit_bias, bad_words or allowed_token_ids change logits of tokens that they name."""
        return any(getattr(self, name) for name in _NAMED_TOKENS)

    @property
    def edits_logits(self) -> bool:
        """Whether logits are changed otherwise than by temperature and truncation: no trainer computes such logprobs."""
        return self.penalizes or self.names_tokens

    @property
    def raw_is_processed(self) -> bool:
        """Whether raw and processed logprobs coincide under this sampling."""
        scaled = not self.greedy and self.temperature != 1
        return not (scaled or self.truncates or self.edits_logits or self.min_tokens > 0)

    def as_run_by(self, engine: str) -> Sampling:
        """This sampling as an engine of the kind `engine` runs it: vLLM raises temperatures between 0 and 0.01 to 0.01."""
        if engine in _VLLM and 0 < self.temperature < _VLLM_LEAST_TEMPERATURE:
            return dataclasses.replace(self, temperature=_VLLM_LEAST_TEMPERATURE)
        return self

    def untruncated(self) -> Sampling:
        """The same temperature, penalties and named tokens, without top-p, top-k and min-p."""
        return dataclasses.replace(self, top_p=1.0, top_k=0, min_p=0.0)

    @property
    def applied_temperature(self) -> float:
        """The temperature that logits are divided by; 1 under greedy decoding, which divides by none."""
        return 1.0 if self.greedy else self.temperature

    def steps(self) -> dict[str, float]:
        """The logits-processing steps of processed logprobs, by name: penalties, the temperature (0: greedy), truncation, and
        each token or text that `logit_bias`, `bad_words` and `allowed_token_ids` name.

        Values have six digits, so that a temperature that was stored as float32 equals the original.
        """
        steps = self._other_than(_PENALTIES) | {"temperature": 0.0 if self.greedy else self.temperature}
        steps |= self._other_than(_TRUNCATIONS) if self.truncates else {}
        steps |= {f"logit_bias of {token}": bias for token, bias in self.logit_bias}
        steps |= {f"bad word {word!r}": 1.0 for word in self.bad_words}
        steps |= {f"allowed token {token}": 1.0 for token in self.allowed_token_ids}
        return {name: float(f"{value:.6g}") for name, value in steps.items()}

    def processing(self) -> str:
        """The logits-processing steps of processed logprobs, in words: `T=0.7, top-p 0.9`."""
        named = (("logit_bias", "logit bias of {}"), ("bad_words", "{}"), ("allowed_token_ids", "{} allowed"))
        nouns = ("tokens", "bad words", "tokens")
        parts = [
            text.format(counted(len(getattr(self, name)), noun))
            for (name, text), noun in zip(named, nouns, strict=True)
            if getattr(self, name)
        ]
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self._other_than(_PENALTIES).items()]
        parts.append("greedy" if self.greedy else f"T={self.temperature:g}")
        if self.truncates:
            parts += [f"{name.replace('_', '-')} {value:g}" for name, value in self._other_than(_TRUNCATIONS).items()]
        return ", ".join(parts)

    def _other_than(self, neutral: Mapping[str, float]) -> dict[str, float]:
        """The fields of `neutral` whose value is another one."""
        return {name: getattr(self, name) for name, value in neutral.items() if getattr(self, name) != value}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; those of named tokens only where they name any, as in files of earlier versions."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v or k not in _NAMED_TOKENS}
        if self.logit_bias:
            fields["logit_bias"] = [[token, bias] for token, bias in self.logit_bias]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def _values_of_vllm(parameters: Any, fields: tuple[str, ...], names: set[str]) -> dict[str, Any]:
    """What a `vllm.SamplingParams` with these fields says, in the names of Sampling.

    Raises UsageError for a field that is not in `names` and that does not have vLLM's default.
    """
    values: dict[str, Any] = {}
    default = type(parameters)()
    for name in fields:
        new = getattr(parameters, name)
        if name.startswith("_") or name in _OUTPUT_ONLY:
            continue
        if name in names:
            values[name] = new
        elif new != getattr(default, name):
            raise UsageError(f"SamplingParams({name}={new!r}) is not supported: a golden cannot replay it")
    if values.get("seed") is None:
        values["seed"] = 0
    if values.get("logprobs") is None:
        values["logprobs"] = Sampling().logprobs
    if values.get("max_tokens") is None:
        raise UsageError("SamplingParams(max_tokens=None): a golden needs a bound on its length")
    return values
