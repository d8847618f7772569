"""What veRL's trainer has in hand: the tensors of a DataProto, here made of a trace, for this folder has no trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence


def batch_of(trace):
    bounds = [trace.bounds(i) for i in range(trace.num_sequences)]
    prompts = [torch.tensor(trace.prompt(i)) for i in range(trace.num_sequences)]
    responses = [torch.tensor(trace.completion(i)) for i in range(trace.num_sequences)]
    attention = [
        pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left"),
        pad_sequence([torch.ones_like(r) for r in responses], True, 0),
    ]
    return {
        "prompts": pad_sequence(prompts, True, 0, "left"),
        "responses": pad_sequence(responses, True, 0),
        "attention_mask": torch.cat(attention, 1),
        "response_mask": pad_sequence([torch.tensor(trace.mask[a:b]).long() for a, b in bounds], True, 0),
        "rollout_log_probs": pad_sequence([torch.tensor(trace.logprobs[a:b]) for a, b in bounds], True, 0.0),
    }
