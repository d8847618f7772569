"""From a transformers model's hidden states to logits, a piece at a time, the head in a precision of its own."""

from __future__ import annotations

from typing import Any, Final

from ..errors import UsageError

#: How far logits made of hidden states may be from those of the model's own forward pass, as a share of the largest.
_SAME: Final = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
_TRIED: Final = 8


class Head:
    """The language-model head of a causal transformers model.

    `dtype` is the precision that it multiplies in; by default the model's. A head that is tied to the embeddings is read
    from there, and its weights in another precision are a copy: the embeddings stay as they are.

    Raises UsageError for a model without a head, and for one whose own logits are not the head's of its hidden states (so
    that nothing is computed otherwise than the model does, in silence).
    """

    def __init__(self, model: Any, dtype: str | None = None) -> None:
        import torch

        layer = model.get_output_embeddings()
        if layer is None:
            raise UsageError(f"{type(model).__name__} has no language-model head: it gives no logprobs of tokens")
        self._model = model
        self._layer = layer
        own = str(layer.weight.dtype).removeprefix("torch.")
        self.dtype = dtype or own
        self._weight = None if self.dtype == own else layer.weight.detach().to(getattr(torch, self.dtype))
        bias = getattr(layer, "bias", None)
        self._bias = None if bias is None or self._weight is None else bias.detach().to(self._weight.dtype)
        config = model.config.get_text_config()
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._factor = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        self._check()

    def logits(self, hidden: Any) -> Any:
        """Logits [..., V] of hidden states [..., H], in `dtype`."""
        import torch

        if self._weight is None:
            logits = self._layer(hidden)
        else:
            logits = torch.nn.functional.linear(hidden.to(self._weight.dtype), self._weight, self._bias)
        if self._factor != 1:
            logits = logits * self._factor
        if self._cap:
            logits = self._cap * (logits / self._cap).tanh()
        return logits

    def _check(self) -> None:
        import torch

        tokens = torch.arange(_TRIED, device=self._layer.weight.device)[None] % self._model.config.get_text_config().vocab_size
        with torch.no_grad():
            whole = self._model(input_ids=tokens, use_cache=False).logits.double()
            pieces = self.logits(self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).double()
        room = max(_SAME.get(self.dtype, 0.05), _SAME.get(str(self._layer.weight.dtype).removeprefix("torch."), 0.05))
        apart = float((whole - pieces).abs().max() / whole.abs().max().clamp(min=1e-9))
        if not apart <= room:
            raise UsageError(
                f"{type(self._model).__name__} does more to its logits than head, soft cap and scale: {apart:.2g} of the "
                "largest is not explained; give a scorer that calls the model itself"
            )
