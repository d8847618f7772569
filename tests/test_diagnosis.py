"""From "it differs" to "this is why": which settings account for a mismatch, and a reference evaluation, on real engines."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineError, EngineSpec, Golden, MismatchError, Sampling, UsageError, check_golden
from pytest_logprob_parity.cli import main
from pytest_logprob_parity.comparison.result import Finding
from pytest_logprob_parity.diagnosis.ablation import Ablation, Budget, Step, ablate
from pytest_logprob_parity.diagnosis.reference_evaluation import ReferenceDistances, read_against, weigh

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


def test_a_configuration_that_overrides_the_checkpoints_is_a_setting_too(golden, pool):
    failing = SPEC.replace(hf_overrides={"rms_norm_eps": 0.3})
    with pytest.raises(MismatchError) as error:
        check_golden(golden, pool.engine(failing), replay=("decode",))
    (found,) = error.value.comparison.findings
    assert (found.layer, found.cause) == ("weights", "weights_differ")
    assert "config.hf_overrides.rms_norm_eps None -> 0.3" in found.evidence
    ablation = ablated(golden, pool, failing)
    assert (ablation.best.moved, ablation.best.rms) == (("hf_overrides",), 0)
    assert any(line.startswith("hf_overrides accounts for 100% of the mismatch") for line in ablation.describe())


def test_an_engine_that_does_not_start_is_a_row_and_the_budget_is_kept(golden, pool, tmp_path):
    none = ablated(golden, pool, SPEC.replace(logprobs_mode="raw_logprobs"), Budget(engines=0))
    assert none.left_out.startswith("1 more steps were left out: the budget is 0 engines")
    changed = Golden.load(golden)
    config = {**changed.fingerprint["config"], "max_num_batched_tokens": 1, "logprobs_mode": "processed_logprobs"}
    dataclasses.replace(changed, fingerprint={**changed.fingerprint, "config": config}).save(tmp_path / "g.safetensors")
    found = ablated(tmp_path / "g.safetensors", pool, SPEC.replace(logprobs_mode="raw_logprobs"))
    (problem,) = [step for step in found.steps if step.moved == ("max_num_batched_tokens",)]
    assert "did not start" in problem.problem
    assert any("max_num_batched_tokens" in line and "did not start" in line for line in found.describe())
    assert found.best.moved == ("logprobs_mode",)


def test_a_reference_evaluation_says_which_side_has_changed(golden, pool, tmp_path):
    shutil.copytree(ROOT / "models" / "tiny-arith-step2", tmp_path / "other")
    other = ablated(golden, pool, EngineSpec(str(tmp_path / "other"), dtype="bfloat16"), read=True)
    assert other.reference.golden > 2 * other.reference.now
    assert other.describe()[-1].endswith("this run agrees with it, the golden does not")
    assert "no setting differs: the weights, the build or the hardware are left" in other.describe()
    both = ablated(golden, pool, EngineSpec(str(tmp_path / "other"), dtype="bfloat16", logprobs_mode="raw_logprobs"), read=True)
    assert both.reference_of == ("logprobs_mode",)
    assert both.reference.off == "golden"
    assert both.weigh(())[0].cause == "weights_differ"
    rotten = ablated(golden, pool, SPEC.replace(kv_cache_dtype="fp8_e5m2"), read=True)
    assert rotten.reference.now > 2 * rotten.reference.golden


def test_what_a_reference_evaluation_makes_of_a_comparison():
    truth = np.random.default_rng(0).normal(-1, 0.5, 400).astype(np.float32)
    trace = _trace(truth)
    golden, now = _trace(truth + 0.01), _trace(truth + np.where(np.arange(400) < 40, 2, 0.01).astype(np.float32))
    few = weigh([], read_against(golden, now, trace, 0.5))
    assert [(f.layer, f.candidates[0]) for f in few] == [("path", "prefix_cache"), ("weights", "stale_kv_cache")]
    assert "10% of the sequences carry it" in few[0].evidence
    changed = weigh([], read_against(_trace(truth + 1), golden, trace, 0.5))
    assert (changed[0].layer, changed[0].cause) == ("weights", "weights_differ")
    (before,) = weigh([], read_against(_trace(truth + 1), golden, trace, 0.5), other_build=True)
    assert (before.layer, before.cause, before.candidates[:2]) == ("path", None, ("engine_build", "weights_differ"))
    assert "or the golden's engine computed something else" in before.evidence


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
    told = Ablation(steps=steps, differs=differs, noise=0.01).describe()
    assert told[-1] == ("max_num_seqs and block_size account for 100% of the mismatch; what remains, RMS 0 nats, is noise")


def test_what_lies_below_what_matters_accuses_nobody():
    assert ReferenceDistances(golden=1e-6, now=6e-6, share=1.0, matters=1e-3).off == ""
    assert ReferenceDistances(golden=1e-4, now=6e-3, share=1.0, matters=1e-3).off == "now"
    truth = np.random.default_rng(0).normal(-1, 0.5, 400).astype(np.float32)
    tiny = read_against(_trace(truth), _trace(truth + np.float32(6e-6)), _trace(truth), 0.01)
    given = [Finding(layer="path", cause="engine_build", evidence="the only difference")]
    assert (tiny.now > 2 * tiny.golden, weigh(given, tiny)) == (True, given)
    excluded = np.where(np.arange(400) < 9, -np.inf, truth).astype(np.float32)
    assert read_against(_trace(excluded), _trace(truth + 1), _trace(excluded), 0.5).off == "now"  # warnings are errors


class FakePool:
    """Engines whose error is what `error(settings)` says; the golden's own settings are all 0, a failing engine's all 1."""

    def __init__(self, error, silent=()):
        self._error, self._silent = error, silent
        self.truth = _trace(np.random.default_rng(0).normal(-1, 0.5, 400).astype(np.float32))

    def engine(self, spec):
        moved = {name for name, value in spec.settings.items() if value == 0}
        values = {name: value for name, value in spec.settings.items() if name not in self._silent}
        config = SimpleNamespace(values=values, dtype="float32")
        return SimpleNamespace(config=config, replay=lambda trace: self._answer(moved))

    def _answer(self, moved):
        error = self._error(moved)
        if isinstance(error, str):
            raise EngineError(error)
        return self.truth.with_(logprobs=self.truth.logprobs + np.float32(error))


KNOBS = ("max_num_seqs", "block_size", "enable_prefix_caching", "async_scheduling", "max_num_batched_tokens")


def fake_ablation(error, budget=Budget(), **options):  # noqa: B008 - frozen
    pool = FakePool(error, **options)
    golden = Golden(pool.truth, fingerprint={"config": dict.fromkeys(KNOBS, 0), "dtype": "float32"})
    return ablate(golden, EngineSpec("m", **dict.fromkeys(KNOBS, 1)), pool, budget, lambda _: None, read=False)


@pytest.mark.parametrize(
    "guilty", [{"block_size"}, {"block_size", "max_num_seqs"}, {"block_size", "async_scheduling", "max_num_seqs"}]
)
def test_what_helps_only_in_company_is_found_and_nothing_else_is_blamed(guilty):
    def error(moved):
        """A part of it goes by itself, the rest only when all the guilty ones are moved."""
        return 0.0 if guilty <= moved else 0.7 if "block_size" in moved else 1.0

    found = fake_ablation(error, Budget(engines=30))
    assert set(found.best.moved) == guilty
    assert found.left_out == ""
    assert "account" in found.describe()[-1]
    assert "what remains, RMS 0 nats, is noise" in found.describe()[-1]


def test_nothing_is_concluded_of_settings_that_were_not_tried():
    none = "no setting accounts for the mismatch: the weights, the build or the hardware are left"
    assert none in fake_ablation(lambda moved: 1.0).describe()
    for budget in (Budget(engines=2), Budget(engines=0), Budget(minutes=0)):
        told = fake_ablation(lambda moved: 1.0, budget).describe()
        assert none not in told
        assert "not known of" in told[-2]
        assert told[-1].startswith(f"{5 - 2 * (budget.engines == 2) + 1} more steps were left out")
    broken = fake_ablation(lambda moved: "did not start" if "block_size" in moved else 1.0).describe()
    assert broken[-1].endswith("none accounts for the mismatch; not known of block_size: not tried, or not started")


def test_what_the_engine_does_not_report_cannot_be_moved():
    found = fake_ablation(lambda moved: 1.0, silent=("block_size",))
    assert set(found.differs) == set(KNOBS) - {"block_size"}
    assert set(fake_ablation(lambda moved: 1.0).differs.values()) == {(0, 1)}


def test_a_budget_is_not_negative(tmp_path, capsys):
    with pytest.raises(UsageError, match="a budget of nan minutes: must be 0 or more"):
        Budget(minutes=float("nan"))
    assert main(["diagnose", str(tmp_path / "g"), "--max-engines", "-1"]) == 2
    assert capsys.readouterr().err == "logprob-parity: a budget of -1 engines: must be 0 or more\n"


def test_the_command_weighs_the_findings_with_the_reference_evaluation(golden, tmp_path, capsys):
    """The folder of the golden's model holds another step's weights, and the processor is another one."""
    shutil.copytree(ROOT / "models" / "tiny-arith-step2", tmp_path / "tiny-arith")
    changed = Golden.load(golden)
    hardware = {**changed.fingerprint["hardware"], "device": "another processor"}
    given = {**changed.fingerprint, "hardware": hardware}
    dataclasses.replace(changed, fingerprint=given).save(tmp_path / "g.safetensors")
    assert main(["diagnose", str(tmp_path / "g.safetensors"), f"model={tmp_path / 'tiny-arith'}"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[1].startswith("  weights: weights_differ: the checkpoint of now gives the numbers of this run")
    assert "engine_build" not in "\n".join(told)
    assert told[-1].endswith("this run agrees with it, the golden does not")


def test_what_is_not_a_mismatch_is_not_diagnosed(engine, tmp_path, capsys):
    path = tmp_path / "g.safetensors"
    check_golden(path, engine, prompts=["12 + 30 ="], sampling=Sampling(max_tokens=4), update=True, repeats=2)
    told = Golden.load(path)
    other = {**told.fingerprint, "hardware": {**told.fingerprint["hardware"], "device": "another processor"}}
    logprobs = told.trace.logprobs + np.float32(1e-3)
    dataclasses.replace(told, trace=told.trace.with_(logprobs=logprobs), fingerprint=other).save(path)
    assert main(["diagnose", str(path), f"model={MODEL}"]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("unverified: ")
    assert printed.endswith("no mismatch was shown, so there is none to diagnose\n")


def test_the_command_prints_the_verdict_and_the_steps(golden, capsys):
    status = main(["diagnose", str(golden), f"model={MODEL}", "logprobs_mode=raw_logprobs", "--no-reference-evaluation"])
    printed = capsys.readouterr().out
    assert status == 1
    assert printed.startswith("fail: The logprobs of the two sides have different meanings")
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
        ["E * findings *semantic: raw_vs_processed*", "E * diagnosis    as it failed: RMS *",
         "E * logprobs_mode accounts for 100% of the mismatch*"]
    )  # fmt: skip
