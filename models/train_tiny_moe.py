"""Train models/tiny-arith-moe on one core, from nothing but fixed seeds: a mixture of experts for the same task.

    OMP_NUM_THREADS=1 python models/train_tiny_moe.py [--out models] [--steps N]

A Qwen3-MoE decoder of 1.1 M parameters (8 experts in each of 3 layers, 2 of them for each token) with the tokenizer of
models/tiny-arith learns the word problems of arith.py. A loss that balances the load keeps its routers from collapsing.
Runs in under 15 minutes on one core. Prints the greedy accuracy on fresh problems, and the share of tokens of each expert.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from arith import make_problem
from train_tiny_arith import MAX_POSITIONS, accuracy, batches
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

#: Weight of the loss that balances the load (the Switch Transformer's, equation 4): 2 where 2 experts a token are used evenly.
BALANCE = 0.01


def make_model(seed: int, vocab_size: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=256,
            moe_intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=False,
            initializer_range=0.05,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def train_step(
    model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[float, float]:
    """One step; returns the loss of the assistant's tokens (nats), and the loss that balances the load."""
    out = model.model(input_ids=ids, output_router_logits=True)
    targets = labels[:, 1:]
    kept = targets != -100
    loss = torch.nn.functional.cross_entropy(model.lm_head(out.last_hidden_state[:, :-1][kept]), targets[kept])
    config = model.config
    balance = load_balancing_loss_func(
        out.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask=(ids != config.pad_token_id).long()
    )
    optimizer.zero_grad()
    (loss + BALANCE * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), balance.item()


@torch.no_grad()
def load_of_experts(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The share of the tokens that each expert gets: [layers, experts], each row sums to 1."""
    kept = (ids != model.config.pad_token_id).flatten()
    router_logits = model.model(input_ids=ids, output_router_logits=True).router_logits
    rows = []
    for logits in router_logits:
        chosen = logits.reshape(-1, model.config.num_experts)[kept].topk(model.config.num_experts_per_tok, dim=-1).indices
        rows.append(torch.bincount(chosen.flatten(), minlength=model.config.num_experts) / chosen.numel())
    return torch.stack(rows)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> Qwen3MoeForCausalLM:
    """Write the checkpoint in bfloat16 and hand back what was written."""
    half = Qwen3MoeForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    half.config.dtype = torch.bfloat16
    half.save_pretrained(path)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(path)
    return half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a batch")
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent / "tiny-arith")
    model = make_model(seed=0, vocab_size=len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)

    rng = random.Random("fresh problems")
    fresh = [make_problem(rng) for _ in range(300)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    source = batches(tokenizer, seed=1, tokens=args.tokens)
    for step in range(1, args.steps + 1):
        rate = args.lr * min(1.0, step / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, balance = train_step(model, optimizer, *next(source))
        if step % 25 == 0:
            print(f"step {step} loss {loss:.4f} balance {balance:.3f} {time.process_time():.0f} s of a core", flush=True)
        if step % 100 == 0:
            save(model, tokenizer, args.out / "tiny-arith-moe")

    written = save(model, tokenizer, args.out / "tiny-arith-moe")
    print(f"tiny-arith-moe: greedy accuracy on {len(fresh)} fresh problems {accuracy(written, tokenizer, fresh):.3f}")
    for layer, shares in enumerate(load_of_experts(written, next(source)[0])):
        print(f"layer {layer}: share of the tokens of each expert {', '.join(f'{share:.2f}' for share in shares)}")
    print(f"{time.process_time():.0f} s of a core")


if __name__ == "__main__":
    main()
