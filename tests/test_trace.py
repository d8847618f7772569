"""Trace: made from rollouts in hand, kept in a file, read back."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from pytest_logprob_parity import Sampling, Trace, UsageError
from pytest_logprob_parity.trace import file_format

SEQUENCES = [
    {
        "prompt_token_ids": [5, 6, 7],
        "token_ids": [8, 9, 1],
        "logprobs": [-0.1, -2.0, -0.3],
        "top_logprobs": [{8: -0.1, 3: -2.5}, {4: -0.2, 9: -2.0}, {1: -0.3}],
        "finish_reason": "stop",
    },
    {"prompt_token_ids": [5, 6, 7], "token_ids": [9], "logprobs": [-1.5], "finish_reason": "length"},
    {
        "prompt_token_ids": [2],
        "token_ids": [3, 30, 31, 4],
        "logprobs": [-0.5, None, None, -0.25],
        "mask": [True, False, False, True],
        "episode": 7,
        "weight_versions": None,
    },
]


@pytest.fixture
def trace():
    return Trace.from_sequences(
        SEQUENCES,
        logprobs_mode="processed_logprobs",
        path="decode",
        sampling=Sampling(temperature=0.7),
        engine="vllm",
        engine_version="0.18.1",
        dtype="float32",
        token_texts={8: "eight"},
    )


def test_equal_prompts_are_one_group(trace):
    assert trace.num_prompts == 2
    assert trace.group.tolist() == [0, 0, 1]
    assert trace.sample.tolist() == [0, 1, 0]
    assert trace.prompt(1) == [5, 6, 7]
    assert trace.completion(2) == [3, 30, 31, 4]


def test_top_logprobs_come_likeliest_first_and_padded(trace):
    assert trace.top_token_ids[1].tolist() == [4, 9]
    assert trace.top_token_ids[2].tolist() == [1, -1]
    assert trace.top_logprobs[2, 1] == -np.inf


def test_masked_tokens_split_a_sequence_into_turns(trace):
    turns = [(s.sequence, s.turn, s.stop - s.start) for s in trace.segments()]
    assert turns == [(0, 0, 3), (1, 0, 1), (2, 0, 1), (2, 1, 1)]


def test_a_file_gives_back_what_was_saved(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(tmp_path / "t.safetensors")
    for name, column in trace.to_columns().items():
        np.testing.assert_array_equal(getattr(loaded, name), column)
    assert loaded.to_metadata() == trace.to_metadata()
    assert loaded.sampling == Sampling(temperature=0.7)
    trace.with_(newest_version=3).save(tmp_path / "updated.safetensors")
    assert (loaded.newest_version, Trace.load(tmp_path / "updated.safetensors").newest_version) == (None, 3)


def test_how_a_replay_was_forced_is_kept_and_older_files_tell_it_in_one_text(trace, tmp_path):
    replayed, file = trace.with_(replay="window", forcing="native"), tmp_path / "t.safetensors"
    replayed.save(file)
    assert Trace.load(file).to_metadata() == replayed.to_metadata()
    for text, told in (("decode (sampler)", ("decode", "sampler")), ("prefill", ("prefill", None)), ("", ("", None))):
        trace.with_(replay=text).save(file)
        assert (Trace.load(file).replay, Trace.load(file).forcing) == told


def test_equal_traces_give_equal_bytes_in_any_process(trace, tmp_path):
    trace.save(tmp_path / "here.safetensors")
    code = (
        "import sys; from pathlib import Path; from pytest_logprob_parity import Trace\n"
        "Trace.load(sys.argv[1]).save(sys.argv[2])"
    )
    for seed in ("1", "2"):
        there = tmp_path / f"there{seed}.safetensors"
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "here.safetensors"), str(there)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert there.read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def test_files_have_the_permissions_of_any_new_file(trace, tmp_path):
    before = os.umask(0o027)
    try:
        trace.save(tmp_path / "t.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "t.safetensors").stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_columns_for_millions_of_tokens_are_not_copied():
    logprobs = np.zeros(6, np.float32)
    trace = Trace.from_arrays(
        prompt_token_ids=[1, 2],
        prompt_offsets=[0, 2],
        token_ids=np.arange(6),
        sequence_offsets=[0, 4, 6],
        logprobs=logprobs,
        group=[0, 0],
    )
    assert trace.logprobs is logprobs
    assert trace.sample.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"logprobs": [-0.1]}, "sequence 0 has 3 token_ids but 1 logprobs"),
        ({"logprob": [-0.1]}, "sequence 0 has an unknown key 'logprob'"),
        ({"prompt_token_ids": None}, "sequence 0 lacks prompt_token_ids"),
        ({"token_ids": [8.5, 9, 1]}, "sequence 0: Trace column token_ids is not int32"),
        ({"token_ids": [2**40, 9, 1]}, "sequence 0: Trace column token_ids is not int32"),
        ({"mask": ["no", "no", "no"]}, "sequence 0: Trace column mask is not bool"),
    ],
)
def test_a_sequence_that_does_not_fit_is_named(change, told):
    with pytest.raises(UsageError, match=told):
        Trace.from_sequences([{**SEQUENCES[0], **change}])


def test_labels_are_checked():
    with pytest.raises(UsageError, match="logprobs_mode='raw'"):
        Trace.from_sequences(SEQUENCES[:1], logprobs_mode="raw")
    with pytest.raises(UsageError, match="no sequences"):
        Trace.from_sequences([])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"top_logprobs": [{2: None}]}, "top_logprobs has one {token id: logprob} for each token, or None"),
        ({"top_logprobs": [[-1.0]]}, "top_logprobs has one {token id: logprob} for each token, or None"),
        ({"logprobs": -0.5}, "logprobs has one entry for each token, so it is not -0.5"),
        ({"prompt_token_ids": "hi"}, "Trace column prompt_token_ids is not int32"),
        ({"prompt_token_ids": [2**40]}, "Trace column prompt_token_ids is not int32"),
        ({"prompt_token_ids": [1.7]}, "Trace column prompt_token_ids is not int32"),
    ],
    ids=str,
)
def test_sequences_that_do_not_fit_are_named(change, told):
    with pytest.raises(UsageError) as error:
        Trace.from_sequences([{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [-0.5], **change}])
    assert str(error.value).startswith("Trace.from_sequences: sequence 0")
    assert told in str(error.value)


def test_a_position_without_top_logprobs_is_fine():
    sequence = {"prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": [-0.5, -1], "top_logprobs": [None, {3: -1.0}]}
    assert Trace.from_sequences([sequence]).top_token_ids.tolist() == [[-1], [3]]
    with pytest.raises(UsageError, match="sequence 0 is no mapping but int"):
        Trace.from_sequences([5])


# -- what servers and engines do to numbers -----------------------------------------------------------------------------


def _one(logprob, **changes):
    return {"prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": [logprob, -1.0]} | changes


def test_minus_9999_is_minus_infinity_wherever_logprobs_enter(trace, tmp_path):
    """OpenAI-compatible servers write -inf so. The negative control: a number beside it is a number."""
    tops = [{2: -0.1, 4: -9999.0}, {3: -1.0}]
    made = Trace.from_sequences([_one(-9999.0, top_logprobs=tops)])
    assert made.logprobs.tolist() == [-np.inf, -1]
    assert made.top_logprobs[0].tolist() == [np.float32(-0.1), -np.inf]
    assert Trace.from_sequences([_one(-9998.5)]).logprobs[0] == -9998.5
    column = np.array([-0.5] * 7 + [-9999.0], np.float32)
    changed = trace.with_(logprobs=column, untruncated_logprobs=column)
    assert np.isneginf([changed.logprobs[7], changed.untruncated_logprobs[7]]).all()
    assert column[7] == -9999  # the caller's own array is not touched
    columns, labels = trace.to_columns() | {"logprobs": column}, {"trace": trace.to_metadata()}
    file_format.write(tmp_path / "old.safetensors", columns, labels)
    assert np.isneginf(Trace.load(tmp_path / "old.safetensors").logprobs[7])


@pytest.mark.parametrize(
    ("engine", "asked", "ran"),
    [
        ("vllm", 0.005, 0.01),
        ("vllm", 1e-6, 0.01),
        ("vllm-server", 0.005, 0.01),
        ("vllm", 0.0, 0.0),
        ("vllm", 0.02, 0.02),
        ("transformers", 0.005, 0.005),
    ],
)
def test_the_label_is_the_temperature_that_the_engine_ran(engine, asked, ran):
    trace = Trace.from_sequences([_one(-0.5)], engine=engine, sampling=Sampling(temperature=asked))
    assert trace.sampling.temperature == ran
    assert trace.with_(engine="transformers").sampling.temperature == ran


def test_other_logprobs_leave_the_ranks_and_the_top_k_of_the_old_ones_behind(trace):
    other = trace.with_(ranks=np.ones(8, np.int32)).with_logprobs(np.zeros(8, np.float32))
    assert (other.top_k, int(other.ranks.max()), other.num_tokens) == (0, 0, 8)
