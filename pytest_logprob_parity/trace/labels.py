"""The labels of a trace: the words that they are made of, and how a file stores them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias, get_args

#: Whether logprobs are of the model's own distribution, or of that after logits processing.
LogprobsMode: TypeAlias = Literal["processed_logprobs", "raw_logprobs"]
LOGPROBS_MODES: Final[tuple[LogprobsMode, ...]] = get_args(LogprobsMode)
#: What computed logprobs.
TracePath: TypeAlias = Literal["decode", "prefill"]
PATHS: Final[tuple[TracePath, ...]] = get_args(TracePath)
#: How an engine is asked to replay a trace; see `engines.replay`.
ReplayPath: TypeAlias = Literal["decode", "prefill", "regenerate", "window"]
#: What forces an engine to decode the expected tokens: its own trace replay, or its wrapped sampler.
Forcing: TypeAlias = Literal["sampler", "native"]
FORCINGS: Final[tuple[Forcing, ...]] = get_args(Forcing)

_DTYPE_NAMES: Final = {
    "fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16",
    "half": "float16",
}  # fmt: skip


def dtype_name(name: str) -> str:
    """A dtype's name as traces spell it: `torch.float32`, `fp32` and `FLOAT32` are `float32`."""
    short = str(name).lower().removeprefix("torch.")
    return _DTYPE_NAMES.get(short, short)


_ORIGINS: Final[Mapping[str, str]] = {
    "decode": "a forced decode", "prefill": "a prefill", "regenerate": "a free generation",
    "window": "forced decodes of windows", "scorer": "a scorer",
}  # fmt: skip
_FORCED: Final[Mapping[Forcing, str]] = {
    "sampler": " (tokens forced in the sampler)",
    "native": " (tokens forced by the engine's own trace replay)",
}


def logprobs_in_words(
    mode: LogprobsMode, path: TracePath, replay: ReplayPath | Literal["scorer", ""] = "", forcing: Forcing | None = None
) -> str:  # fmt: skip
    """What logprobs these labels describe: `raw logprobs, from a forced decode (tokens forced in the sampler)`."""
    origin = _ORIGINS[replay] if replay else f"a {path}"
    return f"{mode.replace('_', ' ')}, from {origin}{_FORCED[forcing] if replay and forcing else ''}"


def with_forcing(labels: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a file; older files have `decode (sampler)` for what is `replay` and `forcing` today."""
    replay, _, forcing = str(labels.get("replay", "")).removesuffix(")").partition(" (")
    return {**labels, "replay": replay, "forcing": forcing} if forcing in FORCINGS else dict(labels)


def pack_texts(texts: Mapping[int, str]) -> dict[str, list[Any]]:
    """Texts by token id, in order of the ids, each id as its distance from the previous one: that keeps files small."""
    ids = sorted(texts)
    return {"steps": [b - a for a, b in itertools.pairwise([0, *ids])], "texts": [texts[i] for i in ids]}


def unpack_texts(steps: Sequence[int], texts: Sequence[str]) -> dict[int, str]:
    """The inverse of `pack_texts`. Raises ValueError and TypeError for anything else."""
    return {int(i): str(text) for i, text in zip(itertools.accumulate(steps), texts, strict=True)}
