"""What a checkpoint is called in GGUF: the names of its tensors, their order of values, and the model's hyperparameters.

Source: llama.cpp's convert_hf_to_gguf.py and the tensor names of its `gguf` package, for the architectures listed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...bounded import read_text
from ...checkpoint.plain_tensors import PlainTensor, tensors_of
from ...errors import UsageError

_MOST_JSON: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Architecture:
    """GGUF's name of an architecture, and whether its rotary embedding pairs neighbours, so that heads are permuted."""

    name: str
    permutes: bool = False


#: What config.json calls an architecture -> what GGUF does.
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "LlamaForCausalLM": Architecture("llama", permutes=True),
    "MistralForCausalLM": Architecture("llama", permutes=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
}
_OUTER: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
#: A buffer that early checkpoints hold, which is computed.
_BUFFER: Final = re.compile(r".*rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A checkpoint as GGUF has it: `metadata` by key, and by GGUF's name each tensor with what reorders its values."""

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[PlainTensor, Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None]]
    vocabulary: int
    context: int
    dtype: str


def layout_of(folder: Path) -> Layout:
    """The layout of a model folder. Raises UsageError, in one line, for a model that GGUF is not written for here."""
    config = _config(folder)
    architecture = _architecture(config, folder)
    names = config.get("num_attention_heads"), config.get("num_key_value_heads") or config.get("num_attention_heads")
    heads, key_heads = (int(n) for n in names if n is not None)
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        if _BUFFER.fullmatch(name) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        target = _target(name)
        if target is None:
            raise UsageError(f"{folder}: the tensor {name!r} has no name in GGUF's {architecture.name}: another architecture")
        reorder = None
        if architecture.permutes and (found := re.search(r"\.attn_([qk])\.", target)):
            reorder = _permute(heads if found[1] == "q" else key_heads)
        tensors[target] = tensor, reorder
    if "token_embd.weight" not in tensors:
        raise UsageError(f"{folder}: the checkpoint has no model.embed_tokens.weight")
    return Layout(
        architecture=architecture.name,
        metadata=_metadata(architecture.name, config, heads, key_heads),
        tensors=tensors,
        vocabulary=tensors["token_embd.weight"][0].shape[0],
        context=int(config["max_position_embeddings"]),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(read_text(folder / "config.json", _MOST_JSON))
        config["architectures"][0], config["hidden_size"], config["max_position_embeddings"]
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise UsageError(f"{folder}/config.json: not the configuration of a causal model ({error})") from None
    return config


def _architecture(config: Mapping[str, Any], folder: Path) -> Architecture:
    """Raises UsageError for an architecture, or a part of one, that is not converted."""
    name = str(config["architectures"][0])
    if name not in ARCHITECTURES:
        raise UsageError(
            f"{folder}: engine='llama_cpp' converts {', '.join(ARCHITECTURES)}, not {name}: convert it with llama.cpp's "
            "convert_hf_to_gguf.py and name the file: gguf='FILE'"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    sliding = config.get("use_sliding_window", True) and config.get("sliding_window")
    for wrong, what in (
        (kind != "default", f"rope_type {kind!r}"),
        (sliding, f"a sliding window of {sliding}"),
        (config.get("hidden_act") != "silu", f"hidden_act {config.get('hidden_act')!r}"),
    ):
        if wrong:
            raise UsageError(f"{folder}: engine='llama_cpp' does not convert {what}; name a file that has it: gguf='FILE'")
    return ARCHITECTURES[name]


def _metadata(name: str, config: Mapping[str, Any], heads: int, key_heads: int) -> dict[str, Any]:
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    return {
        f"{name}.block_count": int(config["num_hidden_layers"]),
        f"{name}.context_length": int(config["max_position_embeddings"]),
        f"{name}.embedding_length": int(config["hidden_size"]),
        f"{name}.feed_forward_length": int(config["intermediate_size"]),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": key_heads,
        f"{name}.attention.key_length": width,
        f"{name}.attention.value_length": width,
        f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{name}.rope.dimension_count": width,
        f"{name}.rope.freq_base": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        f"{name}.vocab_size": int(config["vocab_size"]),
        "tokenizer.ggml.model": "no_vocab",  # token ids go in, token ids come out
    }


def _target(name: str) -> str | None:
    """GGUF's name of a tensor; None where there is none."""
    if found := _LAYER.fullmatch(name):
        return f"blk.{found[1]}.{_INNER[found[2]]}.{found[3]}" if found[2] in _INNER else None
    outer, _, kind = name.rpartition(".")
    return f"{_OUTER[outer]}.{kind}" if outer in _OUTER and kind in ("weight", "bias") else None


def _permute(heads: int) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    """From halves of a head, as transformers' rotary embedding pairs them, to neighbours, as llama.cpp's does."""

    def permuted(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        split = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)

    return permuted
