"""The routers of a transformers model: which experts they choose, and forcing them to choose others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

#: Two computations of one router's weights agree up to this (a share, in bfloat16).
_ROUNDING: Final = 0.02


def routers_of(model: Any) -> list[Any]:
    """The routers of a transformers model in the order of its layers: modules that score `num_experts` and choose `top_k`.

    Empty for a dense model, and where the routers are no modules of their own (transformers before 5).
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return []
    return [module for module in model.modules() if _is_router(module)]


def _is_router(module: Any) -> bool:
    count = getattr(module, "num_experts", None)
    weight = getattr(module, "weight", None)
    return isinstance(getattr(module, "top_k", None), int) and weight is not None and tuple(weight.shape[:1]) == (count,)


@contextlib.contextmanager
def watched(routers: list[Any], forced: Any = None) -> Iterator[list[Any]]:
    """Within: what each router chose in the last forward pass, [rows, k] each.

    `forced` [rows, layers, k] are experts to use in place of the chosen ones, with the weights that the router's own logits
    give them; a row of -1 keeps the router's choice. Raises NotImplementedError for a router whose weights are made in
    another way than by a softmax.
    """
    chosen: list[Any] = [None] * len(routers)
    hooks = [router.register_forward_hook(_hook(place, chosen, forced)) for place, router in enumerate(routers)]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def _hook(place: int, chosen: list[Any], forced: Any) -> Any:
    def hook(router: Any, _inputs: Any, output: Any) -> Any:
        import torch

        logits, weights, experts = output
        if forced is not None:
            _check_softmax(router, logits, weights, experts)
            wanted = forced[:, place].to(experts.device).to(experts.dtype)
            experts = torch.where((wanted < 0).any(-1, keepdim=True), experts, wanted)
            output = (logits, _weights(router, logits, experts).to(weights.dtype), experts)
        chosen[place] = experts
        return output

    return hook


def _weights(router: Any, logits: Any, experts: Any) -> Any:
    """The weights [rows, k] that a softmax router gives these experts, in float32."""
    weights = logits.float().softmax(-1).gather(-1, experts)
    return weights / weights.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else weights


def _check_softmax(router: Any, logits: Any, weights: Any, experts: Any) -> None:
    again = _weights(router, logits, experts)
    if (again - weights.float()).abs().max() > _ROUNDING:
        raise NotImplementedError(f"{type(router).__name__} does not weigh its experts by a softmax")
