"""A transformers model in float64 all through: its norms and rotary embeddings compute in float32 whatever its dtype is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

#: A replacement is one where it agrees with what it replaces to so much: float32's rounding.
_SAME: Final = 1e-5


def compute_in_float64(model: Any) -> None:
    """Replace the norms and the rotary embedding of a float64 model by ones that compute in float64.

    A module whose arithmetic is another one (a norm with an offset, a scaled rotary embedding of some kind) is left alone:
    a replacement has to agree with it to 1e-5 on random input.
    """
    import torch

    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "variance_epsilon") and getattr(module, "weight", None) is not None:
                sample = torch.randn((2, 3, len(module.weight)), dtype=torch.float64, device=module.weight.device)
                _replace(module, norm_forward(module), (sample,))
            elif hasattr(module, "inv_freq") and hasattr(module, "attention_scaling"):
                positions = torch.arange(64, device=module.inv_freq.device)[None]
                hidden = torch.zeros((1, 64, 1), dtype=torch.float64, device=positions.device)
                _replace(module, _rotary_forward(module, model.config), (hidden, positions))


def norm_forward(module: Any) -> Callable[[Any], Any]:
    """RMSNorm's forward pass in the dtype of its input."""

    def forward(hidden: Any) -> Any:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return module.weight * hidden * (variance + module.variance_epsilon) ** -0.5

    return forward


def inverse_frequencies(config: Any, dimension: int) -> Any:
    """Rotary frequencies [dimension / 2] of the default kind, in float64."""
    import torch

    return 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dimension, 2).double() / dimension)


def _rotary_forward(module: Any, config: Any) -> Callable[..., Any]:
    import torch

    parameters = getattr(config, "rope_parameters", None) or {}
    frequencies = module.inv_freq.double()
    if parameters.get("rope_type", "default") == "default" and "rope_theta" in parameters:
        frequencies = inverse_frequencies(config, 2 * len(module.inv_freq)).to(module.inv_freq.device)

    def forward(hidden: Any, position_ids: Any) -> Any:
        angles = position_ids[..., None].double() * frequencies
        both = torch.cat([angles, angles], -1)
        return both.cos() * module.attention_scaling, both.sin() * module.attention_scaling

    return forward


def _replace(module: Any, forward: Callable[..., Any], sample: tuple[Any, ...]) -> None:
    def flat(result: Any) -> list[Any]:
        return list(result) if isinstance(result, tuple) else [result]

    before, after = flat(module(*sample)), flat(forward(*sample))
    if all(
        a.shape == b.shape and float((a.double() - b.double()).abs().max()) < _SAME for a, b in zip(before, after, strict=True)
    ):
        module.forward = forward
