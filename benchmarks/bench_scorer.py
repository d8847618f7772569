"""The transformers scorer: its time against the bare forward pass (bar 1.1), its peak memory at 8,192 tokens of a vocabulary
of 151,936 against logits made whole (bar a third), and its distance from float64 (bar 1e-5).
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import REPO, report_number, report_ratio, share_the_machine, time_in_turns

TOKENS, VOCABULARY = 8192, 151_936


def wide_model(hidden: int = 64) -> Any:
    """A Qwen3 of two layers with a large vocabulary, of random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, tie_word_embeddings=True,
    )).eval()  # fmt: skip


def peak(how: str) -> None:
    """The child process: one pass, and by how many bytes the peak of its memory rose."""
    import torch

    from pytest_logprob_parity import TransformersScorer

    scorer = TransformersScorer(wide_model())
    ids = torch.randint(0, VOCABULARY, (4, TOKENS // 4))
    scorer(ids[:, :8], torch.ones_like(ids[:, :8]), 1.0)
    before = int(Path("/proc/self/statm").read_text("utf-8").split()[1]) * resource.getpagesize()
    with torch.no_grad():
        if how == "chunked":
            scorer(ids, torch.ones_like(ids), 0.7)
        else:
            logits = scorer.model(input_ids=ids).logits[:, :-1] / 0.7
            logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def memory() -> None:
    rose = {
        how: int(subprocess.run([sys.executable, __file__, how], capture_output=True, text=True, check=True).stdout.split()[-1])
        for how in ("chunked", "whole")
    }
    detail = f"{rose['chunked'] / 1e9:.2f} GB, whole logits {rose['whole'] / 1e9:.2f} GB"
    name = f"peak memory of {TOKENS:,} tokens x {VOCABULARY:,}, chunked / whole"
    report_number(name, rose["chunked"] / rose["whole"], 1 / 3, detail)


def speed() -> None:
    import torch

    from pytest_logprob_parity import TransformersScorer

    model = str(REPO / "models" / "tiny-arith")
    for name, scorer, vocabulary in (
        ("tiny-arith", TransformersScorer(model), 384),
        ("151,936 words, 1,024 wide", TransformersScorer(wide_model(1024)), VOCABULARY),
    ):
        width, rounds = (256, 15) if vocabulary < 1000 else (16, 5)
        ids = torch.randint(2, vocabulary, (16, width), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)

        def bare(scorer: Any = scorer, ids: Any = ids, mask: Any = mask) -> Any:
            with torch.no_grad():
                return scorer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

        works = {"scorer": lambda s=scorer, i=ids, m=mask: s(i, m, 0.7), "bare": bare}
        times = time_in_turns(works, rounds=rounds)
        report_ratio(f"{name}: scorer / bare forward pass", times["scorer"], times["bare"], 1.1)


if __name__ == "__main__":
    share_the_machine()
    if sys.argv[1:]:
        peak(sys.argv[1])
    else:
        speed()
        memory()
