"""What NeMo-RL's loss has in hand, here made of a trace, for this folder has no trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence


def batch_of(trace):
    rows, masks, logprobs = [], [], []
    for i in range(trace.num_sequences):
        prompt, (start, stop) = trace.prompt(i), trace.bounds(i)
        rows.append(torch.tensor(prompt + trace.completion(i)))
        nothing = torch.zeros(len(prompt))  # place t is for token t
        masks.append(torch.cat([nothing.long(), torch.tensor(trace.mask[start:stop]).long()]))
        logprobs.append(torch.cat([nothing, torch.tensor(trace.logprobs[start:stop])]))
    return {
        "input_ids": pad_sequence(rows, True, 0),
        "input_lengths": torch.tensor([len(row) for row in rows]),
        "token_mask": pad_sequence(masks, True, 0),
        "generation_logprobs": pad_sequence(logprobs, True, 0.0),
        "sample_mask": torch.ones(len(rows)),
    }
