"""Under truncation: recording and the default check against bare `LLM.generate` of the same requests, and the same bits.

The recording pass and the check are those without a noise floor. Before kept sets, recording made one more replay without
truncation and the check another one; both ways are timed here, in turns, on one engine.

python benchmarks/bench_kept_sets.py [FOLDER_OF_A_MODEL [ROUNDS]]        # tiny-arith by default; 36 x 48 tokens of a model
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
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
from pytest_logprob_parity.engines.pool import Pool  # noqa: E402
from pytest_logprob_parity.engines.vllm import backend as backend_module  # noqa: E402
from pytest_logprob_parity.golden import Golden  # noqa: E402
from pytest_logprob_parity.spec import EngineSpec, Sampling  # noqa: E402
from pytest_logprob_parity.trace import Trace  # noqa: E402


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else ""
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 9
    with tempfile.TemporaryDirectory() as folder, Pool(REPO, print) as pool:
        path = Path(folder) / "golden.safetensors"
        if model:
            spec = EngineSpec(model, dtype="bfloat16", max_model_len=512)
            bench(f"{Path(model).name}, top-p 0.9", pool, spec, PROMPTS, SAMPLINGS["T=0.7 top-p"], path, rounds)
        else:
            sampling = dataclasses.replace(SAMPLING, top_p=0.9)
            bench("tiny-arith, top-p 0.9", pool, SPEC, arith_prompts(), sampling, path, rounds)


def bench(
    label: str, pool: Pool, spec: EngineSpec, prompts: list[Any], sampling: Sampling, path: Path, rounds: int
) -> None:  # fmt: skip
    engine = pool.engine(spec)
    llm = pool.backend(spec)._llm  # type: ignore[attr-defined]

    def record() -> object:
        return check_golden(path, engine, prompts=prompts, sampling=sampling, update=True, repeats=0)

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
        "recording with a second replay": second_replay(record),
        "default check": check,
        "default check with a second replay": second_replay(check),
        "decode replay": lambda: engine.replay(trace),
    }
    times = time_in_turns(works, rounds=rounds)
    bars = {"recording": 1.1, "decode replay": 1.1, "default check": 2.1}
    for work, bar in bars.items():
        report_ratio(f"{label}: {work} / bare generate", times[work], times["bare generate"], bar)
    for work in ("recording", "default check"):
        report_ratio(
            f"{label}: {work}, without / with a second replay", times[work], times[f"{work} with a second replay"], 1.0
        )
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
