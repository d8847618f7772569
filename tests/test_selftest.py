"""selftest: faults planted in a real engine, their true effect by float64, and a verdict that has to match."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineSpec, Sampling
from pytest_logprob_parity.comparison.tolerance import default_tolerance
from pytest_logprob_parity.selftest.catalogue import Fault, catalogue
from pytest_logprob_parity.selftest.prompts import make_prompts
from pytest_logprob_parity.selftest.reference import Reference, load_checkpoint
from pytest_logprob_parity.selftest.run import Row, true_effect

STEP_2 = load_checkpoint(ROOT / "models" / "tiny-arith-step2")


@pytest.fixture(scope="module")
def reference():
    return Reference(ROOT / "models" / "tiny-arith")


@pytest.fixture(scope="module")
def traces(pool, reference):
    """A float32 golden of 16 sequences, and what float64 says of it."""
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    prompts = make_prompts(engine.tokenizer, 2)
    trace = engine.generate(prompts, Sampling(temperature=0.7, n=8, max_tokens=16, ignore_eos=True, seed=1))
    return prompts, trace, reference.read(trace, prompts, trace.sampling)


def test_the_catalogue_has_forty_faults_in_three_sizes_each():
    sizes = {}
    for fault in catalogue(STEP_2, 384):
        sizes.setdefault(fault.name, set()).add(fault.size)
    assert len(sizes) >= 40
    assert all(len(of) >= 3 for of in sizes.values())


def test_the_reference_is_the_model(traces):
    _, trace, truth = traces
    assert np.abs(trace.logprobs - truth.logprobs).max() < 1e-4


def test_the_reference_is_as_before_once_a_fault_is_undone(reference, traces):
    prompts, trace, truth = traces
    faults = [f for f in catalogue(STEP_2, 384) if f.site is not None and f.golden == "plain"]
    first = {f.name: f for f in reversed(faults)}  # the largest size of each
    for fault in first.values():
        fault.site(reference)
    assert np.abs(reference.read(trace, prompts, trace.sampling).logprobs - truth.logprobs).max() > 0.1
    reference.undo()
    np.testing.assert_array_equal(reference.read(trace, prompts, trace.sampling).logprobs, truth.logprobs)


def test_a_true_effect_is_measured_in_margins(traces):
    *_, truth = traces
    limits = default_tolerance("bfloat16")
    for by, effect in ((0.002, 1.0), (0.008, 4.0), (0.0, 0.0)):
        moved = truth.with_(logprobs=truth.logprobs + np.float32(by))
        assert true_effect(truth, moved, limits)[0] == pytest.approx(effect, rel=0.05)
    gone = truth.with_(logprobs=np.full_like(truth.logprobs, np.nan))
    assert true_effect(truth, gone, limits) == (math.inf, "NaN")


def test_prompts_are_of_one_length_and_all_different(engine):
    prompts = make_prompts(engine.tokenizer, 25)
    assert {len(p) for p in prompts} == {160}
    assert len({tuple(p) for p in prompts}) == 25


@pytest.mark.parametrize(
    ("effect", "verdict", "semantic", "right"),
    [
        (3, "fail", False, True),
        (3, "pass", False, False),
        (3, "unverified", False, False),  # not failing is missing it, under whatever name
        (0.4, "fail", False, False),
        (0.4, "fail", True, True),
        (0.4, "unverified", False, True),
        (1, "fail", False, True),
        (1, "pass", False, True),
    ],
)
def test_the_truth_and_not_the_verdict_says_what_is_right(effect, verdict, semantic, right):
    row = Row(Fault(name="f", size="s", semantic=semantic), "float32", effect, "mean", verdict, "")
    assert row.right is right


def run_selftest(tmp_path, *arguments):
    """Run the command; its exit status, output and rows."""
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest_logprob_parity.cli", "selftest", "--json", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.is_file(), done.stderr[-3000:]
    return done.returncode, done.stdout, json.loads(out.read_text())


def test_a_part_of_the_catalogue_on_the_real_engine(tmp_path):
    """One fault of each kind: asked, reported, distribution, arithmetic, weights, few tokens, free run, not forced."""
    chosen = (
        "temperature,shifted,log2,normaliser,attention scale,stale KV block,rope base,all positions,weights of another,"
        "int,corrupted,another seed,greedy,force"
    )
    status, output, rows = run_selftest(
        tmp_path, "--dtype", "float32", "--dtype", "bfloat16", "--sequences", "64", "--tokens", "24", "--only", chosen
    )
    assert status == 0, output
    assert len({row["fault"] for row in rows}) >= 12
    assert {row["expected"] for row in rows} == {"fail", "no fail", ""}
    assert "WRONG" not in output
