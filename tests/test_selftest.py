"""`logprob-parity selftest`: faults planted in the user's own engine and model, and which of them a check catches."""

import ast
import dataclasses
import json
import math

import numpy as np
import pytest
from docs_story import mask

from conftest import ROOT
from pytest_logprob_parity import Sampling
from pytest_logprob_parity.cli import main
from pytest_logprob_parity.selftest import judge, table
from pytest_logprob_parity.selftest.checkpoint_tensors import CheckpointTensors
from pytest_logprob_parity.selftest.engine_under_test import NotPossibleError
from pytest_logprob_parity.selftest.fault import Row
from pytest_logprob_parity.selftest.prompts import make_prompts
from pytest_logprob_parity.selftest.report_faults import report_faults
from pytest_logprob_parity.selftest.sampler_faults import sampler_faults
from pytest_logprob_parity.selftest.setting_faults import setting_faults
from pytest_logprob_parity.selftest.truth import OBJECTIVES, growth, true_effect
from pytest_logprob_parity.selftest.weight_faults import matrix_faults, vocabulary_faults

TINY = ROOT / "models" / "tiny-arith"
PAGE = ROOT / "docs" / "how-to" / "selftest.md"

# -- the command, on the real engine -------------------------------------------------------------------------------------


@pytest.fixture
def selftest(capsys):
    """Run the command; its exit status, output and messages."""

    def run(*arguments):
        status = main(["selftest", "--model", str(TINY), *arguments])
        return (status, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("more", "faults"),
    [((), 7), pytest.param((",noise on all",), 8, marks=pytest.mark.nightly)],  # of noise little is left in few tokens
    ids=["short goldens", "whole goldens"],
)
def test_faults_of_each_kind_are_caught_and_the_controls_pass(selftest, more, faults):
    """The lines are those of the page, but for the numbers."""
    only = "asked again,other batch,loaded again,temperature applied,tokens one,logprobs one,NaN,LM head,raw and"
    status, output, messages = selftest("--only", "".join((only, *more)), *(() if more else ("--sampling", "max_tokens=16")))
    assert status == 0, output + messages[-3000:]
    lines = output.splitlines()
    assert sum(" fail " in line for line in lines[1:-3]) == faults
    assert "are caught; false alarms 0 of 4." in output
    assert messages.count("# started ") == 2  # weights are changed in the running engine
    shown = {words(line) for line in PAGE.read_text().splitlines()}
    assert [line for line in lines[1:-3] if words(line) not in shown] == []


def words(line):
    """A line of the table without what varies between machines: all but fault, size and verdict."""
    return mask(line[:79]).rstrip()


def test_a_selftest_whose_verdict_is_broken_says_so(selftest, monkeypatch):
    """Everything passes: no fault is caught, and no control complains."""
    sound = judge.judge_answers

    def judge_answers(*given):
        comparison, differences = sound(*given)
        return dataclasses.replace(comparison, verdict="pass", headline="all is well", findings=()), differences

    monkeypatch.setattr(judge, "judge_answers", judge_answers)
    only = ("--only", "asked again,late,NaN", "--prompts", "8", "--sampling", "max_tokens=16")
    status, output, messages = selftest(*only, "--json")
    found = json.loads(output)
    assert status == 1, messages[-3000:]
    assert {row["outcome"] for row in found["rows"]} == {"pass"}
    assert found["summary"].startswith(
        "On this machine, with this golden, 0 of 3 faults are caught; not caught: tokens one step"
    )
    assert found["status"] == 1
    assert all(row["missed"] for row in found["rows"] if row["multiple"] is None or row["multiple"] > 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --model, or --golden"),
        (["--model", "no-such-folder"], "no such folder"),
        (["--model", str(TINY), "--prompts", "0"], "--prompts 0: 1 or more"),
        (["--model", str(TINY), "--set", "dtype"], "'dtype' is not KEY=VALUE"),
        (["--model", str(TINY), "--sampling", "temprature=1"], "did you mean 'temperature'?"),
        (["--golden", "missing.safetensors"], "there is no such file"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, says, capsys):
    assert main(["selftest", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


# -- faults that are found without knowing an architecture ----------------------------------------------------------------


@pytest.fixture
def tensors():
    """A checkpoint of names that no architecture has: three layers, two matrices with a row for each of 11 token ids."""
    import torch

    draws = torch.Generator().manual_seed(0)
    shapes = {"words.weight": (11, 4), "tail.projection": (11, 4), "tail.gain": (4,)}
    for layer in range(3):
        shapes |= {f"trunk.{layer}.mix.w": (8, 4), f"trunk.{layer}.part.{layer % 2}.w": (4, 4), f"trunk.{layer}.gain": (4,)}
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def test_tensors_have_their_roles_by_shape(tensors):
    found = CheckpointTensors.of(tensors, 11)
    assert found.vocabulary == ("words.weight", "tail.projection")
    assert set(found.matrices) == {n for n in tensors if n.startswith("trunk.") and not n.endswith("gain")}
    assert sorted(found.layers) == [0, 1, 2]
    assert found.same_layers() == (0, 2)  # layer 1 has other parts


@pytest.mark.parametrize("fault", [*matrix_faults(), *vocabulary_faults()], ids=lambda fault: f"{fault.name}, {fault.size}")
def test_a_fault_of_the_weights_changes_what_it_names_and_nothing_else(fault, tensors):
    import contextlib

    checkpoint, changed = CheckpointTensors.of(tensors, 11), {}

    class UnderTest:
        checkpoint = None

        @contextlib.contextmanager
        def with_weights(self, planted):
            changed.update(planted)
            yield None

    UnderTest.checkpoint = checkpoint
    with fault.plant(UnderTest()):
        pass
    really = {name for name, tensor in changed.items() if not tensor.equal(tensors[name])}
    wanted = set(checkpoint.vocabulary) if "LM head" in fault.name else set(tensors) - set(checkpoint.vocabulary)
    assert really
    assert really <= wanted
    assert all(changed[name].shape == tensors[name].shape for name in changed)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sampler_faults(Sampling(temperature=0)), "the golden is greedy: its temperature plays no part"),
        (lambda: sampler_faults(Sampling(temperature=1)), "at T=1 applying it twice changes nothing"),
        (lambda: setting_faults({"logprobs_mode": "raw_logprobs"}, raw_is_processed=True), "they are the same numbers"),
    ],
)
def test_what_the_golden_does_not_allow_is_said(make, says):
    reasons = []
    for fault in make():
        try:
            with fault.plant(None):
                pass
        except NotPossibleError as error:
            reasons.append(str(error))
        except AttributeError:
            continue  # it asks the engine, which is None here
    assert any(says in reason for reason in reasons)


def test_no_two_faults_have_one_name_and_size():
    faults = [
        *sampler_faults(Sampling(temperature=0.7, top_p=0.9)),
        *report_faults(),
        *matrix_faults(),
        *vocabulary_faults(),
        *setting_faults({"logprobs_mode": "processed_logprobs", "dtype": "bfloat16"}, raw_is_processed=False),
    ]
    assert len({(fault.name, fault.size) for fault in faults}) == len(faults)
    assert {fault.kind for fault in faults} == {"sampler", "report", "weights", "setting"}


# -- what the table says ---------------------------------------------------------------------------------------------------


def row(outcome, multiple=0.0, kind="report"):
    return Row(fault="f", size="s", kind=kind, outcome=outcome, rms=0.1, multiple=multiple)


@pytest.mark.parametrize(
    ("rows", "status", "says"),
    [
        ([row("fail", 3), row("pass", kind="control")], 0, "1 of 1 faults are caught; false alarms 0 of 1."),
        ([row("error", 3)], 0, "1 of 1 faults are caught; false alarms 0 of 0."),
        ([row("pass", 3)], 1, "0 of 1 faults are caught; not caught: f (s); false alarms 0 of 0."),
        ([row("unverified", 3)], 1, "not caught: f (s)"),
        ([row("fail", 3), row("fail", kind="control")], 1, "false alarms 1 of 1: f (s)."),
        ([row("pass", 1.9), row("unverified", 0.6), row("pass", 0.1)], 0, "2 near the limit (0.5 to 2 times), 1 too small"),
        ([row("fail", 0.1)], 0, "1 too small to matter (of these 1 fail all the same)"),
        ([row("not possible")], 1, "1 not possible here"),
        ([row("unverified", kind="control"), row("fail", 3)], 0, "Unverified although nothing was wrong: f (s)"),
    ],
)
def test_the_summary_and_the_status(rows, status, says):
    assert says in "\n".join(table.summary(rows, "token"))
    assert table.exit_status(rows) == status


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


def test_what_a_fault_adds_to_the_distance_from_the_model():
    model, rounding = np.full(4, -3.0), np.array([0.1, -0.1, 0.1, -0.1])
    clean = model + rounding
    offsets = np.array([0, 4])
    # the other rounding errors of a sound engine: as far from the model as before
    told = growth(model, clean, model - rounding, offsets)
    assert told.multiple == pytest.approx(0, abs=1e-9)
    assert true_effect(clean, model - rounding, offsets).size == "material"
    # nearer to the model than before is no fault
    assert growth(model, clean, model, offsets).multiple == 0
    # no more than the change itself, and that alone where the model knows no token
    small = clean + 1e-3
    change = values(true_effect(clean, small, offsets))
    assert all(q.value <= change[q.name] for q in growth(model, clean, small, offsets).quantities)
    assert values(growth(np.full(4, np.nan), clean, small, offsets)) == change
    broken = np.array([np.nan, -3, -3, -3])
    assert growth(model, clean, broken, offsets).largest.name == "NaN or +inf"


def test_prompts_are_of_one_length_and_all_different(engine):
    prompts = make_prompts(engine.tokenizer, 25)
    assert {len(p) for p in prompts} == {160}
    assert len({tuple(p) for p in prompts}) == 25
