"""Faults of public reports, planted in a real vLLM and in real trainers: all have to fail, and the cause has to be right.

The engine's faults are judged as a check judges them, with a fingerprint that has not changed, and then diagnosed with what
transformers reads of the checkpoint. `named` is a cause without "or"; `first` stands first among candidates.

python benchmarks/bench_reports.py [--model models/tiny-arith] [--dtype float32] [--only TEXT] [--docs FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalogue.anatomy import Anatomy, load_checkpoint
from common import REPO, report_number, share_the_machine

from pytest_logprob_parity import EngineSpec, Sampling
from pytest_logprob_parity.check.ask import Answers
from pytest_logprob_parity.check.check import check_golden, judge_answers
from pytest_logprob_parity.check.context import Context
from pytest_logprob_parity.comparison.result import Comparison, Finding
from pytest_logprob_parity.diagnosis.reference_evaluation import read_against, weigh
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.errors import UsageError
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.selftest.prompts import make_prompts
from pytest_logprob_parity.trace import Trace

PROMPTS, SAMPLES, TOKENS = 16, 2, 32


@dataclass(frozen=True)
class Row:
    """One fault, judged: what the check's findings name, and what the diagnosis does."""

    side: str
    report: str
    fault: str
    causes: tuple[str, ...]
    verdict: str
    findings: tuple[Finding, ...]
    diagnosis: tuple[Finding, ...]

    @property
    def named(self) -> tuple[str, ...]:
        """The causes that are named, in check or diagnosis, without an "or"."""
        return tuple(f.cause for f in (*self.findings, *self.diagnosis) if f.cause)

    @property
    def first(self) -> str:
        """The cause that comes out first: named, or the first candidate."""
        found = self.diagnosis or self.findings
        return "" if not found else found[0].cause or (found[0].candidates[0] if found[0].candidates else "")

    @property
    def wrong(self) -> bool:
        """Whether a cause is named that is none of the fault's."""
        return any(cause not in self.causes for cause in self.named)

    def __str__(self) -> str:
        mark = "WRONG " if self.wrong else "" if self.first in self.causes else "other "
        mark = "" if self.side == "healthy" else mark
        said = "; ".join(str(f) for f in self.findings)
        return f"{self.verdict}: {mark}{self.side}, {self.fault}: {self.first or 'nothing'} [{said}]"


def engine_rows(pool: Pool, model: str, dtype: str, only: str) -> Iterator[Row]:
    from reported_engine import FAULTS, GOLDENS, TEMPERATURE, Worker

    spec = EngineSpec(model, dtype=dtype)
    reader = EngineSpec(model, engine="transformers", dtype="float32", logprobs_mode="processed_logprobs")
    folder, _ = pool.folders(spec)
    anatomy, checkpoint = Anatomy.of(folder), load_checkpoint(folder)
    other_step = Path(f"{folder}-step2")
    chosen = [fault for fault in FAULTS if only in fault.fault]
    goldens = {name: _golden(pool, spec, Sampling(**{
        "temperature": TEMPERATURE, "max_tokens": TOKENS, "n": 1 if name == "greedy" else SAMPLES, "seed": 1,
        "ignore_eos": True, "logprobs": 5, **GOLDENS[name],
    })) for name in dict.fromkeys(fault.golden for fault in chosen)}  # fmt: skip
    readings = {name: pool.engine(reader).replay(golden.trace) for name, golden in goldens.items()}
    for fault in chosen:
        golden, engine = goldens[fault.golden], pool.engine(spec)

        def site_of(worker: Any) -> Worker:
            site = Worker(worker, checkpoint, anatomy)
            site.other_step = other_step
            return site

        answers = _answers(engine, golden, fault, site_of)
        comparison, _ = judge_answers(golden, answers, None, "rl", Context())
        yield _row(fault, comparison, readings[fault.golden])


def _golden(pool: Pool, spec: EngineSpec, sampling: Sampling) -> Golden:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        engine = pool.engine(spec)
        check_golden(path, engine, prompts=make_prompts(engine.tokenizer, PROMPTS), sampling=sampling, update=True, repeats=2)
        return Golden.load(path)


def _answers(engine: Engine, golden: Golden, fault: Any, site_of: Any) -> Answers:
    """What an engine with the fault answers. It is no longer on the golden's schedule, so that bits alone fail nothing."""
    prints = {**engine.fingerprint(), "schedule": "another"}
    trace = golden.trace
    if fault.free is not None:
        free = engine.replay(fault.free(trace), "regenerate").with_(sampling=trace.sampling)
        return Answers(replays={"decode": engine.replay(trace), "regenerate": free}, fingerprint=prints)
    asked = trace if fault.asked is None else fault.asked(trace)
    if fault.site is None:
        answer = engine.replay(asked)
    else:
        (site,) = engine.on_worker(site_of)
        try:
            fault.site(site)
            answer = engine.replay(asked)
        finally:
            site.undo()
    answer = answer.with_(sampling=trace.sampling, prompt_token_ids=trace.prompt_token_ids, prompt_offsets=trace.prompt_offsets)
    return Answers(replays={"decode": answer}, fingerprint=prints)


def _row(fault: Any, comparison: Comparison, reading: Trace) -> Row:
    findings = comparison.findings
    apart = read_against(comparison.expected, comparison.actual, reading, 0.25)
    diagnosis = tuple(weigh(findings, apart)) if comparison.verdict == "fail" else findings
    return Row("engine", fault.report, fault.fault, fault.causes, comparison.verdict, findings, diagnosis)


# -- trainers -----------------------------------------------------------------------------------------------------------


def trainer_rows(pool: Pool, model: str, only: str) -> Iterator[Row]:
    """Each fault in what a real GRPOTrainer computes of one batch; its model is the reference evaluation."""
    import torch
    from reported_trainer import FAULTS, TEMPERATURE, Fault, Step, healthy, write_adapter

    from pytest_logprob_parity.trainer.frameworks import framework
    from pytest_logprob_parity.trainer.parity import compare_with_trainer

    trl = framework("trl")
    sampling = Sampling(temperature=TEMPERATURE, max_tokens=24, seed=1, logprobs=5)
    trainer, batch, trace = _grpo(pool, model, sampling)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)

    def rollouts_of(fault: Fault) -> Any:
        """The engine's column [rows, keep] with the fault in the engine's settings."""
        if not fault.rollouts:
            return batch["sampling_per_token_logps"].clone()
        values = trace.top_logprobs[:, 0] if "likeliest" in fault.rollouts else trace.logprobs
        if "min_tokens" in fault.rollouts:
            asked = trace.with_(sampling=dataclasses.replace(sampling, **fault.rollouts))
            values = pool.engine(EngineSpec(model, dtype="float32")).replay(asked).logprobs
        if fault.rollouts.keys() & {"logprobs_mode", "adapter"}:
            values = pool.engine(EngineSpec(model, dtype="float32", **fault.rollouts)).replay(trace).logprobs
        column = torch.zeros_like(batch["sampling_per_token_logps"])
        column[batch["completion_mask"].bool()] = torch.from_numpy(values.copy())
        return column

    temporary = tempfile.TemporaryDirectory()
    no_faults = healthy(write_adapter(str(pool.absolute(model)), temporary.name))
    for fault in (*FAULTS, *no_faults):
        if only not in fault.fault:
            continue
        step = Step(trainer=trainer, ids=ids, mask=mask, keep=batch["completion_ids"].shape[1], rollout=rollouts_of(fault),
                    completion_mask=batch["completion_mask"])  # fmt: skip
        trainer.model.eval()
        torch.manual_seed(0)
        with contextlib.ExitStack() as inside, contextlib.ExitStack() as staying:
            if fault.inside is not None:
                (staying if fault.stays else inside).enter_context(fault.inside(trainer))
            step.logps = step.compute() if fault.step is None else fault.step(step)
            inside.close()
            if fault.after is not None:
                fault.after(step)
            held = {**batch, "old_per_token_logps": step.logps, "sampling_per_token_logps": step.rollout}
            if "tool" in fault.rollouts:
                held["tool_mask"] = batch["completion_mask"].clone()
                held["tool_mask"][:, 5:10] = 0
                held["sampling_per_token_logps"] = step.rollout * held["tool_mask"]
            asked = dataclasses.replace(sampling, min_tokens=fault.rollouts.get("min_tokens", 0))
            try:
                rollouts = trl.read(held, sampling=asked, dtype="float32")
                scorer = trl.scorer(trainer.model)
                told = compare_with_trainer(rollouts, scorer, trainer_dtype=fault.dtype, objective=fault.objective)
                verdict, findings = told.verdict, told.findings
            except UsageError as error:
                verdict, findings = (
                    "fail",
                    (Finding(layer="semantic", cause="wrong_values", evidence=f"refused: {str(error).splitlines()[0]}"),),
                )
        yield Row(
            "healthy" if fault in no_faults else "trainer", fault.report, fault.fault, fault.causes, verdict, findings, ()
        )


def _grpo(pool: Pool, model: str, sampling: Sampling) -> tuple[Any, dict[str, Any], Trace]:
    """A GRPOTrainer after a step at learning rate 0, its batch, and the engine's trace that the rollouts in it are of."""
    import os

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    from common import arith_prompts
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    engine, kept = pool.engine(EngineSpec(model, dtype="float32")), {}
    short = [[{"role": "user", "content": f"{a} + {a + 5}?"}] for a in range(PROMPTS // 2)]  # long ones are padded to
    prompts = [prompt for pair in zip(arith_prompts(PROMPTS // 2), short, strict=True) for prompt in pair]

    def rollout(prompts: Any, trainer: Any) -> dict[str, Any]:
        kept["trace"] = trace = engine.generate(prompts, sampling)
        every = range(trace.num_sequences)
        return {
            "prompt_ids": [trace.prompt(i) for i in every],
            "completion_ids": [trace.completion(i) for i in every],
            "logprobs": [trace.logprobs[slice(*trace.bounds(i))].tolist() for i in every],
        }

    class Kept(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            kept["batch"] = super()._generate_and_score_completions(inputs)
            return kept["batch"]

    class Synced:
        def sync_weights(self) -> None:
            """The weights do not change: the learning rate is 0."""

    with tempfile.TemporaryDirectory() as folder:
        trainer = Kept(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model),
            reward_funcs=lambda completions, **_: [float(len(str(c)) % 7) for c in completions],
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=2 * PROMPTS,
                num_generations=2,
                max_steps=1,
                temperature=sampling.temperature,
                max_completion_length=sampling.max_tokens,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                gradient_checkpointing=False,
                learning_rate=0.0,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            rollout_func=rollout,
        )
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Synced(), -1
        trainer.train()
    return trainer, kept["batch"], kept["trace"]


def main() -> None:
    share_the_machine()
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/tiny-arith")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="")
    parser.add_argument("--side", choices=("engine", "trainer"))
    parser.add_argument("--docs", type=Path)
    given = parser.parse_args()
    began, rows = time.monotonic(), []
    with Pool(REPO, lambda line: None) as pool:
        sides = {
            "engine": lambda: engine_rows(pool, given.model, given.dtype, given.only),
            "trainer": lambda: trainer_rows(pool, given.model, given.only),
        }
        for side, judge in sides.items():
            if given.side in (None, side):
                for row in judge():
                    print(row, flush=True)
                    rows.append(row)
    fine = [row for row in rows if row.side == "healthy"]
    report_number("healthy trainers that do not pass", sum(row.verdict != "pass" for row in fine), 0, f"of {len(fine)}")
    rows = [row for row in rows if row.side != "healthy"]
    for side in dict.fromkeys(row.side for row in rows):
        mine = [row for row in rows if row.side == side]
        report_number(f"{side}: faults that do not fail", sum(row.verdict != "fail" for row in mine), 0, f"of {len(mine)}")
        right = sum(row.first in row.causes for row in mine) / len(mine)
        print(f"{side}: cause right or first in {right:.1%} of {len(mine)} (to reach: 95 %)")
        report_number(f"{side}: causes named that are wrong", sum(row.wrong for row in mine), 0, f"of {len(mine)}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    if given.docs is not None:
        given.docs.write_text(page(rows), "utf-8")


def page(rows: list[Row]) -> str:
    """The table of the docs."""
    lines = [INTRODUCTION]
    for side in dict.fromkeys(row.side for row in rows):
        lines += [
            "",
            f"## {side.capitalize()}s",
            "",
            "| report | what was wrong | verdict | named, or first |",
            "|---|---|---|---|",
        ]
        for row in rows:
            if row.side == side:
                alone = bool((row.diagnosis or row.findings)[0].cause)
                mark = f"`{row.first}`" + ("" if alone else " first") + ("" if row.first in row.causes else ", not right")
                lines.append(f"| {row.report} | {row.fault} | {row.verdict} | {mark} |")
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Faults that others reported

These are public reports of wrong logprobs. Each fault was planted again in real code: in vLLM 0.32.0 (float32,
`models/tiny-arith`, with an unchanged fingerprint), and in the logprobs that a GRPOTrainer of TRL 1.16 computes for one
batch. If the code of a report does not run here, its mechanism was planted, for example a soft cap on one side. Only
excerpts of the reports were read.

`benchmarks/bench_reports.py --docs` writes this page. The last column has the cause that the finding names. With
*first*, the evidence fits several causes, and this one is the first candidate. For engines the findings come from
`check` and `diagnose`. For trainers they come from `assert_trainer_parity` with two columns and a scorer. The tables
leave out ranks that are too small (NVIDIA/TensorRT-LLM#7296): they are reported but decide nothing, because no RL
update uses ranks. They also leave out faults that these prompts do not show."""


if __name__ == "__main__":
    main()
