"""What OpenRLHF's trainer has in hand: the fields of an Experience, here made of a trace, for this folder has no trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence


def experience_of(trace):
    rows, actions, logprobs = [], [], []
    for i in range(trace.num_sequences):
        prompt, (start, stop) = trace.prompt(i), trace.bounds(i)
        rows.append(torch.tensor(prompt + trace.completion(i)))
        nothing = torch.zeros(len(prompt) - 1)  # place t is for token t + 1
        actions.append(torch.cat([nothing.long(), torch.tensor(trace.mask[start:stop]).long()]))
        logprobs.append(torch.cat([nothing, torch.tensor(trace.logprobs[start:stop])]))
    return {
        "sequences": pad_sequence(rows, True, 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0),
        "action_mask": pad_sequence(actions, True, 0),
        "rollout_log_probs": pad_sequence(logprobs, True, 0.0),
    }
