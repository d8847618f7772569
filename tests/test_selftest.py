"""selftest: faults planted in a real engine, their true effect by float64, and a verdict that has to match."""

import ast
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
from pytest_logprob_parity.selftest.run import Row
from pytest_logprob_parity.selftest.run import true_effect as effect_in_margins
from pytest_logprob_parity.selftest.truth import OBJECTIVES, true_effect

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
        assert effect_in_margins(truth, moved, limits)[0] == pytest.approx(effect, rel=0.05)
    gone = truth.with_(logprobs=np.full_like(truth.logprobs, np.nan))
    assert effect_in_margins(truth, gone, limits) == (math.inf, "NaN")


# -- the truth: every number below was computed by hand ------------------------------------------------------------------


def effect(d, lengths=None, **given):
    """The effect of moving clean logprobs of -3 nats by `d`, in sequences of these lengths (default: one sequence)."""
    d = np.asarray(d, np.float64)
    clean = np.full(len(d), -3.0)
    return true_effect(clean, clean + d, np.cumsum([0, *(lengths or [len(d)])]), **given)


def values(of):
    return {q.name: q.value for q in of.quantities}


def test_the_truth_imports_nothing_of_what_it_judges():
    tree = ast.parse((ROOT / "pytest_logprob_parity" / "selftest" / "truth.py").read_text("utf-8"))
    imported = {getattr(node, "module", None) or node.names[0].name for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom))}  # fmt: skip
    assert imported == {"__future__", "math", "dataclasses", "typing", "numpy", "numpy.typing"}


def test_ratios_of_tokens():
    # ratios 1.25, 0.8, 1, 1; ln 1.25 = 0.223144: k3 = (0.25 - 0.223144 - 0.2 + 0.223144) / 4
    told = effect([math.log(1.25), math.log(0.8), 0, 0])
    found = values(told)
    assert found["k3"] == pytest.approx(0.0125)
    assert found["mean"] == pytest.approx(0, abs=1e-15)
    assert found["clipped tokens"] == 0.25  # 0.8 is on the edge, 1.25 beyond it
    assert told.largest.name in ("k3", "clipped tokens")
    assert told.multiple == pytest.approx(25)
    assert told.size == "material"


def test_ratios_of_sequences():
    # means of sequences 4e-4, 2e-4, 0, 0: one ratio outside 1 +- 3e-4, mean 1.5e-4
    told = effect([8e-4, 0, 2e-4, 2e-4, 0, 0, 1e-3, -1e-3], [2, 2, 2, 2], objective="sequence")
    assert values(told)["clipped sequences"] == 0.25
    assert values(told)["mean of sequences"] == pytest.approx(1.5e-4)
    assert told.multiple == pytest.approx(2.5)
    assert told.size == "material"
    assert effect([8e-4, 0, 2e-4, 2e-4, 0, 0, 1e-3, -1e-3], [2, 2, 2, 2]).size == "immaterial"


def test_weights_with_a_cap():
    # weights 2 (capped from 4), 1, 1, 1: ESS = 25 / (4 * 7)
    told = effect([math.log(4), 0, 0, 0], objective="truncated")
    assert values(told)["ESS loss"] == pytest.approx(3 / 28)
    assert values(told)["capped tokens"] == 0.25
    assert values(told)["k3"] == pytest.approx((3 - math.log(4)) / 4)


def test_weights_without_a_cap():
    # weights 4, 1, 1, 1: ESS = 49 / (4 * 19)
    assert values(effect([math.log(4), 0, 0, 0], objective="unclipped"))["ESS loss"] == pytest.approx(27 / 76)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("by", "size"), [(8, "material"), (-8, "material"), (-2, "material"), (-1.2, "between"), (-0.4, "immaterial")]
)
def test_one_token_of_many(objective, by, size):
    if objective == "sequence" and size != "material":
        pytest.skip("a mean over sequences feels less than that")
    d = np.zeros(12_800)
    d[77] = by
    assert effect(d, [64] * 200, objective=objective).size == size


def test_one_token_of_a_mixture_of_experts_may_be_a_tie():
    d = np.zeros(12_800)
    d[77] = -4.7
    assert effect(d, [64] * 200, experts=True).size == "between"
    d[77] = -8
    assert effect(d, [64] * 200, experts=True).size == "material"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_sequence_of_two_hundred(objective):
    d = np.zeros(12_800)
    d[:64] = np.resize([0.31, -0.31], 64)
    told = effect(d, [64] * 200, objective=objective)
    assert values(told)["one sequence"] == pytest.approx(0.31 * math.sqrt(63 / 64))
    assert told.size == "material"


def test_the_largest_token_of_a_sequence_is_not_counted_twice():
    assert values(effect([3, 0.1, 0.1, 0.1]))["one sequence"] == pytest.approx(math.sqrt(0.03 / 4))
    assert values(effect([3.0]))["one sequence"] == 0


def test_what_averages_out_is_still_material():
    d = np.zeros(12_800)
    hit = np.random.default_rng(0).permutation(12_800)[:244]  # 1.9 %
    d[hit[:122]], d[hit[122:]] = 0.49, -0.49
    told = effect(d, [64] * 200)
    # k3 = 0.01906 * (cosh 0.49 - 1), clip share 1.9 times its limit
    assert values(told)["k3"] == pytest.approx(244 / 12_800 * (math.cosh(0.49) - 1))
    assert told.multiple == pytest.approx(4.67, abs=0.01)


def test_tokens_without_a_number():
    clean = np.array([-1.0, -1, -1, -1])
    offsets = np.array([0, 4])
    for bad in (np.nan, np.inf):
        told = true_effect(clean, np.array([-1.0, -1, bad, -1]), offsets)
        assert (told.largest.name, told.multiple) == ("NaN or +inf", math.inf)
    assert true_effect(np.array([-1.0, np.nan, -1, -1]), clean, offsets).multiple == 0  # nothing to compare with


@pytest.mark.parametrize(
    ("objective", "name", "value"),
    [("token", "clipped tokens", 0.01), ("sequence", "clipped sequences", 0.1), ("truncated", "capped tokens", 0.01),
     ("unclipped", "excluded tokens", 0.01)],
)  # fmt: skip
def test_tokens_that_one_side_excludes(objective, name, value):
    clean = np.full(100, -1.0)
    faulty, depth = clean.copy(), np.zeros(100)
    faulty[3], depth[3] = -np.inf, 1e-3
    offsets = np.arange(0, 101, 10)
    told = true_effect(clean, faulty, offsets, objective, depth=depth)
    assert values(told)[name] == pytest.approx(value)
    assert values(told)["one token"] == 1e-3  # at the very edge of the kept tokens
    assert values(true_effect(clean, faulty, offsets, objective))["one token"] == math.inf  # nobody says where it lay
    assert true_effect(faulty, faulty, offsets, objective).multiple == 0


def test_the_truth_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="known are token"):
        effect([0.0], objective="ppo")
    with pytest.raises(ValueError, match="offsets that end at 3"):
        true_effect(np.zeros(4), np.zeros(4), np.array([0, 3]))


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
