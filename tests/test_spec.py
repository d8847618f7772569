"""EngineSpec and Sampling: what can be asked for, and what a misspelt wish gets."""

import json

import numpy as np
import pytest

from pytest_logprob_parity import EngineSpec, Sampling, UsageError


def test_equal_specs_are_one_engine():
    one = EngineSpec("models/m", dtype="bfloat16", max_model_len=256, max_num_seqs=4)
    other = EngineSpec(model="models/m", max_num_seqs=4, max_model_len=256, dtype="bfloat16")
    assert one == other
    assert len({one, other}) == 1
    assert one != one.replace(max_num_seqs=5)


def test_profile_rl_pins_what_a_trainer_relies_on():
    pins = EngineSpec("m").pins(cpu=True)
    assert pins == {
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": False,
        "async_scheduling": False,
        "generation_config": "vllm",
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "seed": 0,
    }
    assert "enable_chunked_prefill" not in EngineSpec("m").pins(cpu=False)


def test_profile_serving_pins_nothing_but_the_seed():
    assert EngineSpec("m", profile="serving").pins(cpu=True) == {"seed": 0}


def test_settings_win_over_the_profile():
    assert EngineSpec("m", logprobs_mode="raw_logprobs").pins(cpu=False)["logprobs_mode"] == "raw_logprobs"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"engine": "vlm"}, "did you mean 'vllm'?"),
        ({"profile": "serve"}, "did you mean 'serving'?"),
        ({"dtype": "bf16"}, "known are auto, float64, float32, bfloat16, float16"),
        ({"hf_overrides": object()}, "must be JSON"),
    ],
)
def test_a_wish_that_does_not_exist_is_named(arguments, told):
    with pytest.raises(UsageError, match="EngineSpec") as error:
        EngineSpec("m", **arguments)
    assert told in str(error.value)


def test_sampling_takes_a_dict_and_names_what_it_does_not_know():
    assert Sampling.of({"temperature": 0.7, "stop": "x"}) == Sampling(temperature=0.7, stop=("x",))
    with pytest.raises(UsageError, match=r"no field 'top_pp', did you mean 'top_p'\?"):
        Sampling.of({"top_pp": 0.9})


def test_sampling_takes_vllm_sampling_params(pool):
    from vllm import SamplingParams

    given = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=32, seed=3, n=2, stop=["###"], logprobs=3)
    expected = Sampling(temperature=0.7, top_p=0.9, max_tokens=32, seed=3, n=2, stop=("###",), logprobs=3)
    assert Sampling.of(given) == expected


@pytest.mark.parametrize(
    ("field", "kept"),
    [({"logit_bias": {5: 1.0, 2: -3}}, ((2, -3.0), (5, 1.0))), ({"bad_words": ["no"]}, ("no",)),
     ({"allowed_token_ids": [2, 1]}, (1, 2))],
)  # fmt: skip
def test_named_tokens_are_taken_from_vllm_and_kept_in_json(pool, field, kept):
    from vllm import SamplingParams

    name = next(iter(field))
    sampling = Sampling.of(SamplingParams(max_tokens=8, **field))
    assert getattr(sampling, name) == kept
    assert Sampling.of(json.loads(json.dumps(sampling.to_json()))) == sampling
    assert (sampling.names_tokens, sampling.edits_logits, sampling.raw_is_processed) == (True, True, False)


def test_a_sampling_without_named_tokens_is_stored_as_before():
    stored = Sampling(temperature=0.7).to_json()
    assert list(stored) == [
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "max_tokens",
        "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed", "n", "logprobs",
    ]  # fmt: skip
    assert Sampling(logit_bias={"3": 1}) == Sampling(logit_bias=[(3, 1.0)])
    assert hash(Sampling(logit_bias={3: 1}))
    assert Sampling(temperature=0.7, logit_bias={3: 1}, bad_words=["no", "nor"]).processing() == (
        "logit bias of 1 token, 2 bad words, T=0.7"
    )


@pytest.mark.parametrize(
    "values",
    [{"logit_bias": 3}, {"logit_bias": {-1: 2}}, {"logit_bias": {1: 200}}, {"logit_bias": {1: float("nan")}},
     {"bad_words": [""]}, {"bad_words": [3]}, {"allowed_token_ids": ["a"]}, {"allowed_token_ids": [-1]}],
)  # fmt: skip
def test_named_tokens_that_are_none(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Sampling(**values)


def test_structured_outputs_are_refused_by_name(pool):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    with pytest.raises(UsageError, match=r"structured_outputs.* is not supported"):
        Sampling.of(SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[0-9]+")))


def test_values_of_a_like_type_are_taken_as_what_they_mean():
    given = Sampling(temperature=np.float32(0.5), n=np.int64(2), stop_token_ids=np.array([3, 4]))
    assert given == Sampling(temperature=0.5, n=2, stop_token_ids=(3, 4))
    assert type(given.n) is int


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "0.7"},
        {"top_k": 2.5},
        {"seed": -1},
        {"seed": 2**63},
        {"ignore_eos": 1},
        {"temperature": -1},
        {"top_p": 0},
        {"min_p": 2},
        {"max_tokens": 0},
        {"n": 0},
        {"logprobs": 0},
        {"seed": None},
    ],
)
def test_values_out_of_range_are_errors(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Sampling(**values)


@pytest.mark.parametrize(
    ("sampling", "same"),
    [
        (Sampling(), True),
        (Sampling(temperature=0), True),
        (Sampling(temperature=0, top_p=0.9), True),
        (Sampling(temperature=0.7), False),
        (Sampling(top_p=0.9), False),
        (Sampling(top_k=5), False),
        (Sampling(repetition_penalty=1.1), False),
        (Sampling(temperature=0, repetition_penalty=1.1), False),
        (Sampling(min_tokens=4), False),
    ],
)
def test_raw_is_processed_only_without_temperature_truncation_and_penalties(sampling, same):
    assert sampling.raw_is_processed is same
