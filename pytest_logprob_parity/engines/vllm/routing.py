"""Runs in vLLM's worker: to which experts each decoded token was routed, seen in the forward pass that predicts it.

vLLM's own `enable_return_routed_experts` needs Model Runner V2; its routers can be watched without it. Beside the experts a
step keeps how close each choice was (`margins`) and a number of what the router was given (`inputs`): they tell a tie from a
router that chooses otherwise, and this from a router that was given something else.
"""

from __future__ import annotations

from typing import Any, Final

from .watched_rows import rows_of_step

#: Key in `SamplingParams.extra_args`: the number under which the routing of a request is kept; it is taken away by `take`.
ROUTED: Final = "logprob_parity_routed"
_ROUTERS: Final = "_logprob_parity_routers"
_STORE: Final = "_logprob_parity_routing"


class Routers:
    """The routers of a model in the order of its layers, and what each did in the last forward pass of T tokens.

    A call is the number of each token's input [T], its router logits [T, E] and the experts that were chosen [T, k].
    """

    def __init__(self, routers: list[Any]) -> None:
        self.biased = [place for place, router in enumerate(routers) if _is_biased(router)]
        self.calls: list[Any] = [None] * len(routers)
        self._directions: dict[int, Any] = {}
        for place, router in enumerate(routers):
            self._watch(place, router)

    def _watch(self, place: int, router: Any) -> None:
        original = router._compute_routing

        def compute(hidden_states: Any, router_logits: Any, *args: Any, **kwargs: Any) -> Any:
            inputs = hidden_states.float() @ self._direction(hidden_states)  # now: an expert may write into its input
            weights, ids = original(hidden_states, router_logits, *args, **kwargs)
            self.calls[place] = (inputs, router_logits, ids)
            return weights, ids

        router._compute_routing = compute

    def _direction(self, hidden_states: Any) -> Any:
        """A fixed direction [H], of which each token's input is told by its part along it."""
        import torch

        size = hidden_states.shape[-1]
        if size not in self._directions:
            self._directions[size] = torch.cos(torch.arange(size, device=hidden_states.device).float() * 12.9898)
        return self._directions[size]


def _is_biased(router: Any) -> bool:
    """Whether a router chooses by more than its logits: a bias of each expert, groups, a table."""
    names = ("e_score_correction_bias", "custom_routing_function", "_hash_indices_table")
    return any(getattr(router, name, None) is not None for name in names) or bool(getattr(router, "use_grouped_topk", False))


def watch_routers(runner: Any) -> int:
    """Watch the routers of this model runner's model from now on; how many there are, 0 where they cannot be watched.

    A compiled model is not watched: what runs then was traced before. Doing it twice does nothing.
    """
    if not hasattr(runner, _ROUTERS):
        config = getattr(runner, "vllm_config", None)
        eager = bool(getattr(getattr(config, "model_config", None), "enforce_eager", False))
        setattr(runner, _ROUTERS, Routers(_routers_of(runner.model)) if eager else None)
    found: Routers | None = getattr(runner, _ROUTERS)
    return len(found.calls) if found is not None else 0


def _routers_of(model: Any) -> list[Any]:
    """The routers of a model's layers, in their order."""
    layers = [module for module in model.modules() if hasattr(getattr(module, "router", None), "_compute_routing")]
    return [layer.router for layer in sorted(layers, key=lambda layer: int(getattr(layer, "layer_id", 0)))]


def keep_routing(runner: Any) -> None:
    """Keep the routing of the step that was just computed, of the requests whose parameters ask for it."""
    import torch

    routers: Routers | None = getattr(runner, _ROUTERS, None)
    if routers is None or not routers.calls:
        return
    rows, keys = rows_of_step(runner, ROUTED)
    if not rows or any(call is None for call in routers.calls):
        return
    starts = getattr(runner.query_start_loc, "np", None)
    starts = runner.query_start_loc_np if starts is None else starts
    last = torch.as_tensor(starts[1:][rows].astype("int64") - 1)
    last = last.to(routers.calls[0][2].device)
    experts = torch.stack([ids[last] for _, _, ids in routers.calls], dim=1).long()
    logits = torch.stack([logits[last] for _, logits, _ in routers.calls], dim=1).float()
    margins = logits.gather(-1, experts).amin(-1) - logits.scatter(-1, experts, float("-inf")).amax(-1)
    if routers.biased:
        margins[:, routers.biased] = float("nan")
    inputs = torch.stack([inputs[last] for inputs, _, _ in routers.calls], dim=1)
    step = (keys, experts.to(torch.int16).cpu(), margins.half().cpu(), inputs.half().cpu())
    runner.__dict__.setdefault(_STORE, []).append(step)


def take_routing(runner: Any) -> dict[str, tuple[list[int], bytes, bytes, bytes]]:
    """What was kept since the last time, by the number of the request: the shape [L, layers, k], and the bytes of the experts
    (int16, [L, layers, k]), margins and inputs (float16, [L, layers] each) of its L tokens. A position that is missing ends it.
    """
    import torch

    steps = getattr(runner, _STORE, [])
    if not steps:
        return {}
    keys = [key for step in steps for key in step[0]]
    columns = [torch.cat([step[place] for step in steps]) for place in (1, 2, 3)]
    rows: dict[int, dict[int, int]] = {}
    for row, (number, position) in enumerate(keys):  # a prompt in chunks has several rows for its first token: the last counts
        rows.setdefault(number, {})[position] = row
    taken = {}
    for number, places in rows.items():
        whole: list[int] = []
        while len(whole) in places:
            whole.append(places[len(whole)])
        experts, margins, inputs = (column[whole].numpy() for column in columns)
        taken[str(number)] = (list(experts.shape), experts.tobytes(), margins.tobytes(), inputs.tobytes())
    steps.clear()
    return taken
