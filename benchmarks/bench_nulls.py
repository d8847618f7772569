"""The permutation test where nothing is different: 1,000 made-up nulls, and 1,000 put together from real replays.

A real null takes, for each block by itself, R + 1 of the real replays in sampled batch compositions: that makes them
exchangeable within blocks, whatever the noise of the engine looks like. Then what must fail: tests that statistics rule out,
on the same noise,
and differences that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from common import REPO, SPEC, long_prompts, report_number, share_the_machine

from pytest_logprob_parity.comparison.permutation_test import block_permutation_test
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.golden.noise_floor import REPEATS, NoiseFloor
from pytest_logprob_parity.spec import Sampling
from pytest_logprob_parity.trace.batch_composition import BatchCompositions

Array = Any
DTYPES = ("bfloat16", "float32")
PROMPTS, GROUP, TOKENS, PROMPT_LENGTH = 14, 4, 48, 256
SEQUENCES, BLOCKS = PROMPTS * GROUP, BatchCompositions().blocks
REPLAYS = 24
NULLS = 250  # of each made-up family; twice as many of each dtype's real ones
TRIALS = 100  # of each control and each power
#: alpha -> how many of 2,000 may be rejected: what 2,000 draws of a test of this level stay at or under 99 times in 100.
BARS = {0.05: 123, 0.01: 31}


def blocks_of(sequences: int, tokens: int) -> Array:
    """The block of every token."""
    return np.repeat(np.arange(sequences) % BLOCKS, tokens)


def p_value(replays: Array, blocks: Array) -> float:
    """Of the last replay against all others."""
    test = block_permutation_test(replays[:-1], replays[-1], blocks)
    assert test is not None
    return test.p_value


# -- made-up noise: [R + 1, sequences * tokens], float32, RMS of about 0.01 ----------------------------------------------


def gaussian(rng: np.random.Generator, sequences: int = SEQUENCES, tokens: int = TOKENS) -> Array:
    return rng.normal(0, 0.01, (REPEATS + 1, sequences * tokens)).astype(np.float32)


def heavy(rng: np.random.Generator, sequences: int = SEQUENCES, tokens: int = TOKENS) -> Array:
    """Student's t of 3 degrees, and a scale for each sequence and replay: squares depend within a sequence."""
    noise = rng.standard_t(3, (REPEATS + 1, sequences, tokens)) * np.exp(rng.normal(0, 1, (REPEATS + 1, sequences, 1)))
    return (0.005 * noise).reshape(REPEATS + 1, -1).astype(np.float32)


def shape_classes(rng: np.random.Generator, sequences: int = SEQUENCES, tokens: int = TOKENS, classes: int = 3) -> Array:
    """Noise is a function of shape: a vector for each class, and each block of each replay in one of a few classes."""
    noise = rng.normal(0, 0.01, (classes, sequences * tokens)).astype(np.float32)
    blocks = blocks_of(sequences, tokens)
    drawn = rng.choice(classes, (REPEATS + 1, BLOCKS), p=[0.6, 0.3, 0.1])
    return np.stack([noise[row[blocks], np.arange(len(blocks))] for row in drawn])


def mostly_still(rng: np.random.Generator, sequences: int = SEQUENCES, tokens: int = TOKENS) -> Array:
    """As in bfloat16: four tokens in five never move; the others are often equal to their last bit."""
    moves = rng.random(sequences * tokens) < 0.2
    noise = np.round(rng.standard_t(3, (REPEATS + 1, sequences * tokens)) * 0.7) / 128
    return np.where(moves, noise, 0).astype(np.float32)


FAMILIES: dict[str, Callable[..., Array]] = {
    "Gaussian": gaussian,
    "heavy tails, design effect": heavy,
    "three shape classes, exact ties": shape_classes,
    "80 % of tokens never move": mostly_still,
}


# -- real noise ----------------------------------------------------------------------------------------------------------


def record_replays(pool: Pool, dtype: str) -> tuple[Array, Array, Array]:
    """A generating run [N], replays of its tokens in sampled batch compositions [REPLAYS, N], and whole runs of one batch
    composition each [6, N].
    """
    engine = pool.engine(SPEC.replace(dtype=dtype))
    sampling = Sampling(temperature=0.7, top_p=0.95, ignore_eos=True, max_tokens=TOKENS, n=GROUP, seed=1)
    trace = engine.generate(long_prompts(engine.tokenizer, PROMPTS, PROMPT_LENGTH), sampling)
    drawn = np.stack([engine.replay_in_batch_compositions(trace, BatchCompositions(), number) for number in range(REPLAYS)])
    fixed = [BatchCompositions(batch_sizes=(s,), weights=(1.0,), alone=1.0, blocks=1) for s in (64, 1, 2, 3, 5, 7)]
    whole = np.stack([engine.replay_in_batch_compositions(trace, shapes, 0) for shapes in fixed])
    floor = NoiseFloor(drawn, BatchCompositions(), reproduces=True)
    both = NoiseFloor(whole[:2], BatchCompositions(), reproduces=True)
    distinct = len({row.tobytes() for row in drawn})
    print(
        f"{dtype}: {trace.num_sequences} x {TOKENS} tokens, {distinct} of {REPLAYS} replays distinct; "
        f"{floor.describe()}; one at a time against all at once RMS {both.rms:.2g}, {both.changed:.1%} of the tokens move",
        flush=True,
    )
    return trace.logprobs, drawn, whole


def draw_real(rng: np.random.Generator, replays: Array, count: int) -> Array:
    """`count` replays in which every block comes from another real replay, none of them twice: [count, N]."""
    blocks = blocks_of(SEQUENCES, TOKENS)
    chosen = np.stack([rng.choice(len(replays), count, replace=False) for _ in range(BLOCKS)], axis=1)
    return np.stack([replays[row[blocks], np.arange(len(blocks))] for row in chosen])


def draws(family: Callable[[np.random.Generator], Array], count: int, seed: int) -> Iterator[Array]:
    for number in range(count):
        yield family(np.random.default_rng([seed, number]))


# -- tests that are none, and differences that are there ------------------------------------------------------------------


def permute_sequences(whole: Array) -> list[float]:
    """p of whole runs of one shape each, every one in its turn the candidate, where sequences take the place of blocks."""
    sequences = np.repeat(np.arange(SEQUENCES), TOKENS)
    return [p_value(np.roll(whole, turn, axis=0), sequences) for turn in range(len(whole))]


def sampled_nulls(rng: np.random.Generator, noise: float, vocabulary: int = 32) -> tuple[Array, Array]:
    """Tokens drawn by a generating run's own noisy logits: its logprobs of them [N], and those of R + 1 others [R + 1, N]."""
    tokens = SEQUENCES * TOKENS
    logits = rng.normal(0, 1.5, (tokens, vocabulary))
    runs = logits + rng.normal(0, noise, (REPEATS + 2, tokens, vocabulary))
    runs -= np.log(np.exp(runs).sum(axis=2, keepdims=True))
    chosen = (runs[0] + rng.gumbel(size=(tokens, vocabulary))).argmax(axis=1)
    picked = runs[:, np.arange(tokens), chosen]
    return picked[0], picked[1:]


def sign_flip_p(d: Array, rng: np.random.Generator) -> float:
    """Two-sided p of "d has the mean 0" by flipping the signs of sequences: centred on the generating run, so not valid."""
    sums = np.where(np.isfinite(d), d, 0).reshape(SEQUENCES, TOKENS).sum(axis=1)
    flipped = np.abs((rng.choice((-1, 1), (9_999, SEQUENCES)) * sums).sum(axis=1))
    return float((1 + np.count_nonzero(flipped >= abs(sums.sum()))) / 10_000)


def show(name: str, p: list[float]) -> None:
    rejected = {alpha: int(np.count_nonzero(np.array(p) <= alpha)) for alpha in BARS}
    print(f"  {name:58s} {len(p):5d} {rejected[0.05]:5d} {rejected[0.01]:5d}  ({np.mean(np.array(p) <= 0.01):.0%})", flush=True)


def show_controls(real: dict[str, tuple[Array, Array, Array]]) -> None:
    print("What is no valid test, and has to show it (false alarms at 0.05, at 0.01):")
    blocks = blocks_of(SEQUENCES, TOKENS)
    for dtype, (generating, replays, whole) in real.items():
        for name, candidate in (("all at once", whole[0]), ("one request at a time", whole[1])):
            p = [p_value(np.stack([*draw_real(np.random.default_rng([3, n]), replays, REPEATS), candidate]), blocks)
                 for n in range(TRIALS)]  # fmt: skip
            show(f"{dtype}: candidate of a fixed shape, {name}", p)
        show(f"{dtype}: whole runs of one shape, labels permuted by sequence", permute_sequences(whole))
        p = [sign_flip_p(row - generating, np.random.default_rng([4, n])) for n, row in enumerate(replays)]
        show(f"{dtype}: centred on the generating run", p)
    for noise in (0.03, 0.1):
        valid, centred, counted = [], [], []
        for number in range(TRIALS):
            rng = np.random.default_rng([5, number])
            generating, others = sampled_nulls(rng, noise)
            valid.append(p_value(others, blocks))
            centred.append(sign_flip_p(others[-1] - generating, rng))
            counted.append(p_value(np.stack([*others[:-1], generating]), blocks))
        show(f"sampled tokens, logit noise {noise}: the valid test", valid)
        show(f"sampled tokens, logit noise {noise}: centred on the generating run", centred)
        show(f"sampled tokens, logit noise {noise}: generating run as candidate", counted)


def show_power(real: dict[str, tuple[Array, Array, Array]]) -> None:
    """Differences in floors: one floor is the RMS between two replays."""
    print(f"What is there, and how often it is found (at 0.05, at 0.01), R = {REPEATS}, {TOKENS} tokens a sequence:")
    for name, family in (("Gaussian", gaussian), ("heavy tails", heavy)):
        for sequences in (16, 50, 200):
            for bias, spread in ((0.1, 0.0), (0.05, 0.0), (0.0, 1.0)):
                p = [p_value(add(family(rng, sequences), bias, spread, rng), blocks_of(sequences, TOKENS))
                     for rng in (np.random.default_rng([6, n]) for n in range(TRIALS))]  # fmt: skip
                show(f"{name}, {sequences} sequences: bias {bias} floor, added spread {spread} floor", p)
    for dtype, (_, replays, _) in real.items():
        for bias, spread in ((0.1, 0.0), (0.05, 0.0), (0.0, 0.3), (0.0, 1.0)):
            p = [p_value(add(draw_real(rng, replays, REPEATS + 1), bias, spread, rng), blocks_of(SEQUENCES, TOKENS))
                 for rng in (np.random.default_rng([7, n]) for n in range(TRIALS))]  # fmt: skip
            show(f"real {dtype}: bias {bias} floor, added spread {spread} floor", p)


def add(replays: Array, bias: float, spread: float, rng: np.random.Generator) -> Array:
    """The last replay with a bias and independent noise of an RMS, both in floors."""
    replays = replays.astype(np.float64)
    floor = NoiseFloor(replays[:-1].astype(np.float32), BatchCompositions(), reproduces=True).rms
    replays[-1] += bias * floor + rng.normal(0, spread * floor, replays.shape[1])
    return replays


def main() -> None:
    share_the_machine()
    with Pool(REPO, print) as pool:
        real = {dtype: record_replays(pool, dtype) for dtype in DTYPES}
    blocks = blocks_of(SEQUENCES, TOKENS)
    print(f"Nulls, {SEQUENCES} x {TOKENS} tokens, {REPEATS} repeats (how many, rejected at 0.05, at 0.01):")
    every: list[float] = []
    for seed, (name, family) in enumerate(FAMILIES.items()):
        p = [p_value(replays, blocks) for replays in draws(family, NULLS, seed)]
        show(f"made up: {name}", p)
        every += p
    for seed, (dtype, (_, replays, _)) in enumerate(real.items()):
        nulls = draws(lambda rng, replays=replays: draw_real(rng, replays, REPEATS + 1), 2 * NULLS, 100 + seed)
        p = [p_value(null, blocks) for null in nulls]
        show(f"real: {dtype}", p)
        every += p
    show("all", every)
    for alpha, bar in BARS.items():
        rejected = int(np.count_nonzero(np.array(every) <= alpha))
        report_number(
            f"rejections at {alpha} / the most allowed", rejected / bar, 1, f"{rejected} of {len(every)}, {bar} allowed"
        )
    show_controls(real)
    show_power(real)


if __name__ == "__main__":
    main()
