"""What a checkpoint is made of: its sizes, and the names of its tensors. For the families that the catalogue knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pytest_logprob_parity.errors import UsageError

State = Mapping[str, Any]  # checkpoint name -> tensor

#: Families that differ in names and in nothing that the catalogue does not read from the configuration.
FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
#: Names of an expert's projections (gate, up, down), and of the module that holds router and experts.
_EXPERTS: Final = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def load_checkpoint(folder: Path) -> State:
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """The sizes of a decoder-only transformer. `experts` is 0 for a dense one.

    `renormalises`: the router's probabilities of the chosen experts are divided by their sum. `tied`: the LM head is the
    embedding.
    """

    family: str
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    epsilon: float
    rope_base: float
    tied: bool
    experts: int = 0
    experts_per_token: int = 0
    renormalises: bool = True

    @classmethod
    def of(cls, folder: Path) -> Anatomy:
        """Read `config.json`. Raises UsageError for a model that the float64 reference does not compute."""
        config = json.loads((folder / "config.json").read_text("utf-8"))
        family = str(config.get("model_type"))
        if family not in FAMILIES:
            raise UsageError(f"catalogue: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        unsupported = {
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
            "sliding_window": config.get("sliding_window") is not None and config.get("use_sliding_window", True),
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0) != 1.0,
        }
        if names := [name for name, is_so in unsupported.items() if is_so]:
            raise UsageError(f"catalogue: {names[0]}={config.get(names[0])!r} of {folder.name} is not supported")
        heads = int(config["num_attention_heads"])
        experts = int(config.get("num_local_experts") or config.get("num_experts") or 0) if family in _EXPERTS else 0
        return cls(
            family=family,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            epsilon=float(config["rms_norm_eps"]),
            rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
            tied=bool(config.get("tie_word_embeddings", False)),
            experts=experts,
            experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
            renormalises=family != "qwen3_moe" or bool(config.get("norm_topk_prob", False)),
        )

    @property
    def head(self) -> str:
        """The name of the LM head's weights."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def router(self, layer: int) -> str:
        """The name of a layer's router weights [experts, hidden]; a dense layer's checkpoint does not have them."""
        return f"model.layers.{layer}.{_EXPERTS[self.family][0]}.gate.weight" if self.experts else ""

    def mlp(self, layer: int, expert: int | None = None) -> tuple[str, str, str]:
        """The names of the projections (gate, up, down) of a layer's MLP, or of one of its experts."""
        if expert is None:
            module, parts = "mlp", ("gate_proj", "up_proj", "down_proj")
        else:
            block, *names = _EXPERTS[self.family]
            module, parts = f"{block}.experts.{expert}", (names[0], names[1], names[2])
        gate, up, down = (f"model.layers.{layer}.{module}.{part}.weight" for part in parts)
        return gate, up, down
