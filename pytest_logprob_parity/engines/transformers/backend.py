"""transformers as an engine: the reference, one forward pass a step, no batching tricks, float64 where it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ... import machine
from ...checkpoint.adapter import Adapter, apply_adapter
from ...checkpoint.float64 import compute_in_float64
from ...checkpoint.lm_head import Head
from ...checkpoint.loading import load_whole
from ...checkpoint.prompts import banned_ids
from ...errors import EngineError, UsageError
from ...spec import EngineSpec, Sampling
from ...suggest import nearest
from ..backend import Completion, Request, ResolvedConfig
from ..readback import check_readback

#: Engine arguments that this engine knows besides the fields of EngineSpec.
SETTINGS: Final = ("logprobs_mode", "max_model_len", "attn_implementation", "head_dtype", "max_num_seqs", "continuous_batching")
#: Pins of a profile that hold here by construction: there is no cache across requests, no scheduler, no compiler.
_BY_NATURE: Final = {
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "enable_chunked_prefill": False,
    "enforce_eager": True,
    "generation_config": "vllm",
}


class TransformersBackend:
    """A transformers model in this process."""

    def __init__(self, model: Any, tokenizer: Any, spec: EngineSpec) -> None:
        self._model = model
        self._stop_ids = end_tokens_of(model, tokenizer)
        self._tokenizer = tokenizer
        asked = spec.pins(cpu=True)
        values = _BY_NATURE | {
            "seed": spec.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": asked.get("logprobs_mode", "raw_logprobs"),
            "max_model_len": asked.get("max_model_len", getattr(model.config, "max_position_embeddings", None)),
            "attn_implementation": model.config._attn_implementation,
            "head_dtype": asked.get("head_dtype", str(model.dtype).removeprefix("torch.")),
            "max_num_seqs": asked.get("max_num_seqs", 64),
        }
        values = self.values_of(asked, values)
        self._batch = int(str(values["max_num_seqs"]))
        self._head = Head(model, str(values["head_dtype"]))
        version = machine.installed_version("transformers") or "unknown"
        self.config = ResolvedConfig(
            engine="transformers",
            version=version,
            dtype=str(values["dtype"]),
            values=values,
            unverified=check_readback(asked, values, f"transformers {version}"),
            hardware=machine.hardware(),
            vocabulary=int(model.config.get_text_config().vocab_size),
        )

    @classmethod
    def start(cls, spec: EngineSpec, model: Path, tokenizer: Path, adapter: Adapter | None = None) -> TransformersBackend:
        """Load the model, with `adapter` merged into it.

        Raises UsageError for a setting this engine does not have, EngineError where it fails.
        """
        for name in spec.settings:
            if name not in SETTINGS:
                raise UsageError(f"engine='transformers' has no setting {name!r}{nearest(name, SETTINGS)}")
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:
            raise EngineError(f"transformers cannot be imported ({error}); install pytest-logprob-parity[trainer]") from None
        from ...checkpoint.prompts import tokenizer_of

        dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
        attention = (
            {"attn_implementation": spec.settings["attn_implementation"]} if "attn_implementation" in spec.settings else {}
        )
        loaded = load_whole(model, spec.model, torch_dtype=dtype, **attention)
        if adapter is not None:
            apply_adapter(loaded, adapter)
        if loaded.dtype == torch.float64:
            compute_in_float64(loaded)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(loaded.eval().to(device), tokenizer_of(tokenizer), spec)

    def values_of(self, asked: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """The values of the configuration: `values`, with what another way of decoding uses in their place."""
        return values | ({"continuous_batching": False} if "continuous_batching" in asked else {})

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """See Backend.run."""
        completions: list[Completion] = []
        if self._tokenizer is None and any(r.sampling.stop and r.scored_token_ids is None for r in requests):
            raise UsageError("Sampling(stop=...): the model's folder has no tokenizer to read texts with: use stop_token_ids")
        for start in range(0, len(requests), self._batch):
            completions += self._run_batch(requests[start : start + self._batch])
        return completions

    def close(self) -> None:
        """See Backend.close."""
        self._model = None

    def _run_batch(self, requests: Sequence[Request]) -> list[Completion]:
        import torch

        with torch.no_grad():
            scored = [r for r in requests if r.scored_token_ids is not None]
            if len(scored) == len(requests):
                return [self._score(request) for request in requests]
            if scored:
                raise EngineError("transformers: scoring and decoding requests cannot be mixed in one call")
            return self.decode(requests)

    def _logits(self, hidden: Any) -> Any:
        """Logits of hidden states; float32 at least, as samplers have them."""
        import torch

        logits = self._head.logits(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _score(self, request: Request) -> Completion:
        import torch

        tokens = [int(t) for t in request.scored_token_ids or ()]
        ids = torch.tensor([[*request.prompt_token_ids, *tokens]], device=self._model.device)
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        first = len(request.prompt_token_ids) - 1
        logprobs = self._logits(hidden[0, first:-1]).log_softmax(-1)
        chosen = torch.tensor(tokens, device=logprobs.device)
        return completion_of_rows(tokens, [gather(logprobs, chosen, request.sampling.logprobs)], "unknown", rows=True)

    def decode(self, requests: Sequence[Request]) -> list[Completion]:
        """Left-padded batch with a KV cache, one token a step for every request that has not ended."""
        import torch

        device = self._model.device
        width = max(len(r.prompt_token_ids) for r in requests)
        ids = torch.zeros((len(requests), width), dtype=torch.long, device=device)
        attention = torch.zeros_like(ids)
        for i, request in enumerate(requests):
            ids[i, width - len(request.prompt_token_ids) :] = torch.tensor(list(request.prompt_token_ids))
            attention[i, width - len(request.prompt_token_ids) :] = 1
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        generators = [generator_of(request, device) for request in requests]
        written: list[list[int]] = [[] for _ in requests]
        rows: list[list[Any]] = [[] for _ in requests]
        reasons = ["" for _ in requests]
        cache = None
        while not all(reasons):
            out = self._model.base_model(
                input_ids=ids, attention_mask=attention, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logits = self._logits(out.last_hidden_state[:, -1])
            taken = [0] * len(requests)
            for i, request in enumerate(requests):
                if reasons[i]:
                    continue
                taken[i], row = self._step(request, logits[i], written[i], generators[i])
                written[i].append(taken[i])
                rows[i].append(row)
                reasons[i] = self._end(request, written[i])
            ids = torch.tensor(taken, device=device)[:, None]
            attention = torch.cat([attention, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
        return [completion_of_rows(w, r, reason) for w, r, reason in zip(written, rows, reasons, strict=True)]

    def _step(self, request: Request, logits: Any, written: list[int], generator: Any) -> tuple[int, Any]:
        import torch

        sampling = request.sampling
        banned = banned_ids(self._tokenizer, sampling.bad_words)
        processed = process(logits, sampling, request.prompt_token_ids, written, self._stop_ids, banned)
        if request.forced_token_ids is not None:
            token = int(request.forced_token_ids[len(written)])
        elif sampling.greedy:
            token = int(processed.argmax())
        else:
            token = int(torch.multinomial(processed.softmax(-1), 1, generator=generator))
        source = processed if self.config.logprobs_mode == "processed_logprobs" else logits
        chosen = torch.tensor([token], device=logits.device)
        return token, gather(source.log_softmax(-1)[None], chosen, sampling.logprobs)

    def _end(self, request: Request, written: list[int]) -> str:
        sampling = request.sampling
        if request.forced_token_ids is not None:
            return "length" if len(written) == len(request.forced_token_ids) else ""
        if len(written) >= sampling.min_tokens:
            if written[-1] in sampling.stop_token_ids or (written[-1] in self._stop_ids and not sampling.ignore_eos):
                return "stop"
            if sampling.stop and any(s in self._tokenizer.decode(written, skip_special_tokens=True) for s in sampling.stop):
                return "stop"
        full = len(written) + len(request.prompt_token_ids) >= (self.config.max_model_len or 1 << 60)
        return "length" if len(written) == sampling.max_tokens or full else ""


def process(
    logits: Any, sampling: Sampling, prompt: Sequence[int], written: list[int], stop_ids: frozenset[int],
    banned: Sequence[Sequence[int]] = (),
) -> Any:  # fmt: skip
    """Logits [V] after named tokens, minimum length, penalties, temperature and truncation, in vLLM's order."""
    logits = penalize(logits, sampling, prompt, written, stop_ids, banned)
    return logits if sampling.greedy else truncate(logits, sampling)


def penalize(
    logits: Any, sampling: Sampling, prompt: Sequence[int], written: list[int], stop_ids: frozenset[int],
    banned: Sequence[Sequence[int]] = (),
) -> Any:  # fmt: skip
    """Logits [V] after named tokens, minimum length and penalties; `banned` are the token ids of the bad words."""
    import torch

    logits = logits.clone()
    if sampling.allowed_token_ids:
        kept = logits[list(sampling.allowed_token_ids)]
        logits.fill_(-torch.inf)[list(sampling.allowed_token_ids)] = kept
    for *before, last in banned:
        if not before or written[-len(before) :] == before:
            logits[last] = -torch.inf
    if len(written) < sampling.min_tokens:
        logits[sorted(stop_ids | set(sampling.stop_token_ids))] = -torch.inf
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *written}), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if written and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens, counts = torch.tensor(written, device=logits.device).unique(return_counts=True)
        logits[tokens] -= sampling.frequency_penalty * counts + sampling.presence_penalty
    return logits


def truncate(logits: Any, sampling: Sampling) -> Any:
    """Logits [..., V] after temperature, min-p, top-k and top-p, in vLLM's order: -inf where a token is left out."""
    import torch

    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
    if sampling.top_k > 0:
        kept = min(sampling.top_k, logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(kept).values[..., -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort()  # ascending: the tail whose mass stays within 1 - top_p goes
        tail = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), -torch.inf)
    return logits


def gather(logprobs: Any, chosen: Any, k: int) -> tuple[Any, Any, Any, Any]:
    """Logprob and rank [L] of the chosen tokens and the top k [L, k] of logprobs [L, V], as numpy."""
    values = logprobs.gather(-1, chosen[:, None])
    ranks = (logprobs > values).sum(-1) + 1
    top = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
    return tuple(x.cpu().numpy() for x in (values[:, 0], ranks, top.indices, top.values))


def completion_of_rows(tokens: Sequence[int], parts: list[Any], reason: str, *, rows: bool = False) -> Completion:
    """The columns of a completion, of what `gather` gave for each token, or with `rows` for all of them."""
    chosen, ranks, top_ids, top_logprobs = parts[0] if rows else (np.concatenate(column) for column in zip(*parts, strict=True))
    return Completion(
        token_ids=np.asarray(tokens, np.int32),
        logprobs=chosen.astype(np.float32),
        ranks=ranks.astype(np.int32),
        top_token_ids=top_ids.astype(np.int32),
        top_logprobs=top_logprobs.astype(np.float32),
        finish_reason=reason,
    )


def generator_of(request: Request, device: Any) -> Any:
    """Random numbers of a request's own seed."""
    import torch

    generator = torch.Generator(device=device)
    generator.manual_seed(request.seed or 0)
    return generator


def end_tokens_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """What ends a completion: the end tokens of tokenizer and model configuration, as vLLM takes them."""
    ids = {getattr(tokenizer, "eos_token_id", None)}
    for source in (model.config, model.generation_config):
        configured = getattr(source, "eos_token_id", None)
        ids |= set(configured) if isinstance(configured, (list, tuple)) else {configured}
    return frozenset(int(i) for i in ids if i is not None)
