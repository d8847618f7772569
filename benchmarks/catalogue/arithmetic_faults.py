"""Faults of the model's arithmetic: attention, norms, positions, keys and values, activation, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .anatomy import Anatomy
from .fault import Fault, each, sequences, spread
from .site import Site


def model_faults(anatomy: Anatomy) -> Iterator[Fault]:
    """The faults of one model."""
    import torch

    yield from each("attention scale", "model", {
        f"{p:+g} %": {"site": lambda s, p=p: s.attention_scale(1 + p / 100)} for p in (30, 3, 0.01)
    })  # fmt: skip
    yield from each("norm epsilon", "model", {f"{v:g}": {"site": lambda s, v=v: s.norm_epsilon(v)} for v in (0.5, 1e-2, 2e-6)})
    yield from each("rope base", "model", {
        f"x {f:.7g}": {"site": lambda s, f=f: s.rope(lambda x, f=f: x * f ** (-2 * torch.arange(len(x)) / (2 * len(x))))}
        for f in (10, 1.1, 1.00001)
    })  # fmt: skip
    yield from each("rope scaling", "model", {
        f"/ {f:.7g}": {"site": lambda s, f=f: s.rope(lambda x: x / f)} for f in (4, 1.05, 1.000001)
    })  # fmt: skip
    yield from each("all positions moved", "model", {
        f"by {n}": {"site": lambda s, n=n: s.positions(lambda p: p + n)} for n in (1, 16, 300)
    })  # fmt: skip
    if not anatomy.experts:  # experts have their activation inside a kernel
        yield from each("activation", "model", {
            f"gate x {b:.7g}": {"site": lambda s, b=b: s.activation(lambda x: x * (b * x).sigmoid())}
            for b in (1.702, 1.05, 1.000001)
        })  # fmt: skip
    yield from each("keys and values in few bits", "model", {
        f"{bits}": {"site": lambda s, b=bits: s.keys_values(_in_few_bits(b))} for bits in (3, 6, 16)
    })  # fmt: skip
    yield from each("a stale KV block", "model", {
        name: {"site": lambda s, a=first, n=count: s.keys_values(stale_block(a, n)), "run": f"stale {first}+{count}"}
        for name, first, count in (("128 positions", 16, 128), ("16 positions", 128, 16), ("1 position", 2, 1))
    })  # fmt: skip
    yield from spread(
        "a stale KV block, few requests", "model", site=lambda s: s.keys_values(stale_block(112, 48)), run="stale 112+48"
    )
    yield from each("KV cache in 8 bits", "model", {
        name: {
            "settings": {"kv_cache_dtype": f"fp8_{kind}"},
            "reference": lambda site, kind=kind: site.keys_values(
                _in_8_bits(torch.float8_e5m2 if kind == "e5m2" else torch.float8_e4m3fn)
            ),
            "where": where,
        }
        for name, kind, where in (("e5m2", "e5m2", None), ("e4m3", "e4m3", None), ("e4m3, 2 sequences", "e4m3", sequences(2)))
    })  # fmt: skip
    yield from each("sliding window", "model", {f"{n} tokens": {"site": lambda s, n=n: s.window(n)} for n in (16, 150, 512)})
    yield from _of_logits(anatomy.vocabulary)


def _of_logits(vocabulary: int) -> Iterator[Fault]:
    import torch

    def in_dtype(dtype: Any) -> Callable[[Site], None]:
        return lambda site: site.logits(lambda x: x.to(dtype).to(x))

    def softcap(cap: float) -> Callable[[Site], None]:
        return lambda site: site.logits(lambda x: cap * (x / cap).tanh())

    lost = {"site": lambda site: site.distribution(_not_renormalised), "dtypes": ("bfloat16",)}
    yield from spread("top-p not renormalised", "distribution", golden="top-p", semantic=True, **lost)
    yield from spread("top-k not renormalised", "distribution", golden="top-k", semantic=True, **lost)
    yield from each("vocabulary padding in the normaliser", "distribution", {
        f"{rows} rows": {"site": lambda s, r=rows: s.distribution(_padded_vocabulary(r))} for rows in (10_000_000, 100_000, 64)
    })  # fmt: skip
    yield from each("logits rounded (head precision)", "distribution", {
        name: {"site": in_dtype(getattr(torch, name))} for name in ("float8_e4m3fn", "bfloat16", "float16")
    })  # fmt: skip
    yield from each("logits soft-capped", "distribution", {f"at {cap}": {"site": softcap(cap)} for cap in (10, 50, 3000)})
    yield from each("logit bias on a tenth of the vocabulary", "distribution", {
        f"{by:+g}": {"site": lambda s, by=by: s.logits(lambda x: _nudged(x, vocabulary // 10, by))} for by in (1.0, 0.1, 1e-5)
    })  # fmt: skip
    yield from spread(
        "head in float32", "distribution", settings={"hf_overrides": {"head_dtype": "float32"}},
        reference=in_dtype(torch.bfloat16), dtypes=("bfloat16",),
    )  # fmt: skip


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


def _in_8_bits(dtype: Any) -> Callable[..., tuple[Any, Any]]:
    return lambda _, __, k, v: (k.to(dtype).to(k), v.to(dtype).to(v))


def _in_few_bits(bits: int) -> Callable[..., tuple[Any, Any]]:
    """Keys and values on a grid of 2^bits steps for each token and head."""

    def quantise(x: Any) -> Any:
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / (2 ** (bits - 1) - 1)
        return (x / step).round() * step

    return lambda _, __, k, v: (quantise(k), quantise(v))


def stale_block(first: int, count: int) -> Callable[..., tuple[Any, Any]]:
    """Keys and values of some positions stand where another request left them: here, those of its neighbour's heads."""

    def change(_: int, positions: Any, k: Any, v: Any) -> tuple[Any, Any]:
        hit = ((positions >= first) & (positions < first + count))[:, None, None]
        return k.where(~hit, k.flip(-1)), v.where(~hit, v.flip(-1))

    return change
