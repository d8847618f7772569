"""Faults that hit part of what runs: after a position, one prompt, one sequence, the first or the last tokens, few tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import fault as f
from .anatomy import Anatomy
from .arithmetic_faults import stale_block
from .fault import Fault, each

#: Runs whose outcome some tokens carry and others do not.
_RAW = {"sampling": {"temperature": 1.0}}
_HOT = {"sampling": {"temperature": 0.49}}


def stale(first: int, count: int) -> dict[str, Any]:
    """Keys and values of `count` positions from `first` on are those of another request."""
    return {"site": lambda site: site.keys_values(stale_block(first, count)), "run": f"stale {first}+{count}"}


def place_faults(anatomy: Anatomy, length: int, tokens: int) -> Iterator[Fault]:
    """The faults for prompts of `length` tokens and completions of `tokens`."""
    last_block, many, most = stale(length - 16, 16), stale(length - 48, 48), stale(16, 128)
    yield from each("KV cache wrong after a position", "place", {
        f"{n} in": stale(length + n, 1 << 20) for n in (0, tokens // 8, tokens // 2, tokens - 8, tokens - 2)
    })  # fmt: skip
    yield from each("positions stop at a limit", "place", {
        f"{n} in": {"site": lambda s, n=n: s.positions(lambda p: p.clamp(max=length + n))}
        for n in (0, tokens // 4, tokens - 8, tokens - 2)
    })  # fmt: skip
    yield from each("a stale KV block, one sequence", "place", {
        "16 positions": last_block, "48 positions": many, "128 positions": most,
    }, where=f.sequences(1))  # fmt: skip
    yield from each("a stale KV block, one prompt", "place", {
        "16 positions": last_block, "48 positions": many, "128 positions": most,
    }, where=f.prompts(1))  # fmt: skip
    yield from each("raw in one prompt", "place", {
        "1 prompt": {"where": f.prompts(1)}, "3 prompts": {"where": f.prompts(3)},
    }, **_RAW)  # fmt: skip
    partly = {"raw": _RAW, "temperature twice": _HOT, "stale KV, 48 positions": many, "stale KV, 128 positions": most}
    yield from each("first token of each completion", "place", partly, where=f.first_tokens)
    yield from each("last token of each completion", "place", partly, where=f.last_tokens)
    yield from each("1 % of tokens", "place", partly, where=f.share(0.01))
    yield from each("0.1 % of tokens", "place", {
        "temperature twice": _HOT, "stale KV, 128 positions": most,
    }, where=f.share(0.001))  # fmt: skip
    yield from each("one token off", "place", {
        f"{by:+g} nats": {"shift": f.off(by, count=1)} for by in (-8.0, -4.0, 2.5, -0.25)
    })  # fmt: skip
    yield from each("tokens off, signs balanced", "place", {
        f"{100 * of:g} % by {by:g}": {"shift": f.off(by, of=of, balanced=True)}
        for of, by in ((0.019, 0.49), (0.015, 0.45), (0.05, 0.35), (0.002, 0.3))
    })  # fmt: skip
    yield from _ranges(anatomy)


def _ranges(anatomy: Anatomy) -> Iterator[Fault]:
    """One range of token ids: the logits of one shard of the LM head, a quarter of the vocabulary."""
    ids = slice(anatomy.vocabulary // 4, anatomy.vocabulary // 2)

    def changed(how: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def change(logits: Any) -> Any:
            logits = logits.clone()
            logits[..., ids] = how(logits[..., ids])
            return logits

        return change

    hows: dict[str, Callable[[Any], Any]] = {
        "x 1.2": lambda x: 1.2 * x,
        "x 1.05": lambda x: 1.05 * x,
        "x 1.00001": lambda x: 1.00001 * x,
        "ids off by one": lambda x: x.roll(1, -1),
    }
    yield from each("logits of one range of ids", "place", {
        size: {"site": lambda site, how=how: site.logits(changed(how))} for size, how in hows.items()
    })  # fmt: skip
