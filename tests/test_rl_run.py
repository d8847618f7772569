"""The RL run of the examples: its gate on the real engine, a step of its loop. docs/explanation/rl-run.md has the whole run."""

import importlib
import sys

import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def run():
    sys.path.insert(0, str(ROOT / "examples" / "rl-run"))
    try:
        yield importlib.import_module("run")
    finally:
        sys.path.remove(str(ROOT / "examples" / "rl-run"))


@pytest.fixture(scope="module")
def probe(run, tmp_path_factory):
    return run.write_probe(run.MODEL, tmp_path_factory.mktemp("probe") / "probe")


def causes(comparison):
    return {finding.cause for finding in comparison.findings if finding.layer != "noise"}


def test_the_gate_fails_the_first_run_on_v1_for_what_is_wrong_with_it(run, pool, probe):
    gate = run.gate(pool.engine(run.spec_of("first V1 run")), probe, problems=10)
    told = [(comparison.verdict, causes(comparison)) for _, comparison in gate]
    assert told == [("fail", {"raw_vs_processed"}), ("pass", set()), ("fail", {"stale_kv_cache"})]


def test_the_gate_passes_what_is_fixed_and_the_loop_learns_from_its_rollouts(run, pool, probe):
    engine = pool.engine(run.spec_of("all fixed"))
    assert [comparison.verdict for _, comparison in run.gate(engine, probe, problems=10)] == ["pass"] * 3
    first, second = run.train(pool.engine(run.spec_of("all fixed")), 2)
    assert (first["lag"], first["step"]) == (0, 1)
    assert 0 < second["lag"] < 1  # the weights came while its requests ran
    for row in (first, second):
        assert row["rl/kl_new_old"] < 1e-3
        assert row["rl/ratio_new_old"] == pytest.approx(1, abs=0.01)
