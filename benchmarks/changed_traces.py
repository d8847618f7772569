"""Changes of a trace, by name: noise, outliers, logits processing, labels, tokens. Seeded, and made by Trace's face alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from pytest_logprob_parity import Sampling, Trace

Change: TypeAlias = Callable[[Trace, np.random.Generator], Trace]
#: Columns with a row for each sequence; and those of the prompts, which stay.
_OF_SEQUENCES: Final = ("finish_reasons", "group", "sample", "episode", "turn", "seeds")
_OF_PROMPTS: Final = ("prompt_token_ids", "prompt_offsets", "sequence_offsets")


def float32(values: Any) -> Any:
    """The values as logprobs are kept."""
    return np.asarray(values, np.float32)


def owner_of_tokens(trace: Trace) -> Any:
    """The sequence of each token [N]; by columns that every version has."""
    return np.repeat(np.arange(trace.num_sequences), np.diff(trace.sequence_offsets))


def put(trace: Trace, chosen: Any, top: Any) -> Trace:
    """The trace with other logprobs: those of the top-k in order, and the chosen token's own where the top-k has it."""
    if not trace.top_k:
        return trace.with_(logprobs=float32(chosen))
    top, ids = float32(top), trace.top_token_ids
    place = ids == trace.token_ids[:, None]
    found = np.take_along_axis(top, place.argmax(1)[:, None], 1)[:, 0]
    order = np.argsort(-top, axis=1, kind="stable")
    return trace.with_(
        logprobs=float32(np.where(place.any(1), found, chosen)),
        top_logprobs=np.take_along_axis(top, order, 1),
        top_token_ids=np.take_along_axis(ids, order, 1),
    )


def moved(draw: Callable[[np.random.Generator, Any], Any], *, every: float = 1.0, alone: bool = False) -> Change:
    """Add numbers (nats) that `draw` makes for a shape: to a share `every` of the tokens, `alone` without their top-k."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        moves = rng.random(trace.num_tokens) < every
        chosen = trace.logprobs + np.where(moves, draw(rng, trace.num_tokens), 0)
        if alone:
            return trace.with_(logprobs=float32(chosen))
        return put(trace, chosen, trace.top_logprobs + np.where(moves[:, None], draw(rng, trace.top_logprobs.shape), 0))

    return change


def normal(sigma: float, mean: float = 0.0, **which: Any) -> Change:
    """Add normal noise; `which` is that of `moved`."""
    return moved(lambda rng, shape: rng.normal(mean, sigma, shape), **which)


def heavy(scale: float) -> Change:
    """Add noise with Student's tails of two degrees of freedom."""
    return moved(lambda rng, shape: scale * rng.standard_t(2, shape))


def outliers(count: int, size: float, *, sequences: bool = False) -> Change:
    """Move `count` tokens by `size` nats, or all tokens of `count` sequences by as much noise."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        chosen = trace.logprobs.astype(np.float64)
        if sequences:
            hit = np.isin(
                owner_of_tokens(trace), rng.choice(trace.num_sequences, min(count, trace.num_sequences), replace=False)
            )
            return trace.with_(logprobs=float32(chosen + np.where(hit, rng.normal(0, size, len(chosen)), 0)))
        chosen[rng.choice(len(chosen), min(count, len(chosen)), replace=False)] += size
        return trace.with_(logprobs=float32(chosen))

    return change


def shifted(by: int, *, alone: bool = False) -> Change:
    """Give each token the numbers of the token `by` places before it."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        rolled = {} if alone else {name: np.roll(getattr(trace, name), by, 0) for name in ("top_logprobs", "top_token_ids")}
        return trace.with_(logprobs=np.roll(trace.logprobs, by), **rolled)

    return change


def scaled(temperature: float) -> Change:
    """Divide the logits by a temperature, as far as the top-k shows them."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        chosen, top = trace.logprobs / temperature, trace.top_logprobs / temperature
        total = np.log(np.maximum(np.exp(top.astype(np.float64)).sum(1), 1e-30)) if trace.top_k else np.zeros(len(chosen))
        return put(trace, chosen - total, top - total[:, None])

    return change


def truncated(*, top_p: float = 1.0, top_k: int = 1000, min_p: float = 0.0) -> Change:
    """Exclude tokens with -inf, and renormalise the others."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        p = np.exp(trace.top_logprobs.astype(np.float64))
        if not trace.top_k:
            return trace
        kept = (np.cumsum(p, 1) - p < top_p) & (np.arange(trace.top_k) < top_k) & (p >= min_p * p[:, :1])
        total = np.log(np.maximum((p * kept).sum(1, keepdims=True), 1e-30))
        return put(trace, np.full(trace.num_tokens, -np.inf), np.where(kept, trace.top_logprobs - total, -np.inf))

    return change


def penalised(size: float, *, factor: bool) -> Change:
    """Take `size` nats from tokens that their sequence has already, or multiply their logprobs by it."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        chosen, top = trace.logprobs.copy(), trace.top_logprobs.copy()
        for start, stop in zip(trace.sequence_offsets[:-1], trace.sequence_offsets[1:], strict=True):
            seen: set[int] = set()
            for token in range(start, stop):
                hit = np.isin(trace.top_token_ids[token], list(seen))
                top[token] = np.where(hit, top[token] * size if factor else top[token] - size, top[token])
                if int(trace.token_ids[token]) in seen:
                    chosen[token] = chosen[token] * size if factor else chosen[token] - size
                seen.add(int(trace.token_ids[token]))
        return put(trace, chosen, top)

    return change


def rounded(dtype: str, offset: float = 0.0) -> Change:
    """Round to bfloat16 or float16: the logprobs, or logits that lie `offset` above them."""

    def rounding(values: Any) -> Any:
        if dtype == "float16":
            return float32(values + offset).astype(np.float16).astype(np.float32) - np.float32(offset)
        bits = np.ascontiguousarray(float32(values + offset)).view(np.uint32)
        return ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32) - np.float32(offset)

    def finite(values: Any) -> Any:
        return np.where(np.isfinite(values), rounding(np.where(np.isfinite(values), values, 0)), values)

    return lambda trace, rng: put(trace, finite(trace.logprobs), finite(trace.top_logprobs))


def filled(value: float, where: str) -> Change:
    """Write `value` over one logprob, over the first of each sequence, over those of one sequence, over some, or over all."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        starts, number = trace.sequence_offsets[:-1], int(rng.integers(trace.num_sequences))
        some = rng.random(trace.num_tokens) < 0.6
        places: dict[str, Any] = {
            "one": starts[number : number + 1], "first": starts[starts < trace.num_tokens], "some": some, "all": slice(None),
            "sequence": slice(*trace.bounds(number)),
        }  # fmt: skip
        chosen = trace.logprobs.copy()
        chosen[places[where]] = value
        return trace.with_(logprobs=chosen)

    return change


def only(choose: Callable[[Trace, np.random.Generator], Sequence[int]]) -> Change:
    """Keep these sequences, in this order."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        chosen = list(choose(trace, rng))
        rows = np.concatenate([np.arange(*trace.bounds(sequence)) for sequence in chosen])
        columns = {name: column for name, column in trace.to_columns().items() if name not in _OF_PROMPTS}
        taken = {name: column[chosen if name in _OF_SEQUENCES else rows] for name, column in columns.items()}
        lengths = np.diff(trace.sequence_offsets)[chosen]
        return trace.with_(**taken, sequence_offsets=np.concatenate([[0], np.cumsum(lengths)]))

    return change


def first(count: int) -> Change:
    """Keep the first `count` sequences."""
    return only(lambda trace, rng: range(min(count, trace.num_sequences)))


def masked(share: float) -> Change:
    """Mask a share of the tokens."""
    return lambda trace, rng: trace.with_(mask=trace.mask & (rng.random(trace.num_tokens) >= share))


def other_tokens(sequences: int) -> Change:
    """Let some sequences go on with other tokens from their middle."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        ids = trace.token_ids.copy()
        for sequence in rng.choice(trace.num_sequences, min(sequences, trace.num_sequences), replace=False).tolist():
            start, stop = trace.bounds(sequence)
            ids[(start + stop) // 2 : stop] = (ids[(start + stop) // 2 : stop] + 1) % 300
        return trace.with_(token_ids=ids)

    return change


def sampled(**changes: Any) -> Change:
    """Label the trace with another sampling."""
    return lambda trace, rng: trace.with_(sampling=Sampling.of({**trace.sampling.to_json(), **changes}))


def labelled(**labels: Any) -> Change:
    """Give the trace other labels."""
    return lambda trace, rng: trace.with_(**labels)


def other_mode(trace: Trace, rng: np.random.Generator) -> Trace:
    """Say raw of processed logprobs, and processed of raw ones."""
    modes = ("raw_logprobs", "processed_logprobs")
    return trace.with_(logprobs_mode=modes[trace.logprobs_mode == "raw_logprobs"])


def without_temperature(trace: Trace, rng: np.random.Generator) -> Trace:
    """Raw logprobs where the labels say processed, as far as the top-k shows them."""
    return scaled(1 / (trace.sampling.temperature or 0.5))(trace, rng)


def stale(trace: Trace, rng: np.random.Generator) -> Trace:
    """Two versions of the weights: the first half of each sequence is of the older ones, which differ."""
    place = np.arange(trace.num_tokens) - trace.sequence_offsets[:-1][owner_of_tokens(trace)]
    old = place < (np.diff(trace.sequence_offsets) // 2)[owner_of_tokens(trace)]
    chosen = trace.logprobs + np.where(old, rng.normal(0, 0.3, trace.num_tokens), 0)
    return trace.with_(logprobs=float32(chosen), weight_versions=np.where(old, 0, 1).astype(np.int32), newest_version=1)


def other_top_k(edit: Callable[[Any, Any], tuple[Any, Any]]) -> Change:
    """Change ids and logprobs of the top-k alone."""

    def change(trace: Trace, rng: np.random.Generator) -> Trace:
        ids, top = edit(trace.top_token_ids, trace.top_logprobs)
        return trace.with_(top_token_ids=ids, top_logprobs=float32(top))

    return change


def _noises() -> dict[str, Change]:
    sizes = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.2, 0.5, 1.0, 3.0)
    means, tails = (-0.05, -0.01, -0.003, 0.001, 0.003, 0.01, 0.05), (0.001, 0.01, 0.03, 0.1)
    tokens = ((1, 0.6), (1, -2), (1, 20), (2, -20), (3, 1), (5, 1), (10, 0.6), (20, 5))
    sequences = ((1, 0.2), (1, 1), (3, 0.3), (5, 1))
    return {
        **{f"noise {s:g}": normal(s) for s in sizes},
        **{f"noise {s:g} without top-k": normal(s, alone=True) for s in sizes[3:14:2]},
        **{f"noise {s:g} on a fifth": normal(s, every=0.2) for s in sizes[2:14:3]},
        **{f"heavy tails {s:g}": heavy(s) for s in tails},
        **{f"mean {m:g}": normal(0.01, m) for m in means},
        "one bit": moved(lambda rng, shape: np.full(shape, 6e-8), every=0.01),
        "the same": lambda trace, rng: trace,
        **{f"{n} tokens {s:g}": outliers(n, s) for n, s in tokens},
        **{f"{n} sequences {s:g}": outliers(n, s, sequences=True) for n, s in sequences},
    }


def _processings() -> dict[str, Change]:
    return {
        **{f"shifted by {by}": shifted(by) for by in (-1, 1, 2)},
        **{f"shifted by {by} without top-k": shifted(by, alone=True) for by in (-1, 1)},
        **{f"temperature {t:g}": scaled(t) for t in (0.5, 0.7, 0.9, 0.95, 0.99, 1.01, 1.1, 1.3, 2.0)},
        **{f"top-p {p:g}": truncated(top_p=p) for p in (0.99, 0.95, 0.9, 0.7, 0.5)},
        **{f"top-k {k}": truncated(top_k=k) for k in (1, 2, 3, 5)},
        **{f"min-p {p:g}": truncated(min_p=p) for p in (0.05, 0.2)},
        **{f"repetition penalty {f:g}": penalised(f, factor=True) for f in (1.01, 1.05, 1.2)},
        **{f"presence penalty {s:g}": penalised(s, factor=False) for s in (0.05, 0.5, 2.0)},
        **{f"{dtype} + {offset:g}": rounded(dtype, offset) for dtype in ("bfloat16", "float16") for offset in (0.0, 6.0, 25.0)},
        "without temperature": without_temperature,
        "stale weights": stale,
    }


def _records() -> dict[str, Change]:
    values = (("NaN", np.nan), ("+inf", np.inf), ("-inf", -np.inf), ("-9999", -9999.0), ("0", 0.0))
    places = ("one", "first", "sequence", "some", "all")
    return {
        **{f"{name} for {where}": filled(value, where) for name, value in values for where in places},
        "no top-k": other_top_k(lambda ids, top: (ids[:, :0], top[:, :0])),
        "less top-k": other_top_k(lambda ids, top: (ids[:, :2], top[:, :2])),
        "top-k -9999": other_top_k(lambda ids, top: (ids, top * 0 - 9999)),
        "top-k ids moved": other_top_k(lambda ids, top: (np.roll(ids, 1, 1), top)),
        "ranks + 5": lambda trace, rng: trace.with_(ranks=trace.ranks + np.int32(5)),
        **{f"the first {n} sequences": first(n) for n in (1, 2, 4, 8)},
        "sequences backwards": only(lambda trace, rng: range(trace.num_sequences)[::-1]),
        "half the sequences": only(lambda trace, rng: range(0, trace.num_sequences, 2)),
        **{f"masked {share:g}": masked(share) for share in (0.2, 0.9, 1.0)},
        **{f"other tokens in {n}": other_tokens(n) for n in (1, 4, 1000)},
        "other ends": lambda trace, rng: trace.with_(finish_reasons=(3 - trace.finish_reasons).clip(0, 3).astype(np.uint8)),
    }


def _labels() -> dict[str, Change]:
    samplings: Mapping[str, Mapping[str, Any]] = {
        "T 1": {"temperature": 1.0}, "T 0.9": {"temperature": 0.9}, "greedy": {"temperature": 0}, "top-p 0.8": {"top_p": 0.8},
        "top-k 3": {"top_k": 3}, "min-p 0.1": {"min_p": 0.1}, "repetition 1.3": {"repetition_penalty": 1.3},
        "no top-p": {"top_p": 1.0}, "presence 1": {"presence_penalty": 1.0}, "min_tokens 8": {"min_tokens": 8},
        "seed 77": {"seed": 77},
    }  # fmt: skip
    return {
        **{f"labelled {name}": sampled(**changes) for name, changes in samplings.items()},
        **{f"labelled {d}": labelled(dtype=d) for d in ("float32", "bfloat16", "float16", "unknown")},
        "labelled prefill": labelled(path="prefill"),
        "labelled other mode": other_mode,
        "another version": labelled(engine_version="9.9.9"),
        "another engine": labelled(engine="transformers", engine_version="4.0"),
        "no untruncated": labelled(untruncated_logprobs=None),
        "a forced replay": labelled(replay="decode", forcing="sampler"),
    }


#: Every change by name.
CHANGES: Final[Mapping[str, Change]] = {**_noises(), **_processings(), **_records(), **_labels()}


def changed(trace: Trace, names: Sequence[str], seed: int) -> Trace:
    """The trace with these changes, one after the other."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        for name in names:
            trace = CHANGES[name](trace, rng)
    return trace
