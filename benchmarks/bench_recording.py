"""Recording, decode replay and the default check on a real engine, against bare `LLM.generate` of the same requests.

Both sides use one and the same LLM object, and write the same tokens: 16 prompts x 4 completions, a seed for each.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import REPO, SAMPLING, SPEC, arith_prompts, report_ratio, time_in_turns

from pytest_logprob_parity.check.check import check_golden
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.spec import Sampling
from pytest_logprob_parity.trace import Trace

ROUNDS = 15


def bare_generate(llm: Any, trace: Trace, **others: Any) -> Callable[[], Any]:
    """What someone without the plugin would run to get the tokens and logprobs of `trace`."""
    from vllm import SamplingParams

    sampling = trace.sampling
    prompts = [{"prompt_token_ids": trace.prompt(i)} for i in range(trace.num_sequences)]
    names = ("temperature", "top_p", "max_tokens", "logprobs")
    settings = {name: getattr(sampling, name) for name in names} | others

    def generate() -> Any:
        params = [SamplingParams(seed=seed, **settings) for seed in trace.seeds.tolist()]
        return llm.generate(prompts, params, use_tqdm=False)

    written = [list(output.outputs[0].token_ids) for output in generate()]
    assert written == [trace.completion(i) for i in range(trace.num_sequences)], "the two sides write other tokens"
    return generate


def bench(label: str, pool: Pool, sampling: Sampling, path: Path) -> None:
    engine, prompts = pool.engine(SPEC), arith_prompts()
    llm = pool.backend(SPEC)._llm  # type: ignore[attr-defined]

    def record() -> object:
        # The recording pass alone; what the noise floor costs beside it is in bench_verdict.py.
        return check_golden(path, engine, prompts=prompts, sampling=sampling, update=True, repeats=0)

    def check() -> object:
        return check_golden(path, engine, prompts=prompts, sampling=sampling)

    record()
    trace = Golden.load(path).trace
    print(f"{label}: {trace.num_sequences} sequences, {trace.num_tokens} tokens, top-{trace.top_k}")
    works = {
        "bare generate": bare_generate(llm, trace),
        "recording": record,
        "bare generate without text and dicts": bare_generate(llm, trace, flat_logprobs=True, detokenize=False),
        "decode replay": lambda: engine.replay(trace),
        "default check": check,
    }
    times = time_in_turns(works, rounds=ROUNDS)
    for work, bar in (("recording", 1.05), ("decode replay", 1.1), ("default check", 2.2)):
        for bare in ("bare generate", "bare generate without text and dicts"):
            report_ratio(f"{label}: {work} / {bare}", times[work], times[bare], bar)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, Pool(REPO, print) as pool:
        path = Path(folder) / "golden.safetensors"
        bench("T=0.7", pool, SAMPLING, path)
        print("Under truncation the recording adds a decode replay without it (untruncated_logprobs), the check another one:")
        bench("T=0.7, top-p 0.9", pool, dataclasses.replace(SAMPLING, top_p=0.9), path)


if __name__ == "__main__":
    main()
