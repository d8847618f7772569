"""200 clean runs at level `rl`: one engine and its golden under variations that move bits and mean nothing. None may fail.

For each dtype a golden of 200 x 64 tokens with its noise floor, then 100 variations: other engines (batch limits, block
size, prefix cache, threads, another instruction set, compilation, tensor parallel 2) are held against it by
`check_golden`, free run included; on each of them the tokens are replayed in shapes that the floor never draws and judged.
One engine at a time for each dtype; what hangs on the environment or spoils its process has a process of its own.

python benchmarks/bench_clean.py [DTYPE ...]        # bfloat16 and float32 where not said otherwise
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import REPO, SPEC, long_prompts, report_number, share_the_machine

from pytest_logprob_parity import fingerprint
from pytest_logprob_parity.check import check_golden
from pytest_logprob_parity.comparison.result import Comparison, MismatchError
from pytest_logprob_parity.comparison.tolerance import default_tolerance, with_floor
from pytest_logprob_parity.comparison.verdict import Evidence, judge
from pytest_logprob_parity.errors import ParityError
from pytest_logprob_parity.floor import Shapes
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.pool import Engine, Pool
from pytest_logprob_parity.spec import Sampling

DTYPES = ("bfloat16", "float32")
SEQUENCES, TOKENS, GROUP, PROMPT_LENGTH = 200, 64, 8, 256
#: What has to come out for each dtype.
RUNS, DIGESTS = 100, 60


@dataclasses.dataclass(frozen=True)
class Variation:
    """An engine that may not matter: its settings, how many replays in other shapes beside its check, its environment.

    In an environment of its own, or `apart`, it has a process of its own.
    """

    name: str
    settings: Mapping[str, Any]
    replays: int
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    apart: bool = False
    dtypes: Sequence[str] = DTYPES


AS_RECORDED = "as recorded"
VARIATIONS = (
    Variation(AS_RECORDED, {}, 30),
    Variation("max_num_seqs 3", {"max_num_seqs": 3}, 0),  # 67 batches for every replay
    Variation("max_num_seqs 9, 1,024 tokens a step", {"max_num_seqs": 9, "max_num_batched_tokens": 1024}, 5),
    Variation("2,048 tokens a step, blocks of 32", {"max_num_batched_tokens": 2048, "block_size": 32}, 11),
    Variation("prefix cache", {"enable_prefix_caching": True}, 15),
    Variation("one thread", {}, 1, {"OMP_NUM_THREADS": "1"}),
    Variation(
        "AVX2 in place of AVX-512",
        {},
        14,
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        dtypes=("float32",),
    ),
    Variation(  # oneDNN multiplies bfloat16 with AVX-512 or not at all
        "AVX2 in place of AVX-512, but for products",
        {},
        14,
        {"ATEN_CPU_CAPABILITY": "avx2"},
        dtypes=("bfloat16",),
    ),
    Variation("compiled", {"enforce_eager": False}, 14, apart=True),
    Variation(
        "tensor parallel 2",
        {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        1,  # one thread each: shapes move nothing there, and as little with one thread
        {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ),
)
assert all(sum(1 + v.replays for v in VARIATIONS if dtype in v.dtypes) == RUNS for dtype in DTYPES)

#: Batches of few requests, of odd numbers above all, are what moves bits here; the rest goes at once, to keep it quick.
SHAPES = tuple(
    Shapes(batch_sizes=sizes, weights=weights, alone=alone, blocks=blocks, seed=1)
    for sizes, weights, alone, blocks in (
        ((1, 200), (0.8, 0.2), 1.0, 1),
        ((3, 200), (0.75, 0.25), 1.0, 1),
        ((1, 3, 5, 200), (0.3, 0.3, 0.2, 0.2), 1.0, 1),
        ((1, 3, 100), (0.4, 0.2, 0.4), 0.5, 2),
    )
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One clean run and its verdict."""

    engine: str
    kind: str
    verdict: str
    headline: str
    digest: str
    rms: float
    max_abs: float
    flips: float
    diverged: int | None
    p_value: float
    setup: str


# -- in a process with an engine -----------------------------------------------------------------------------------------


def summary(engine: str, kind: str, comparison: Comparison) -> Run:
    metrics = comparison.metrics
    return Run(
        engine,
        kind,
        comparison.verdict,
        comparison.headline,
        hashlib.sha256(comparison.actual.logprobs.tobytes()).hexdigest(),
        metrics["rms_diff"],
        metrics["max_abs_diff"],
        metrics["support_flips"],
        None if comparison.free_run is None else comparison.free_run.diverged,
        comparison.difference.p_value if comparison.difference is not None else float("nan"),
        comparison.setup,
    )


def check(engine: Engine, path: Path) -> Comparison:
    """The default check: decode replay and free run, and a replay in the floor's shapes where bits differ."""
    try:
        return check_golden(path, engine)
    except MismatchError as error:
        return error.comparison


def replay(engine: Engine, golden: Golden, shapes: Shapes, number: int) -> Comparison:
    """The verdict on a replay in drawn shapes; one that draws as the floor did is held against its repeats too."""
    trace, floor = golden.trace, golden.floor
    assert floor is not None
    logprobs = engine.replay_in_drawn_shapes(trace, shapes, number)
    like_the_floor = shapes == floor.shapes
    setup = fingerprint.setup_class(golden.fingerprint, [("shape", None, None)])
    evidence = Evidence(floor, draw=(lambda: logprobs) if like_the_floor else None, setup=setup)
    limits = with_floor(default_tolerance(trace.dtype), floor)
    return judge(trace, trace.with_(logprobs=logprobs, replay="drawn shapes"), limits, "rl", evidence)


def vary(pool: Pool, dtype: str, variation: Variation, path: Path) -> Iterator[Run]:
    engine = pool.engine(SPEC.replace(dtype=dtype, **variation.settings))
    if variation.name == AS_RECORDED:
        sampling = Sampling(temperature=0.7, top_p=0.95, ignore_eos=True, max_tokens=TOKENS, n=GROUP, seed=1)
        prompts = long_prompts(engine.tokenizer, SEQUENCES // GROUP, PROMPT_LENGTH)
        recorded = check_golden(path, engine, prompts=prompts, sampling=sampling, update=True)
        print(f"{dtype}: recorded; {'; '.join([*recorded.notes, *recorded.shows])}", flush=True)
    golden = Golden.load(path)
    assert golden.floor is not None
    yield summary(variation.name, "check", check(engine, path))
    for number in range(variation.replays):
        if variation.name == AS_RECORDED and number < 3:
            yield summary(variation.name, "floor's shapes", replay(engine, golden, golden.floor.shapes, 100 + number))
        else:
            shapes = SHAPES[number % len(SHAPES)]
            unlike = VARIATIONS.index(variation) * 1000 + number
            yield summary(variation.name, "other shapes", replay(engine, golden, shapes, unlike))


def work(dtype: str, names: Sequence[str], path: Path, results: Path) -> None:
    """The child process: every variation of these names, their runs as lines of JSON."""
    with Pool(REPO, lambda line: print(line, flush=True)) as pool, results.open("a", encoding="utf-8") as lines:
        for variation in VARIATIONS:
            if variation.name not in names:
                continue
            began, count = time.monotonic(), 0
            try:
                for run in vary(pool, dtype, variation, path):
                    lines.write(json.dumps(dataclasses.asdict(run)) + "\n")
                    lines.flush()
                    count += 1
            except ParityError as error:
                print(f"{dtype}, {variation.name}: {error}", flush=True)
            print(f"{dtype}, {variation.name}: {count} runs in {time.monotonic() - began:.0f} s", flush=True)


# -- in the process that starts the others -------------------------------------------------------------------------------


def run_all(dtype: str, folder: Path) -> list[Run]:
    path, results = folder / f"{dtype}.safetensors", folder / f"{dtype}.jsonl"
    together = [v.name for v in VARIATIONS if not v.environment and not v.apart]
    for variation in (None, *(v for v in VARIATIONS if v.name not in together and dtype in v.dtypes)):
        names = together if variation is None else [variation.name]
        environment = {**os.environ, **({} if variation is None else variation.environment)}
        command = [sys.executable, __file__, "--work", dtype, json.dumps(names), str(path), str(results)]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(f"{dtype}, {', '.join(names)}: exit status {done.returncode}\n{done.stderr[-2000:]}", flush=True)
    return [Run(**json.loads(line)) for line in results.read_text("utf-8").splitlines()]


def show(dtype: str, runs: Sequence[Run]) -> None:
    print(f"\n{dtype}: {'engine':38s} runs digests  largest RMS   max |d| flips diverged smallest p  verdicts")
    for name, group in itertools.groupby(runs, key=lambda run: run.engine):
        show_row(name, list(group))
    show_row("all", runs)
    for run in runs:
        if run.verdict != "pass":
            print(f"  {run.verdict}: {run.engine}, {run.kind}: {run.headline}")
    failures = [run for run in runs if run.verdict != "pass"]
    digests = len({run.digest for run in runs})
    report_number(f"{dtype}: runs wanted / runs", RUNS / max(len(runs), 1), 1, f"{len(runs)} of {RUNS}")
    report_number(f"{dtype}: clean runs that did not pass", len(failures), 0, f"{len(failures)} of {len(runs)}")
    report_number(
        f"{dtype}: digests wanted / distinct output digests", DIGESTS / max(digests, 1), 1, f"{digests}, {DIGESTS} wanted"
    )


def show_row(name: str, runs: Sequence[Run]) -> None:
    p = [run.p_value for run in runs if not np.isnan(run.p_value)]
    diverged = [str(run.diverged) for run in runs if run.diverged is not None]
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in Counter(run.verdict for run in runs).items())
    print(
        f"  {name:46s} {len(runs):4d} {len({run.digest for run in runs}):7d} {np.nanmax([r.rms for r in runs]):12.2g} "
        f"{np.nanmax([r.max_abs for r in runs]):9.2g} {max(r.flips for r in runs):5.0f} "
        f"{'' if name == 'all' else '/'.join(diverged):>8s} {f'{min(p):.2g}' if p else '':>10s}  {verdicts}"
    )


def main() -> None:
    share_the_machine()
    if sys.argv[1:2] == ["--work"]:
        dtype, names, path, results = sys.argv[2:]
        work(dtype, json.loads(names), Path(path), Path(results))
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        dtypes = sys.argv[1:] or DTYPES
        for dtype in dtypes:  # one engine at a time: two on two cores wait for each other's threads
            show(dtype, run_all(dtype, Path(name)))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
