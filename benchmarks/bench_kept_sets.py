"""Under truncation: recording and the default check against bare `LLM.generate` of the same requests, and the same bits.

The recording pass is that without a noise floor and a reference. Before kept sets, recording made one more replay without
truncation and the check another one; both ways are timed here, in turns, on one
engine.

python benchmarks/bench_kept_sets.py [--cpu-time] [FOLDER_OF_A_MODEL [ROUNDS]]    # tiny-arith by default

With --cpu-time the seconds are the processor's, of all threads: for a machine that has other work. A model in a folder gets 36
sequences of 48 tokens.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from common import REPO, SAMPLING, SPEC, arith_prompts, report_number, report_ratio, share_the_machine, time_in_turns

share_the_machine()

import numpy as np  # noqa: E402
from bench_real_model import PROMPTS, SAMPLINGS  # noqa: E402
from bench_recording import bare_generate  # noqa: E402

from pytest_logprob_parity.check.check import check_golden  # noqa: E402
from pytest_logprob_parity.check.context import Context  # noqa: E402
from pytest_logprob_parity.engines.pool import Pool  # noqa: E402
from pytest_logprob_parity.engines.vllm import backend as backend_module  # noqa: E402
from pytest_logprob_parity.golden import Golden  # noqa: E402
from pytest_logprob_parity.spec import EngineSpec, Sampling  # noqa: E402
from pytest_logprob_parity.trace import Trace  # noqa: E402

CPU_TIME: bool = "--cpu-time" in sys.argv
#: A recording pass alone.
ALONE = Context(reference="none")


def main() -> None:
    given = [argument for argument in sys.argv[1:] if argument != "--cpu-time"]
    model = given[0] if given else ""
    rounds = int(given[1]) if len(given) > 1 else 9
    with tempfile.TemporaryDirectory() as folder, Pool(REPO, print) as pool:
        path = Path(folder) / "golden.safetensors"
        if model:
            spec = EngineSpec(model, dtype="bfloat16", max_model_len=512)
            bench(f"{Path(model).name}, top-p 0.9", pool, spec, PROMPTS, SAMPLINGS["T=0.7 top-p"], path, rounds, before=False)
        else:
            sampling = dataclasses.replace(SAMPLING, top_p=0.9)
            bench("tiny-arith, top-p 0.9", pool, SPEC, arith_prompts(), sampling, path, rounds, before=True)


def bench(
    label: str, pool: Pool, spec: EngineSpec, prompts: list[Any], sampling: Sampling, path: Path, rounds: int, *, before: bool
) -> None:  # fmt: skip
    """Time one model; with `before` also the way before kept sets."""
    engine = pool.engine(spec)
    llm = pool.backend(spec)._llm  # type: ignore[attr-defined]

    def record() -> object:
        return check_golden(path, engine, prompts=prompts, sampling=sampling, update=True, repeats=0, context=ALONE)

    def check() -> object:
        return check_golden(path, engine, prompts=prompts, sampling=sampling)

    record()
    trace = Golden.load(path).trace
    assert trace.kept_counts is not None
    per_token = float(trace.kept_counts.mean())
    print(
        f"{label}: {trace.num_sequences} sequences, {trace.num_tokens} tokens, {per_token:.1f} kept tokens on average (largest "
        f"{trace.kept_counts.max()}): {8 + 4 * per_token:.0f} bytes a token in the golden for them and untruncated_logprobs",
        flush=True,
    )
    works: dict[str, Callable[[], object]] = {
        "bare generate": bare_generate(llm, trace),
        "recording": record,
        "default check": check,
    }
    if before:
        works |= {
            "recording with a second replay": second_replay(record),
            "default check with a second replay": second_replay(check),
        }
    times = time_in_turns(works, rounds=rounds, warmups=1, clock=time.process_time if CPU_TIME else time.perf_counter)
    for work, bar in {"recording": 1.1, "default check": 2.1}.items():
        report_ratio(f"{label}: {work} / bare generate", times[work], times["bare generate"], bar)
        if before:
            old = times[f"{work} with a second replay"]
            report_ratio(f"{label}: {work}, without / with a second replay", times[work], old, 1.0)
    same_bits(label, trace, engine.replay(trace), engine.replay(trace.with_(sampling=trace.sampling.untruncated())))


def second_replay(work: Callable[[], object]) -> Callable[[], object]:
    """The same work where the worker tells nothing of kept sets, as before."""

    def run() -> object:
        with mock.patch.object(backend_module, "numbered", lambda requests, config: [None] * len(requests)):
            return work()

    return run


def same_bits(label: str, trace: Trace, again: Trace, free: Trace) -> None:
    assert trace.untruncated_logprobs is not None
    assert again.untruncated_logprobs is not None
    for name, told in (("recording", trace.untruncated_logprobs), ("decode replay", again.untruncated_logprobs)):
        changed = int(np.count_nonzero(told != free.logprobs))
        report_number(f"{label}: untruncated_logprobs of the {name}, other bits than a second replay", changed, 0, "tokens")


if __name__ == "__main__":
    main()
