"""Collect clean runs: goldens of the bench's models, their references, and the answers of engines that mean no harm.

For each model and dtype a few goldens are recorded (profile `rl`, 5 repeats of noise floor): every way of sampling meets
small and large sizes. Each golden is then put to other engines that must not fail: other batch composition, prefix cache,
block size, threads, AVX2, compiled, other builds of vLLM, transformers. Goldens recorded compiled or under AVX2 are put to
the eager engine. bench_clean.py judges what is stored here, in seconds, as often as the rules change.

    FOLDER/models/MODEL                                          made by bench_models.py where they are missing
    FOLDER/runs/MODEL/DTYPE/CELL/golden.safetensors
    FOLDER/runs/MODEL/DTYPE/CELL/ENGINE.{decode,regenerate,more}.safetensors       what an engine answered; `reference` is
                                                                 transformers in float32
What exists is not made again, so an interrupted collection goes on where it was.

python benchmarks/clean_runs.py FOLDER [--seed N] [--models A,B] [--dtypes A,B] [--cells N] [--engines A,B] \\
    [--python BUILD=INTERPRETER]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import KINDS, make_model

from pytest_logprob_parity.check.ask import Answers, ask
from pytest_logprob_parity.check.measure import measure
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.matrix.worker import save_answers
from pytest_logprob_parity.spec import EngineSpec, Sampling
from pytest_logprob_parity.trace import Trace, offsets_of

DTYPES = ("bfloat16", "float32")
REPEATS = 5

SAMPLINGS: Mapping[str, Mapping[str, float]] = {
    "T=1": {},
    "greedy": {"temperature": 0.0},
    "T=0.7": {"temperature": 0.7},
    "T=0.05": {"temperature": 0.05},
    "T=0.7 top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "T=1.5": {"temperature": 1.5},
    "min-p 0.1": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.3},
}
#: Prompts x samples of each x tokens. The first four are collected first.
SIZES = ((24, 1, 64), (8, 1, 16), (50, 4, 16), (24, 1, 64), (8, 8, 32), (4, 64, 16), (25, 8, 64), (4, 1, 8))
#: Stands in for (25, 8, 64) in every other model.
LONG = (3, 1, 1000)
#: Largest tokens x vocabulary: beyond it a smaller size stands in. Top-p sorts the vocabulary, which CPUs do slowly.
LARGEST, LARGEST_SORTED = 450_000_000, 50_000_000


@dataclass(frozen=True)
class Cell:
    """One golden: how it is sampled, how large it is, and which engine of `ENGINES` records it."""

    sampling: str
    size: tuple[int, int, int]
    recorder: str = "eager"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return ",".join((self.sampling, "x".join(map(str, self.size)), self.recorder))


@dataclass(frozen=True)
class Variation:
    """An engine that means no harm: settings, environment variables, build; `compositions` adds replays of its own."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    build: str = ""
    kind: str = "vllm"
    dtype: str = ""
    paths: Sequence[str] = ("decode", "regenerate")
    compositions: int = 0
    dtypes: Sequence[str] = DTYPES


_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
ENGINES: Mapping[str, Variation] = {
    "eager": Variation(compositions=2),  # a process of its own is what every one of these has
    "compiled": Variation({"enforce_eager": False}),
    # oneDNN multiplies bfloat16 with AVX-512 or not at all.
    "avx2": Variation(variables=_AVX2, dtypes=("float32",)),
    "avx2 but products": Variation(variables={"ATEN_CPU_CAPABILITY": "avx2"}, dtypes=("bfloat16",)),
    "reference": Variation(kind="transformers", dtype="float32", paths=("decode",)),
    "transformers": Variation(kind="transformers"),
    "max_num_seqs 3": Variation({"max_num_seqs": 3}),
    "max_num_seqs 9": Variation({"max_num_seqs": 9}),
    "prefix cache": Variation({"enable_prefix_caching": True}),
    "blocks of 32": Variation({"block_size": 32}),
    "blocks of 64": Variation({"block_size": 64, "max_num_batched_tokens": 2048}),
    "two threads": Variation(variables={"OMP_NUM_THREADS": "2"}),
    "vllm 0.18.1": Variation(build="0.18.1"),
    "vllm 0.26.0": Variation(build="0.26.0"),
}
RECORDERS = ("eager", "compiled", "avx2", "avx2 but products")
#: What a golden is put to that the eager engine did not record.
FOR_OTHER_RECORDERS = ("eager", "reference", "transformers", "max_num_seqs 9")


def cells_of(model: str, dtype: str) -> list[Cell]:
    """The goldens of one model in one dtype, those first that matter most."""
    number, shift = list(KINDS).index(model), DTYPES.index(dtype)
    samplings = list(SAMPLINGS)
    cells = []
    for i, size in enumerate(SIZES):
        sampling = samplings[(i + 3 * number + 4 * shift) % len(samplings)]
        wanted = LONG if size == (25, 8, 64) and (number + shift) % 2 else size
        cells.append(Cell(sampling, _that_fits(wanted, sampling, KINDS[model].vocabulary)))
    other = "compiled" if (number + shift) % 2 else "avx2" if dtype == "float32" else "avx2 but products"
    cells.insert(4, dataclasses.replace(cells[0], recorder=other))
    return list(dict.fromkeys(cells))


def _that_fits(size: tuple[int, int, int], sampling: str, vocabulary: int) -> tuple[int, int, int]:
    most = LARGEST_SORTED if "top-p" in sampling else LARGEST
    sizes = [s for s in (size, (24, 1, 64), (8, 1, 16)) if np.prod(s) * vocabulary <= most]
    return sizes[0]


def prompts_of(model: str, cell: Cell, seed: int) -> list[list[int]]:
    """Random token ids, 8 to 200 a prompt: lengths differ so that batch composition moves bits."""
    rng = random.Random(zlib.crc32(f"{seed}/{model}/{cell.name}".encode()))
    ids = range(2, KINDS[model].vocabulary)
    return [rng.choices(ids, k=round(8 * 25 ** rng.random())) for _ in range(cell.size[0])]


def sampling_of(cell: Cell, seed: int) -> Sampling:
    """The sampling of a cell: never ends early, top-5."""
    more = {"max_tokens": cell.size[2], "n": cell.size[1], "seed": 1000 * seed + 1, "ignore_eos": True, "logprobs": 5}
    return Sampling.of({**SAMPLINGS[cell.sampling], **more})


# -- in a process with an engine -----------------------------------------------------------------------------------------


def work(folder: Path, seed: int, name: str, targets: Sequence[tuple[str, str]], count: int) -> None:
    """Have the engine `name` of each model and dtype record its goldens and answer for those of the others."""
    variation = ENGINES[name]
    with Pool(folder) as pool:
        for model, dtype in targets:
            kind = {"engine": variation.kind, "dtype": variation.dtype or dtype}
            engine = pool.engine(EngineSpec(f"models/{model}", **kind, **variation.settings))
            began, done = time.monotonic(), 0
            try:
                for cell, place in open_work(folder, name, model, dtype, count):
                    if not (place / "golden.safetensors").exists():
                        place.mkdir(parents=True, exist_ok=True)
                        prompts = prompts_of(model, cell, seed)
                        asked = (prompts, sampling_of(cell, seed), ("decode",), REPEATS, str(place))
                        measure(engine, *asked).golden.save(place / "golden.safetensors")
                    if is_open(place, name, cell):
                        answer(engine, Golden.load(place / "golden.safetensors"), place, name)
                    done += 1
            except Exception as error:  # the other models can still answer
                print(f"{name}, {model} {dtype}: {type(error).__name__}: {error}"[:500], flush=True)
                pool.discard(engine.spec)
            if done:
                print(f"{name}, {model} {dtype}: {done} cells in {time.monotonic() - began:.0f} s", flush=True)
            pool.discard(engine.spec)


def open_work(folder: Path, name: str, model: str, dtype: str, count: int) -> Iterator[tuple[Cell, Path]]:
    """The first `count` cells of a model that the engine `name` has something to do for, with their folders."""
    for cell in cells_of(model, dtype)[:count]:
        place = folder / "runs" / model / dtype / cell.name
        recorded = (place / "golden.safetensors").exists()
        if (not recorded and cell.recorder == name) or (recorded and is_open(place, name, cell)):
            yield cell, place


def is_open(place: Path, name: str, cell: Cell) -> bool:
    """Whether the engine `name` has still to answer for a recorded golden."""
    if cell.recorder != "eager" and name not in FOR_OTHER_RECORDERS:
        return False
    return not (place / f"{name}.more.safetensors").exists()


def answer(engine: Engine, golden: Golden, place: Path, name: str) -> None:
    """Ask an engine what a check asks, but for the permutation test's draw (no verdict at level `rl` hangs on it), and store
    it: the answers to the check itself last, for they say that all is there.
    """
    for number in range(ENGINES[name].compositions):
        replayed = replay_in_other_batches(engine, golden.trace, number)
        save_answers(
            place, f"other batches {number + 1}", Answers(replays={"decode": replayed}, fingerprint=engine.fingerprint())
        )
    answers = ask(engine, golden, ENGINES[name].paths)
    save_answers(place, name, dataclasses.replace(answers, draw=None))


def replay_in_other_batches(engine: Engine, trace: Trace, number: int) -> Trace:
    """Forced decode in batches that the noise floor does not draw: of 3, 7, 24 or 100 sequences, in random order."""
    rng = np.random.default_rng([7, number])
    waiting = rng.permutation(trace.num_sequences)
    names = ("logprobs", "ranks", "top_token_ids", "top_logprobs")
    columns = {name: getattr(trace, name).copy() for name in names}
    while len(waiting):
        size = int(rng.choice([3, 7, 24, 100]))
        batch, waiting = waiting[:size].tolist(), waiting[size:]
        replayed = engine.replay(_part_of(trace, batch))
        tokens = np.concatenate([np.arange(*trace.bounds(i)) for i in batch])
        for name, column in columns.items():
            column[tokens] = getattr(replayed, name)
    return replayed.with_(
        **{f.name: getattr(trace, f.name) for f in dataclasses.fields(trace) if isinstance(getattr(trace, f.name), np.ndarray)}
        | columns
        | {"untruncated_logprobs": None, "replay": "other batches"}
    )


def _part_of(trace: Trace, sequences: Sequence[int]) -> Trace:
    tokens = np.concatenate([np.arange(*trace.bounds(i)) for i in sequences])
    prompts = [trace.prompt(i) for i in sequences]
    return Trace.from_arrays(
        prompt_token_ids=np.concatenate(prompts),
        prompt_offsets=offsets_of(prompts),
        token_ids=trace.token_ids[tokens],
        sequence_offsets=offsets_of([trace.completion(i) for i in sequences]),
        logprobs=trace.logprobs[tokens],
        ranks=trace.ranks[tokens],
        top_token_ids=trace.top_token_ids[tokens],
        top_logprobs=trace.top_logprobs[tokens],
        finish_reasons=trace.finish_reasons[sequences],
        group=np.arange(len(sequences)),
        seeds=trace.seeds[sequences],
        sampling=trace.sampling,
        logprobs_mode=trace.logprobs_mode,
        engine=trace.engine,
        engine_version=trace.engine_version,
        dtype=trace.dtype,
    )


# -- in the process that starts the others -------------------------------------------------------------------------------


def run_all(
    folder: Path, seed: int, models: Sequence[str], dtype: str, count: int, engines: Sequence[str], pythons: Mapping[str, str]
) -> None:
    """Collect one dtype: goldens first, then what the other engines say of them; two processes at a time."""
    phases = (
        [("eager", models[::2]), ("eager", models[1::2])],
        [(name, models) for name in engines if name != "eager" and (ENGINES[name].build in pythons or not ENGINES[name].build)],
        [("eager", models[::2]), ("eager", models[1::2])],
    )

    def run(job: tuple[str, Sequence[str]]) -> None:
        name, members = job
        variation = ENGINES[name]
        open_ones = [m for m in members if any(open_work(folder, name, m, dtype, count))]
        if not open_ones or dtype not in variation.dtypes:
            return
        task = {"seed": seed, "name": name, "targets": [(m, dtype) for m in open_ones], "count": count}
        command = [pythons.get(variation.build) or sys.executable, __file__, str(folder), "--work", json.dumps(task)]
        log = folder / f"{name}.log"
        with log.open("ab") as errors:
            done = subprocess.run(command, env=environment(variation), stderr=errors, check=False)
        if done.returncode:
            print(f"{name}, {dtype}: exit status {done.returncode}; see {log}", flush=True)

    for jobs in phases:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(run, jobs))


def environment(variation: Variation) -> dict[str, str]:
    """The variables of an engine's process: one thread, and threads that wait sleep, for others work on these cores."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # One CPU build refuses to start where this says nothing of an allocator that only makes it faster.
        "LOGPROB_PARITY_PRELOAD": "libtcmalloc:libiomp",
        **variation.variables,
    }


def names_in(text: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated list. Raises SystemExit for one that is unknown."""
    names = text.split(",")
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect clean runs for bench_clean.py.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other weights, prompts and random numbers")
    parser.add_argument("--models", default=",".join(KINDS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--cells", type=int, default=99, help="how many goldens for each model and dtype")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which of them answer; the eager one always does")
    parser.add_argument("--python", action="append", default=[], metavar="BUILD=INTERPRETER", help="where a build of vLLM is")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if arguments.work:
        os.environ["LD_PRELOAD"] = ":".join([os.environ.get("LD_PRELOAD", ""), os.environ["LOGPROB_PARITY_PRELOAD"]])
        task = json.loads(arguments.work)
        work(folder, task["seed"], task["name"], task["targets"], task["count"])
        return
    models = names_in(arguments.models, KINDS)
    for model in models:
        if not (folder / "models" / model / "tokenizer.json").exists():
            print(f"{model}: {make_model(model, folder / 'models' / model, arguments.seed):.2f} nats at T=1", flush=True)
    engines, pythons = names_in(arguments.engines, ENGINES), dict(p.split("=", 1) for p in arguments.python)
    for dtype in names_in(arguments.dtypes, DTYPES):
        began = time.monotonic()
        run_all(folder, arguments.seed, models, dtype, arguments.cells, engines, pythons)
        print(f"{dtype}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
