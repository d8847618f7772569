"""Rollouts in fewer bits on purpose: a declared gap has limits of its own, and is still held to what columns mean."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MODEL
from pytest_logprob_parity import (
    EngineSpec,
    MismatchError,
    Sampling,
    TransformersScorer,
    UsageError,
    assert_trainer_parity,
    check_golden,
    compare,
)
from pytest_logprob_parity.golden import Golden

SAMPLING = Sampling(temperature=0.7, max_tokens=48, n=2, seed=1)
EIGHT_BITS = {"kv_cache_dtype": "fp8_e4m3", "dtype": "bfloat16", "max_num_seqs": 48}


def keys_of(comparison):
    return {note.key for note in comparison.notes}


@pytest.fixture(scope="module")
def golden(pool, questions, tmp_path_factory):
    """The golden of a bfloat16 engine."""
    path = tmp_path_factory.mktemp("gaps") / "golden.safetensors"
    engine = pool.engine(EngineSpec(MODEL, dtype="bfloat16", max_num_seqs=48))
    check_golden(path, engine, prompts=questions(32), sampling=SAMPLING, update=True, repeats=2)
    comparison = check_golden(path, engine, tolerance="fp8")
    assert "gap_not_there" in keys_of(comparison)
    return path


def test_fp8_fails_where_it_is_not_declared_and_passes_where_it_is(pool, golden):
    engine = pool.engine(EngineSpec(MODEL, **EIGHT_BITS))
    with pytest.raises(MismatchError) as error:
        check_golden(golden, engine, replay=("decode",))
    (finding,) = error.value.comparison.findings
    assert (finding.layer, finding.cause) == ("path", "kv_cache_dtype")

    comparison = check_golden(golden, engine, replay=("decode",), tolerance="fp8")
    assert comparison.headline.endswith("(declared gap: fp8 rollouts)")
    (note,) = (note for note in comparison.notes if note.key == "declared_gap")
    assert note.startswith("declared gap: fp8 rollouts; limits mean_diff 0.01, k3 0.015, ")
    assert "gap_not_there" not in keys_of(comparison)

    raw = engine.replay(Golden.load(golden).trace, "prefill")  # a declared gap excuses no other meaning
    with pytest.raises(MismatchError, match=r"^fail: ") as error:
        check_golden(golden, raw, tolerance="fp8")
    assert error.value.comparison.headline.key == "other_meanings"
    assert error.value.comparison.findings[0].cause == "raw_vs_processed"


def test_a_trainer_may_declare_it_too(pool, questions):
    rollouts = pool.engine(EngineSpec(MODEL, **EIGHT_BITS)).generate(questions(32), SAMPLING)
    trainer = TransformersScorer(MODEL, dtype="bfloat16")
    comparison = assert_trainer_parity(rollouts, trainer, tolerance="fp8")
    assert comparison.headline.endswith("(declared gap: fp8 rollouts)")
    assert compare(expected=rollouts, actual=rollouts, tolerance="int8").headline.endswith("(declared gap: int8 rollouts)")


def test_a_declared_gap_has_limits(pool, golden):
    coarser = pool.engine(EngineSpec(MODEL, **EIGHT_BITS | {"kv_cache_dtype": "fp8_e5m2"}))  # two bits of mantissa
    with pytest.raises(MismatchError, match=r"^fail: Logprobs are not close.*\(declared gap: fp8 rollouts\)") as error:
        check_golden(golden, coarser, replay=("decode",), tolerance="fp8")
    assert error.value.comparison.findings[0].cause == "kv_cache_dtype"


def write_int8(folder):
    """The model with its linear layers in int8, weights by channel and activations by token, as compressed-tensors has them."""
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and ".layers." in name]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 127
        tensors[f"{name}_scale"] = scale.bfloat16()
        tensors[name] = (tensors[name].float() / scale).round().to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight | {"strategy": "channel", "dynamic": False},
        "input_activations": eight | {"strategy": "token", "dynamic": True},
    }
    about = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = about | {"ignore": ["lm_head"], "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_int8_rollouts_of_a_bfloat16_trainer(pool, questions, tmp_path):
    engine, path = pool.engine(EngineSpec(str(write_int8(tmp_path / "int8")), dtype="bfloat16")), tmp_path / "g.safetensors"
    check_golden(path, engine, prompts=questions(32), sampling=SAMPLING, update=True, repeats=0)
    rollouts, trainer = Golden.load(path), TransformersScorer(MODEL, dtype="bfloat16")
    comparison = assert_trainer_parity(rollouts, trainer, tolerance="int8")
    assert comparison.headline.endswith("(declared gap: int8 rollouts)")
    assert "gap_not_there" not in keys_of(comparison)
    with pytest.raises(MismatchError) as error:
        assert_trainer_parity(rollouts, trainer, tolerance={"rms_diff": 0.01})
    (finding,) = error.value.comparison.findings
    assert (finding.layer, finding.cause, finding.candidates[0]) == ("weights", None, "quantization")
    assert finding.evidence.startswith("rollouts with quantization 'compressed-tensors'")


def test_a_setting_that_says_int8_and_does_nothing(pool, golden):
    """It is for experts: vLLM takes it for a dense model, reports it, and computes every bit as before."""
    setting = {"quantization": "int8_per_channel_weight_only", "dtype": "bfloat16", "max_num_seqs": 48}
    comparison = check_golden(golden, pool.engine(EngineSpec(MODEL, **setting)), replay=("decode",), tolerance="int8")
    assert comparison.metrics["n_changed"] == 0
    told = [note for note in comparison.notes if note.key == "gap_not_there"]
    assert any("every logprob is bit-identical to the other side's" in note for note in told)


def test_gaps_that_do_not_exist(golden):
    with pytest.raises(UsageError, match=r"tolerance='fp9': declared gaps are fp8, int8, did you mean 'fp8'\?"):
        check_golden(golden, Golden.load(golden).trace, tolerance="fp9")
