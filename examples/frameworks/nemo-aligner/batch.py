"""What NeMo-Aligner's PPO has in hand: tokens and its own logprobs of them, here made by a scorer in its place."""

import torch
from torch.nn.utils.rnn import pad_sequence


def batch_of(trace, scorer):
    rows = [torch.tensor(trace.prompt(i) + trace.completion(i)) for i in range(trace.num_sequences)]
    tokens = pad_sequence(rows, True, 0)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0)
    return {
        "response_tokens": tokens,
        "prompt_lengths": torch.tensor([len(trace.prompt(i)) for i in range(trace.num_sequences)]),
        "response_lengths": torch.tensor([len(row) for row in rows]),
        "logprobs": scorer(tokens, mask, 1.0),
    }
