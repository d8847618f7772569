"""What veRL's trainer has in hand: the tensors of a DataProto, here made of a trace, for this folder has no trainer."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM


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


def logprobs_of_trainer(batch, folder, temperature, dtype):
    """What the trainer makes of its batch [B, C]: one pass of the model over prompt and completion, divided by T."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    ids = torch.cat([batch["prompts"], batch["responses"]], 1)
    mask = batch["attention_mask"]
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, :-1].float() / temperature
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logprobs[:, -batch["responses"].shape[1] :]
