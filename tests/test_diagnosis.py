"""From "it differs" to "this is why": which settings account for a mismatch, and a third opinion, on real engines."""

import dataclasses
import shutil

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineSpec, Golden, Sampling, check_golden
from pytest_logprob_parity.cli import main
from pytest_logprob_parity.diagnosis.ablation import Ablation, Budget, Step, ablate
from pytest_logprob_parity.diagnosis.reading import read_against, weigh

SPEC = EngineSpec(MODEL, dtype="bfloat16")


@pytest.fixture(scope="module")
def golden(engine, questions, tmp_path_factory):
    """The path of a golden of the shared engine."""
    path = tmp_path_factory.mktemp("diagnosis") / "g.safetensors"
    sampling = Sampling(temperature=0.7, max_tokens=24, n=2, seed=1)
    check_golden(path, engine, prompts=questions(12), sampling=sampling, update=True, repeats=2)
    return path


def ablated(golden, pool, spec, budget=Budget(), read=False):  # noqa: B008 - frozen
    return ablate(Golden.load(golden), spec, pool, budget, lambda _: None, read=read)


def test_the_settings_that_account_for_it_are_named_with_their_share(golden, pool):
    failing = SPEC.replace(logprobs_mode="raw_logprobs", max_num_seqs=3, kv_cache_dtype="fp8_e4m3")
    found = ablated(golden, pool, failing)
    assert set(found.differs) >= {"logprobs_mode", "max_num_seqs", "kv_cache_dtype"}
    shares = {step.moved: found.share(step) for step in found.steps[1:]}
    assert shares["logprobs_mode",] > 0.2
    assert shares["kv_cache_dtype",] > 0.2
    assert abs(shares["max_num_seqs",]) < 0.05
    assert set(found.best.moved) >= {"logprobs_mode", "kv_cache_dtype"}
    told = found.describe()
    assert told[1].split()[:4] == ["semantic", "logprobs_mode", "'raw_logprobs'", "->"]
    assert "what remains" in told[-1]


def test_an_engine_that_does_not_start_is_a_row_and_the_budget_is_kept(golden, pool, tmp_path):
    changed = Golden.load(golden)
    config = {**changed.fingerprint["config"], "max_num_batched_tokens": 1, "logprobs_mode": "processed_logprobs"}
    dataclasses.replace(changed, fingerprint={**changed.fingerprint, "config": config}).save(tmp_path / "g.safetensors")
    found = ablated(tmp_path / "g.safetensors", pool, SPEC.replace(logprobs_mode="raw_logprobs"))
    (problem,) = [step for step in found.steps if step.moved == ("max_num_batched_tokens",)]
    assert "did not start" in problem.problem
    assert any("max_num_batched_tokens" in line and "did not start" in line for line in found.describe())
    assert found.best.moved == ("logprobs_mode",)
    assert ablated(golden, pool, SPEC.replace(logprobs_mode="raw_logprobs"), Budget(engines=0)).left_out.startswith(
        "1 more steps were left out: the budget is 0 engines"
    )


def test_a_third_opinion_says_which_side_has_changed(golden, pool, tmp_path):
    shutil.copytree(ROOT / "models" / "tiny-arith-step2", tmp_path / "other")
    other = ablated(golden, pool, EngineSpec(str(tmp_path / "other"), dtype="bfloat16"), read=True)
    assert other.reading.golden > 2 * other.reading.now
    assert other.describe()[-1].endswith("this run agrees with it, the golden does not")
    assert "no setting differs: the weights, the build or the hardware are left" in other.describe()
    rotten = ablated(golden, pool, SPEC.replace(kv_cache_dtype="fp8_e5m2"), read=True)
    assert rotten.reading.now > 2 * rotten.reading.golden


def test_what_a_reading_makes_of_a_comparison():
    truth = np.random.default_rng(0).normal(-1, 0.5, 400).astype(np.float32)
    trace = _trace(truth)
    golden, now = _trace(truth + 0.01), _trace(truth + np.where(np.arange(400) < 40, 2, 0.01).astype(np.float32))
    few = weigh([], read_against(golden, now, trace, 0.5))
    assert [(f.layer, f.candidates[0]) for f in few] == [("path", "prefix_cache"), ("weights", "stale_kv_cache")]
    assert "10% of the sequences carry it" in few[0].evidence
    changed = weigh([], read_against(_trace(truth + 1), golden, trace, 0.5))
    assert (changed[0].layer, changed[0].cause) == ("weights", "weights_differ")


def _trace(logprobs):
    from pytest_logprob_parity import Trace

    return Trace.from_arrays(
        prompt_token_ids=np.arange(20), prompt_offsets=np.arange(21), token_ids=np.arange(400), logprobs=logprobs,
        sequence_offsets=np.arange(21) * 20, dtype="float32",
    )  # fmt: skip


def test_what_helps_only_in_company_is_found_by_pairs():
    """By what is left, in numbers: the table is made from steps, whoever measured them."""
    differs = {"max_num_seqs": (256, 3), "block_size": (128, 32)}
    steps = (Step((), 1.0), Step(("max_num_seqs",), 1.0), Step(("block_size",), 1.0), Step(("max_num_seqs", "block_size"), 0.0))
    told = Ablation(steps, differs, noise=0.01).describe()
    assert told[-1] == ("max_num_seqs and block_size account for 100% of the mismatch; what remains, RMS 0 nats, is noise")


def test_the_command_prints_the_verdict_and_the_steps(golden, capsys):
    status = main(["diagnose", str(golden), f"model={MODEL}", "logprobs_mode=raw_logprobs", "--no-reading"])
    printed = capsys.readouterr().out
    assert status == 1
    assert printed.startswith("fail: The logprobs do not mean the same")
    assert "logprobs_mode accounts for 100% of the mismatch; what remains, RMS 0 nats, is noise" in printed


def test_pytest_diagnoses_where_it_is_asked_to(run_inner, pytester, questions):
    pytester.makepyfile(f"""
        import pytest

        @pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")
        def test_rollouts(parity_engine, golden_trace):
            sampling = dict(temperature=0.7, max_tokens=8, n=4)
            golden_trace.check(parity_engine, prompts=["12 + 30 =", "7 * 8 ="], sampling=sampling)
    """)
    run_inner("--update-golden").assert_outcomes(passed=1)
    failed = run_inner("--parity-set", "logprobs_mode=raw_logprobs", "--parity-diagnose")
    failed.assert_outcomes(failed=1)
    failed.stdout.fnmatch_lines(
        ["E * diagnosis    as it failed: RMS *", "E * logprobs_mode accounts for 100% of the mismatch*"]
    )
