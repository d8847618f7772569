"""Other engines by the same golden: transformers' continuous batching, vLLM on transformers' modules, and all in one matrix."""

import shutil

import numpy as np
import pytest
from sglang_stand_in import SglangStandIn

from conftest import MODEL, ROOT, forked_python
from pytest_logprob_parity import EngineSpec, Golden, MismatchError, Sampling, UsageError, check_golden, compare
from pytest_logprob_parity.checkpoint.loading import load_whole
from pytest_logprob_parity.matrix.executors import LocalExecutor
from pytest_logprob_parity.matrix.plan import load_plan
from pytest_logprob_parity.matrix.run import run_matrix

GREEDY = ROOT / "golden" / "tests" / "test_goldens" / "test_greedy_in_float32-d7567e60.safetensors"
V0 = ROOT / "examples" / "v0-to-v1" / "golden"


@pytest.fixture
def continuous(pool):
    """`continuous(...)`: a transformers engine with continuous batching."""
    return lambda model=MODEL, **settings: pool.engine(
        EngineSpec(model, engine="transformers", dtype="float32", continuous_batching=True, **settings)
    )


# -- transformers' continuous batching --------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["greedy", "top-p-0.9", "top-k-5"])
def test_continuous_batching_agrees_with_vllms_goldens(continuous, sampling):
    trace = Golden.load(V0 / f"0.8.5-V0-float32-{sampling}.safetensors").trace
    comparison = compare(expected=trace, actual=continuous().replay(trace))
    assert comparison.passed
    assert comparison.actual.logprobs_mode == "processed_logprobs"
    assert comparison.metrics["rms_diff"] < 1e-5


def test_continuous_batching_fails_with_other_weights(continuous):
    with pytest.raises(MismatchError) as failed:
        check_golden(GREEDY, continuous(f"{MODEL}-step2"))
    assert any(finding.layer == "weights" for finding in failed.value.comparison.findings)


def test_continuous_batching_records_and_agrees_with_itself(continuous, questions, tmp_path):
    """With less room than requests, so that its scheduler has something to do."""
    engine, golden = continuous(max_num_seqs=5), tmp_path / "golden.safetensors"
    sampling = Sampling(temperature=0.7, n=2, max_tokens=16)
    check_golden(golden, engine, prompts=questions(6), sampling=sampling, update=True, repeats=0)
    assert check_golden(golden, engine).metrics["n_changed"] == 0


def test_what_it_uses_is_read_back(continuous):
    values = continuous().config.values
    assert values["continuous_batching"]
    assert (values["enable_prefix_caching"], values["async_scheduling"], values["enforce_eager"]) == (False, False, True)
    assert values["attn_implementation"] in ("sdpa", "paged|eager")
    assert continuous(profile="serving").config.values["enable_prefix_caching"]


def test_what_continuous_batching_would_drop_is_refused(continuous):
    with pytest.raises(UsageError, match=r"continuous batching has no repetition_penalty: it would drop 1\.1"):
        check_golden(V0 / "0.8.5-V0-float32-repetition-1.1.safetensors", continuous())


# -- vLLM on transformers' modules ------------------------------------------------------------------------------------


def test_vllm_runs_transformers_modules_by_a_setting(pool):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32", model_impl="transformers"))
    assert engine.config.values["model_impl"] == "transformers"
    comparison = check_golden(GREEDY, engine)
    assert comparison.passed
    assert comparison.metrics["rms_diff"] < 1e-5
    assert pool.starts[-1].own_process  # it changes transformers' classes in its process


# -- one matrix -------------------------------------------------------------------------------------------------------


def test_one_matrix_has_all_of_them(tmp_path, monkeypatch):
    """The example's plan and vLLM's goldens of it; vLLM's own cells start nothing here."""
    monkeypatch.setenv("LOGPROB_PARITY_GGUF", str(tmp_path / "gguf"))
    server = SglangStandIn(load_whole(ROOT / "models" / "tiny-arith", MODEL, dtype="float32").eval(), MODEL)
    shutil.copytree(ROOT / "examples" / "other-engines", tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "matrix.toml").read_text()
    text = text.replace("../../models/tiny-arith", MODEL).replace("http://127.0.0.1:30000", server.url)
    start, end = text.index("[environment.vllm]"), text.index("[cell.vLLM]")
    places = {"vllm": "/no/vllm/here", **dict.fromkeys(("transformers", "llama.cpp", "client"), forked_python())}
    environments = [f'[environment."{name}"]\npython = "{python}"\n' for name, python in places.items()]
    (tmp_path / "matrix.toml").write_text(text[:start] + "".join(environments) + text[end:])
    try:
        rows = run_matrix(load_plan(tmp_path / "matrix.toml"), LocalExecutor(2), tmp_path / "out", tmp_path / "home", print)
    finally:
        server.close()
    found = {(row.cell, row.sampling): row for row in rows}
    assert found["vLLM", "T=1"].verdict == "not run"
    for cell in ("llama.cpp", "transformers, continuous batching"):
        for sampling in ("T=1", "T=0.7, top-p 0.9"):
            assert found[cell, sampling].verdict == "pass", found[cell, sampling].headline
            assert found[cell, sampling].metrics["rms_diff"] < 1e-5
    assert found["SGLang", "T=1"].verdict == "pass"
    assert found["SGLang", "T=0.7, top-p 0.9"].verdict == "unverified"
    assert found["llama.cpp, Q8_0", "T=1"].metrics["rms_diff"] > 1e-3
    assert np.isfinite(found["llama.cpp, Q8_0", "T=1"].metrics["rms_diff"])
