"""Weight updates in flight on a real engine: what it really did to the requests that ran, against transformers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import MODEL
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    MismatchError,
    Sampling,
    Trace,
    UsageError,
    assert_updated_equals_cold,
    assert_weight_update,
    write_probe,
)
from pytest_logprob_parity.checkpoint.weight_update import WeightUpdate, check_finite

STEP_2 = f"{MODEL}-step2"
SAMPLING = Sampling(temperature=0.7, max_tokens=32, ignore_eos=True, seed=1)
#: Each day in float32, where the references are exact to 1e-5; the other one each night.
BOTH_DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)]


@pytest.fixture
def spec(request):
    return EngineSpec(MODEL, dtype=getattr(request, "param", "float32"))


@pytest.fixture
def updated(pool, spec, questions):
    """An engine and what it wrote while an update arrived after 12 tokens."""

    def update(weights=STEP_2, **how):
        engine = pool.engine(spec)
        return engine, engine.update_weights(weights, at_token=12, prompts=questions(8), sampling=SAMPLING, **how)

    return update


def check(trace, **how):
    return assert_weight_update(trace, before=MODEL, after=STEP_2, **how)


def finding_of(trace, **how):
    with pytest.raises(MismatchError) as error:
        check(trace, **how)
    assert error.value.comparison.verdict == "fail"
    (finding,) = error.value.comparison.findings
    return finding


@pytest.mark.parametrize("spec", BOTH_DTYPES, indirect=True)
@pytest.mark.parametrize("how", [{"mode": "keep"}, {"mode": "keep", "clear_cache": True}, {"mode": "v0"}], ids=str)
def test_running_requests_go_on_with_the_new_weights(updated, questions, how):
    engine, trace = updated(**how)
    assert trace.weight_versions.tolist() == ([0] * 12 + [1] * 20) * 8
    assert trace.lag().tolist() == ([1] * 12 + [0] * 20) * 8
    assert check(trace, **how).passed
    afterwards = engine.generate(questions(8), SAMPLING)  # a fresh request is the new weights' alone
    assert set(afterwards.weight_versions.tolist()) == {1}
    assert check(afterwards, **how).passed


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_requests_that_end_before_the_update_are_the_old_weights_alone(updated, questions, mode):
    engine, trace = updated(mode=mode, clear_cache=True)
    assert set(trace.weight_versions.tolist()) == {0}
    assert trace.num_tokens == 8 * (32 if mode == "wait" else 12)
    with pytest.raises(MismatchError, match="cannot show whether the update arrived: no token was written after it") as error:
        check(trace, mode=mode, clear_cache=True)
    assert error.value.comparison.metrics["rms_diff"] < 1e-5
    assert check(engine.generate(questions(8), SAMPLING), mode=mode, clear_cache=True).passed


def test_an_engine_that_has_had_updates_is_told_as_a_fresh_one_is(pool, spec, questions):
    engine, prompts = pool.engine(spec), questions(8)
    for number, (mode, at_token) in enumerate((("keep", 1000), ("wait", 12), ("abort", 12))):
        trace = engine.update_weights(STEP_2, mode=mode, at_token=at_token, prompts=prompts, sampling=SAMPLING)
        assert set(trace.weight_versions.tolist()) == {2 * number}
        with pytest.raises(
            MismatchError, match="cannot show whether the update arrived: no token was written after it"
        ) as error:
            check(trace, mode=mode)
        assert error.value.comparison.verdict == "unverified"
        engine.update_weights(MODEL)
    newest = trace.with_(weight_versions=np.full(trace.num_tokens, 5, np.int32))
    assert finding_of(newest).cause == "stale_weights"  # the same numbers, said to be the new weights'


@pytest.mark.parametrize("spec", BOTH_DTYPES, indirect=True)
def test_a_cache_that_was_not_cleared_and_one_that_was(updated):
    finding = finding_of(updated(clear_cache=False)[1], clear_cache=True)
    assert (finding.layer, finding.cause) == ("weights", "stale_kv_cache")
    finding = finding_of(updated(clear_cache=True)[1])
    assert (finding.cause, finding.candidates) == (None, ("stale_kv_cache", "engine_build"))
    assert finding.values["cleared"]


def test_weights_that_never_came(updated, questions):
    engine, trace = updated(MODEL)  # the engine gets what it has
    finding = finding_of(trace)
    assert (finding.layer, finding.cause) == ("weights", "stale_weights")
    assert not finding.values["came"]
    assert not finding_of(engine.generate(questions(8), SAMPLING)).values["came"]


@pytest.mark.parametrize("spec", BOTH_DTYPES, indirect=True)
def test_a_layer_that_the_weights_did_not_reach(updated):
    old, new = load_file(f"{MODEL}/model.safetensors"), load_file(f"{STEP_2}/model.safetensors")
    _, trace = updated({name: (old if ".layers.2." in name else new)[name] for name in new})
    finding = finding_of(trace)
    assert finding.cause == "stale_weights"
    assert finding.values["stale_parts"] == ["layer 2"]
    assert "layer 2 still as before the update" in finding.evidence


def test_layers_that_the_weights_did_not_reach_and_what_only_comes_near(pool, spec, questions):
    old, new = load_file(f"{MODEL}/model.safetensors"), load_file(f"{STEP_2}/model.safetensors")

    def without(*parts):
        weights = {name: (old if any(p in name for p in parts) else new)[name] for name in new}
        return pool.engine(spec).update_weights(weights, at_token=12, prompts=questions(5), sampling=SAMPLING)

    finding = finding_of(without(".layers.1.", ".layers.3."))
    assert finding.cause == "stale_weights"
    assert set(finding.values["stale_parts"]) == {"layer 1", "layer 3"}
    assert all(part in finding.evidence for part in finding.values["stale_parts"])
    finding = finding_of(without(".layers.0.", ".layers.1.", ".layers.3.", "lm_head", "embed"))
    assert (finding.cause, finding.candidates[0]) == (None, "stale_weights")
    assert finding.evidence.startswith("nearest: ")
    assert ", which leaves RMS " in finding.evidence


@pytest.mark.parametrize("kind", ["q_proj", "down_proj", "input_layernorm"])
def test_a_kind_of_tensors_that_came_in_no_layer(updated, kind):
    old, new = load_file(f"{MODEL}/model.safetensors"), load_file(f"{STEP_2}/model.safetensors")
    finding = finding_of(updated({name: (old if f".{kind}." in name else new)[name] for name in new})[1])
    assert (finding.cause, finding.values["stale_parts"]) == ("stale_weights", [f"every {kind}"])


def test_gate_and_up_that_changed_places(updated):
    new = load_file(f"{STEP_2}/model.safetensors")
    other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}

    def partner(name):
        kind = next((kind for kind in other if f".{kind}." in name), None)
        return name if kind is None else name.replace(kind, other[kind])

    finding = finding_of(updated({name: new[partner(name)].clone() for name in new})[1])
    assert (finding.cause, finding.values["swapped"]) == ("weights_differ", ("gate_proj", "up_proj"))


@pytest.mark.parametrize("lacks", [("k_proj", "v_proj"), ("up_proj",), ("q_proj",)], ids=str)
def test_a_part_of_a_fused_parameter_is_refused_before_the_engine_is_touched(pool, spec, questions, lacks):
    """A part alone would be loaded as other numbers, and the engine stay broken through later full updates."""
    engine, new = pool.engine(spec), load_file(f"{STEP_2}/model.safetensors")
    before = engine.generate(questions(4), SAMPLING)
    partial = {name: tensor for name, tensor in new.items() if not any(f".{part}." in name for part in lacks)}
    with pytest.raises(UsageError, match=rf"lacks {', '.join(lacks)} \({4 * len(lacks)} tensors"):
        engine.update_weights(partial)
    assert engine.weight_version == 0
    assert np.array_equal(engine.generate(questions(4), SAMPLING).logprobs, before.logprobs)
    assert engine.update_weights({n: t for n, t in new.items() if ".layers.1." in n}) is None  # a layer alone is whole


def test_an_updated_engine_gives_what_a_fresh_one_does(pool, spec, questions):
    engine = pool.engine(spec)
    comparison = assert_updated_equals_cold(engine, STEP_2, prompts=questions(8), sampling=SAMPLING)
    assert not comparison.metrics["n_changed"]
    assert any(note.key == "checksums" and "agree" in note for note in comparison.notes)
    assert engine.weight_version == 1  # it runs on beside the fresh one
    with pytest.raises(UsageError, match="starts from a checkpoint folder"):
        assert_updated_equals_cold(engine, load_file(f"{STEP_2}/model.safetensors"), prompts=questions(8))


def test_an_update_that_arrived_at_another_token(updated):
    _, trace = updated()
    told = np.array(([0] * 15 + [1] * 17) * 8, np.int32)
    finding = finding_of(trace.with_(weight_versions=told))
    assert finding.cause == "stale_weights"
    assert finding.values["later"] == -3


def test_the_reference_computes_sequences_together_as_one_by_one(updated, monkeypatch):
    from pytest_logprob_parity.weight_updates import outcomes, piecewise, update_reference

    _, trace = updated()
    assert len({len(trace.prompt(i)) for i in range(trace.num_sequences)}) > 3  # which are padded, then
    for outcome in (*outcomes.PLAIN, outcomes.Outcome(prompt_block=32)):
        folders = Path(MODEL), Path(STEP_2)
        together = update_reference.UpdateReference(*folders, trace).logprobs(outcome)
        with monkeypatch.context() as patch:
            patch.setattr(piecewise, "_LOGITS", 1)
            alone = update_reference.UpdateReference(*folders, trace).logprobs(outcome)
        np.testing.assert_allclose(together, alone, rtol=0, atol=2e-5)
        assert not np.array_equal(together, alone)


def test_a_prefix_cache_that_outlives_the_weights(pool, questions):
    spec = EngineSpec(MODEL, dtype="float32", enable_prefix_caching=True)
    prompts = [[{"role": "user", "content": " ".join(q[0]["content"] for q in questions(6, seed))}] for seed in range(8)]
    for clear in (False, True):
        engine = pool.engine(spec)
        engine.generate(prompts, SAMPLING)
        engine.update_weights(STEP_2, clear_cache=clear)
        trace = engine.generate(prompts, SAMPLING)
        if clear:
            assert check(trace, clear_cache=True).passed
        else:
            finding = finding_of(trace, clear_cache=True)
            assert finding.cause == "stale_kv_cache"
            assert finding.values["prompt_block"] > 0


def test_a_probe_tells_old_keys_and_values_from_new_ones_in_bfloat16(pool, questions, tmp_path):
    probe = write_probe(MODEL, tmp_path / "probe")
    prompts = [[{"role": "user", "content": " ".join(q[0]["content"] for q in questions(6, seed))}] for seed in range(8)]
    for caching in (True, False):
        engine = pool.engine(EngineSpec(MODEL, dtype="bfloat16", **({"enable_prefix_caching": True} if caching else {})))
        engine.generate(prompts, SAMPLING)
        engine.update_weights(probe)
        trace = engine.generate(prompts, SAMPLING)
        how = {"before": MODEL, "after": probe, "clear_cache": True}
        if not caching:
            assert assert_weight_update(trace, **how).passed
            continue
        with pytest.raises(MismatchError) as error:
            assert_weight_update(trace, **how)
        assert error.value.comparison.findings[0].cause == "stale_kv_cache"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "holds no safetensors"),
        ("cut short", "half-written, or damaged"),
        ("an index without its files", "which its index names: half-written"),
        ("another architecture", "has no v_proj whose sign could be turned"),
        ("whole numbers", "a checkpoint of floating point is needed"),
        ("there already", "is there already"),
    ],
)
def test_a_probe_is_written_whole_or_not_at_all(tmp_path, name, says):
    out = tmp_path / "probe"
    if name == "there already":
        out.mkdir()
    source = MODEL if name == "there already" else bad_checkpoint(tmp_path, name)
    with pytest.raises(UsageError, match="^write_probe.*" + says):
        write_probe(source, out)
    assert sorted(tmp_path.glob("*probe*")) == ([out] if name == "there already" else [])


def test_a_probe_of_a_tied_checkpoint_stays_tied(tmp_path):
    from safetensors.torch import save_file

    tied = tmp_path / "tied"
    shutil.copytree(MODEL, tied)
    tensors = load_file(str(tied / "model.safetensors"))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, str(tied / "model.safetensors"))
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    probe = load_file(str(write_probe(tied, tmp_path / "probe") / "model.safetensors"))
    assert torch.equal(probe["lm_head.weight"], probe["model.embed_tokens.weight"])
    assert not torch.equal(probe["lm_head.weight"], tensors["model.embed_tokens.weight"])


def test_a_half_written_checkpoint_accuses_no_engine(tmp_path):
    trace = Trace.from_sequences([{"prompt_token_ids": [5], "token_ids": [6, 7], "logprobs": [-1.0, -1.0]}], dtype="float32")
    half = bad_checkpoint(tmp_path, "part of it")
    with pytest.raises(EngineError, match=r"lacks 11 tensors, 'model.layers.3.*half-written"):
        assert_weight_update(trace.with_(weight_versions=np.ones(2, np.int32)), before=MODEL, after=half)


def test_others_get_an_engine_with_the_checkpoints_own_weights(pool, spec, questions, updated):
    before = pool.engine(spec).generate(questions(4), SAMPLING)
    engine, _ = updated()
    assert not np.array_equal(engine.replay(before).logprobs, before.logprobs)
    assert np.array_equal(pool.engine(spec).replay(before).logprobs, before.logprobs)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing there", "there is no folder"),
        ("empty", "holds no safetensors"),
        ("cut short", "half-written, or damaged"),
        ("an index without its files", "which its index names: half-written"),
        ("another architecture", "another architecture; the engine keeps the weights it has"),
        ("part of it", "lacks"),
        ("whole numbers", "is of whole numbers in"),
        ("another model type", "is 'llama' by its config.json, tiny-arith is 'qwen3'"),
        ("half a config", "config.json is no JSON object: half-written, or damaged"),
        ("not a number", "'model.norm.weight' in"),
        ("not a number", "holds 1 NaN or infinities; the engine keeps the weights it has"),
    ],
)
def test_what_cannot_be_loaded_leaves_the_engine_with_the_weights_it_had(pool, spec, questions, tmp_path, name, says):
    engine = pool.engine(spec)
    before = engine.generate(questions(4), SAMPLING)
    with pytest.raises(UsageError) as error:
        engine.update_weights(bad_checkpoint(tmp_path, name))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert engine.weight_version == 0
    assert np.array_equal(engine.replay(before).logprobs, before.logprobs)


def bad_checkpoint(folder: Path, name):
    from safetensors.torch import save_file

    folder = folder / "checkpoint"
    if name == "nothing there":
        return folder
    if name == "empty":
        folder.mkdir()
        return folder
    shutil.copytree(STEP_2, folder)
    weights = folder / "model.safetensors"
    if name == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif name == "an index without its files":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-2.safetensors"}}')
    elif name == "another model type":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    elif name == "half a config":
        (folder / "config.json").write_text('{"model_type": ')
    elif name == "not a number":
        tensors = load_file(str(weights))
        tensors["model.norm.weight"][3] = float("inf")
        save_file(tensors, str(weights))
    elif name == "whole numbers":
        save_file({k: (v * 100).to(torch.int8) for k, v in load_file(str(weights)).items()}, str(weights))
    elif name == "another architecture":
        save_file({f"transformer.{k.replace('v_proj', 'qkv')}": v for k, v in load_file(str(weights)).items()}, str(weights))
    else:
        save_file({k: v for k, v in load_file(str(weights)).items() if ".layers.3." not in k}, str(weights))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "int8"])
def test_weights_of_any_precision_are_looked_through_for_what_is_no_number(dtype):
    weights = torch.linspace(-1, 1, 60).reshape(5, 12).to(getattr(torch, dtype))
    check_finite(WeightUpdate(weights={"a": weights, "none": torch.empty(0)}))
    if dtype == "int8":
        return
    weights[2, 3] = float("nan")
    with pytest.raises(
        UsageError, match=r"^weight update: 'a' in the mapping of tensors holds 1 NaN or infinities; the engine"
    ):
        check_finite(WeightUpdate(weights={"a": weights}))


def test_modes_and_traces_that_do_not_exist(pool, spec, questions, updated):
    engine = pool.engine(spec)
    with pytest.raises(UsageError, match="known are keep, wait, abort, v0, did you mean 'keep'"):
        engine.update_weights(STEP_2, mode="keeep")
    with pytest.raises(UsageError, match="invalidated nothing"):
        engine.update_weights(STEP_2, mode="v0", clear_cache=True)
    plain = Trace.from_sequences([{"prompt_token_ids": [5], "token_ids": [6, 7], "logprobs": [-1.0, -1.0]}])
    with pytest.raises(UsageError, match="does not say which weights wrote its tokens"):
        check(plain)
    with pytest.raises(UsageError, match=r"^update_weights.NoneType.: a checkpoint folder, an adapter's folder, or tensors by"):
        engine.update_weights(None)
    with pytest.raises(UsageError, match=r"'lm_head.weight' is list: torch tensors by checkpoint names are needed"):
        engine.update_weights({"lm_head.weight": [1.0, 2.0]})


def test_an_engine_that_died_says_that_its_updates_died_with_it(pool, spec):
    engine = pool.engine(spec)
    engine.update_weights(STEP_2)
    pool.discard(spec)
    with pytest.raises(EngineError, match="is down, and its 1 weight updates with it"):
        engine.update_weights(STEP_2)
