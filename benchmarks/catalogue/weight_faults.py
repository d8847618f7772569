"""Faults of the weights: noise, rounding, another step, parts in each other's place, one shard wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .anatomy import Anatomy, State
from .fault import Fault, each, sequences
from .site import Site


def weight_faults(anatomy: Anatomy, checkpoint: State) -> Iterator[Fault]:
    """The faults of one checkpoint. Changed tensors stay in the dtype of the checkpoint: engine and reference load the same."""

    def sizes(
        how: Callable[..., Callable[[State], State]], arguments: Mapping[str, Sequence[Any]]
    ) -> dict[str, dict[str, Any]]:
        return {size: {"site": lambda s, values=values: s.weights(how(*values))} for size, values in arguments.items()}

    middle, last = anatomy.layers // 2, anatomy.layers - 1
    down = "." + ".".join(anatomy.mlp(last, 0 if anatomy.experts else None)[2].rsplit(".", 2)[1:])
    yield from each("one layer noised", "weights", sizes(_noised, {
        f"{r:g}": (f"layers.{middle}.", r) for r in (0.3, 0.03, 1e-5)
    }))  # fmt: skip
    yield from each("all weights noised", "weights", sizes(_noised, {f"{r:g}": (".weight", r) for r in (0.1, 0.01, 1e-5)}))
    yield from each("integer weights", "weights", {
        f"int{bits}": {"site": lambda s, bits=bits: s.weights(lambda state: quantised(state, bits, _matrices(state)))}
        for bits in (4, 8, 16)
    })  # fmt: skip
    yield from each("weights cut off", "weights", sizes(_truncated, {f"{bits} bits": (bits,) for bits in (3, 5, 7)}))
    yield from each("two layers swapped", "weights", sizes(_layers_swapped, {f"{a:g}": (middle, a) for a in (1, 0.05, 1e-5)}))
    yield from each("final norm gain", "weights", sizes(_scaled, {
        f"x {f:g}": (f, "model.norm.weight") for f in (1.3, 1.03, 1.0001)
    }))  # fmt: skip
    yield from each("last MLP's gain", "weights", sizes(_scaled, {
        f"x {f:g}": (f, f"layers.{last}.", down) for f in (0.5, 0.97, 1.0001)
    }))  # fmt: skip
    if any("q_norm" in name for name in checkpoint):
        yield from each("query norm gain", "weights", sizes(_scaled, {
            f"x {f:g}": (f, "q_norm.weight") for f in (0.5, 0.97, 1.0001)
        }))  # fmt: skip
    yield from each("adapter scale", "weights", sizes(_adapter, {f"{s:g}": (s,) for s in (0.3, 0.03, 1e-5)}))
    yield from each("weights pruned", "weights", sizes(_pruned, {f"{100 * s:g} %": (s,) for s in (0.3, 0.05, 1e-5)}))
    yield from each("KV heads in another order", "weights", sizes(_heads_swapped, {f"{a:g}": (a,) for a in (1, 0.05, 1e-5)}))
    tenth = slice(0, anatomy.vocabulary // 10)
    yield from each("head rows noised", "weights", sizes(_rows, {
        f"{r:g}": (anatomy.head, tenth, _noise(r)) for r in (1, 0.1, 1e-5)
    }))  # fmt: skip
    if not anatomy.tied:
        yield from each("embedding rows noised", "weights", sizes(_rows, {
            f"{r:g}": ("model.embed_tokens.weight", tenth, _noise(r)) for r in (1, 0.05, 1e-5)
        }))  # fmt: skip
    yield from _shards(anatomy)


def _shards(anatomy: Anatomy) -> Iterator[Fault]:
    """One shard of the LM head or of the embedding is wrong: the rows of a quarter of the vocabulary, or of a sixteenth."""
    size = anatomy.vocabulary
    quarter, sixteenth = slice(size // 4, size // 2), slice(size // 2, size // 2 + size // 16)
    hows: dict[str, tuple[slice, Callable[[Any], Any]]] = {
        "rows off by one": (quarter, lambda x: x.roll(1, 0)),
        "zeros": (quarter, lambda x: 0 * x),
        "noised, 0.3": (quarter, _noise(0.3)),
        "noised, 0.03": (quarter, _noise(0.03)),
        "x 1.1": (quarter, lambda x: 1.1 * x),
        "x 1.0001": (quarter, lambda x: 1.0001 * x),
        "a sixteenth, rows off by one": (sixteenth, lambda x: x.roll(1, 0)),
        "a sixteenth, zeros": (sixteenth, lambda x: 0 * x),
    }
    names = {"the LM head" if not anatomy.tied else "the tied embedding": anatomy.head}
    if not anatomy.tied:
        names["the embedding"] = "model.embed_tokens.weight"
    for part, tensor in names.items():
        yield from each(f"one shard of {part}", "place", {
            size: {"site": lambda s, tensor=tensor, rows=rows, how=how: s.weights(_rows(tensor, rows, how))}
            for size, (rows, how) in hows.items()
        })  # fmt: skip


def step_faults(other: State) -> Iterator[Fault]:
    """The faults of an engine that has the weights, or some, of a later step of the same training."""
    last = max((int(name.split(".")[2]) for name in other if name.startswith("model.layers.")), default=0)

    def towards(part: str, amount: float) -> Callable[[Site], None]:
        def change(state: State) -> State:
            return {n: as_kept(state[n], state[n].float().lerp(other[n].float(), amount)) for n in _matching(state, part)}

        return lambda site: site.weights(change)

    yield from each("weights of another step", "weights", {f"{a:g}": {"site": towards("", a)} for a in (1, 0.1, 1e-4)})
    yield from each("one layer of another step", "weights", {
        f"{a:g}": {"site": towards(f"layers.{last}.", a)} for a in (1, 0.1, 1e-4)
    })  # fmt: skip
    yield from each("a replica of another step", "weights", {
        f"{n} sequences": {"where": sequences(n)} for n in (20, 4, 1)
    }, site=towards("", 1.0), run="another step")  # fmt: skip


def as_kept(like: Any, values: Any) -> Any:
    """Values in the dtype that the checkpoint keeps `like` in."""
    return values.to(like.dtype)


def quantised(state: State, bits: int, names: Iterable[str]) -> State:
    """The named matrices with each row on a grid of 2^bits steps."""
    changed = {}
    for name in names:
        x = state[name].float()
        step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        changed[name] = as_kept(state[name], (x / step).round() * step)
    return changed


def _matching(state: State, *parts: str) -> list[str]:
    return [name for name in state if all(part in name for part in parts)]


def _matrices(state: State) -> list[str]:
    """The projections of all layers; not the routers, which quantisation leaves alone."""
    return [n for n in state if ".layers." in n and n.endswith(".weight") and state[n].dim() == 2 and ".gate." not in n]


def _noised(part: str, relative: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        import torch

        draws = torch.Generator().manual_seed(0)
        return {
            name: as_kept(state[name], x + relative * x.std() * torch.randn(x.shape, generator=draws))
            for name in _matching(state, part)
            for x in [state[name].float()]
        }

    return change


def _truncated(bits: int) -> Callable[[State], State]:
    """Mantissas cut off towards zero after `bits` bits."""

    def change(state: State) -> State:
        import torch

        changed = {}
        for name in _matching(state, ".weight"):
            mantissa, exponent = torch.frexp(state[name].float())
            cut = torch.ldexp((mantissa * 2 ** (bits + 1)).trunc() / 2 ** (bits + 1), exponent)
            changed[name] = as_kept(state[name], cut)
        return changed

    return change


def _layers_swapped(middle: int, amount: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        return {
            name: as_kept(x, (1 - amount) * x.float() + amount * state[name.replace(f"layers.{a}.", f"layers.{b}.")].float())
            for a, b in ((middle - 1, middle), (middle, middle - 1))
            for name, x in state.items()
            if f"layers.{a}." in name
        }

    return change


def _scaled(factor: float, *parts: str) -> Callable[[State], State]:
    return lambda state: {name: as_kept(state[name], state[name].float() * factor) for name in _matching(state, *parts)}


def _adapter(scale: float) -> Callable[[State], State]:
    """A low-rank update of the value projections, applied with a scale."""

    def change(state: State) -> State:
        import torch

        draws = torch.Generator().manual_seed(1)
        changed = {}
        for name in _matching(state, "v_proj.weight"):
            x = state[name].float()
            update = torch.randn(x.shape[0], 4, generator=draws) @ torch.randn(4, x.shape[1], generator=draws)
            changed[name] = as_kept(state[name], x + scale * x.std() / 2 * update)
        return changed

    return change


def _pruned(share: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        changed = {}
        for name in _matrices(state):
            x = state[name].float()
            threshold = x.abs().flatten().kthvalue(max(int(share * x.numel()), 1)).values
            changed[name] = as_kept(state[name], x * (x.abs() > threshold))
        return changed

    return change


def _heads_swapped(amount: float) -> Callable[[State], State]:
    """The halves of the key projections change places: another order of shards."""

    def change(state: State) -> State:
        return {
            name: as_kept(state[name], (1 - amount) * x + amount * x.roll(len(x) // 2, 0))
            for name in _matching(state, "k_proj.weight")
            for x in [state[name].float()]
        }

    return change


def _rows(name: str, rows: slice, how: Callable[[Any], Any]) -> Callable[[State], State]:
    """Some rows of one tensor changed."""

    def change(state: State) -> State:
        x = state[name].float().clone()
        x[rows] = how(x[rows])
        return {name: as_kept(state[name], x)}

    return change


def _noise(relative: float) -> Callable[[Any], Any]:
    def how(x: Any) -> Any:
        import torch

        return x + relative * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    return how
