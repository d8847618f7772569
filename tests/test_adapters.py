"""LoRA adapters on a real engine: merged against unmerged, missing, of another step, stale, scaled wrongly, and bad folders."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MODEL
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    Finding,
    Golden,
    MismatchError,
    Sampling,
    TransformersScorer,
    UsageError,
    assert_trainer_parity,
    assert_weight_update,
    check_golden,
    compare,
    merge_adapter,
)
from pytest_logprob_parity.checkpoint.adapter import apply_adapter, read_adapter
from pytest_logprob_parity.diagnosis.reference_evaluation import ReferenceDistances, weigh
from pytest_logprob_parity.trainer.frameworks import framework

SAMPLING = Sampling(temperature=0.7, max_tokens=32, ignore_eos=True, seed=1)
SIZES = {
    "self_attn.q_proj": (128, 192), "self_attn.k_proj": (64, 192), "self_attn.v_proj": (64, 192),
    "self_attn.o_proj": (192, 128), "mlp.gate_proj": (512, 192), "mlp.up_proj": (512, 192), "mlp.down_proj": (192, 512),
}  # fmt: skip


def write_adapter(folder, seed=1, *, size=0.01, rank=8, alpha=16, modules=tuple(SIZES), **config):
    """An adapter as PEFT writes it, with random A and B; it moves logprobs by about `size` x 6 nats (RMS)."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for module in modules:
            out, into = SIZES[module]
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=random) / into**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=random) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(about | config))
    return folder


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Adapters of two steps."""
    home = tmp_path_factory.mktemp("adapters")
    return [write_adapter(home / f"step-{n}", seed=n) for n in (1, 2)]


@pytest.fixture(scope="module")
def prompts(questions):
    return questions(8)


@pytest.fixture(scope="module")
def rollouts(pool, steps, prompts):
    """What the float32 engine writes with the adapter of step 1."""
    return pool.engine(EngineSpec(MODEL, dtype="float32", adapter=str(steps[0]))).generate(prompts, SAMPLING)


# -- the trainer has it too ------------------------------------------------------------------------------------------------


def named(rollouts, **scorer):
    with pytest.raises(MismatchError) as error:
        assert_trainer_parity(rollouts, TransformersScorer(MODEL, **scorer))
    (finding,) = error.value.comparison.findings
    return finding


def test_a_trainer_with_the_same_adapter_agrees(rollouts, steps):
    comparison = assert_trainer_parity(rollouts, TransformersScorer(MODEL, adapter=steps[0]))
    assert comparison.metrics["rms_diff"] < 1e-5


def test_a_trainer_without_it_of_another_step_or_with_another_alpha_is_told(rollouts, steps, tmp_path):
    finding = named(rollouts, adapter=write_adapter(tmp_path / "alpha-8", alpha=8))
    assert (finding.layer, finding.cause) == ("weights", "adapter")
    assert "the rollouts are those of the adapter at twice its scale" in finding.evidence
    finding = named(rollouts, adapter=steps[1])
    assert (finding.layer, finding.cause, finding.candidates[0]) == ("weights", None, "adapter")
    finding = named(rollouts)
    assert (finding.cause, "adapter" in finding.candidates) == (None, True)
    golden = Golden(rollouts, fingerprint={"adapter": str(read_adapter(steps[0]))})
    finding = named(golden, adapter=steps[1])
    assert (finding.layer, finding.cause) == ("weights", "adapter")
    assert finding.evidence == f"{read_adapter(steps[0])} in the golden, {read_adapter(steps[1])} in the trainer"


def test_an_adapter_that_only_comes_near_is_no_cause(rollouts, steps, tmp_path):
    finding = named(rollouts, adapter=write_adapter(tmp_path / "alpha-9", alpha=9))  # nearly half of it
    assert (finding.layer, finding.cause, finding.candidates[0]) == ("weights", None, "adapter")
    assert finding.evidence.startswith("nearest: the adapter at twice its scale, which leaves RMS 0.0")
    assert finding.evidence.endswith("the engine probably has the adapter of another step")


def test_a_framework_scores_with_the_adapter_too(rollouts, steps, tmp_path):
    for name in ("trl", "verl"):
        scorer = framework(name).scorer(MODEL, dtype="float32", adapter=steps[0])
        assert assert_trainer_parity(rollouts, scorer).metrics["rms_diff"] < 1e-5
        other = framework(name).scorer(MODEL, dtype="float32", adapter=write_adapter(tmp_path / name, alpha=8))
        with pytest.raises(MismatchError, match="the rollouts are those of the adapter at twice its scale"):
            assert_trainer_parity(rollouts, other)


# -- updates, float32 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(pool, steps):
    return pool.engine(EngineSpec(MODEL, dtype="float32", adapter=str(steps[0])))


@pytest.mark.parametrize("how", [{"mode": "keep"}, {"mode": "keep", "clear_cache": True}], ids=str)
def test_running_requests_go_on_with_the_next_steps_adapter(engine, steps, prompts, how):
    trace = engine.update_weights(steps[1], at_token=12, prompts=prompts, sampling=SAMPLING, **how)
    assert trace.weight_versions.tolist() == ([0] * 12 + [1] * 20) * 8
    between = {"before": steps[0], "after": steps[1], "model": MODEL}
    assert assert_weight_update(trace, **between, **how).metrics["rms_diff"] < 1e-5
    assert assert_weight_update(engine.generate(prompts, SAMPLING), **between, **how).passed
    assert engine.fingerprint()["adapter"].startswith("step-2 (")
    with pytest.raises(UsageError, match="say which model it belongs to, model="):
        assert_weight_update(trace, before=steps[0], after=steps[1])


def test_others_get_the_adapter_of_their_spec_back(engine, rollouts):
    assert np.array_equal(engine.replay(rollouts).logprobs, rollouts.logprobs)
    assert engine.fingerprint()["adapter"].startswith("step-1 (")


def test_new_weights_beneath_leave_the_adapter_on_top(engine, steps, prompts):
    engine.update_weights(f"{MODEL}-step2")
    trainer = TransformersScorer(f"{MODEL}-step2", adapter=steps[0])
    assert assert_trainer_parity(engine.generate(prompts, SAMPLING), trainer).metrics["rms_diff"] < 1e-5


def test_an_adapter_that_is_all_zero_does_nothing_by_right(engine, rollouts, tmp_path):
    engine.update_weights(write_adapter(tmp_path / "zero", size=0.0))
    assert not np.array_equal(engine.replay(rollouts).logprobs, rollouts.logprobs)
    with pytest.raises(UsageError, match=r"has rank 32, the engine room for 8"):
        engine.update_weights(write_adapter(tmp_path / "wide", rank=32))


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_that_never_came_is_named(pool, questions, steps, tmp_path):
    """New files in the same folder, loaded under the same id: the worker knows the id and ignores the files.

    An update exchanges it, and a prefix cache knows the two apart: its keys are name and folder, and the name has the content
    in it.
    """
    prompts = [[{"role": "user", "content": " ".join(q[0]["content"] for q in questions(6, seed))}] for seed in range(12)]
    folder, old = write_adapter(tmp_path / "latest", seed=1), steps[0]
    engine = pool.engine(EngineSpec(MODEL, dtype="float32", adapter=str(folder), enable_prefix_caching=True))
    assert engine.adapter.digest == read_adapter(old).digest
    engine.generate(prompts, SAMPLING)
    write_adapter(folder, seed=2)

    def add_again(worker):
        from vllm.lora.request import LoRARequest

        return worker.add_lora(LoRARequest("latest", 1, str(folder)))

    assert engine.on_worker(add_again) == [True]  # it says that it did
    trace = engine.generate(prompts, SAMPLING)
    told = trace.with_(weight_versions=np.ones(trace.num_tokens, np.int32))
    with pytest.raises(MismatchError) as error:
        assert_weight_update(told, before=old, after=folder, model=MODEL)
    (finding,) = error.value.comparison.findings
    assert (finding.layer, finding.cause) == ("weights", "adapter")
    assert not finding.values["came"]
    with pytest.raises(UsageError, match="are no longer those that the engine loaded"):
        engine.fingerprint()
    engine.update_weights(folder)
    trace = engine.generate(prompts, SAMPLING)
    assert assert_weight_update(trace, before=old, after=folder, model=MODEL, clear_cache=True).passed


# -- merged against unmerged -----------------------------------------------------------------------------------------------


def test_merged_and_unmerged_give_the_same_in_float32(pool, steps, rollouts, prompts, tmp_path):
    merged = merge_adapter(MODEL, steps[0], tmp_path / "merged", dtype="float32")
    engine = pool.engine(EngineSpec(str(merged), dtype="float32"))
    comparison = compare(expected=rollouts, actual=engine.replay(rollouts))
    assert comparison.verdict == "pass"
    assert comparison.metrics["rms_diff"] < 1e-5
    assert "float32" in {json.loads((merged / "config.json").read_text()).get(name) for name in ("torch_dtype", "dtype")}
    with pytest.raises(UsageError, match="this engine was started without; give EngineSpec"):
        engine.update_weights(steps[0])
    assert np.array_equal(engine.replay(rollouts).logprobs, comparison.actual.logprobs)  # it goes on
    with pytest.raises(UsageError, match="is there already"):
        merge_adapter(MODEL, steps[0], tmp_path / "merged")
    for dtype in ("fp32", "int8"):
        with pytest.raises(UsageError, match=f"dtype='{dtype}'.*known are float64, float32"):
            merge_adapter(MODEL, steps[0], tmp_path / "other", dtype=dtype)
    assert not (tmp_path / "other").exists()


def test_the_transformers_engine_merges_it(pool, steps, rollouts):
    engine = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float32", adapter=str(steps[0])))
    comparison = compare(expected=rollouts, actual=engine.replay(rollouts))
    assert (comparison.verdict, comparison.metrics["rms_diff"] < 1e-5) == ("pass", True)
    assert engine.fingerprint()["adapter"].startswith("step-1 (")


# -- goldens, bfloat16 -----------------------------------------------------------------------------------------------------


def test_a_golden_knows_its_adapter_and_a_check_names_another(pool, steps, questions, tmp_path):
    """One engine, which gets one adapter after the other; then one without, and one with merged weights."""
    path, home = tmp_path / "golden.safetensors", tmp_path / "model"
    shutil.copytree(MODEL, home)  # a spec of its own
    engine = pool.engine(EngineSpec(str(home), dtype="bfloat16", adapter=str(steps[0])))
    check_golden(path, engine, prompts=questions(16), sampling=SAMPLING, update=True, repeats=2)  # which also replays it

    moved = shutil.copytree(steps[0], tmp_path / "the-same-elsewhere")
    engine.update_weights(moved)
    comparison = check_golden(path, engine)
    assert (comparison.setup, comparison.metrics["n_changed"]) == ("same", 0)

    others = {
        "step-2": steps[1],
        "alpha-64": write_adapter(tmp_path / "alpha-64", alpha=64),
    }
    for name, folder in others.items():
        engine.update_weights(folder)
        finding = failing(path, engine)
        assert finding.evidence == f"{read_adapter(steps[0])} in the golden, {read_adapter(folder)} in this run"
        assert finding.evidence.partition(", ")[2].startswith(name)
    engine.update_weights(write_adapter(tmp_path / "hardly-another", alpha=16.001))
    comparison = check_golden(path, engine)
    assert (comparison.verdict, comparison.setup) == ("pass", "compatible")
    assert "; another adapter: step-1 (" in comparison.headline

    without = pool.engine(EngineSpec(str(home), dtype="bfloat16", enable_lora=True, max_lora_rank=8))
    assert failing(path, without, "unverified").evidence == f"{read_adapter(steps[0])} in the golden, no adapter in this run"
    without.update_weights(steps[0])
    assert check_golden(path, without).metrics["n_changed"] == 0
    merged = pool.engine(EngineSpec(str(merge_adapter(home, steps[0], tmp_path / "merged")), dtype="bfloat16"))
    comparison = check_golden(path, merged, replay=("decode",))
    assert (comparison.verdict, comparison.metrics["rms_diff"] < 0.03) == ("pass", True)
    assert any(note.startswith("another adapter: step-1") for note in comparison.notes)


def failing(path, engine, verdict="fail"):
    with pytest.raises(MismatchError) as error:
        check_golden(path, engine, replay=("decode",))
    finding = next(f for f in error.value.comparison.findings if f.cause == "adapter")
    assert (error.value.comparison.verdict, finding.layer) == (verdict, "weights")
    return finding


# -- what cannot be --------------------------------------------------------------------------------------------------------


def test_an_adapter_that_the_engine_puts_nowhere_is_an_error(pool, tmp_path):
    """vLLM serves the base model then, with a line at debug level."""
    folder = write_adapter(tmp_path / "attention", modules=("self_attn.q_proj",))
    deaf = EngineSpec(MODEL, dtype="float32", adapter=str(folder), lora_target_modules=["down_proj"])
    with pytest.raises(EngineError, match=r"attention \(.*gives every logprob as without it.*it changes q_proj"):
        pool.engine(deaf).generate([[5, 6]])


BAD = {
    "no folder": "there is no such folder",
    "no config": "has no adapter_config.json",
    "half a config": "adapter_config.json is no JSON object: half-written, or damaged",
    "no rank": "adapter_config.json: r is null, expected a whole number above 0",
    "half a rank": "adapter_config.json: r is 4.5, expected a whole number above 0",
    "no alpha": "adapter_config.json: lora_alpha is Infinity, expected a finite number above 0",
    "no pattern": "adapter_config.json: rank_pattern has the key '(q', expected a regular expression of module names",
    "a rank of 0": "adapter_config.json: rank_pattern.q_proj is 0, expected a finite number above 0",
    "dora": "use_dora=True is not supported",
    "turned around": "fan_in_fan_out=True is not supported",
    "pissa": "init_lora_weights='pissa' changed the weights beneath",
    "no tensors": "has no adapter_model.safetensors",
    "cut short": "half-written, or damaged",
    "another rank": "and adapter_config.json says rank 4: they do not belong together",
    "half a module": "lacks its lora_B: half-written",
    "another target": "target module 'c_attn' is none of tiny-arith",
    "another layer": "which tiny-arith does not have, did you mean 'model.layers.",
    "another model": "it belongs to another model",
    "a target left out": "names target module 'v_proj', and no tensor is of one: half-written",
    "whole numbers": "is I8: one of F32, F16, BF16, F64 is needed",
    "not a number": "holds 1 NaN or infinities",
    "an embedding": "is no lora_A or lora_B of a linear layer, and would be left out",
}


@pytest.mark.parametrize("name", BAD)
def test_folders_that_no_engine_is_started_for(pool, tmp_path, name):
    starts = len(pool.starts)
    with pytest.raises(UsageError) as error:
        pool.engine(EngineSpec(MODEL, dtype="float32", adapter=str(bad_adapter(tmp_path / "adapter", name)))).generate([[5]])
    assert BAD[name] in str(error.value)
    assert "\n" not in str(error.value)
    assert len(pool.starts) == starts


def bad_adapter(folder, name):
    if name == "no folder":
        return folder
    config = {"no rank": {"r": None}, "dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.get(name, {})
    config |= {
        "half a rank": {"r": 4.5},
        "no alpha": {"lora_alpha": float("inf")},
        "no pattern": {"rank_pattern": {"(q": 4}},
    }.get(name, {})
    config |= {"a rank of 0": {"rank_pattern": {"q_proj": 0}}, "turned around": {"fan_in_fan_out": True}}.get(name, {})
    config |= {"another rank": {"r": 4}, "another target": {"target_modules": ["q_proj", "c_attn"]}}.get(name, {})
    config |= {"a target left out": {"target_modules": ["q_proj", "v_proj"]}}.get(name, {})
    write_adapter(folder, modules=("self_attn.q_proj",), **config)
    file, q_proj = folder / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = load_file(file)
    if name == "no config":
        (folder / "adapter_config.json").unlink()
    elif name == "half a config":
        (folder / "adapter_config.json").write_text('{"r": 8, ')
    elif name == "no tensors":
        file.unlink()
    elif name == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif name == "half a module":
        save_file({k: v for k, v in tensors.items() if k != f"{q_proj}B.weight"}, file)
    elif name == "another layer":
        save_file({k.replace("layers.0", "layers.9"): v for k, v in tensors.items()}, file)
    elif name == "another model":
        save_file(tensors | {f"{q_proj}B.weight": torch.zeros(64, 8)}, file)
    elif name == "whole numbers":
        save_file({k: v.to(torch.int8) for k, v in tensors.items()}, file)
    elif name == "not a number":
        tensors[f"{q_proj}A.weight"][1, 1] = float("nan")
        save_file(tensors, file)
    elif name == "an embedding":
        save_file(tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(8, 384)}, file)
    return folder


def test_settings_that_rule_an_adapter_out(pool, steps):
    for settings, says in (({"enable_lora": False}, "enable_lora=False with adapter"), ({"max_lora_rank": 1}, "has rank 8")):
        with pytest.raises(UsageError, match=says):
            pool.engine(EngineSpec(MODEL, dtype="float32", adapter=str(steps[0]), **settings)).generate([[5]])
    with pytest.raises(UsageError, match=r"adapter=3\): must be a string"):
        EngineSpec(MODEL, adapter=3)
    assert EngineSpec(MODEL, adapter=steps[0]) == EngineSpec(MODEL, adapter=str(steps[0])) != EngineSpec(MODEL)


def test_an_engine_that_takes_none(pool, steps):
    plain = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float32"))
    with pytest.raises(UsageError, match="transformers takes no weight updates"):
        plain.update_weights(steps[0])


def test_an_adapter_may_come_from_the_command_line(run_inner, pytester, steps):
    pytester.makeini(f"[pytest]\nparity_engine =\n    model={MODEL}\n    engine=transformers\n    dtype=float32\n")
    pytester.makepyfile("""
        def test_it(parity_engine):
            assert parity_engine.adapter.folder.name == "step-2"
    """)
    run_inner("--parity-set", f"adapter={steps[1]}").assert_outcomes(passed=1)


def test_a_reference_evaluation_does_not_overrule_what_is_known():
    """Another adapter is another one, whatever a reference evaluation of the checkpoint says."""
    named = [Finding(layer="weights", cause="adapter", evidence="step-1 in the golden, no adapter in this run")]
    assert weigh(named, ReferenceDistances(golden=0.1, now=0.001, share=1.0)) == named


# -- factors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 16 / 8**0.5),
        ({"alpha_pattern": {"q_proj": 4}}, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 4, "k_proj": 1}}, 2.0),
    ],
    ids=str,
)
def test_the_factor_is_what_peft_makes_of_the_config(tmp_path, config, scale):
    adapter = read_adapter(write_adapter(tmp_path / "adapter", modules=("self_attn.q_proj",), **config))
    assert adapter.modules["model.layers.0.self_attn.q_proj"] == pytest.approx(scale)
    name, delta = next(iter(adapter.deltas()))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(delta, scale * b @ a)


def test_the_digest_is_of_what_is_computed(tmp_path):
    digest = read_adapter(write_adapter(tmp_path / "a")).digest
    assert read_adapter(write_adapter(tmp_path / "b", base_model_name_or_path="elsewhere", lora_dropout=0.1)).digest == digest
    others = [{"alpha": 8}, {"seed": 2}, {"use_rslora": True}]
    assert len({digest, *(read_adapter(write_adapter(tmp_path / f"c{n}", **o)).digest for n, o in enumerate(others))}) == 4


def test_an_adapter_for_layers_that_a_loaded_model_does_not_have(tmp_path, steps):
    with pytest.raises(UsageError, match=r"has no 'model\.layers\.0.mlp.down_proj.weight' to merge it into"):
        apply_adapter(torch.nn.Linear(2, 2), read_adapter(steps[0]))
