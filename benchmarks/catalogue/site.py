"""The operations that plant a fault in a model: on the engine and on the float64 reference they are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .anatomy import State

#: What is added to reported logprobs (nats), by prompt and completion: one number for each token of the completion.
Shifts = Mapping[tuple[tuple[int, ...], tuple[int, ...]], Sequence[float]]


class Site(Protocol):
    """A model that can be operated on, and restored by `undo`. Tensors are torch's, in the dtype of the model."""

    def weights(self, change: Callable[[State], State]) -> None:
        """Load other weights: `change` gets the whole checkpoint and returns the tensors that differ."""

    def norm_epsilon(self, value: float) -> None:
        """Set the epsilon of every RMS norm."""

    def attention_scale(self, factor: float) -> None:
        """Multiply the scale of every attention."""

    def window(self, size: int) -> None:
        """Let every token attend to itself and the `size - 1` tokens before it only."""

    def rope(self, change: Callable[[Any], Any]) -> None:
        """Change the inverse frequencies [head size / 2] of the rotary embedding."""

    def positions(self, change: Callable[[Any], Any]) -> None:
        """Change the positions [tokens] that the rotary embedding sees."""

    def keys_values(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """Change what attention reads: `change(layer, positions [tokens], keys, values [tokens, heads, head size])`."""

    def activation(self, function: Callable[[Any], Any]) -> None:
        """Put `function` in place of the MLP's activation of the gate."""

    def routing(self, change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> None:
        """Change which experts a token uses: `change(layer, positions [tokens], shares, experts)`, both [tokens, experts used].

        `experts` are their numbers, `shares` what each one's output is multiplied by. Dense layers have none.
        """

    def logits(self, change: Callable[[Any], Any]) -> None:
        """Change the logits [rows, vocabulary], in float32 or better, before anything is done with them."""

    def distribution(self, change: Callable[[Any, Any], Any]) -> None:
        """Change the reported logprobs: `change(scaled logits, logprobs)`, both [rows, vocabulary].

        Scaled logits are after penalties and temperature, before truncation.
        """
