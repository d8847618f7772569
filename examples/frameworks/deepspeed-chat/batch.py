"""What DeepSpeed-Chat's generate_experience returns, here made by a scorer in its trainer's place."""

import torch
from torch.nn.utils.rnn import pad_sequence


def experience_of(trace, scorer):
    prompts = [torch.tensor(trace.prompt(i)) for i in range(trace.num_sequences)]
    answers = [torch.tensor(trace.completion(i)) for i in range(trace.num_sequences)]
    left = pad_sequence(prompts, True, 0, "left")
    ids = torch.cat([left, pad_sequence(answers, True, 0)], 1)
    mask = (ids != 0).long()
    return {"prompts": left, "input_ids": ids, "attention_mask": mask, "logprobs": scorer(ids, mask, 1.0)}
