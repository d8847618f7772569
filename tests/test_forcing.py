"""How an engine is forced is chosen by what it can do, not by its device. Stand-ins: no Model Runner V2 runs on CPUs yet."""

import os
from types import SimpleNamespace

import pytest

from pytest_logprob_parity.engines.vllm import start
from pytest_logprob_parity.engines.vllm.config import SPECULATES, why_not_forced
from pytest_logprob_parity.engines.vllm.forced_decode import of_all
from pytest_logprob_parity.golden.fingerprint import keeps_schedule


class Llm:
    """Stands for vLLM's LLM: notes what it is built with, and refuses trace replay without Model Runner V2 as vLLM does."""

    def __init__(self, runner):
        self.runner, self.built = runner, []

    def __call__(self, **arguments):
        self.built.append((arguments, os.environ.get("VLLM_USE_V2_MODEL_RUNNER")))
        if arguments.get("enable_trace_replay") and self.runner != "v2":
            raise ValueError("1 validation error for VllmConfig: trace replay requires Model Runner V2")
        return self


def test_an_engine_that_replays_traces_itself_is_built_to_do_so_on_any_device(monkeypatch):
    monkeypatch.setattr(start, "can_replay_traces", lambda: True)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    v2 = start.build(Llm("v2"), {"model": "m"})
    assert v2.built == [({"enable_trace_replay": True, "model": "m"}, None)]
    v1 = start.build(Llm("v1"), {"model": "m"})
    assert v1.built[-1] == ({"model": "m"}, None)
    refused = start.build(Llm("v2"), {"model": "m", "enable_trace_replay": False})
    assert refused.built == [({"enable_trace_replay": False, "model": "m"}, None)]


def test_an_engine_that_cannot_replay_traces_gets_the_runner_whose_sampler_can_be_wrapped(monkeypatch):
    monkeypatch.setattr(start, "can_replay_traces", lambda: False)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    assert start.build(Llm("v1"), {"model": "m"}).built == [({"model": "m"}, "0")]
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ


def test_other_reasons_not_to_start_are_handed_on(monkeypatch):
    monkeypatch.setattr(start, "can_replay_traces", lambda: True)

    def broken(**arguments):
        raise ValueError("max_model_len is too large")

    with pytest.raises(ValueError, match="too large"):
        start.build(broken, {})


@pytest.mark.parametrize(
    ("replays", "values", "how"),
    [
        (True, {"model_runner": "v2"}, "native"),
        (False, {"model_runner": "v2"}, "Model Runner V2 was started without enable_trace_replay=True"),
        (False, {"model_runner": "v1"}, None),
        (False, {"model_runner": "v1", "pipeline_parallel_size": 2, "data_parallel_size": 2}, None),
        (True, {"model_runner": "v2", "speculative_decoding": "ngram"}, SPECULATES),
    ],
)
def test_what_a_configuration_says_of_forcing(replays, values, how):
    config = SimpleNamespace(model_config=SimpleNamespace(enable_trace_replay=replays))
    assert why_not_forced(config, values) == how


def test_every_worker_has_to_be_forced():
    assert of_all(["sampler", "sampler"]) == "sampler"
    assert of_all(["sampler", "NPURunner has no sampler that can be wrapped"]) == "NPURunner has no sampler that can be wrapped"


def test_data_parallelism_keeps_no_schedule():
    assert keeps_schedule({"config": {"data_parallel_size": 1}})
    assert not keeps_schedule({"config": {"data_parallel_size": 2}})
