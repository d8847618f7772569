"""llama.cpp as an engine: it shares no code with vLLM and agrees with vLLM's goldens, and faults do not pass."""

import builtins
import json
import shutil

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    Golden,
    IncomparableError,
    MismatchError,
    Sampling,
    UsageError,
    check_golden,
)
from pytest_logprob_parity.engines import numpy_sampler
from pytest_logprob_parity.engines.llama_cpp import gguf_file
from pytest_logprob_parity.engines.llama_cpp.layout import layout_of
from pytest_logprob_parity.engines.llama_cpp.library import Library
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.engines.transformers import backend as transformers_backend

V0 = ROOT / "examples" / "v0-to-v1" / "golden"
GREEDY = ROOT / "golden" / "tests" / "test_goldens" / "test_greedy_in_float32-d7567e60.safetensors"
STEP2 = f"{MODEL}-step2"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Files are written here, not into the user's cache folder."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGPROB_PARITY_GGUF", str(folder))
        yield folder


@pytest.fixture(scope="module")
def llama(cache):
    """`llama(...)`: the engine of a spec."""
    with Pool(ROOT) as engines:
        yield lambda model=MODEL, dtype="float32", **settings: engines.engine(
            EngineSpec(model, engine="llama_cpp", dtype=dtype, **{"threads": 1, **settings})
        )


@pytest.mark.parametrize("sampling", ["T-0.7", "top-p-0.9", "repetition-1.1"])
def test_vllms_goldens_pass_under_every_logits_processing_step(llama, sampling):
    """`repetition-1.1` has them all: temperature, top-p, top-k and a penalty."""
    comparison = check_golden(V0 / f"0.8.5-V0-float32-{sampling}.safetensors", llama())
    assert comparison.passed
    assert comparison.actual.engine == "llama_cpp"
    assert comparison.metrics["rms_diff"] < 1e-5


def test_other_weights_fail(llama):
    with pytest.raises(MismatchError) as failed:
        check_golden(GREEDY, llama(STEP2))
    assert failed.value.comparison.verdict == "fail"
    assert any(finding.layer == "weights" for finding in failed.value.comparison.findings)


def test_weights_of_another_step_in_a_file_of_the_same_shapes_fail(llama, cache):
    _ = llama(STEP2).config
    (file,) = cache.glob("tiny-arith-step2-F32-*.gguf")
    with pytest.raises(MismatchError) as failed:
        check_golden(GREEDY, llama(gguf=str(file)))
    assert failed.value.comparison.verdict == "fail"


def test_quantized_weights_fail_by_name_and_pass_as_a_declared_gap(llama):
    engine = llama(quantization="q8_0")
    golden = V0 / "0.8.5-V0-float32-T-0.7.safetensors"
    with pytest.raises(MismatchError) as failed:
        check_golden(golden, engine, tolerance={"rms_diff": 1e-6})
    told = [cause for finding in failed.value.comparison.findings for cause in (finding.cause, *finding.candidates)]
    assert "quantization" in told
    declared = check_golden(golden, engine, tolerance="int8")
    assert declared.passed
    assert 0.005 < declared.metrics["rms_diff"] < 0.03
    assert not any(note.key == "gap_not_there" for note in declared.notes)


def test_it_records_and_agrees_with_itself_bit_for_bit(llama, questions, tmp_path):
    engine, golden = llama(), tmp_path / "golden.safetensors"
    sampling = Sampling(temperature=0.7, top_p=0.9, n=2, max_tokens=24, seed=3)
    check_golden(golden, engine, prompts=questions(6), sampling=sampling, update=True, repeats=2)
    comparison = check_golden(golden, engine)
    assert comparison.passed
    assert comparison.metrics["n_changed"] == 0
    trace = Golden.load(golden).trace
    np.testing.assert_array_equal(engine.replay(trace, "regenerate").token_ids, trace.token_ids)


def test_prefill_is_decode_up_to_rounding(llama):
    trace = Golden.load(GREEDY).trace
    replays = llama().replay_all(trace, ["decode", "prefill"])
    np.testing.assert_allclose(replays["prefill"].logprobs, replays["decode"].logprobs, atol=1e-4)


def test_bfloat16(llama):
    trace = Golden.load(GREEDY).trace
    apart = np.abs(llama(dtype="bfloat16").replay(trace).logprobs - trace.logprobs)
    assert 1e-4 < np.sqrt((apart**2).mean()) < 0.2


# -- files ------------------------------------------------------------------------------------------------------------


def make_model(folder, kind, **changes):
    """A small model with random weights, of another architecture than tiny-arith's, with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, bos_token_id=None, **changes,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(f"{MODEL}/{name}", folder / name)
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Qwen2", {}), ("Mistral", {"sliding_window": None})],
    ids=["llama", "llama-tied", "qwen2", "mistral"],
)
def test_other_architectures_agree_with_transformers(llama, pool, tmp_path, kind, changes):
    model = make_model(tmp_path / kind.lower(), kind, **changes)
    prompts = [[5, 9, 200, 31], [17] * 9]
    reference = pool.engine(EngineSpec(model, engine="transformers", dtype="float32"))
    trace = reference.generate(prompts, Sampling(temperature=1.0, max_tokens=40, ignore_eos=True, seed=1))
    apart = llama(model).replay(trace).logprobs - trace.logprobs
    assert np.abs(apart).max() < 1e-4


def test_a_file_is_written_once_and_again_for_other_weights(llama, cache, tmp_path):
    model = tmp_path / "mine"
    shutil.copytree(MODEL, model)
    _ = llama(str(model)).config
    (first,) = cache.glob("mine-F32-*.gguf")
    stamp = first.stat().st_mtime_ns
    _ = llama(str(model), max_num_seqs=4).config
    assert first.stat().st_mtime_ns == stamp
    shutil.copy(f"{STEP2}/model.safetensors", model / "model.safetensors")
    _ = llama(str(model), max_num_seqs=5).config
    (second,) = cache.glob("mine-F32-*.gguf")
    assert second != first


def test_a_file_of_another_model_is_one_line(llama, cache, tmp_path):
    other = make_model(tmp_path / "other", "Qwen2")
    wider = tmp_path / "wider"
    shutil.copytree(MODEL, wider)
    _ = llama(other).config
    (file,) = cache.glob("other-F32-*.gguf")
    told = rf"gguf='{file}' is not of {MODEL}: its architecture is qwen2, the model's is qwen3; convert that model"
    with pytest.raises(IncomparableError, match=told):
        _ = llama(gguf=str(file)).config


@pytest.mark.parametrize(
    ("architecture", "shapes", "told"),
    [
        ("qwen3", {"token_embd.weight": (999, 192)}, "its vocabulary has 999 tokens, the model's has 384"),
        ("qwen3", {"blk.0.attn_q.weight": (64, 192)}, r"blk\.0\.attn_q\.weight has the shape \[64, 192\], .* \[128, 192\]"),
        ("qwen3", {"output_norm.weight": None}, r"it has no tensor output_norm\.weight \(1 of 47 are missing\)"),
        ("qwen3", {"blk.9.attn_q.weight": (128, 192)}, r"it has a tensor blk\.9\.attn_q\.weight that the model does not have"),
    ],
)  # fmt: skip
def test_how_a_file_differs(architecture, shapes, told):
    layout = layout_of(ROOT / "models" / "tiny-arith")
    own = {name: tensor.shape for name, (tensor, _) in layout.tensors.items()} | shapes
    import re

    own = {name: shape for name, shape in own.items() if shape is not None}
    assert re.search(told, gguf_file._difference(architecture, own, layout))


def test_bad_input_is_one_line(llama, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0cut")
    model = tmp_path / "m"
    shutil.copytree(MODEL, model)

    def with_config(**changes):
        config = json.loads((ROOT / "models" / "tiny-arith" / "config.json").read_text()) | changes
        (model / "config.json").write_text(json.dumps(config))
        return str(model)

    for start, told in (
        (lambda: llama(gguf="none.gguf"), "gguf='none.gguf': there is no such file"),
        (lambda: llama(gguf=str(tmp_path / "x.gguf")), "is no GGUF file that can be read"),
        (lambda: llama(quantization="q2"), "quantizes to q8_0, not to 'q2'"),
        (lambda: llama(dtype="float64"), "computes in float32, bfloat16, float16, not in float64"),
        (lambda: llama(kv_cache_dtype="q9"), "kv_cache_dtype='q9': known are auto, float32"),
        (lambda: llama(max_num_seqs=0), "max_num_seqs=0: must be a whole number, 1 or more"),
        (lambda: llama(max_modle_len=5), "no setting 'max_modle_len', did you mean 'max_model_len'"),
        (lambda: llama(with_config(architectures=["OPTForCausalLM"])), "converts LlamaForCausalLM.* not OPTForCausalLM"),
        (lambda: llama(with_config(sliding_window=8, use_sliding_window=True), threads=2), "a sliding window of 8"),
        (lambda: llama(with_config(rope_parameters={"rope_type": "yarn"}), threads=3), "does not convert rope_type 'yarn'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told) as error:
            _ = start().config
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "told"),
    [
        ("llama_cpp_py_sync", r"llama\.cpp \(the package llama-cpp-py-sync\) cannot be imported \(.*\); install pytest-log"),
        ("gguf", r"the package gguf, which writes and reads GGUF files, cannot be imported \(.*\); install pytest-logprob-par"),
    ],
)
def test_a_missing_package_is_named(package, told, monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *arguments, **keywords):
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(Library, "_loaded", None)
    monkeypatch.setenv("LOGPROB_PARITY_GGUF", str(tmp_path))
    monkeypatch.setattr(builtins, "__import__", refuse)
    with Pool(ROOT) as engines, pytest.raises(EngineError, match=told) as error:
        _ = engines.engine(EngineSpec(MODEL, engine="llama_cpp")).config
    assert "[llama-cpp]" in str(error.value)
    assert "\n" not in str(error.value)


# -- from logits to logprobs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=7),
        Sampling(temperature=0.9, top_p=0.8),
        Sampling(temperature=0.9, min_p=0.05),
        Sampling(temperature=0.5, top_k=20, top_p=0.9, min_p=0.01),
        Sampling(temperature=0, repetition_penalty=1.2),
        Sampling(presence_penalty=0.4, frequency_penalty=0.3, min_tokens=9, stop_token_ids=(3,)),
    ],
    ids=lambda s: s.processing(),
)
def test_numpy_processes_logits_as_torch_does(sampling):
    import torch

    rng = np.random.default_rng(1)
    for _ in range(20):
        logits = rng.normal(0, 3, 200)
        prompt, written = rng.integers(0, 200, 9).tolist(), rng.integers(0, 200, 7).tolist()
        ours = numpy_sampler.process(logits, sampling, prompt, written, frozenset({1}))
        theirs = transformers_backend.process(torch.tensor(logits), sampling, prompt, written, frozenset({1})).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
