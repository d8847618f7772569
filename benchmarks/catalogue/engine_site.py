"""Plants faults in the model inside the worker of a started vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .anatomy import Anatomy, State
from .site import Shifts


class EngineSite:
    """The model in the worker of a vLLM that runs in this process, eager."""

    def __init__(self, worker: Any, checkpoint: State, anatomy: Anatomy) -> None:
        self._runner = worker.model_runner
        self._model = self._runner.get_model()
        self._layers = self._model.model.layers
        self._checkpoint = checkpoint
        self._anatomy = anatomy
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Take everything back, last first."""
        while self._undo:
            self._undo.pop()()

    def weights(self, change: Callable[[State], State]) -> None:
        """See Site."""
        self._undo.append(lambda: self._load(self._checkpoint))
        self._load({**self._checkpoint, **change(self._checkpoint)})

    def _load(self, state: State) -> None:
        self._runner.reload_weights(weights_iterator=iter(state.items()))
        for number, layer in enumerate(self._layers):
            if (block := _experts_of(layer)) is not None:
                self._load_experts(block.experts.routed_experts, number, state)

    def _load_experts(self, experts: Any, layer: int, state: State) -> None:
        """Load the experts of a layer as starting does: reloading packs them a second time (seen in 0.32.0 on CPUs)."""
        import torch

        names = [self._anatomy.mlp(layer, expert) for expert in range(self._anatomy.experts)]
        both = torch.stack([torch.cat([state[gate], state[up]]) for gate, up, _ in names])
        down = torch.stack([state[name] for _, _, name in names])
        kernel = getattr(getattr(experts.quant_method.moe_kernel, "impl", None), "fused_experts", None)
        isa = getattr(kernel, "isa", None)
        for parameter, weights in ((experts.w13_weight, both), (experts.w2_weight, down)):
            weights = weights.to(parameter.dtype)
            if isa is not None:
                from vllm._custom_ops import cpu_prepack_moe_weight

                weights = cpu_prepack_moe_weight(weights, isa)
            parameter.data.copy_(weights)

    def norm_epsilon(self, value: float) -> None:
        """See Site."""
        for module in self._model.modules():
            if hasattr(module, "variance_epsilon"):
                self._set(module, "variance_epsilon", value)

    def attention_scale(self, factor: float) -> None:
        """See Site."""
        for layer in self._layers:
            implementation = layer.self_attn.attn.impl
            self._set(implementation, "scale", implementation.scale * factor)

    def window(self, size: int) -> None:
        """See Site."""
        for layer in self._layers:
            self._set(layer.self_attn.attn.impl, "sliding_window", size)

    def rope(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        import torch

        for rotary in {id(layer.self_attn.rotary_emb): layer.self_attn.rotary_emb for layer in self._layers}.values():
            cache = rotary.cos_sin_cache
            frequencies = change(1.0 / rotary.base ** (torch.arange(0, rotary.rotary_dim, 2).double() / rotary.rotary_dim))
            angles = torch.outer(torch.arange(len(cache)).double(), frequencies)
            self._set(rotary, "cos_sin_cache", torch.cat([angles.cos(), angles.sin()], -1).to(cache))

    def positions(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        for layer in self._layers:
            self._before(layer.self_attn, lambda _, args, kwargs: (args, {**kwargs, "positions": change(kwargs["positions"])}))

    def keys_values(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """See Site."""
        seen = self._positions_of_step()
        for number, layer in enumerate(self._layers):
            attention = layer.self_attn

            def operate(_: Any, args: Any, kwargs: Any, number: int = number, attention: Any = attention) -> Any:
                query, *rest = args
                heads = [x.view(len(x), attention.num_kv_heads, attention.head_dim) for x in rest]
                changed = change(number, seen["positions"], *heads)
                return (query, *(c.to(x).reshape(x.shape) for c, x in zip(changed, rest, strict=True))), kwargs

            self._before(attention.attn, operate)

    def activation(self, function: Callable[[Any], Any]) -> None:
        """See Site."""

        def forward(both: Any) -> Any:
            gate, up = both.chunk(2, -1)
            return (function(gate.float()) * up.float()).to(both)

        for layer in self._layers:
            self._set(layer.mlp.act_fn, "forward", forward)

    def routing(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """See Site."""
        seen = self._positions_of_step()
        for number, layer in enumerate(self._layers):
            block = _experts_of(layer)
            if block is None:
                continue
            router = block.experts.router
            original = router._compute_routing

            def compute(*args: Any, number: int = number, original: Any = original, **kwargs: Any) -> tuple[Any, Any]:
                shares, experts = original(*args, **kwargs)
                changed = change(number, seen["positions"], shares, experts)
                return changed[0].to(shares).contiguous(), changed[1].to(experts).contiguous()

            self._set(router, "_compute_routing", compute)

    def logits(self, change: Callable[[Any], Any]) -> None:
        """See Site."""
        original = self._model.compute_logits
        self._set(self._model, "compute_logits", lambda *args, **kwargs: change(original(*args, **kwargs).float()))

    def distribution(self, change: Callable[[Any, Any], Any]) -> None:
        """See Site."""
        sampler = self._runner.sampler
        original = sampler.sample

        def sample(logits: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
            scaled = logits.float() / metadata.temperature[: len(logits), None]
            sampled, logprobs = original(logits, metadata, *args, **kwargs)
            return sampled, change(scaled, logprobs)

        self._set(sampler, "sample", sample)

    def shift(self, shifts: Shifts) -> None:
        """Report some tokens of forced requests wrongly: their logprob is off by so much, the others of that position hold the
        rest of the mass.
        """
        from pytest_logprob_parity.engines.vllm.forced_decode import FORCED

        sampler, runner = self._runner.sampler, self._runner
        original = sampler.sample

        def sample(*args: Any, **kwargs: Any) -> Any:
            sampled, logprobs = original(*args, **kwargs)
            for row, name in enumerate(runner.input_batch.req_ids):
                request = runner.requests[name]
                forced = (request.sampling_params.extra_args or {}).get(FORCED)
                position = len(request.output_token_ids)
                if forced is None or position >= len(forced):
                    continue
                by = shifts.get((tuple(request.prompt_token_ids), tuple(forced)))
                if by is not None and by[position]:
                    logprobs[row] = _with_shift(logprobs[row], forced[position], by[position])
            return sampled, logprobs

        self._set(sampler, "sample", sample)

    def _positions_of_step(self) -> dict[str, Any]:
        """Where the positions [tokens] of the step that runs are found, under `positions`."""
        seen: dict[str, Any] = {}

        def note(_: Any, args: Any, kwargs: Any) -> None:
            seen["positions"] = kwargs["positions"]

        for layer in self._layers:
            self._before(layer.self_attn, note)
        return seen

    def free_of_force(self, every: int) -> None:
        """Let one request in `every` draw its own tokens although it was told what to decode."""
        from pytest_logprob_parity.engines.vllm.forced_decode import FORCED

        sampler, runner = self._runner.sampler, self._runner
        original = sampler.sample

        def sample(*args: Any, **kwargs: Any) -> Any:
            for row, name in enumerate(runner.input_batch.req_ids):
                told = runner.requests[name].sampling_params.extra_args
                if row % every == 0 and told:
                    told.pop(FORCED, None)
            return original(*args, **kwargs)

        self._set(sampler, "sample", sample)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and remember what stood there, or that nothing of its own did."""
        own = name in vars(owner) or name in getattr(owner, "_buffers", {})
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, before) if own else delattr(owner, name))

    def _before(self, module: Any, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _experts_of(layer: Any) -> Any:
    """The module of a layer that holds a router and its experts; None in a dense layer."""
    block = getattr(layer, "block_sparse_moe", None) or layer.mlp
    return block if hasattr(block, "experts") else None


def _with_shift(logprobs: Any, token: int, by: float) -> Any:
    """Logprobs [vocabulary] in which one token's is off by `by` nats and the rest is scaled to make it a distribution."""
    before = logprobs[token].double()
    after = before + by
    rest = (-after.exp()).log1p() - (-before.exp()).log1p()
    changed = logprobs + rest.to(logprobs)
    changed[token] = after.to(logprobs)
    return changed
