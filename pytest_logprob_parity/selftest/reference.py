"""The truth about a fault: the same model in float64, with the same fault, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..engines.float64 import inverse_frequencies, norm_forward
from ..engines.transformers import process
from ..spec import Sampling
from ..trace import Trace
from .sites import State

_ATTENTION: Final = "logprob_parity_float64"


def load_checkpoint(folder: Path) -> State:
    """All tensors of a checkpoint, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


class Reference:
    """A transformers model in float64: norms, rotary embedding and attention too, which transformers does in float32.

    Implements Site. Prompts of a trace must all have one length. `logits` are computed in two passes: the prompts, and
    all completions of a prompt behind its cached keys and values.
    """

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        attention = f"{_ATTENTION}_{id(self)}"
        AttentionInterface.register(attention, self._attend)
        self._model = AutoModelForCausalLM.from_pretrained(
            str(model), dtype=torch.float64, attn_implementation=attention, local_files_only=True
        ).eval()
        self.checkpoint = load_checkpoint(model)
        for module in self._model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = norm_forward(module)
        self._epsilon = {m: m.variance_epsilon for m in self._model.modules() if hasattr(m, "variance_epsilon")}
        self._rotary = self._model.model.rotary_emb
        self._frequencies = inverse_frequencies(self._model.config, 2 * len(self._rotary.inv_freq))
        self._rotary.forward = self._rotate
        self._activation = [layer.mlp.act_fn for layer in self._model.model.layers]
        self._loaded = False
        self.undo()

    def undo(self) -> None:
        """Take every fault back."""
        import torch

        self._scale = 1.0
        self._change_frequencies: Callable[[Any], Any] = lambda x: x
        self._change_positions: Callable[[Any], Any] = lambda x: x
        self._change_keys_values: Callable[..., Any] | None = None
        self._change_logits: Callable[[Any], Any] = lambda x: x
        self._change_distribution: Callable[[Any, Any], Any] | None = None
        self._window: int | None = None
        for module, epsilon in self._epsilon.items():
            module.variance_epsilon = epsilon
        for activation in self._activation:
            vars(activation).pop("forward", None)
        if self._loaded:
            self._model.load_state_dict({k: v.to(torch.float64) for k, v in self.checkpoint.items()}, strict=False)
            self._loaded = False

    def weights(self, change: Callable[[State], State]) -> None:
        """See Site."""
        import torch

        self._model.load_state_dict({k: v.to(torch.float64) for k, v in change(self.checkpoint).items()}, strict=False)
        self._loaded = True

    def norm_epsilon(self, value: float) -> None:
        """See Site."""
        for module in self._epsilon:
            module.variance_epsilon = value

    def attention_scale(self, factor: float) -> None:
        """See Site."""
        self._scale = factor

    def window(self, size: int) -> None:
        """See Site."""
        self._window = size

    def rope(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        self._change_frequencies = change

    def positions(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        self._change_positions = change

    def keys_values(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """See Site."""
        self._change_keys_values = change

    def activation(self, function: Callable[[Any], Any]) -> None:
        """See Site."""
        for activation in self._activation:
            activation.forward = function

    def logits(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        self._change_logits = change

    def distribution(self, change: Callable[[Any, Any], Any]) -> None:
        """See Site."""
        self._change_distribution = change

    def read(self, trace: Trace, prompts: Sequence[Sequence[int]], sampling: Sampling, *, processed: bool = True) -> Trace:
        """The tokens of `trace` behind `prompts` (one for each of its prompts), with float64's logprobs and top-k.

        `sampling` is what the logits go through; `processed=False` reports them raw.
        """
        import torch

        with torch.no_grad():
            logits = self._change_logits(self._logits(trace, prompts))
            logprobs = self._process(logits, trace, prompts, sampling) if processed else logits.log_softmax(-1)
            chosen = logprobs.gather(-1, torch.tensor(trace.token_ids, dtype=torch.long)[:, None])[:, 0]
            top = logprobs.topk(trace.top_k)
        return trace.with_(
            logprobs=chosen.numpy().astype(np.float32),
            top_logprobs=top.values.numpy().astype(np.float32),
            top_token_ids=top.indices.numpy().astype(np.int32),
        )

    def _logits(self, trace: Trace, prompts: Sequence[Sequence[int]]) -> Any:
        """Logits [tokens, vocabulary] at the positions that predict the tokens of `trace`."""
        import torch

        length = len(prompts[0])
        longest = int(np.diff(trace.sequence_offsets).max())
        completions = torch.zeros((trace.num_sequences, longest), dtype=torch.long)
        rows = [trace.completion(i) for i in range(trace.num_sequences)]
        for i, row in enumerate(rows):
            completions[i, : len(row)] = torch.tensor(row)
        head = self._model.get_output_embeddings()
        pieces: list[Any] = []
        order: list[int] = []
        for groups in np.array_split(np.arange(len(prompts)), max(len(prompts) // 13, 1)):
            members = [i for i in range(trace.num_sequences) if int(trace.group[i]) in set(groups.tolist())]
            place = {int(g): n for n, g in enumerate(groups)}
            first = self._model.model(torch.tensor([list(prompts[g]) for g in groups]), use_cache=True)
            index = torch.tensor([place[int(trace.group[i])] for i in members])
            first.past_key_values.batch_select_indices(index)
            then = self._model.model(
                completions[members, :-1], past_key_values=first.past_key_values, use_cache=True,
                position_ids=torch.arange(length, length + longest - 1)[None],
            ).last_hidden_state  # fmt: skip
            hidden = torch.cat([first.last_hidden_state[index, -1:], then], 1)
            pieces += [head(hidden[n, : len(rows[i])]) for n, i in enumerate(members)]
            order += members
        return torch.cat([pieces[n] for n in np.argsort(order)])

    def _process(self, logits: Any, trace: Trace, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Any:
        """Logprobs [tokens, vocabulary] after penalties, temperature and truncation."""
        import torch

        if not (sampling.penalizes or sampling.truncates or self._change_distribution):
            return (logits / sampling.temperature).log_softmax(-1)
        processed, scaled = torch.empty_like(logits), torch.empty_like(logits)
        for i in range(trace.num_sequences):
            start, stop = trace.bounds(i)
            prompt, written = prompts[int(trace.group[i])], trace.completion(i)
            for row in range(start, stop):
                before = written[: row - start]
                processed[row] = process(logits[row], sampling, prompt, before, frozenset())
                scaled[row] = process(logits[row], sampling.untruncated(), prompt, before, frozenset())
        logprobs = processed.log_softmax(-1)
        return logprobs if self._change_distribution is None else self._change_distribution(scaled, logprobs)

    def _rotate(self, hidden: Any, position_ids: Any) -> tuple[Any, Any]:
        import torch

        angles = self._change_positions(position_ids)[..., None].double() * self._change_frequencies(self._frequencies)
        both = torch.cat([angles, angles], -1)
        return both.cos(), both.sin()

    def _attend(self, module: Any, query: Any, key: Any, value: Any, *_: Any, scaling: float, **__: Any) -> tuple[Any, None]:
        """Attention over all keys so far, [batch, heads, tokens, head size], causal, within the window if there is one."""
        import torch

        total, asked = key.shape[2], query.shape[2]
        if self._change_keys_values is not None:
            batch, heads = key.shape[:2]
            positions = torch.arange(total).repeat(batch)
            flat = [x.transpose(1, 2).reshape(batch * total, heads, -1) for x in (key, value)]
            changed = self._change_keys_values(module.layer_idx, positions, *flat)
            key, value = (x.view(batch, total, heads, -1).transpose(1, 2).to(key) for x in changed)
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        weights = query @ key.transpose(2, 3) * (scaling * self._scale)
        ahead = torch.arange(total)[None] - torch.arange(total - asked, total)[:, None]
        hidden = ahead > 0 if self._window is None else (ahead > 0) | (ahead <= -self._window)
        output = weights.masked_fill(hidden, -torch.inf).softmax(-1) @ value
        return output.transpose(1, 2).contiguous(), None
