"""Faults of a mixture of experts: wrong experts, too few of them, or experts in each other's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .anatomy import Anatomy, State
from .fault import Fault, each
from .site import Site
from .weight_faults import as_kept, quantised


def expert_faults(anatomy: Anatomy, length: int, tokens: int) -> Iterator[Fault]:
    """The faults for prompts of `length` tokens and completions of `tokens`; none for a dense model."""
    if not anatomy.experts:
        return
    everywhere, one = range(anatomy.layers), range(anatomy.layers // 2, anatomy.layers // 2 + 1)

    def weights(how: Callable[[State], State]) -> dict[str, Any]:
        return {"site": lambda site: site.weights(how)}

    yield from each("router's rows permuted", "experts", {
        "all layers": weights(_routers_rolled(anatomy, everywhere, 1)),
        "one layer": weights(_routers_rolled(anatomy, one, 1)),
        "one layer, by 1 %": weights(_routers_rolled(anatomy, one, 0.01)),
        "one layer, by 1e-5": weights(_routers_rolled(anatomy, one, 1e-5)),
    })  # fmt: skip
    yield from each("two experts swapped", "experts", {
        "all layers": weights(_swapped(anatomy, everywhere)), "one layer": weights(_swapped(anatomy, one)),
    })  # fmt: skip
    yield from each("an expert without output", "experts", {
        "all layers": weights(_silent(anatomy, everywhere, 0.0)),
        "one layer": weights(_silent(anatomy, one, 0.0)),
        "one layer, x 0.9999": weights(_silent(anatomy, one, 0.9999)),
    })  # fmt: skip
    yield from each("router in few bits", "experts", {f"int{bits}": weights(_few_bits(anatomy, bits)) for bits in (3, 4, 8)})
    yield from each("another expert for some tokens", "experts", {
        name: {"site": lambda site, every=every: site.routing(_another(anatomy, every))}
        for name, every in (("all", 1), ("1 position in 8", 8), ("1 position in 64", 64), ("1 position in 200", 200))
    })  # fmt: skip
    yield from each("one expert fewer", "experts", {
        "all layers": _routed(_fewer(everywhere, 0)), "one layer": _routed(_fewer(one, 0)),
    })  # fmt: skip
    yield from each("one expert fewer after a position", "experts", {
        f"{n} in": _routed(_fewer(everywhere, length + n)) for n in (tokens // 2, tokens - 2)
    })  # fmt: skip
    yield from each(
        "experts' shares scaled",
        "experts",
        {f"x {factor:g}": _routed(_shares_scaled(factor)) for factor in (0.7, 0.95, 0.9999)},
    )


def _routed(change: Callable[[int, Any, Any, Any], tuple[Any, Any]]) -> dict[str, Callable[[Site], None]]:
    return {"site": lambda site: site.routing(change)}


def _another(anatomy: Anatomy, every: int) -> Callable[[int, Any, Any, Any], tuple[Any, Any]]:
    """At one position in `every`, the experts next to the chosen ones, in every layer."""

    def change(_: int, positions: Any, shares: Any, experts: Any) -> tuple[Any, Any]:
        hit = (positions % every == 0)[:, None]
        return shares, experts.where(~hit, (experts + 1) % anatomy.experts)

    return change


def _fewer(layers: range, first: int) -> Callable[[int, Any, Any, Any], tuple[Any, Any]]:
    """From position `first` on, the least of the chosen experts is left out and the others take its share."""

    def change(layer: int, positions: Any, shares: Any, experts: Any) -> tuple[Any, Any]:
        if layer not in layers:
            return shares, experts
        least = shares.argmin(-1, keepdim=True)
        fewer = shares.scatter(-1, least, 0.0)
        fewer = fewer * shares.sum(-1, keepdim=True) / fewer.sum(-1, keepdim=True)
        return shares.where((positions < first)[:, None], fewer), experts

    return change


def _shares_scaled(factor: float) -> Callable[[int, Any, Any, Any], tuple[Any, Any]]:
    return lambda _, __, shares, experts: (shares * factor, experts)


def _few_bits(anatomy: Anatomy, bits: int) -> Callable[[State], State]:
    return lambda state: quantised(state, bits, _routers(anatomy, state))


def _routers(anatomy: Anatomy, state: State, layers: range | None = None) -> list[str]:
    return [name for layer in layers or range(anatomy.layers) if (name := anatomy.router(layer)) in state]


def _routers_rolled(anatomy: Anatomy, layers: range, amount: float) -> Callable[[State], State]:
    """Each row of the router in the place of the next one, or so much of the way there."""

    def change(state: State) -> State:
        return {
            name: as_kept(state[name], (1 - amount) * x + amount * x.roll(1, 0))
            for name in _routers(anatomy, state, layers)
            for x in [state[name].float()]
        }

    return change


def _swapped(anatomy: Anatomy, layers: range) -> Callable[[State], State]:
    """The first two experts in each other's place, with the router as it was."""
    return lambda state: {
        ours: state[theirs]
        for layer in layers
        for a, b in ((0, 1), (1, 0))
        for ours, theirs in zip(anatomy.mlp(layer, a), anatomy.mlp(layer, b), strict=True)
    }


def _silent(anatomy: Anatomy, layers: range, factor: float) -> Callable[[State], State]:
    """The output of the first expert, times `factor`."""

    def change(state: State) -> State:
        names = [anatomy.mlp(layer, 0)[2] for layer in layers]
        return {name: as_kept(state[name], state[name].float() * factor) for name in names}

    return change
