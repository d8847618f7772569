"""What GRPOTrainer has in hand after generating: here made of a trace, for this folder has no trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM


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


def logprobs_of_trainer(batch, folder, temperature, dtype):
    """What the trainer makes of its batch [B, C]: one pass of the model over prompt and completion, divided by T."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float() / temperature
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logprobs[:, -batch["completion_ids"].shape[1] :]
