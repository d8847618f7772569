"""What GRPOTrainer has in hand after generating: here made of a trace, for this folder has no trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence


def batch_of(trace):
    bounds = [trace.bounds(i) for i in range(trace.num_sequences)]
    prompts = [torch.tensor(trace.prompt(i)) for i in range(trace.num_sequences)]
    completions = [torch.tensor(trace.completion(i)) for i in range(trace.num_sequences)]
    return {
        "prompt_ids": pad_sequence(prompts, True, 0, "left"),
        "prompt_mask": pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left"),
        "completion_ids": pad_sequence(completions, True, 0),
        "completion_mask": pad_sequence([torch.ones_like(c) for c in completions], True, 0),
        "sampling_per_token_logps": pad_sequence([torch.tensor(trace.logprobs[a:b]) for a, b in bounds], True, 0.0),
        "tool_mask": pad_sequence([torch.tensor(trace.mask[a:b]).long() for a, b in bounds], True, 1),
    }
