"""Runs the catalogue on one model, or on several in a process of their own each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from pytest_logprob_parity.engines.pool import Pool

from .judge_faults import CatalogueRun
from .plan import Plan
from .row import Row


def run_model(model: str, plan: Plan, notify: Callable[[str], None], show: Callable[[Row], None]) -> list[Row]:
    """Judge the catalogue on one model in this process; `show` gets each row as it comes."""
    step = plan.other_step or Path(f"{model}-step2")
    rows = []
    with Pool(notify=notify) as pool:
        other = step if step.is_dir() else None
        for row in CatalogueRun(pool, model, other, plan, notify).run():
            rows.append(row)
            show(row)
    return rows


def run_models(models: Sequence[str], plan: Plan, notify: Callable[[str], None], show: Callable[[Row], None]) -> Iterator[Row]:
    """Judge the catalogue on each model, several in a process of their own each.

    vLLM does not start a mixture of experts in a process where a dense model has run (0.32.0). `notify` and `show` are
    functions of a module, for they are sent there.
    """
    if len(models) == 1:
        yield from run_model(models[0], plan, notify, show)
        return
    context = multiprocessing.get_context("forkserver")  # all are forks of one process that imports vLLM
    context.set_forkserver_preload(["vllm.entrypoints.llm", "transformers.models.auto.modeling_auto"])
    for model in models:
        with ProcessPoolExecutor(1, context) as executor:
            yield from executor.submit(run_model, model, plan, notify, show).result()
