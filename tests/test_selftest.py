"""`logprob-parity selftest`: faults planted in the user's own engine and model, and which of them a check catches."""

import ast
import math

import numpy as np
import pytest

from conftest import ROOT
from pytest_logprob_parity.selftest.prompts import make_prompts
from pytest_logprob_parity.selftest.truth import OBJECTIVES, true_effect

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
