"""A finding: one cause, with its layer and its evidence; and which causes each layer has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from .json_values import json_value

SemanticCause: TypeAlias = Literal[
    "raw_vs_processed",
    "temperature",
    "truncation",
    "penalties",
    "logit_bias",
    "banned_tokens",
    "min_tokens",
    "shifted_positions",
    "wrong_token",
    "wrong_values",
]
PathCause: TypeAlias = Literal[
    "prefix_cache", "async_scheduling", "chunked_prefill", "batch_shape", "compilation", "attention_backend",
    "kv_cache_dtype", "parallelism", "speculative_decoding", "expert_routing", "engine_build",
]  # fmt: skip
WeightsCause: TypeAlias = Literal[
    "weights_differ", "weight_dtype", "quantization", "adapter", "stale_weights", "stale_kv_cache", "version_label"
]  # fmt: skip
TrainerCause: TypeAlias = Literal["attention_mask", "dropout", "packing", "prompt", "logits"]
Cause: TypeAlias = (
    SemanticCause
    | PathCause
    | Literal["head_precision"]
    | TrainerCause
    | WeightsCause
    | Literal["seed_stream", "numerical_noise"]
)
Layer: TypeAlias = Literal["semantic", "path", "head", "trainer", "weights", "sampling", "noise"]
#: Layers, in the order in which to rule them out, and the causes of each.
CAUSES: Final[Mapping[Layer, tuple[Cause, ...]]] = {
    "semantic": get_args(SemanticCause),
    "path": get_args(PathCause),
    "head": ("head_precision",),
    "trainer": get_args(TrainerCause),
    "weights": get_args(WeightsCause),
    "sampling": ("seed_stream",),
    "noise": ("numerical_noise",),
}
LAYERS: Final[tuple[Layer, ...]] = tuple(CAUSES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One cause: its layer, its name (None where the evidence does not single one out), candidates, and evidence.

    `evidence` is for people; `values` are the numbers in it, by name, for code (JSON values).
    """

    layer: Layer
    cause: Cause | None
    evidence: str
    candidates: tuple[Cause, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        return {
            "layer": self.layer,
            "cause": self.cause,
            "candidates": list(self.candidates),
            "evidence": self.evidence,
            "values": json_value(self.values),
        }

    def __str__(self) -> str:
        name = self.cause or one_of(self.candidates)
        return f"{self.layer}: {name}: {self.evidence}"


def one_of(candidates: Iterable[str]) -> str:
    """Candidates in words: `one of adapter, stale_weights`, or `perhaps adapter` where there is one."""
    names = list(candidates)
    return f"perhaps {names[0]}" if len(names) == 1 else f"one of {', '.join(names)}"
