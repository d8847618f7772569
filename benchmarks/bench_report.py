"""The report of 50 checks of 200 x 64 tokens, none equal bit for bit: its size, and how fast it is written and opened.

The traces are a real engine's: a golden, and its tokens replayed by the same engine in other batch shapes, one sequence at a
time, with raw logprobs, and with the weights of another checkpoint.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from common import REPO, SPEC, long_prompts, report_number, share_the_machine

sys.path.insert(0, str(REPO / "tests"))

from chromium import Chromium, find

from pytest_logprob_parity.check.check import check_golden
from pytest_logprob_parity.check.context import Checked
from pytest_logprob_parity.comparison.message import failure_message
from pytest_logprob_parity.comparison.result import MismatchError
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.report.check_entry import make_entry
from pytest_logprob_parity.report.write import results_of, write_report
from pytest_logprob_parity.spec import Sampling

SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=64, min_tokens=64, n=4, seed=1, logprobs=5)
CHECKS = 50
MEGABYTES, SECONDS = 5.0, 2.0


def real_checks(folder: Path) -> list[Checked]:
    """What checks of one golden saw on several real engines."""
    path = folder / "golden.safetensors"
    others = ({"model": "models/tiny-arith-step2"}, {"logprobs_mode": "raw_logprobs"}, {"max_num_seqs": 3})
    with Pool(REPO, print) as pool:
        engine = pool.engine(SPEC)
        check_golden(path, engine, prompts=long_prompts(engine.tokenizer, 50, 160), sampling=SAMPLING, update=True)
        return [checked for changes in others for checked in _checks(pool, path, changes)]


def _checks(pool: Pool, path: Path, changes: dict[str, object]) -> Iterator[Checked]:
    from pytest_logprob_parity.check.context import Context

    seen: list[Checked] = []
    try:
        check_golden(path, pool.engine(SPEC.replace(**changes)), context=Context(observe=seen.append))
    except MismatchError as error:
        print(changes, error.comparison.headline)
    yield from seen


def main() -> None:
    share_the_machine()
    with tempfile.TemporaryDirectory() as folder:
        seen = real_checks(Path(folder))
        began = time.perf_counter()
        entries = [_entry(seen[number % len(seen)], number) for number in range(CHECKS)]
        print(f"{CHECKS} entries of results.json: {time.perf_counter() - began:.1f} s")
        content = results_of(entries, REPO)
        began = time.perf_counter()
        page = write_report(Path(folder) / "report", content)
        print(f"rendering: {time.perf_counter() - began:.1f} s")
        tokens = sum(int(checked.comparison.metrics["n_tokens"]) for checked in seen) // len(seen)
        megabytes = page.stat().st_size / 1e6
        detail = f"{megabytes:.2f} MB for {CHECKS} checks of {tokens:,} tokens; results.json "
        detail += f"{(page.parent / 'results.json').stat().st_size / 1e6:.2f} MB"
        report_number("size of the page / 5 MB", megabytes / MEGABYTES, 1, detail)
        if find() is None:
            print("no Chromium: opening was not timed")
            return
        with Chromium(Path(folder) / "profile") as browser:
            browser.look()
            times = [browser.open(page) for _ in range(5)]
            opened = statistics.median(times)
            shown = f"median of {[round(t, 2) for t in times]} s until loaded and laid out"
            report_number("opening the page / 2 s", opened / SECONDS, 1, shown)
            began = time.perf_counter()
            browser.run("document.querySelector('#unfold').click(), new Promise(done => requestAnimationFrame(done))")
            print(f"unfolding all checks: {time.perf_counter() - began:.2f} s; problems: {browser.problems or 'none'}")


def _entry(checked: Checked, number: int) -> dict[str, object]:
    comparison = dataclasses.replace(checked.comparison)
    golden = f"golden/tests/test_{number}/test_rollouts-00000000.safetensors"
    message = "" if comparison.passed else failure_message(
        comparison, golden=golden, about=[], differences=checked.differences, accept="pytest --update-golden"
    )  # fmt: skip
    about = {
        "node_id": f"tests/test_{number}.py::test_rollouts", "name": "", "file": f"tests/test_{number}.py", "line": 12,
        "golden": golden, "message": message, "obtained": "", "refusal": "",
        "commands": [{"what": "accept", "command": "logprob-parity accept"}],
    }  # fmt: skip
    outcome = {"pass": "passed", "fail": "failed"}.get(comparison.verdict, "unverified")
    return make_entry(about, outcome, comparison.headline, comparison, checked, REPO)


if __name__ == "__main__":
    main()
