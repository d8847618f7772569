"""GSPO on a transformers model: what a trainer makes of the logprobs that an engine reports with its rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from pytest_logprob_parity import Trace

#: GSPO clips the ratio of a whole sequence, exp of its mean difference. The paper's 3e-4 is for completions of thousands of
#: tokens; these have 25.
CLIP = 0.003
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Step:
    """What a trainer saw of one batch before it stepped: its logprobs [N] of the rollouts' tokens, their entropy (nats), and
    the share of sequences whose ratio was clipped."""

    logprobs: np.ndarray
    entropy: float
    clipped: float


class Trainer:
    """A policy in float32 with its optimizer."""

    def __init__(self, model: str, temperature: float) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32, local_files_only=True)
        self._temperature = temperature
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the policy's tensors, as an engine takes them: by checkpoint names, in the checkpoint's dtype."""
        return {name: tensor.detach().to(torch.bfloat16) for name, tensor in self.model.state_dict().items()}

    def step(self, rollouts: Trace, rewards: Sequence[float]) -> Step:
        """One optimizer step on one batch; the ratio is to the logprobs that came with the rollouts."""
        ids, mask, completion = _batch(rollouts)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float() / self._temperature
        distribution = logits.log_softmax(-1)
        new = distribution.gather(-1, ids[:, 1:, None])[..., 0]
        old = torch.zeros_like(new)
        old[completion] = torch.tensor(rollouts.logprobs)
        length = completion.sum(-1).clamp(min=1)
        ratio = (((new - old) * completion).sum(-1) / length).exp()
        advantage = _advantages(rollouts, rewards)
        inside = ratio.clamp(1 - CLIP, 1 + CLIP)
        gained = torch.minimum(ratio * advantage, inside * advantage)
        self._optimizer.zero_grad()
        (-gained.mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        with torch.no_grad():
            entropy = -(distribution.exp() * distribution).sum(-1)[completion].mean()
            clipped = (ratio * advantage > inside * advantage).float().mean()
        return Step(new[completion].detach().numpy(), float(entropy), float(clipped))


def _batch(rollouts: Trace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids and attention mask [B, L], and which of the tokens from the second one on are the completions' [B, L - 1]."""
    rows = [[*rollouts.prompt(i), *rollouts.completion(i)] for i in range(rollouts.num_sequences)]
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    mask, completion = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
        completion[n, len(rollouts.prompt(n)) : len(row)] = True
    return ids, mask, completion[:, 1:]


def _advantages(rollouts: Trace, rewards: Sequence[float]) -> torch.Tensor:
    """GRPO's: the reward less its group's mean, over its group's standard deviation [B]."""
    values, group = torch.tensor(rewards), torch.tensor(np.asarray(rollouts.group))
    advantage = torch.zeros_like(values)
    for g in group.unique():
        own = values[group == g]
        advantage[group == g] = (own - own.mean()) / (own.std() + 1e-4)
    return advantage
