"""selftest: faults planted in a real engine, their true effect by float64, and a verdict that has to match."""

import ast
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineSpec, Sampling
from pytest_logprob_parity.errors import UsageError
from pytest_logprob_parity.selftest import table
from pytest_logprob_parity.selftest.anatomy import Anatomy, load_checkpoint
from pytest_logprob_parity.selftest.catalogue import catalogue
from pytest_logprob_parity.selftest.fault import Case
from pytest_logprob_parity.selftest.prompts import make_prompts
from pytest_logprob_parity.selftest.reference import Reference
from pytest_logprob_parity.selftest.run import Row
from pytest_logprob_parity.selftest.truth import OBJECTIVES, Quantity, TrueEffect, true_effect

TINY = ROOT / "models" / "tiny-arith"
STEP_2 = load_checkpoint(ROOT / "models" / "tiny-arith-step2")


@pytest.fixture(scope="module")
def reference():
    return Reference(TINY)


@pytest.fixture(scope="module")
def faults(reference):
    return catalogue(reference.anatomy, reference.checkpoint, STEP_2, 160, 16)


@pytest.fixture(scope="module")
def traces(pool, reference):
    """A float32 golden of 16 sequences, and what float64 says of it."""
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    prompts = make_prompts(engine.tokenizer, 2)
    trace = engine.generate(prompts, Sampling(temperature=0.7, n=8, max_tokens=16, ignore_eos=True, seed=1))
    return prompts, trace, reference.read(trace, prompts, trace.sampling)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of experts with random weights and tiny-arith's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        sliding_window=None, initializer_range=0.15, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    return folder


def test_the_catalogue_has_forty_faults_in_three_sizes_each(faults):
    sizes = {}
    for fault in faults:
        if fault.group not in ("place", "experts"):
            sizes.setdefault(fault.name, set()).add(fault.size)
    assert len(sizes) >= 40
    assert all(len(of) >= 3 for of in sizes.values())


def test_no_two_faults_have_one_name_and_size(faults):
    assert len({(f.name, f.size) for f in faults}) == len(faults)


def test_experts_have_faults_of_their_own(faults, mixture):
    anatomy = Anatomy.of(mixture)
    assert (anatomy.experts, anatomy.experts_per_token) == (4, 2)
    there = {f.name for f in catalogue(anatomy, load_checkpoint(mixture), {}, 160, 16) if f.group == "experts"}
    assert len(there) >= 8
    assert not any(f.group == "experts" for f in faults)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"), ({"sliding_window": 32}, "sliding_window=32")],
)
def test_a_model_that_the_reference_does_not_compute_is_refused(mixture, tmp_path, change, says):
    config = json.loads((mixture / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=says):
        Anatomy.of(tmp_path)


def test_the_reference_is_the_model(traces):
    _, trace, truth = traces
    assert np.abs(trace.logprobs - truth.logprobs).max() < 1e-4


def test_the_reference_is_the_mixture(mixture, traces):
    """Held against transformers: other code for the router, the experts and everything else."""
    import torch
    from transformers import AutoModelForCausalLM

    prompts, trace, _ = traces
    truth = Reference(mixture).read(trace, prompts, Sampling(temperature=1.0))
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32, local_files_only=True).eval()
    ids = torch.tensor([[*prompts[int(trace.group[i])], *trace.completion(i)] for i in range(trace.num_sequences)])
    with torch.no_grad():
        logprobs = model(ids).logits[:, 159:-1].log_softmax(-1).gather(-1, ids[:, 160:, None])
    assert np.abs(logprobs.flatten().numpy() - truth.logprobs).max() < 1e-3


@pytest.mark.parametrize(
    "sampling", [{"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2, "presence_penalty": 0.3}]
)
def test_the_reference_processes_logits_as_engines_do(pool, reference, traces, sampling):
    prompts, trace, _ = traces
    asked = trace.with_(sampling=Sampling(temperature=0.7, **sampling))
    said = pool.engine(EngineSpec(MODEL, dtype="float32")).replay(asked)
    truth = reference.read(asked, prompts, asked.sampling)
    excluded = np.isneginf(said.logprobs)
    np.testing.assert_array_equal(np.isneginf(truth.logprobs), excluded)
    assert np.abs(said.logprobs[~excluded] - truth.logprobs[~excluded]).max() < 1e-4
    assert (truth.depth[excluded] > 0).all()
    assert np.isnan(truth.depth[~excluded]).all()


def test_the_reference_is_as_before_once_a_fault_is_undone(reference, traces, faults):
    prompts, trace, truth = traces
    first = {f.name: f for f in reversed(faults) if f.site is not None and f.golden == "plain"}  # the largest size of each
    for fault in first.values():
        fault.site(reference)
    assert np.abs(reference.read(trace, prompts, trace.sampling).logprobs - truth.logprobs).max() > 0.1
    reference.undo()
    np.testing.assert_array_equal(reference.read(trace, prompts, trace.sampling).logprobs, truth.logprobs)


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


def row(multiple, verdict, **about):
    """A row with an effect of so many limits; None for a fault that fails by construction."""
    effect = None if multiple is None else TrueEffect("token", (Quantity("k3", multiple, 1.0),))
    differs = about.pop("differs", True)
    return Row(Case(name="f", size="s", group="model", **about), "m", "float32", effect, verdict, "", differs=differs)


@pytest.mark.parametrize(
    ("multiple", "verdict", "about", "right"),
    [
        (3, "fail", {}, True),
        (3, "pass", {}, False),
        (3, "unverified", {}, False),  # not failing is missing it, under whatever name
        (0.4, "fail", {}, False),
        (0.4, "fail", {"semantic": True}, True),
        (0.4, "unverified", {}, True),
        (1, "fail", {}, True),
        (1, "pass", {}, True),
        (None, "error", {}, True),
        (None, "pass", {}, False),
        (None, "fail", {"differs": False}, False),
    ],
)
def test_the_truth_and_not_the_verdict_says_what_is_right(multiple, verdict, about, right):
    assert row(multiple, verdict, **about).right is right


@pytest.mark.parametrize(
    ("verdicts", "reached"),
    [
        (["fail"] * 20, True),
        (["fail"] * 19 + ["unverified"], True),
        (["fail"] * 18 + ["unverified"] * 2, False),
        (["fail"] * 19 + ["pass"], False),
    ],
)
def test_no_material_case_passes_and_nearly_all_fail(verdicts, reached):
    rows = [row(3, verdict) for verdict in verdicts]
    assert table.reached(rows) is reached
    assert table.reached([*rows, row(0.1, "fail")]) is False
    assert f"material cases: 20, {verdicts.count('fail') / 20:.1%} fail" in "\n".join(table.summary(rows, "token"))


def run_selftest(tmp_path, *arguments):
    """Run the command; its exit status, output, messages and rows."""
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest_logprob_parity.cli", "selftest", "--json", str(out), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert out.is_file(), done.stderr[-3000:]
    return done.returncode, done.stdout, done.stderr, json.loads(out.read_text())["rows"]


def test_a_part_of_the_catalogue_on_the_real_engine(tmp_path):
    """One fault of each kind: asked, reported, distribution, arithmetic, weights, few tokens, free run, not forced."""
    chosen = (
        "temperature,shifted,log2,normaliser,attention scale,stale KV block,rope base,all positions,weights of another,"
        "int,corrupted,another seed,greedy,force"
    )
    status, output, _, rows = run_selftest(
        tmp_path, "--dtype", "float32", "--dtype", "bfloat16", "--sequences", "64", "--tokens", "24", "--only", chosen
    )
    assert status == 0, output
    assert len({row["fault"] for row in rows}) >= 12
    assert {row["expected"] for row in rows} == {"fail", "no fail", ""}
    assert "WRONG" not in output


def test_what_is_planted_in_the_engine_is_planted_in_the_reference(mixture, tmp_path):
    """In float32 the engine's own difference is the true effect, for each kind of site, on two models in one command.

    Runs that were kept need no engine.
    """
    chosen = (
        "another expert,one expert fewer,two experts,shares scaled,one token off,positions stop,after a position,LM head,"
        "one prompt,range of ids,balanced,few bits"
    )
    arguments = ("--model", MODEL, "--model", str(mixture), "--dtype", "float32", "--sequences", "16", "--tokens", "16",
                 "--only", chosen, "--runs", str(tmp_path / "runs"))  # fmt: skip
    _, _, messages, rows = run_selftest(tmp_path, *arguments)
    assert "# started vllm" in messages
    assert {row["model"] for row in rows} == {"tiny-arith", mixture.name}
    assert {row["fault"] for row in rows if row["group"] == "experts"} >= {"another expert for some tokens", "one expert fewer"}
    for row in rows:
        if row["truth"] == "material":
            rounded = "few bits" in row["fault"]  # the engine rounds other numbers than the reference
            assert row["seen"] == pytest.approx(row["effect"], rel=0.1 if rounded else 0.05), row
        elif row["truth"] == "immaterial":
            assert row["seen"] < 1, row
    _, _, messages, again = run_selftest(tmp_path, *arguments)
    assert "# started" not in messages
    assert again == rows
