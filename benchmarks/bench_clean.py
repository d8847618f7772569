"""Clean runs on models that nobody tuned for, judged as a check judges them. None may fail; few may be unverified.

benchmarks/clean_runs.py collected the runs: goldens of nine architectures with their reference columns, and the answers of
engines that mean the same. No engine starts here, so that rules can be judged anew in seconds.

python benchmarks/bench_clean.py FOLDER [--objective token] [--all]        # --all: a line for every comparison
python benchmarks/bench_clean.py FOLDER --covered 8        # as if the reference were of 8 sequences; or "none"
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import report_number

from pytest_logprob_parity.check.ask import Answers
from pytest_logprob_parity.check.check import judge_answers
from pytest_logprob_parity.check.context import Context
from pytest_logprob_parity.check.reference_pass import by_turns
from pytest_logprob_parity.checkpoint.digests import model_digests
from pytest_logprob_parity.comparison.result import Comparison
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.golden.reference import Reference
from pytest_logprob_parity.matrix.worker import load_answers
from pytest_logprob_parity.trace import Trace

#: A golden of this size and more should nearly always be verified.
PROMPTS, TOKENS, UNVERIFIED = 24, 1500, 0.05
WANTED = 1000


@dataclass(frozen=True)
class Run:
    """One comparison: what was compared, and what came of it."""

    model: str
    dtype: str
    sampling: str
    size: str
    recorder: str
    variation: str
    large: bool
    comparison: Comparison

    def distances(self, reference: Reference) -> str:
        """RMS and largest of golden to reference and now to reference, and of golden to now (nats)."""
        columns = [reference.errors(t.logprobs) for t in (self.comparison.expected, self.comparison.actual)]
        known = np.isfinite(columns[0]) & np.isfinite(columns[1])
        told = [f"{np.sqrt(np.mean(x[known] ** 2)):.2g} (max {np.abs(x[known]).max(initial=0):.2g})" for x in columns]
        return f"RMS golden-reference {told[0]}, now-reference {told[1]}, d {self.comparison.metrics['rms_diff']:.2g}"


def golden_of(folder: Path, models: Path, covered: int) -> Golden | None:
    """The golden of a folder with its reference of `covered` sequences (-1: all); None where that was not collected."""
    if not (folder / "reference.decode.safetensors").exists():
        return None
    golden, told = Golden.load(folder / "golden.safetensors"), Trace.load(folder / "reference.decode.safetensors")
    sequences = by_turns(golden.trace)[: None if covered < 0 else covered]
    lengths = np.diff(golden.trace.sequence_offsets)
    known = golden.trace.mask & np.isin(np.repeat(np.arange(len(lengths)), lengths), sequences)
    logprobs = np.where(known, told.logprobs, np.nan).astype(np.float32)
    golden = dataclasses.replace(golden, reference=Reference(logprobs, "transformers float32", len(sequences)))
    model = models / folder.parts[-3]
    return dataclasses.replace(golden, fingerprint=_now(golden.fingerprint, model))


def _now(fingerprint: Mapping[str, Any], model: Path) -> dict[str, Any]:
    """A fingerprint with what today's code reads off the model's folder, whichever version collected it."""
    return {**fingerprint, **model_digests(model, model)} if (model / "config.json").exists() else dict(fingerprint)


def runs_of(root: Path, objective: str, covered: int = -1) -> Iterator[tuple[Run, Reference]]:
    for path in sorted((root / "runs").glob("*/*/*/golden.safetensors")):
        folder = path.parent
        golden = golden_of(folder, root / "models", covered)
        if golden is None or golden.reference is None:
            continue
        model, dtype, cell = folder.parts[-3:]
        sampling, size, recorder = cell.rsplit(",", 2)
        large = golden.trace.num_prompts >= PROMPTS and int(golden.trace.mask.sum()) >= TOKENS
        for file in sorted(folder.glob("*.more.safetensors")):
            name = file.name.removesuffix(".more.safetensors")
            if name == "reference":
                continue
            answers = load_answers(folder, name)
            prints = _now(answers.fingerprint, root / "models" / model)
            if name.startswith("other batches"):  # the golden's engine, not its schedule: bits are not expected back
                prints = {**prints, "schedule": name}
            answers = Answers(replays=answers.replays, fingerprint=prints, policy_logprobs=answers.policy_logprobs)
            comparison, _ = judge_answers(golden, answers, None, "rl", Context(objective=objective))
            yield Run(model, dtype, sampling, size, recorder, name, large, comparison), golden.reference


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--objective", default="token")
    parser.add_argument("--covered", type=lambda given: 0 if given == "none" else int(given), default=-1)
    parser.add_argument("--all", action="store_true")
    given = parser.parse_args()
    began = time.monotonic()
    by: dict[str, Counter[str]] = defaultdict(Counter)
    for run, reference in runs_of(given.folder, given.objective, given.covered):
        verdict = run.comparison.verdict
        if given.all or verdict != "pass":
            where = f"{run.model}, {run.dtype}, {run.sampling}, {run.size}, {run.recorder} against {run.variation}"
            print(f"{verdict}: {where}: {run.distances(reference)}: {run.comparison.headline}", flush=True)
        groups = (
            "all", f"size: {PROMPTS} prompts and {TOKENS:,} tokens or more" if run.large else "size: smaller",
            f"model: {run.model}", f"dtype: {run.dtype}", f"sampling: {run.sampling}", f"recorded: {run.recorder}",
            f"now: {run.variation.rstrip(' 0123456789') if run.variation.startswith('other') else run.variation}",
        )  # fmt: skip
        for group in groups:
            by[group][verdict] += 1
    print(f"\n{'':44s}{'runs':>7s}{'fail':>7s}{'unverified':>12s}{'pass':>7s}")
    for group, counts in sorted(by.items()):
        print(f"{group:44s}{counts.total():7d}{counts['fail']:7d}{counts['unverified']:12d}{counts['pass']:7d}")
    every, large = by["all"], by[f"size: {PROMPTS} prompts and {TOKENS:,} tokens or more"]
    report_number("comparisons wanted / comparisons", WANTED / max(every.total(), 1), 1, str(every.total()))
    report_number("clean comparisons that fail", every["fail"], 0, f"{every['fail']} of {every.total()}")
    share = large["unverified"] / max(large.total(), 1)
    report_number("share unverified where the golden is large", share, UNVERIFIED, f"{large['unverified']} of {large.total()}")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    raise SystemExit(every["fail"] > 0)


if __name__ == "__main__":
    main()
