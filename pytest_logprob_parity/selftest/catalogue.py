"""The faults: what each does, in which sizes, and on which golden. Nothing here knows how a verdict comes about."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..spec import Sampling
from ..trace import Trace
from .sites import Site, State

#: The goldens that faults are planted against: how they are sampled. `plain` is recorded in every dtype.
GOLDENS: Final[Mapping[str, Mapping[str, Any]]] = {
    "plain": {},
    "top-p": {"top_p": 0.9},
    "top-k": {"top_k": 5},
    "penalty": {"repetition_penalty": 1.1},
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault in one size. What is given is planted together, in the engine's run and in the reference's.

    - `site` operates on the model, `settings` start another engine (the reference then gets `reference` instead)
    - `sampling` and `prompt` change what the engine is asked
    - `sequences` is how many sequences, `tokens` how many single tokens, carry the fault (0: all)
    - `trace` changes what was reported, after the run
    - `free_run` changes the trace whose seeds and sampling the free run takes; `unforced` frees one request in so many
    - `semantic` faults have a cause that is proven whatever its size: they may fail below the margins
    - `shared`: all sizes come out of one run, and differ in how many sequences carry it
    """

    name: str
    size: str
    golden: str = "plain"
    site: Callable[[Site], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[[Any], None] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    prompt: Callable[[list[int]], list[int]] | None = None
    sequences: int = 0
    tokens: int = 0
    trace: Callable[[Trace, np.random.Generator], Trace] | None = None
    free_run: Callable[[Trace], Trace] | None = None
    unforced: int = 0
    semantic: bool = False
    shared: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    @property
    def run_key(self) -> tuple[str, ...]:
        """Faults of equal keys need one run of the engine: they differ in `sequences`, `tokens` and `trace` alone."""
        inside = self.name if self.site is not None or self.prompt is not None else ""
        size = self.size if inside and not self.shared else ""
        return (inside, size, self.golden, str(sorted(self.settings.items())), str(sorted(self.sampling.items())))


#: What a diagnosis has to come to, by fault: the first is the truth, others mean the same thing under another name. What the
#: engine computes otherwise than the checkpoint says is its build; a request that saw other context, its cache or its batch.
_BUILD: Final = ("engine_build", "attention_backend")
_CONTEXT: Final = ("prefix_cache", "batch_shape", "chunked_prefill", "stale_kv_cache", "engine_build")
CAUSES: Final[Mapping[str, tuple[str, ...]]] = {
    "temperature": ("temperature",),
    "temperature applied twice": ("temperature", "raw_vs_processed"),
    "top-p another": ("truncation",),
    "top-k another": ("truncation",),
    "penalty left out": ("penalties", "raw_vs_processed"),
    "presence penalty slipped in": ("penalties",),
    "frequency penalty slipped in": ("penalties",),
    "min-p slipped in": ("truncation",),
    "top-k slipped in": ("truncation",),
    "padding leaks in": _CONTEXT,
    "prompt cut off": _CONTEXT,
    "raw for processed, unlabelled": ("raw_vs_processed", "temperature"),
    "raw for processed": ("raw_vs_processed",),
    "positions shifted by one": ("shifted_positions",),
    "another token's logprob (dict order)": ("wrong_token",),
    "log2 in place of ln": ("wrong_values",),
    "a neighbour's logprobs": ("wrong_token",),
    "the sequence's mean for every token": ("wrong_values",),
    "rounded logprobs": ("wrong_values",),
    "rounded to decimals": ("wrong_values",),
    "clipped logprobs": ("wrong_values",),
    "log(p + epsilon)": ("wrong_values",),
    "NaN": ("engine_build",),
    "top-p not renormalised": ("truncation",),
    "top-k not renormalised": ("truncation",),
    "vocabulary padding in the normaliser": ("wrong_values", "engine_build"),
    "logits rounded (head precision)": ("head_precision",),
    "logits soft-capped": _BUILD,
    "logit bias on a tenth of the vocabulary": _BUILD,
    "head in float32": ("head_precision",),
    "attention scale": _BUILD,
    "norm epsilon": _BUILD,
    "rope base": _BUILD,
    "rope scaling": _BUILD,
    "all positions moved": _BUILD,
    "activation": _BUILD,
    "keys and values in few bits": ("kv_cache_dtype", *_BUILD),
    "a stale KV block": ("stale_kv_cache", *_BUILD),
    "a stale KV block, few requests": _CONTEXT,
    "KV cache in 8 bits": ("kv_cache_dtype",),
    "sliding window": _BUILD,
    "tokens corrupted": ("wrong_values",),
    "sequences wrong": ("wrong_values",),
    "one token wild": ("wrong_values",),
    "a replica of another step": ("weights_differ",),
    "another seed stream": ("seed_stream",),
    "greedy for sampled": ("seed_stream",),
    "stops elsewhere": ("seed_stream",),
}


def causes_of(fault: Fault) -> tuple[str, ...]:
    """What a diagnosis of this fault may name; faults planted in the weights are of another checkpoint."""
    return CAUSES.get(fault.name, ("weights_differ",))


def catalogue(other_step: State, vocabulary: int) -> list[Fault]:
    """All faults. `other_step` is a later checkpoint of the same training (or {}: those faults are left out)."""
    faults = [*_sampling(), *_reporting(), *_distribution(vocabulary), *_model(), *_weights(), *_outliers(), *_free_runs()]
    if other_step:
        faults += _steps(other_step)
    return faults


def _each(name: str, sizes: Mapping[str, Mapping[str, Any]], **common: Any) -> Iterator[Fault]:
    for size, given in sizes.items():
        yield Fault(name=name, size=size, **{**common, **given})


def _spread(name: str, how: Mapping[str, Any], **common: Any) -> Iterator[Fault]:
    """The same fault in all sequences, in twenty, and in two."""
    for size, sequences in (("all", 0), ("20 sequences", 20), ("2 sequences", 2)):
        yield Fault(name=name, size=size, sequences=sequences, shared=True, **how, **common)


# -- what the engine is asked ------------------------------------------------------------------------------------------


def _sampling() -> Iterator[Fault]:
    def sizes(field_name: str, *values: float) -> dict[str, dict[str, Any]]:
        return {f"{v:g}": {"sampling": {field_name: v}} for v in values}

    yield from _each("temperature", {
        f"{percent:+g} %": {"sampling": {"temperature": 0.7 * (1 + percent / 100)}} for percent in (30, 5, 2, 0.1)
    })  # fmt: skip
    yield from _spread("temperature applied twice", {"sampling": {"temperature": 0.49}})
    yield from _each("top-p another", sizes("top_p", 0.7, 0.88, 0.8999), golden="top-p", dtypes=("bfloat16",))
    yield from _each("top-k another", sizes("top_k", 3, 4, 6), golden="top-k", dtypes=("bfloat16",))
    yield from _each("penalty left out", sizes("repetition_penalty", 1.0, 1.05, 1.0999), golden="penalty", dtypes=("float32",))
    yield from _each("presence penalty slipped in", sizes("presence_penalty", 0.5, 0.05, 0.0005))
    yield from _each("frequency penalty slipped in", sizes("frequency_penalty", 0.2, 0.02, 0.0002))
    yield from _each("min-p slipped in", sizes("min_p", 0.2, 0.02, 1e-7))
    yield from _each("top-k slipped in", sizes("top_k", 2, 10, 300))
    yield from _each("padding leaks in", {
        f"{n} tokens": {"prompt": lambda ids, n=n: [0] * n + ids} for n in (16, 4, 1)
    })  # fmt: skip
    yield from _each("prompt cut off", {f"{n} tokens": {"prompt": lambda ids, n=n: ids[n:]} for n in (80, 8, 1)})


# -- what is reported --------------------------------------------------------------------------------------------------


def _reported(change: Callable[[Any], Any]) -> Callable[[Trace, Any], Trace]:
    return lambda trace, _: trace.with_(logprobs=np.asarray(change(trace.logprobs), np.float32))


def _shifted(trace: Trace, _: Any) -> Trace:
    logprobs = np.roll(trace.logprobs, 1)
    logprobs[trace.sequence_offsets[:-1]] = trace.logprobs[trace.sequence_offsets[:-1]]
    return trace.with_(logprobs=logprobs)


def _swapped(trace: Trace, _: Any) -> Trace:
    """Every sequence reports its neighbour's logprobs, as far as both go."""
    logprobs = trace.logprobs.copy()
    for i in range(0, trace.num_sequences - 1, 2):
        (a, b), (c, d) = trace.bounds(i), trace.bounds(i + 1)
        n = min(b - a, d - c)
        logprobs[a : a + n], logprobs[c : c + n] = trace.logprobs[c : c + n], trace.logprobs[a : a + n]
    return trace.with_(logprobs=logprobs)


def _sequence_mean(trace: Trace, _: Any) -> Trace:
    means = [trace.logprobs[a:b].mean() for a, b in map(trace.bounds, range(trace.num_sequences))]
    return trace.with_(logprobs=np.repeat(np.array(means, np.float32), np.diff(trace.sequence_offsets)))


def _rounded(bits: int) -> Callable[[Any], Any]:
    """Round to `bits` of mantissa: 10 is float16, 7 bfloat16, 3 e4m3."""

    def round_(x: Any) -> Any:
        mantissa, exponent = np.frexp(x.astype(np.float64))
        return np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)

    return round_


def _decimals(count: int) -> Callable[[Any], Any]:
    return lambda x: np.round(x, count)


def _clipped(at: float) -> Callable[[Any], Any]:
    return lambda x: np.maximum(x, at)


def _lifted(by: float) -> Callable[[Any], Any]:
    return lambda x: np.log(np.exp(x.astype(np.float64)) + by)


def _reporting() -> Iterator[Fault]:
    yield from _spread("raw for processed, unlabelled", {"sampling": {"temperature": 1.0}})
    yield from _each("raw for processed", {
        "T=0.7": {}, "top-p": {"golden": "top-p", "dtypes": ("bfloat16",)},
        "penalty": {"golden": "penalty", "dtypes": ("float32",)},
    }, settings={"logprobs_mode": "raw_logprobs"}, semantic=True)  # fmt: skip
    yield from _spread("positions shifted by one", {"trace": _shifted})
    yield from _spread("another token's logprob (dict order)", {"trace": lambda t, _: t.with_(logprobs=t.top_logprobs[:, 0])})
    yield from _spread("log2 in place of ln", {"trace": _reported(lambda x: x / np.log(2))})
    yield from _spread("a neighbour's logprobs", {"trace": _swapped})
    yield from _spread("the sequence's mean for every token", {"trace": _sequence_mean})
    yield from _each("rounded logprobs", {
        name: {"trace": _reported(_rounded(bits))} for name, bits in (("e4m3", 3), ("bfloat16", 7), ("float16", 10))
    })  # fmt: skip
    yield from _each("rounded to decimals", {str(n): {"trace": _reported(_decimals(n))} for n in (1, 2, 5)})
    yield from _each("clipped logprobs", {f"at {v}": {"trace": _reported(_clipped(v))} for v in (-1, -4, -30)})
    yield from _each("log(p + epsilon)", {f"{v:g}": {"trace": _reported(_lifted(v))} for v in (1e-2, 1e-3, 1e-9)})
    yield from _spread("NaN", {"trace": lambda t, _: t.with_(logprobs=np.full_like(t.logprobs, np.nan))})


# -- from logits to a distribution -------------------------------------------------------------------------------------


def _not_renormalised(scaled: Any, logprobs: Any) -> Any:
    return scaled.log_softmax(-1).masked_fill(logprobs.isinf(), float("-inf"))


def _padded_vocabulary(rows: int) -> Callable[[Any, Any], Any]:
    def change(scaled: Any, logprobs: Any) -> Any:
        return logprobs - (rows * (-scaled.logsumexp(-1, keepdim=True)).exp()).log1p()

    return change


def _nudged(logits: Any, tokens: int, by: float) -> Any:
    logits = logits.clone()
    logits[..., :tokens] += by
    return logits


def _distribution(vocabulary: int) -> Iterator[Fault]:
    import torch

    def in_dtype(dtype: Any) -> Callable[[Site], None]:
        return lambda site: site.logits(lambda x: x.to(dtype).to(x))

    def softcap(cap: float) -> Callable[[Site], None]:
        return lambda site: site.logits(lambda x: cap * (x / cap).tanh())

    lost = {"site": lambda site: site.distribution(_not_renormalised)}
    yield from _spread("top-p not renormalised", lost, golden="top-p", dtypes=("bfloat16",))
    yield from _spread("top-k not renormalised", lost, golden="top-k", dtypes=("bfloat16",))
    yield from _each("vocabulary padding in the normaliser", {
        f"{rows} rows": {"site": lambda s, r=rows: s.distribution(_padded_vocabulary(r))} for rows in (10_000_000, 100_000, 64)
    })  # fmt: skip
    yield from _each("logits rounded (head precision)", {
        name: {"site": in_dtype(getattr(torch, name))} for name in ("float8_e4m3fn", "bfloat16", "float16")
    })  # fmt: skip
    yield from _each("logits soft-capped", {f"at {cap}": {"site": softcap(cap)} for cap in (10, 50, 3000)})
    yield from _each("logit bias on a tenth of the vocabulary", {
        f"{by:+g}": {"site": lambda s, by=by: s.logits(lambda x: _nudged(x, vocabulary // 10, by))} for by in (1.0, 0.1, 1e-5)
    })  # fmt: skip
    yield from _each("head in float32", {
        "all": {"sequences": 0}, "20 sequences": {"sequences": 20}, "2 sequences": {"sequences": 2},
    }, settings={"hf_overrides": {"head_dtype": "float32"}}, reference=in_dtype(torch.bfloat16),
       dtypes=("bfloat16",))  # fmt: skip


# -- the model's arithmetic --------------------------------------------------------------------------------------------


def _in_8_bits(dtype: Any) -> Callable[..., tuple[Any, Any]]:
    return lambda _, __, k, v: (k.to(dtype).to(k), v.to(dtype).to(v))


def _in_few_bits(bits: int) -> Callable[..., tuple[Any, Any]]:
    """Keys and values on a grid of 2^bits steps for each token and head."""

    def quantise(x: Any) -> Any:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
        return (x / step).round() * step

    return lambda _, __, k, v: (quantise(k), quantise(v))


def _stale_block(first: int, count: int) -> Callable[..., tuple[Any, Any]]:
    """Keys and values of some positions stand where another request left them: here, those of its neighbour's heads."""

    def change(_: int, positions: Any, k: Any, v: Any) -> tuple[Any, Any]:
        hit = ((positions >= first) & (positions < first + count))[:, None, None]
        return k.where(~hit, k.flip(-1)), v.where(~hit, v.flip(-1))

    return change


def _model() -> Iterator[Fault]:
    import torch

    yield from _each("attention scale", {
        f"{p:+g} %": {"site": lambda s, p=p: s.attention_scale(1 + p / 100)} for p in (30, 3, 0.01)
    })  # fmt: skip
    yield from _each("norm epsilon", {f"{v:g}": {"site": lambda s, v=v: s.norm_epsilon(v)} for v in (0.5, 1e-2, 2e-6)})
    yield from _each("rope base", {
        f"x {f:.7g}": {"site": lambda s, f=f: s.rope(lambda x, f=f: x * f ** (-2 * torch.arange(len(x)) / (2 * len(x))))}
        for f in (10, 1.1, 1.00001)
    })  # fmt: skip
    yield from _each(
        "rope scaling", {f"/ {f:.7g}": {"site": lambda s, f=f: s.rope(lambda x: x / f)} for f in (4, 1.05, 1.000001)}
    )
    yield from _each(
        "all positions moved", {f"by {n}": {"site": lambda s, n=n: s.positions(lambda p: p + n)} for n in (1, 16, 300)}
    )
    yield from _each("activation", {
        f"gate x {b:.7g}": {"site": lambda s, b=b: s.activation(lambda x: x * (b * x).sigmoid())}
        for b in (1.702, 1.05, 1.000001)
    })  # fmt: skip
    yield from _each("keys and values in few bits", {
        f"{bits}": {"site": lambda s, b=bits: s.keys_values(_in_few_bits(b))} for bits in (3, 6, 16)
    })  # fmt: skip
    yield from _each("a stale KV block", {
        name: {"site": lambda s, a=first, n=count: s.keys_values(_stale_block(a, n))}
        for name, first, count in (("128 positions", 16, 128), ("16 positions", 128, 16), ("1 position", 2, 1))
    })  # fmt: skip
    yield from _spread("a stale KV block, few requests", {"site": lambda s: s.keys_values(_stale_block(112, 48))})
    yield from _each("KV cache in 8 bits", {
        name: {
            "settings": {"kv_cache_dtype": f"fp8_{kind}"},
            "reference": lambda site, kind=kind: site.keys_values(
                _in_8_bits(torch.float8_e5m2 if kind == "e5m2" else torch.float8_e4m3fn)
            ),
            "sequences": sequences,
        }
        for name, kind, sequences in (("e5m2", "e5m2", 0), ("e4m3", "e4m3", 0), ("e4m3, 2 sequences", "e4m3", 2))
    })  # fmt: skip
    yield from _each("sliding window", {f"{n} tokens": {"site": lambda s, n=n: s.window(n)} for n in (16, 150, 512)})


# -- weights -----------------------------------------------------------------------------------------------------------


def _matching(state: State, part: str) -> list[str]:
    return [name for name in state if part in name]


def _noised(part: str, relative: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        import torch

        draws = torch.Generator().manual_seed(0)
        return {
            name: _as(state[name], x + relative * x.std() * torch.randn(x.shape, generator=draws))
            for name in _matching(state, part)
            for x in [state[name].float()]
        }

    return change


def _as(like: Any, values: Any) -> Any:
    """Values in the precision that checkpoints are kept in; both engine and reference load that."""
    return values.to(like.dtype)


def _quantised(bits: int) -> Callable[[State], State]:
    def change(state: State) -> State:
        changed = {}
        for name in _matching(state, "proj.weight"):
            x = state[name].float()
            step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            changed[name] = _as(state[name], (x / step).round() * step)
        return changed

    return change


def _truncated(bits: int) -> Callable[[State], State]:
    """Mantissas cut off towards zero after `bits` bits."""

    def change(state: State) -> State:
        import torch

        changed = {}
        for name in _matching(state, ".weight"):
            mantissa, exponent = torch.frexp(state[name].float())
            changed[name] = _as(state[name], torch.ldexp((mantissa * 2 ** (bits + 1)).trunc() / 2 ** (bits + 1), exponent))
        return changed

    return change


def _layers_swapped(amount: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        return {
            name: _as(x, (1 - amount) * x.float() + amount * state[name.replace(f"layers.{a}.", f"layers.{b}.")].float())
            for a, b in ((1, 2), (2, 1))
            for name, x in state.items()
            if f"layers.{a}." in name
        }

    return change


def _scaled(part: str, factor: float) -> Callable[[State], State]:
    return lambda state: {name: _as(state[name], state[name].float() * factor) for name in _matching(state, part)}


def _adapter(scale: float) -> Callable[[State], State]:
    """A low-rank update of the value projections, applied with a scale."""

    def change(state: State) -> State:
        import torch

        draws = torch.Generator().manual_seed(1)
        changed = {}
        for name in _matching(state, "v_proj.weight"):
            x = state[name].float()
            update = torch.randn(x.shape[0], 4, generator=draws) @ torch.randn(4, x.shape[1], generator=draws)
            changed[name] = _as(state[name], x + scale * x.std() / 2 * update)
        return changed

    return change


def _pruned(share: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        changed = {}
        for name in _matching(state, "proj.weight"):
            x = state[name].float()
            threshold = x.abs().flatten().kthvalue(max(int(share * x.numel()), 1)).values
            changed[name] = _as(state[name], x * (x.abs() > threshold))
        return changed

    return change


def _rows_noised(part: str, rows: slice, relative: float) -> Callable[[State], State]:
    def change(state: State) -> State:
        import torch

        draws = torch.Generator().manual_seed(2)
        (name,) = _matching(state, part)
        x = state[name].float().clone()
        x[rows] += relative * x.std() * torch.randn(x[rows].shape, generator=draws)
        return {name: _as(state[name], x)}

    return change


def _heads_swapped(amount: float) -> Callable[[State], State]:
    """The halves of the key projections change places: another order of shards."""

    def change(state: State) -> State:
        return {
            name: _as(state[name], (1 - amount) * x + amount * x.roll(len(x) // 2, 0))
            for name in _matching(state, "k_proj.weight")
            for x in [state[name].float()]
        }

    return change


def _weights() -> Iterator[Fault]:
    def sizes(how: Callable[..., Callable[[State], State]], given: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
        return {size: {"site": lambda s, values=values: s.weights(how(*values))} for size, values in given.items()}

    yield from _each("one layer noised", sizes(_noised, {f"{r:g}": ("layers.2.", r) for r in (0.3, 0.03, 1e-5)}))
    yield from _each("all weights noised", sizes(_noised, {f"{r:g}": (".weight", r) for r in (0.1, 0.01, 1e-5)}))
    yield from _each("integer weights", sizes(_quantised, {f"int{bits}": (bits,) for bits in (4, 8, 16)}))
    yield from _each("weights cut off", sizes(_truncated, {f"{bits} bits": (bits,) for bits in (3, 5, 7)}))
    yield from _each("two layers swapped", sizes(_layers_swapped, {f"{a:g}": (a,) for a in (1, 0.05, 1e-5)}))
    yield from _each("final norm gain", sizes(_scaled, {f"x {f:g}": ("model.norm.weight", f) for f in (1.3, 1.03, 1.0001)}))
    yield from _each("last MLP's gain", sizes(_scaled, {f"x {f:g}": ("layers.3.mlp.down", f) for f in (0.5, 0.97, 1.0001)}))
    yield from _each("query norm gain", sizes(_scaled, {f"x {f:g}": ("q_norm.weight", f) for f in (0.5, 0.97, 1.0001)}))
    yield from _each("adapter scale", sizes(_adapter, {f"{s:g}": (s,) for s in (0.3, 0.03, 1e-5)}))
    yield from _each("weights pruned", sizes(_pruned, {f"{100 * s:g} %": (s,) for s in (0.3, 0.05, 1e-5)}))
    yield from _each("KV heads in another order", sizes(_heads_swapped, {f"{a:g}": (a,) for a in (1, 0.05, 1e-5)}))
    yield from _each("head rows noised", sizes(_rows_noised, {
        f"{r:g}": ("lm_head.weight", slice(0, 40), r) for r in (1, 0.1, 1e-5)
    }))  # fmt: skip
    yield from _each("embedding rows noised", sizes(_rows_noised, {
        f"{r:g}": ("embed_tokens.weight", slice(0, 40), r) for r in (1, 0.05, 1e-5)
    }))  # fmt: skip


def _steps(other: State) -> Iterator[Fault]:
    def towards(part: str, amount: float) -> Callable[[Site], None]:
        def change(state: State) -> State:
            return {n: _as(state[n], state[n].float().lerp(other[n].float(), amount)) for n in _matching(state, part)}

        return lambda site: site.weights(change)

    yield from _each("weights of another step", {f"{a:g}": {"site": towards("", a)} for a in (1, 0.1, 1e-4)})
    yield from _each("one layer of another step", {f"{a:g}": {"site": towards("layers.3.", a)} for a in (1, 0.1, 1e-4)})
    yield from _each("a replica of another step", {
        f"{n} sequences": {"site": towards("", 1.0), "sequences": n} for n in (20, 4, 1)
    }, shared=True)  # fmt: skip


# -- few tokens, few sequences -----------------------------------------------------------------------------------------


def _outliers() -> Iterator[Fault]:
    def off(by: float) -> Callable[[Trace, Any], Trace]:
        return lambda trace, rng: trace.with_(
            logprobs=(trace.logprobs + by * rng.choice([-1, 1], trace.num_tokens)).astype(np.float32)
        )

    yield from _each("tokens corrupted", {f"{n} tokens": {"trace": off(3.0), "tokens": n} for n in (130, 13, 1)})
    yield from _each("sequences wrong", {f"{n} sequences": {"trace": off(1.0), "sequences": n} for n in (20, 4, 1)})
    yield from _each("one token wild", {f"{by:g} nats": {"trace": off(by), "tokens": 1} for by in (6.0, 1.0, 1e-3)})


# -- the free run ------------------------------------------------------------------------------------------------------


def _free_runs() -> Iterator[Fault]:
    def seeds(share: float) -> Callable[[Trace], Trace]:
        return lambda t: t.with_(seeds=np.where(np.arange(len(t.seeds)) < share * len(t.seeds), t.seeds + 1000, t.seeds))

    def sampled(**changes: Any) -> Callable[[Trace], Trace]:
        return lambda t: t.with_(sampling=dataclasses.replace(t.sampling, **changes))

    def longer(by: int) -> Callable[[Trace], Trace]:
        return lambda t: t.with_(sampling=dataclasses.replace(t.sampling, max_tokens=max(t.sampling.max_tokens + by, 1)))

    yield from _each("another seed stream", {
        name: {"free_run": seeds(share)} for name, share in (("all", 1.0), ("1 in 10", 0.1), ("1 in 100", 0.01))
    }, dtypes=("bfloat16",))  # fmt: skip
    yield from _each("greedy for sampled", {
        name: {"free_run": sampled(temperature=t)} for name, t in (("T=0", 0.0), ("T=0.1", 0.1), ("T=0.6", 0.6))
    }, dtypes=("bfloat16",))  # fmt: skip
    yield from _each("stops elsewhere", {
        f"max_tokens {by:+d}": {"free_run": longer(by)} for by in (-8, -1, 1)
    }, dtypes=("bfloat16",))  # fmt: skip
    yield from _each("a replay that did not force", {
        "all": {"unforced": 1}, "1 request in 10": {"unforced": 10}, "1 request in 200": {"unforced": 200},
    })  # fmt: skip


def sampling_of(fault: Fault, sampling: Sampling) -> Sampling:
    """The sampling that the fault's run is asked with."""
    return dataclasses.replace(sampling, **fault.sampling)
