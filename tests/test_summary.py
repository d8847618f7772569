"""Quiet when green, one line when red: what a run prints at its end, by verbosity, and what it leaves out."""

import json

import pytest

from conftest import forked_workers

SOURCE = """
import logging
import numpy as np
import pytest
from pytest_logprob_parity import Trace

def rollouts(shift=0.0):
    rng = np.random.default_rng(0)
    return Trace.from_arrays(
        prompt_token_ids=np.arange(30), prompt_offsets=np.arange(31), token_ids=rng.integers(0, 50, 600),
        sequence_offsets=20 * np.arange(31), logprobs=-1 - rng.exponential(0.5, 600) + shift, dtype="bfloat16",
    )

@pytest.mark.parametrize("n", range(8))
def test_it(golden_trace, n):
    for name in ("vllm.worker", "torch._dynamo", "mine"):
        logging.getLogger(name).debug("said by %s", name.upper())
    golden_trace.check(rollouts(SHIFT))
"""


@pytest.fixture
def repo(pytester, run_inner, once):
    """A repo of eight checks with goldens; `repo(shift, ...)` runs it."""

    def run(shift, *arguments):
        pytester.makepyfile(test_it=SOURCE.replace("SHIFT", str(shift)))
        return run_inner(*arguments)

    once("eight checks", pytester.path, lambda: run(0.0, "--update-golden").assert_outcomes(passed=8))
    return run


def test_quietly_all_that_passes_has_one_line(repo):
    for option in ("-q", "-qq"):
        lines = repo(0.0, option).outlines
        assert [line for line in lines if line.startswith(("logprob-parity: ", "  "))] == ["logprob-parity: 8 checked"]
    recorded = repo(0.0, "-q", "--update-golden").outlines  # what a golden can show is said once, when it is recorded
    assert sum(line.startswith("  recorded") for line in recorded) == 5


def test_by_default_some_are_told_of_and_verbosely_all(repo):
    count = {options: sum(line.startswith("  pass") for line in repo(0.0, *options).outlines) for options in ((), ("-v",))}
    assert count == {(): 5, ("-v",): 8}


@pytest.mark.parametrize("options", [(), forked_workers(1)])
def test_the_short_summary_has_the_verdict_once(repo, monkeypatch, options):
    monkeypatch.setenv("CI", "true")  # pytest cuts nothing off there, and would repeat the whole message
    result = repo(-0.3, "-q", *options)
    lines = [line for line in result.outlines if line.startswith("FAILED ")]
    assert len(lines) == 8
    assert lines[0].startswith("FAILED test_it.py::test_it[0] - fail: ")
    assert sum("to accept" in line for line in result.outlines) == 8


def test_an_error_is_told_by_its_kind(repo, pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    for golden in pytester.path.glob("golden/*/*.safetensors"):
        golden.unlink()
    lines = [line for line in repo(0.0).outlines if line.startswith("FAILED ")]
    assert lines[0].startswith("FAILED test_it.py::test_it[0] - golden: no golden at golden/test_it/test_it-0-")


def test_debug_logs_of_engines_are_not_in_a_failing_tests_output(repo, pytester):
    pytester.makeini("[pytest]\nlog_level = DEBUG")
    out = repo(-0.3, "-k", "[0]").stdout.str()
    assert "said by MINE" in out
    assert "said by VLLM" not in out
    assert "said by TORCH" not in out


def test_one_record_a_check_is_in_junitxml(repo, pytester):
    from xml.etree import ElementTree as ET

    repo(0.0, "-q", f"--junitxml={pytester.path}/junit.xml")
    found = [json.loads(e.get("value")) for e in ET.parse(pytester.path / "junit.xml").iter("property")]
    assert [record["outcome"] for record in found] == ["passed"] * 8
