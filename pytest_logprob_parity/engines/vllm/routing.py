"""Runs in vLLM's worker: to which experts each decoded token was routed, seen in the forward pass that predicts it.

vLLM's own `enable_return_routed_experts` needs Model Runner V2; its routers can be watched without it. Beside the experts a
step keeps how close each choice was (`margins`) and a number of what the router was given (`inputs`): they tell a tie from a
router that chooses otherwise, and this from a router that was given something else.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

#: Key in `SamplingParams.extra_args`: the number under which the routing of a request is kept; it is taken away by `take`.
ROUTED: Final = "logprob_parity_routed"
_ROUTERS: Final = "_logprob_parity_routers"
_STORE: Final = "_logprob_parity_routing"
#: A request that wrote nothing for so many seconds was aborted, or its client has left.
_LONGEST_SECONDS: Final = 3600.0
#: Bytes of one answer of `take_routing`, about; it has one whole request at least.
_MOST_BYTES: Final = 8 * 2**20

#: One request: the shape [L, layers, k], and as base64 its experts (int16), margins and inputs (float16), little-endian.
PackedRouting = tuple[list[int], str, str, str]


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
    rows: list[int] = []
    keys: list[tuple[int, int]] = []
    for row, request_id in enumerate(runner.input_batch.req_ids):
        request = runner.requests[request_id]
        extra = getattr(request.sampling_params, "extra_args", None)
        if isinstance(extra, dict) and type(number := extra.get(ROUTED)) is int:
            rows.append(row)
            keys.append((number, len(request.output_token_ids)))
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
    columns = (experts.to(torch.int16).cpu().numpy(), margins.half().cpu().numpy(), inputs.half().cpu().numpy())
    runner.__dict__.setdefault(_STORE, Store()).keep(keys, columns)


class Store:
    """The routing that one worker keeps of the requests that ask for it: by number, then by position."""

    def __init__(self) -> None:
        self._requests: dict[int, dict[int, tuple[Any, int]]] = {}
        self._touched: dict[int, float] = {}

    def keep(self, keys: list[tuple[int, int]], columns: tuple[Any, Any, Any]) -> None:
        """Keep one step: for each (number, position) a row of the columns.

        A request that is preempted, or whose prompt comes in chunks, writes over what it wrote before.
        """
        now = time.monotonic()
        for row, (number, position) in enumerate(keys):
            if position == 0 and number not in self._requests:
                self._drop_old(now)
                self._requests[number] = {}
            if number in self._requests:  # a later position of another is of a request that was dropped
                self._requests[number][position] = (columns, row)
                self._touched[number] = now

    def take(self, number: int) -> PackedRouting | None:
        """The routing of one request, which is no longer kept then; None where there is none or a position is missing."""
        places = self._requests.pop(number, None)
        self._touched.pop(number, None)
        if not places or any(position not in places for position in range(len(places))):
            return None
        rows = [places[position] for position in range(len(places))]
        whole = [np.stack([columns[place][row] for columns, row in rows]) for place in (0, 1, 2)]
        experts, margins, inputs = (
            base64.b64encode(column.astype(dtype).tobytes()).decode()
            for column, dtype in zip(whole, ("<i2", "<f2", "<f2"), strict=True)
        )
        return list(whole[0].shape), experts, margins, inputs

    def _drop_old(self, now: float) -> None:
        for number in [n for n, touched in self._touched.items() if now - touched > _LONGEST_SECONDS]:
            del self._requests[number], self._touched[number]


def take_routing(worker: Any, numbers: Sequence[int]) -> dict[str, PackedRouting]:
    """What was kept of the requests of these numbers, by the number as text: they are no longer kept then.

    Large answers come in parts: ask again for the numbers that an answer lacks, until one has none.
    """
    store: Store | None = getattr(worker.model_runner, _STORE, None)
    taken: dict[str, PackedRouting] = {}
    size = 0
    for number in numbers if store is not None and isinstance(numbers, (list, tuple)) else ():
        if size > _MOST_BYTES:
            break
        packed = store.take(number) if store is not None and type(number) is int else None
        if packed is not None:
            taken[str(number)] = packed
            size += sum(map(len, packed))
    return taken
