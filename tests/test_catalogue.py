"""benchmarks/catalogue: faults planted in a real engine, their true effect by float64, and a verdict that has to match."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineSpec, Sampling
from pytest_logprob_parity.errors import UsageError
from pytest_logprob_parity.selftest.prompts import make_prompts
from pytest_logprob_parity.selftest.truth import Quantity, TrueEffect

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_catalogue
from catalogue import table
from catalogue.all_faults import catalogue
from catalogue.anatomy import Anatomy, load_checkpoint
from catalogue.fault import Case
from catalogue.reference import Reference
from catalogue.row import Row

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


def row(multiple, verdict, **about):
    """A row with an effect of so many limits; None for a fault that fails by construction."""
    effect = None if multiple is None else TrueEffect("token", (Quantity("k3", multiple, 1.0),))
    differs = about.pop("differs", True)
    case = Case(name="f", size="s", group="model", **about)
    return Row(fault=case, model="m", dtype="float32", effect=effect, verdict=verdict, said="", differs=differs)


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


@pytest.fixture
def run_catalogue(tmp_path, monkeypatch, capfd):
    """Run the command; its exit status, output, messages and rows."""

    def run(*arguments):
        out = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", ["bench_catalogue.py", "--json", str(out), *arguments])
        status = bench_catalogue.main()
        return (status, *capfd.readouterr(), json.loads(out.read_text())["rows"])

    return run


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_of_the_catalogue_on_the_real_engine(run_catalogue, dtype):
    """One fault of each kind: asked, reported, distribution, arithmetic, weights, few tokens, free run, not forced."""
    chosen = (
        "temperature,shifted,log2,normaliser,attention scale,stale KV block,rope base,all positions,weights of another,"
        "int,corrupted,another seed,greedy,force"
    )
    status, output, _, rows = run_catalogue("--dtype", dtype, "--sequences", "64", "--tokens", "24", "--only", chosen)
    assert status == 0, output
    assert len({row["fault"] for row in rows}) >= 12
    assert {row["expected"] for row in rows} == {"fail", "no fail", ""}
    assert "WRONG" not in output


FAULTS_OF_EACH_SITE = (
    "another expert,one expert fewer,two experts,shares scaled,one token off,positions stop,after a position,LM head,"
    "one prompt,range of ids,balanced,few bits"
)


@pytest.mark.parametrize(
    ("chosen", "experts"),
    [
        ("one token off,LM head,one prompt", set()),  # of one model
        pytest.param(FAULTS_OF_EACH_SITE, {"another expert for some tokens", "one expert fewer"}, marks=pytest.mark.nightly),
    ],
    ids=["some", "all"],
)
def test_what_is_planted_in_the_engine_is_planted_in_the_reference(run_catalogue, mixture, tmp_path, chosen, experts):
    """In float32 the engine's own difference is the true effect, for each kind of site, on two models in one command.

    Runs that were kept need no engine.
    """
    models = (MODEL, str(mixture)) if experts else (MODEL,)
    arguments = (*(word for model in models for word in ("--model", model)), "--dtype", "float32", "--sequences", "16",
                 "--tokens", "16", "--only", chosen, "--runs", str(tmp_path / "runs"))  # fmt: skip
    _, _, messages, rows = run_catalogue(*arguments)
    assert "# started vllm" in messages
    assert {row["model"] for row in rows} == {Path(model).name for model in models}
    assert {row["fault"] for row in rows if row["group"] == "experts"} >= experts
    for row in rows:
        if row["truth"] == "material":
            rounded = "few bits" in row["fault"]  # the engine rounds other numbers than the reference
            assert row["seen"] == pytest.approx(row["effect"], rel=0.1 if rounded else 0.05), row
        elif row["truth"] == "immaterial":
            assert row["seen"] < 1, row
    _, _, messages, again = run_catalogue(*arguments)
    assert "# started" not in messages
    assert again == rows
