"""A running SGLang server as an engine, against a stand-in that answers as SGLang's sources say (see sglang_stand_in.py)."""

import numpy as np
import pytest
from sglang_stand_in import SglangStandIn

from conftest import MODEL, ROOT
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    Golden,
    IncomparableError,
    MismatchError,
    Pool,
    UsageError,
    check_golden,
)
from pytest_logprob_parity.checkpoint.loading import load_whole

#: vLLM's golden, greedy in float32, with raw logprobs: what a prefill gives.
GOLDEN = ROOT / "golden" / "tests" / "test_goldens" / "test_greedy_in_float32-d7567e60.safetensors"


@pytest.fixture(scope="module")
def models():
    return {
        name: load_whole(ROOT / "models" / name, name, dtype="float32").eval() for name in ("tiny-arith", "tiny-arith-step2")
    }


@pytest.fixture
def stand_in(models):
    server = SglangStandIn(models["tiny-arith"], MODEL)
    yield server
    server.close()


@pytest.fixture
def connect(stand_in):
    """`connect(...)`: the engine of a spec with the stand-in's address."""
    with Pool(ROOT) as pool:

        def make(model=MODEL, **settings):
            return pool.engine(EngineSpec(model, engine="sglang", url=stand_in.url, retries=0, **settings))

        yield make


def test_vllms_golden_is_checked_against_the_server(connect, stand_in):
    comparison = check_golden(GOLDEN, connect())
    assert comparison.passed
    assert comparison.actual.path == "prefill"
    assert comparison.metrics["rms_diff"] < 1e-5
    assert any("not decoded, scored by a prefill: SGLang cannot be forced" in str(note) for note in comparison.notes)
    golden = Golden.load(GOLDEN).trace
    assert len(stand_in.asked) == golden.num_sequences
    asked = stand_in.asked[0]
    assert asked["logprob_start_len"] == len(golden.prompt(0)) - 1
    assert asked["sampling_params"]["max_new_tokens"] == 0
    assert np.isfinite(comparison.actual.logprobs).all()
    assert (comparison.actual.ranks == 1).mean() > 0.99


def test_other_weights_behind_the_server_fail(connect, stand_in, models):
    stand_in.model = models["tiny-arith-step2"]
    with pytest.raises(MismatchError) as failed:
        check_golden(GOLDEN, connect())
    assert failed.value.comparison.verdict == "fail"


def test_a_golden_with_other_than_raw_logprobs_is_not_verified(connect):
    golden = ROOT / "examples" / "v0-to-v1" / "golden" / "0.8.5-V0-float32-T-0.7.safetensors"
    with pytest.raises(MismatchError, match="prefill, gives raw logprobs") as told:
        check_golden(golden, connect())
    assert told.value.comparison.verdict == "unverified"


def test_it_writes_no_completions(connect, tmp_path):
    with pytest.raises(UsageError, match=r"SGLang cannot be forced .*; it writes no completions: record with another engine"):
        connect().generate(["1 + 1"])
    with pytest.raises(EngineError, match="not recorded: its golden could not be replayed: SGLang cannot be forced along"):
        check_golden(tmp_path / "g.safetensors", connect(), prompts=["1 + 1"], update=True)


def test_the_last_ids_of_the_vocabulary_come_back_as_0(connect, stand_in):
    """SGLang takes them for placeholders of images."""
    golden = Golden.load(GOLDEN).trace
    last = stand_in.model.config.vocab_size - 1
    trace = golden.with_(token_ids=np.full_like(golden.token_ids, last))
    assert np.isfinite(connect().replay(trace, "prefill").logprobs).all()


def test_settings_are_read_back(connect, stand_in):
    values = connect().config.values
    assert (values["enable_prefix_caching"], values["async_scheduling"], values["tensor_parallel_size"]) == (False, True, 1)
    assert connect(attention_backend="triton").config.version == "0.5.23"
    with pytest.raises(EngineError, match="did not take attention_backend: asked for 'fa3', the started engine uses 'triton'"):
        _ = connect(attention_backend="fa3").config
    with pytest.raises(UsageError, match="engine='sglang' has no setting 'atention_backend', did you mean 'attention_backend'"):
        _ = connect(atention_backend="fa3").config
    stand_in.info["disable_radix_cache"] = False
    with pytest.raises(EngineError, match="did not take enable_prefix_caching"):
        _ = connect(timeout=50).config
    assert connect(profile="serving").config.values["enable_prefix_caching"]


def test_earlier_servers_call_their_routes_otherwise(connect, stand_in):
    stand_in.hidden = ("/model_info", "/server_info")
    assert connect().config.version == "0.5.23"
    stand_in.hidden = ("/model_info", "/get_model_info")
    with pytest.raises(EngineError, match=r"has no /get_model_info \(status 404: Not Found\): is that an SGLang server\?"):
        _ = connect(timeout=50).config


def test_a_server_of_another_model(connect, stand_in):
    stand_in.about["model_path"] = stand_in.about["served_model_name"] = "/models/other"
    with pytest.raises(IncomparableError, match=r"has the model '/models/other'.*say served_model='/models/other'"):
        _ = connect().config
    assert connect(served_model="/models/other").config.engine == "sglang"
    with pytest.raises(IncomparableError, match="serves '/models/other', served_model is 'a'"):
        _ = connect(served_model="a").config


def test_nobody_answers():
    with (
        Pool(ROOT) as pool,
        pytest.raises(EngineError, match=r"no server answers at .*; start one: python -m sglang\.launch_server"),
    ):
        _ = pool.engine(EngineSpec(MODEL, engine="sglang", url="http://127.0.0.1:9", retries=0)).config
    with pytest.raises(UsageError, match=r"engine='sglang' needs url='http://HOST:PORT'$"):
        EngineSpec(MODEL, engine="sglang")


def _drop(name):
    return lambda answer: answer["meta_info"].pop(name)


def _shorten(name):
    return lambda answer: answer["meta_info"][name].pop()


def _put(value):
    return lambda answer: answer["meta_info"]["input_token_logprobs"].__setitem__(1, value)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda answer: answer.pop("meta_info"), "answers with no meta_info"),
        (_drop("input_token_logprobs"), "answers without meta_info.input_token_logprobs"),
        (_drop("input_top_logprobs"), "answers without meta_info.input_top_logprobs"),
        (_shorten("input_token_logprobs"), r"answers with \d+ input_token_logprobs, \d+ were asked for"),
        (_put([-1.0, 7]), r"scored other tokens than were sent: meta_info.input_token_logprobs\[1\] is of token 7, not of"),
        (_put("text"), r"input_token_logprobs\[1\] is 'text', expected \[logprob, token id, text\]"),
        (_put([0.5, 7]), "has 0.5, expected a logprob, 0 or below"),
        (lambda answer: answer["meta_info"].update(prompt_tokens=3), "took another prompt than was sent: 3 tokens"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none(connect, stand_in, edit, told):
    stand_in.after = edit
    with pytest.raises(EngineError, match=rf"sglang 0\.5\.23 at .*{told}.*\(request \d+ of \d+\)|{told}"):
        connect().replay(Golden.load(GOLDEN).trace, "prefill")


def test_nan_is_told(connect, stand_in):
    stand_in.after = lambda answer: answer["meta_info"]["input_token_logprobs"][3].__setitem__(0, None)
    assert np.isnan(connect().replay(Golden.load(GOLDEN).trace, "prefill").logprobs).any()
