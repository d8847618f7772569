"""The truth about a fault: the same model in float64, with the same fault, on the same tokens.

The decoder is written here from its definition. It shares no arithmetic with the engines that are judged, nor with
transformers, from which goldens get their reference column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pytest_logprob_parity.selftest.truth import Doubles
from pytest_logprob_parity.spec import Sampling
from pytest_logprob_parity.trace import Trace

from .anatomy import Anatomy, State, load_checkpoint

#: Prompts that run in one batch, and logits (values) that are held at a time.
_PROMPTS: Final = 13
_LOGITS: Final = 8_000_000


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """What float64 says of the tokens of a trace: `logprobs` [N], nats, -inf where truncation excludes the token.

    `depth` [N]: by how many nats the logit of an excluded token would have to rise to be kept; NaN for kept ones. `trace` has
    the same logprobs and the top-k in float32, as an engine would report them.
    """

    logprobs: Doubles
    depth: Doubles
    trace: Trace


class Reference:
    """A decoder-only transformer in float64. Implements Site. Prompts of a trace must all have one length."""

    def __init__(self, folder: Path) -> None:
        self.anatomy = Anatomy.of(folder)
        self.checkpoint = load_checkpoint(folder)
        self._clean = self._doubles(self.checkpoint)
        self._hidden: tuple[Any, Any] | None = None
        self.undo()

    def undo(self) -> None:
        """Take every fault back."""
        self._weights: State = self._clean
        self._epsilon = self.anatomy.epsilon
        self._scale = self.anatomy.head_size**-0.5
        self._window: int | None = None
        self._change_frequencies: Callable[[Any], Any] | None = None
        self._change_positions: Callable[[Any], Any] | None = None
        self._change_keys_values: Callable[..., Any] | None = None
        self._activation: Callable[[Any], Any] | None = None
        self._change_routing: Callable[..., Any] | None = None
        self._change_logits: Callable[[Any], Any] = lambda x: x
        self._change_distribution: Callable[[Any, Any], Any] | None = None
        self._operated = False

    # -- the faults: see Site ------------------------------------------------------------------------------------------

    def weights(self, change: Callable[[State], State]) -> None:
        """See Site."""
        self._weights, self._operated = {**self._clean, **self._doubles(change(self.checkpoint))}, True

    def norm_epsilon(self, value: float) -> None:
        """See Site."""
        self._epsilon, self._operated = value, True

    def attention_scale(self, factor: float) -> None:
        """See Site."""
        self._scale, self._operated = self._scale * factor, True

    def window(self, size: int) -> None:
        """See Site."""
        self._window, self._operated = size, True

    def rope(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        self._change_frequencies, self._operated = change, True

    def positions(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        self._change_positions, self._operated = change, True

    def keys_values(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """See Site."""
        self._change_keys_values, self._operated = change, True

    def activation(self, function: Callable[[Any], Any]) -> None:
        """See Site."""
        self._activation, self._operated = function, True

    def routing(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """See Site."""
        self._change_routing, self._operated = change, True

    def logits(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        self._change_logits = change

    def distribution(self, change: Callable[[Any, Any], Any]) -> None:
        """See Site."""
        self._change_distribution = change

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, trace: Trace, prompts: Sequence[Sequence[int]], sampling: Sampling, *, processed: bool = True) -> Reading:
        """What float64 says of the tokens of `trace` behind `prompts` (one for each of its prompts).

        `sampling` is what the logits go through; `processed=False` reports them raw.
        """
        import torch

        parts: list[tuple[Any, ...]] = []
        with torch.no_grad():
            hidden = self._hidden_of(trace, prompts)
            size = max(_LOGITS // self.anatomy.vocabulary, 1)
            for start in range(0, trace.num_tokens, size):
                rows = range(start, min(start + size, trace.num_tokens))
                logits = self._change_logits(hidden[rows.start : rows.stop] @ self._weights[self.anatomy.head].T)
                if processed:
                    scaled = self._scaled(logits, rows, trace, prompts, sampling)
                    kept = truncated(scaled, sampling)
                else:
                    scaled = kept = logits
                logprobs = kept.log_softmax(-1)
                if processed and self._change_distribution is not None:
                    logprobs = self._change_distribution(scaled, logprobs)
                chosen = torch.tensor(trace.token_ids[rows.start : rows.stop], dtype=torch.long)[:, None]
                edge = scaled.masked_fill(logprobs.isneginf(), torch.inf).amin(-1)
                top = logprobs.topk(trace.top_k)
                said = logprobs.gather(-1, chosen)[:, 0]
                depth = (edge - scaled.gather(-1, chosen)[:, 0]).masked_fill(~said.isneginf(), torch.nan)
                parts.append((said.numpy(), depth.numpy(), top.values.numpy(), top.indices.numpy()))
        said, depth, values, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        columns = {
            "logprobs": said.astype(np.float32),
            "top_logprobs": values.astype(np.float32),
            "top_token_ids": ids.astype(np.int32),
        }
        return Reading(logprobs=said, depth=depth, trace=trace.with_(**columns))

    def _scaled(
        self, logits: Any, rows: range, trace: Trace, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> Any:  # fmt: skip
        """Logits [rows, vocabulary] after penalties and temperature."""
        if sampling.penalizes:
            logits = logits.clone()
            for row, (prompt, written) in zip(rows, _contexts(rows, trace, prompts), strict=True):
                _penalise(logits[row - rows.start], prompt, written, sampling)
        return logits if sampling.greedy else logits / sampling.applied_temperature

    # -- the model -----------------------------------------------------------------------------------------------------

    def _hidden_of(self, trace: Trace, prompts: Sequence[Sequence[int]]) -> Any:
        """Final hidden states [tokens, hidden] at the positions that predict the tokens of `trace`.

        Those of the model without a fault are kept for the next reading of the same tokens.
        """
        import torch

        key = (trace.token_ids.tobytes(), tuple(map(tuple, prompts)))
        if not self._operated and self._hidden is not None and self._hidden[0] == key:
            return self._hidden[1]
        lengths = np.diff(trace.sequence_offsets)
        completions = torch.zeros((trace.num_sequences, int(lengths.max())), dtype=torch.long)
        for i in range(trace.num_sequences):
            completions[i, : lengths[i]] = torch.tensor(trace.completion(i))
        pieces: list[Any] = [None] * trace.num_sequences
        for start in range(0, len(prompts), _PROMPTS):
            groups = range(start, min(start + _PROMPTS, len(prompts)))
            members = [i for i in range(trace.num_sequences) if int(trace.group[i]) in groups]
            first, cache = self._run(torch.tensor([list(prompts[g]) for g in groups]), [])
            owner = torch.tensor([int(trace.group[i]) - start for i in members], dtype=torch.long)
            then, _ = self._run(completions[members, :-1], [(k[owner], v[owner]) for k, v in cache])
            hidden = torch.cat([first[owner, -1:], then], 1)
            for n, i in enumerate(members):
                pieces[i] = hidden[n, : lengths[i]]
        result = torch.cat(pieces)
        if not self._operated:
            self._hidden = (key, result)
        return result

    def _run(self, ids: Any, past: Sequence[tuple[Any, Any]]) -> tuple[Any, list[tuple[Any, Any]]]:
        """Final hidden states [batch, length, hidden] of token ids [batch, length] behind cached keys and values.

        Keys and values are [batch, length, heads, head size], one pair for each layer; those so far are returned too.
        """
        import torch

        start = past[0][0].shape[1] if past else 0
        positions = torch.arange(start, start + ids.shape[1])
        cosines = self._cosines(positions)
        hidden = self._weights["model.embed_tokens.weight"][ids]
        cache = []
        for layer in range(self.anatomy.layers):
            name = f"model.layers.{layer}."
            before = self._norm(hidden, f"{name}input_layernorm.weight")
            query, key, value = self._projected(before, f"{name}self_attn.", cosines)
            if self._change_keys_values is not None:
                key, value = self._with_changed(layer, positions, key, value)
            if past:
                key, value = torch.cat([past[layer][0], key], 1), torch.cat([past[layer][1], value], 1)
            cache.append((key, value))
            mixed = self._attend(query, key, value, positions)
            hidden = hidden + self._linear(mixed, f"{name}self_attn.o_proj")
            hidden = hidden + self._mlp(self._norm(hidden, f"{name}post_attention_layernorm.weight"), layer, positions)
        return self._norm(hidden, "model.norm.weight"), cache

    def _projected(self, hidden: Any, name: str, cosines: tuple[Any, Any]) -> tuple[Any, Any, Any]:
        """Query, key and value [batch, length, heads, head size], the first two normed where the model does that, rotated."""
        parts = []
        for part in ("q", "k", "v"):
            projected = self._linear(hidden, f"{name}{part}_proj").unflatten(-1, (-1, self.anatomy.head_size))
            if f"{name}{part}_norm.weight" in self._weights:
                projected = self._norm(projected, f"{name}{part}_norm.weight")
            parts.append(projected if part == "v" else _rotated(projected, *cosines))
        return parts[0], parts[1], parts[2]

    def _with_changed(self, layer: int, positions: Any, key: Any, value: Any) -> tuple[Any, Any]:
        assert self._change_keys_values is not None
        shape = key.shape
        flat = (x.reshape(-1, *shape[2:]) for x in (key, value))
        changed_key, changed_value = self._change_keys_values(layer, positions.repeat(shape[0]), *flat)
        return changed_key.to(key).view(shape), changed_value.to(value).view(shape)

    def _attend(self, query: Any, key: Any, value: Any, positions: Any) -> Any:
        """Causal attention, within the window where there is one: [batch, length, heads x head size]."""
        import torch

        repeats = self.anatomy.heads // self.anatomy.key_value_heads
        query = query.transpose(1, 2)
        key, value = (x.transpose(1, 2).repeat_interleave(repeats, 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * self._scale
        ahead = torch.arange(key.shape[2])[None] - positions[:, None]
        hidden = ahead > 0 if self._window is None else (ahead > 0) | (ahead <= -self._window)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2).flatten(2)

    def _mlp(self, hidden: Any, layer: int, positions: Any) -> Any:
        """The layer's MLP, or its experts, of hidden states [batch, length, hidden]."""
        import torch

        if self.anatomy.router(layer) not in self._weights:
            return self._gated(hidden, self.anatomy.mlp(layer))
        flat = hidden.flatten(0, 1)
        logits = flat @ self._weights[self.anatomy.router(layer)].T
        shares, experts = logits.softmax(-1).topk(self.anatomy.experts_per_token)
        if self.anatomy.renormalises:
            shares = shares / shares.sum(-1, keepdim=True)
        if self._change_routing is not None:
            shares, experts = self._change_routing(layer, positions.repeat(hidden.shape[0]), shares, experts)
        total = torch.zeros_like(flat)
        for expert in range(self.anatomy.experts):
            rows, slots = torch.where(experts == expert)
            total.index_add_(0, rows, shares[rows, slots, None] * self._gated(flat[rows], self.anatomy.mlp(layer, expert)))
        return total.view(hidden.shape)

    def _gated(self, hidden: Any, names: tuple[str, str, str]) -> Any:
        gate, up, down = (name.removesuffix(".weight") for name in names)
        gates = self._linear(hidden, gate)
        active = gates * gates.sigmoid() if self._activation is None else self._activation(gates)
        return self._linear(active * self._linear(hidden, up), down)

    def _linear(self, hidden: Any, name: str) -> Any:
        result = hidden @ self._weights[f"{name}.weight"].T
        return result + self._weights[f"{name}.bias"] if f"{name}.bias" in self._weights else result

    def _norm(self, hidden: Any, name: str) -> Any:
        return hidden * (hidden.pow(2).mean(-1, keepdim=True) + self._epsilon) ** -0.5 * self._weights[name]

    def _cosines(self, positions: Any) -> tuple[Any, Any]:
        """Cosines and sines [length, 1, head size / 2] of the rotary embedding."""
        import torch

        size = self.anatomy.head_size
        frequencies = self.anatomy.rope_base ** (-torch.arange(0, size, 2).double() / size)
        if self._change_frequencies is not None:
            frequencies = self._change_frequencies(frequencies)
        if self._change_positions is not None:
            positions = self._change_positions(positions)
        angles = (positions.double()[:, None] * frequencies)[:, None]
        return angles.cos(), angles.sin()

    @staticmethod
    def _doubles(state: State) -> State:
        return {name: tensor.double() for name, tensor in state.items()}


def _rotated(x: Any, cosines: Any, sines: Any) -> Any:
    """Heads [batch, length, heads, head size], each pair (i, i + half) turned by its angle."""
    import torch

    a, b = x.chunk(2, -1)
    return torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)


def _contexts(rows: range, trace: Trace, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], list[int]]]:
    """The prompt and the tokens written so far, for each of the tokens `rows`."""
    sequences = trace.sequence_of_token
    for row in rows:
        sequence = int(sequences[row])
        start, _ = trace.bounds(sequence)
        yield prompts[int(trace.group[sequence])], trace.token_ids[start:row].tolist()


def _penalise(logits: Any, prompt: Sequence[int], written: Sequence[int], sampling: Sampling) -> None:
    """Apply penalties to logits [vocabulary] in place: repetition for prompt and completion, the others for the completion."""
    import torch

    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *written}))
        values, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if written:
        tokens, counts = torch.tensor(written).unique(return_counts=True)
        logits[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def truncated(scaled: Any, sampling: Sampling) -> Any:
    """Logits [rows, vocabulary] with -inf for what min-p, top-k and top-p exclude, one after the other."""
    import torch

    if sampling.greedy:
        return scaled
    if sampling.min_p > 0:
        likeliest = scaled.amax(-1, keepdim=True)  # ln(p / p_max) is the distance to the largest logit
        scaled = scaled.masked_fill(scaled - likeliest < np.log(sampling.min_p), -torch.inf)
    if 0 < sampling.top_k < scaled.shape[-1]:
        last = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < last, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scaled.sort(-1, descending=True)
        masses = ordered.softmax(-1)
        likelier = masses.cumsum(-1) - masses  # a token stays where those likelier than it hold less than top-p
        gone = (likelier >= sampling.top_p).scatter(-1, order, likelier >= sampling.top_p)
        scaled = scaled.masked_fill(gone, -torch.inf)
    return scaled
