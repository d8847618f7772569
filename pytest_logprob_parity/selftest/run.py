"""Runs the selftest: records a golden as a check does, plants each fault in the user's engine, and judges what comes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..check.check import check_golden
from ..check.compatibility import check_belongs
from ..check.context import Context
from ..engines.pool import Pool
from ..errors import EngineError, UsageError
from ..golden import Golden
from ..grammar import counted
from ..progress import doing
from ..spec import EngineSpec, Sampling
from .controls import first_controls, later_controls
from .engine_under_test import EngineUnderTest, NotPossibleError, first_line
from .fault import Fault, Row
from .judge import judge_fault
from .prompts import LENGTH, make_prompts
from .report_faults import report_faults
from .sampler_faults import sampler_faults
from .setting_faults import setting_faults
from .truth import Objective
from .weight_faults import matrix_faults, vocabulary_faults

#: How a golden is sampled where nothing else is asked for: with a temperature and a truncation, for faults of either.
SAMPLING: Final = Sampling(temperature=0.7, top_p=0.9, n=2, max_tokens=32, ignore_eos=True, seed=1, logprobs=5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a selftest does: on which engine, with which golden, and which faults.

    `golden` is the user's; None records one with `prompts` prompts, `sampling` saying how the rest is sampled. `only` are kinds
    of faults, or texts of which a fault's name has to contain one; () plants all.
    """

    spec: EngineSpec
    golden: Path | None = None
    objective: Objective = "token"
    prompts: int = 24
    sampling: Sampling = SAMPLING
    only: tuple[str, ...] = ()


def run_selftest(pool: Pool, plan: Plan, notify: Callable[[str], None]) -> Iterator[Row]:
    """Plant and judge the faults of the plan, a row each, in the order that starts the fewest engines.

    Raises UsageError for a golden of another model, EngineError where the engine does not start.
    """
    with tempfile.TemporaryDirectory(prefix="logprob-parity-selftest-") as place:
        path = plan.golden or _record(pool, plan, Path(place) / "golden.safetensors", notify)
        _check_golden_fits(pool, plan, path)
        with doing(f"starting {plan.spec}"):
            under_test = EngineUnderTest(pool, plan.spec, path)
        notify(_described(under_test))
        faults = [fault for fault in _faults(under_test) if fault.is_named(plan.only)]
        if not faults:
            raise UsageError(f"selftest: no fault is of a kind, or has a name, of {', '.join(plan.only)}")
        for number, fault in enumerate(faults, 1):
            with doing(f"fault {number} of {len(faults)}: {fault.name}, {fault.size}"):
                row = _row(fault, under_test, plan.objective)
            yield row


def _record(pool: Pool, plan: Plan, path: Path, notify: Callable[[str], None]) -> Path:
    """A golden as a check records it, of prompts that fit the model."""
    engine = pool.engine(plan.spec)
    with doing(f"starting {plan.spec}"):
        room = engine.config.max_model_len
    tokens = plan.sampling.max_tokens
    length = LENGTH if room is None else min(LENGTH, room - tokens)
    if length < 1:
        raise UsageError(f"selftest: max_tokens={tokens} leaves no room for a prompt: max_model_len is {room}")
    prompts = make_prompts(engine.tokenizer, plan.prompts, length)
    recorded = check_golden(
        path, engine, prompts=prompts, sampling=plan.sampling, update=True, objective=plan.objective, replay=("decode",)
    )
    for note in recorded.notes:
        notify(str(note))
    return path


def _check_golden_fits(pool: Pool, plan: Plan, path: Path) -> None:
    golden = Golden.load(path)
    if not golden.fingerprint:
        raise UsageError(f"selftest: {path} was made of a trace in hand: no engine is known that should give it back")
    check_belongs(golden, pool.engine(plan.spec), None, None, Context(shown_path=str(path), accept="record it anew"))


def _described(under_test: EngineUnderTest) -> str:
    """The golden in one line."""
    trace = under_test.golden.trace
    return (
        f"golden: {counted(trace.num_sequences, 'sequences')} of {counted(trace.num_prompts, 'prompts')}, "
        f"{counted(trace.num_tokens, 'tokens')}, {trace.dtype}, {trace.sampling.processing()}"
    )


def _faults(under_test: EngineUnderTest) -> list[Fault]:
    """All faults: first those of the engine as it runs, then those that need a start, whose last one is a restart."""
    sampling, config = under_test.golden.trace.sampling, under_test.answers.fingerprint
    settings = {**config.get("config", {}), "dtype": config.get("dtype")}
    reload, *restarts = later_controls()
    return [
        *first_controls(), *sampler_faults(sampling), *report_faults(), *matrix_faults(), reload,
        *vocabulary_faults(),
        *setting_faults(settings, raw_is_processed=sampling.raw_is_processed), *restarts,
    ]  # fmt: skip


def _row(fault: Fault, under_test: EngineUnderTest, objective: Objective) -> Row:
    try:
        with fault.plant(under_test) as answers:
            return judge_fault(fault, under_test.golden, under_test.clean, answers, objective)
    except (NotPossibleError, UsageError) as error:
        return Row.without_answer(fault, "not possible", first_line(error))
    except EngineError as error:
        under_test.restart()
        return Row.without_answer(fault, "error", first_line(error))
