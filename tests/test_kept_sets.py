"""Kept sets: what truncation left, from the same decode as the logprobs; what a check and a trainer make of them."""

import dataclasses

import numpy as np
import pytest
import torch

from conftest import MODEL
from pytest_logprob_parity import (
    EngineSpec,
    GoldenError,
    MismatchError,
    Sampling,
    Trace,
    TransformersScorer,
    UsageError,
    assert_trainer_parity,
    check_golden,
    compare,
)
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.columns import Rows
from pytest_logprob_parity.engines.engine import Engine
from pytest_logprob_parity.engines.vllm import kept_sets
from pytest_logprob_parity.engines.vllm.kept_reader import kept_of, take_kept, unpacked
from pytest_logprob_parity.errors import EngineError
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.trainer.parity import compare_with_trainer
from pytest_logprob_parity.trainer.scoring import score

TOP_P = Sampling(temperature=1.0, top_p=0.9, max_tokens=24, n=2, seed=1)
#: For tests that ask the worker: no other test has an engine of this spec in a process of its own.
HERE = EngineSpec(MODEL, dtype="float32", max_num_seqs=48)


@pytest.fixture
def engine(pool):
    return pool.engine(EngineSpec(MODEL, dtype="float32"))


@pytest.fixture(scope="module")
def rollouts(pool, questions):
    """Rollouts under top-p, as the engine tells them."""
    return pool.engine(EngineSpec(MODEL, dtype="float32")).generate(questions(24), TOP_P)


@pytest.fixture(scope="module")
def float32():
    return TransformersScorer(MODEL)


def sets_of(trace):
    """The kept set of each token."""
    return [set(ids.tolist()) for ids in np.split(trace.kept_token_ids, np.cumsum(trace.kept_counts)[:-1])]


def over_kept_sets(trace):
    """The rollouts as a framework has them that records the kept sets and no logprobs without truncation."""
    return trace.with_(
        untruncated_logprobs=None, top_token_ids=trace.top_token_ids[:, :0], top_logprobs=trace.top_logprobs[:, :0]
    )


# -- the engine ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 0.9},
        {"top_k": 4, "temperature": 0.7},
        {"min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 8},
    ],
    ids=str,
)
def test_one_decode_tells_what_a_second_replay_would(engine, questions, sampling):
    sampling = Sampling(max_tokens=24, n=2, seed=1, logprobs=20, **{"temperature": 1.0, **sampling})
    trace = engine.generate(questions(6), sampling)
    for told in (trace, engine.replay(trace)):
        free = engine.replay(told.with_(sampling=sampling.untruncated()))
        assert free.kept_counts is None
        assert np.array_equal(told.untruncated_logprobs, free.logprobs)
        kept, listed = sets_of(told), np.isfinite(told.top_logprobs)
        for place in np.flatnonzero(told.kept_counts <= 20):
            assert kept[place] == set(told.top_token_ids[place][listed[place]].tolist())
        assert all(token in ids for token, ids in zip(told.token_ids.tolist(), kept, strict=True))
        assert compare(expected=trace, actual=told).metrics["kept_sets_differ"] == 0


def test_a_check_makes_no_second_replay_and_says_the_same(engine, questions, tmp_path, monkeypatch):
    path = tmp_path / "golden.safetensors"
    asked = []
    replay = Engine.replay
    monkeypatch.setattr(Engine, "replay", lambda self, *args, **kwargs: asked.append(args) or replay(self, *args, **kwargs))
    check_golden(path, engine, prompts=questions(6), sampling=TOP_P, update=True, repeats=0)
    result = check_golden(path, engine, prompts=questions(6), sampling=TOP_P)
    assert (result.verdict, asked) == ("pass", [])
    assert result.metrics["kept_sets_differ"] == 0
    golden = Golden.load(path).trace
    assert golden.kept_counts.min() >= 1
    assert np.array_equal(golden.untruncated_logprobs, replay(engine, golden.with_(sampling=TOP_P.untruncated())).logprobs)


def test_requests_that_do_not_truncate_keep_nothing(engine, questions):
    trace = engine.generate(questions(2), Sampling(temperature=0.7, max_tokens=8))
    assert trace.kept_counts is trace.kept_token_ids is trace.untruncated_logprobs is None
    greedy = engine.generate(questions(2), Sampling(temperature=0.0, top_p=0.5, max_tokens=8))
    assert greedy.kept_counts is None


def test_nothing_is_left_behind_in_the_worker(pool, in_this_process, questions):
    engine = pool.engine(HERE)
    trace = engine.generate(questions(4), TOP_P)
    engine.replay(trace)
    engine.replay(trace, path="regenerate")
    (store,) = engine.on_worker(lambda worker: worker.model_runner.__dict__[kept_sets._STORE])
    assert len(store) == 0


@pytest.mark.parametrize(("name", "top_p"), [("not applied", None), ("another", 0.6)])
def test_another_top_p_in_this_run_fails(pool, in_this_process, questions, tmp_path, name, top_p):
    engine, sampling = pool.engine(HERE), dataclasses.replace(TOP_P, temperature=0.7)
    path = tmp_path / "golden.safetensors"
    check_golden(path, engine, prompts=questions(24), sampling=sampling, update=True, repeats=0)

    def plant(worker):
        module = worker.model_runner.sampler.topk_topp_sampler
        original = module.forward
        module.forward = lambda logits, generators, k, p: original(logits, generators, k, p if p is None else top(p))
        return original

    def top(p):
        return None if top_p is None else torch.full_like(p, top_p)

    (original,) = engine.on_worker(plant)
    try:
        with pytest.raises(MismatchError) as error:
            check_golden(path, engine, prompts=questions(24), sampling=sampling, replay=("decode",))
    finally:
        engine.on_worker(lambda worker: setattr(worker.model_runner.sampler.topk_topp_sampler, "forward", original))
    comparison = error.value.comparison
    assert (comparison.verdict, comparison.findings[0].cause) == ("fail", "truncation")
    assert comparison.metrics["kept_sets_differ"] > 0.1
    assert check_golden(path, engine, prompts=questions(24), sampling=sampling, replay=("decode",)).passed


def test_chunks_of_prompts_and_preemption_do_not_mix_steps(pool, in_this_process, monkeypatch):
    """A batch that does not fit: prompts come in chunks, requests lose their place and come back. By a replay: vLLM's CPU build
    ends where a request with a seed comes back.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, preempt = [], Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda *args, **kwargs: preempted.append(1) or preempt(*args, **kwargs))
    small = {"max_num_batched_tokens": 32, "max_num_seqs": 16, "max_model_len": 128, "enable_chunked_prefill": True}
    engine = pool.engine(EngineSpec(MODEL, dtype="float32", num_gpu_blocks_override=6, block_size=32, **small))
    sequences = [
        {
            "prompt_token_ids": [9, 8, 7 + i] * 15,
            "token_ids": [(5 * i + 3 * n) % 60 + 4 for n in range(60)],
            "logprobs": [None] * 60,
        }
        for i in range(8)
    ]
    trace = engine.replay(Trace.from_sequences(sequences, sampling=TOP_P))
    assert preempted
    assert np.array_equal(trace.untruncated_logprobs, engine.replay(trace.with_(sampling=TOP_P.untruncated())).logprobs)
    taken = [token in ids for token, ids in zip(trace.token_ids.tolist(), sets_of(trace), strict=True)]
    assert np.array_equal(taken, np.isfinite(trace.logprobs))
    renormalised = (trace.logprobs - trace.untruncated_logprobs)[taken]  # by the probability that was kept
    assert renormalised.min() > -1e-4
    assert renormalised.max() < 0.11


def test_a_weight_update_on_the_way(pool, questions):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    for how in ({"mode": "keep", "clear_cache": True}, {"mode": "abort"}):
        trace = engine.update_weights(f"{MODEL}-step2", at_token=6, prompts=questions(6), sampling=TOP_P, **how)
        assert trace.kept_counts.min() >= 1
        assert (trace.logprobs - trace.untruncated_logprobs).min() > -1e-4
        assert trace.weight_versions.mean() > 0 or how["mode"] == "abort"


def test_raw_logprobs_are_of_all_tokens_and_need_no_kept_set(pool, questions, float32):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32", logprobs_mode="raw_logprobs"))
    trace = engine.generate(questions(4), TOP_P)
    assert trace.kept_counts is None
    assert assert_trainer_parity(trace, float32).metrics["max_abs_diff"] < 1e-3
    pool.discard(engine.spec)


# -- the worker's store --------------------------------------------------------------------------------------------------


def keep(store, *steps):
    for number, position, ids in steps:
        store.keep([(number, position)], [-0.5 - position], [len(ids)], np.array(ids, np.int32))


def test_numbers_are_taken_by_whoever_has_them():
    store = kept_sets.Store()
    store.keep([(7, 0), (8, 0)], [-0.1, -0.2], [2, 1], np.array([3, 5, 9], np.int32))
    keep(store, (7, 1, [4]))
    taken = take_kept([7, None, 99], store.take)
    assert set(taken) == {7}
    assert (taken[7].counts.tolist(), taken[7].token_ids.tolist()) == ([2, 1], [3, 5, 4])
    assert taken[7].untruncated_logprobs.tolist() == pytest.approx([-0.1, -1.5])
    assert take_kept([7], store.take) == {}
    assert take_kept([8], store.take)[8].token_ids.tolist() == [9]
    assert len(store) == 0


def test_a_step_that_runs_again_writes_over_itself_and_a_hole_says_nothing():
    store = kept_sets.Store()
    keep(store, (1, 0, [2, 3]), (1, 0, [4]), (1, 1, [5]), (2, 0, [6]), (2, 2, [7]))
    taken = take_kept([1, 2], store.take)
    assert taken[1].token_ids.tolist() == [4, 5]
    assert len(taken[2].counts) == 0
    request = Request(prompt_token_ids=[1], sampling=TOP_P, tells_kept=True)
    assert kept_of(request, 1, taken[1], None).token_ids.tolist() == [4]  # the worker was a step ahead
    assert kept_of(request, 3, taken[1], None) is None


def test_what_nobody_takes_does_not_stay(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(kept_sets.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(kept_sets, "_MOST_IDS", 10)
    store = kept_sets.Store()
    keep(store, (1, 0, [1, 2]))
    now[0] = 3601.0
    keep(store, (2, 0, [1, 2, 3, 4]), (3, 0, [1, 2, 3, 4]))
    assert (len(store), store._ids) == (2, 8)
    keep(store, (3, 1, [1, 2, 3]), (2, 1, [1]))  # the oldest one goes, and does not come back in the middle
    assert set(take_kept([1, 2, 3], store.take)) == {3}
    assert (len(store), store._ids) == (0, 0)


def test_large_answers_come_in_parts(monkeypatch):
    monkeypatch.setattr(kept_sets, "_MOST_BYTES", 10)
    store, calls = kept_sets.Store(), []
    keep(store, *((number, 0, [number]) for number in range(5)))
    taken = take_kept(list(range(5)), lambda numbers: calls.append(numbers) or store.take(numbers))
    assert [kept.token_ids.tolist() for kept in taken.values()] == [[n] for n in range(5)]
    assert len(calls) == 5


@pytest.mark.parametrize("packed", [None, ["AAAA"], ["?", "", ""], ["AAAAAA==", "", ""], ["AACAvw==", "BQAAAA==", ""]])
def test_an_answer_of_another_version_is_an_error(packed):
    with pytest.raises(EngineError, match="install one version on both sides"):
        unpacked(packed)


def test_vllms_own_sampling_mask_is_read():
    request = Request(prompt_token_ids=[1], sampling=TOP_P, tells_kept=True)
    kept = kept_of(request, 2, None, [[3, 5], [4]])
    rows = Rows.empty(2, 0)
    rows.kept.append((0, kept, 2))
    columns = rows.kept_columns()
    assert columns["untruncated_logprobs"] is None
    assert (columns["kept_counts"].tolist(), columns["kept_token_ids"].tolist()) == ([2, 1], [3, 5, 4])
    whole = Request(prompt_token_ids=[1], sampling=Sampling(), tells_kept=True)
    assert kept_of(whole, 2, None, [[3, 5], [4]]) is None  # the whole vocabulary, for each token


# -- rollouts in hand ----------------------------------------------------------------------------------------------------


def sequence(**changes):
    return {
        "prompt_token_ids": [1, 2], "token_ids": [7, 8, 9], "logprobs": [-0.1, -0.2, -0.3],
        "kept_token_ids": [[7, 5], [8], [9, 4, 2]], **changes,
    }  # fmt: skip


def test_kept_sets_of_a_caller_as_lists_or_flat(tmp_path):
    lists = Trace.from_sequences([sequence(), sequence()], sampling=TOP_P)
    flat = sequence(kept_token_ids=[5, 7, 8, 2, 4, 9], kept_counts=[2, 1, 3])
    assert lists.kept_counts.tolist() == [2, 1, 3] * 2
    assert lists.kept_token_ids.tolist() == [5, 7, 8, 2, 4, 9] * 2
    assert np.array_equal(lists.kept_token_ids, Trace.from_sequences([flat, flat]).kept_token_ids)
    lists.save(tmp_path / "trace.safetensors")
    assert np.array_equal(Trace.load(tmp_path / "trace.safetensors").kept_token_ids, lists.kept_token_ids)
    partly = Trace.from_sequences([sequence(kept_token_ids=[None, [8, 3], []])])
    assert (partly.kept_counts.tolist(), partly.kept_token_ids.tolist()) == ([0, 2, 0], [3, 8])
    excluded = sequence(logprobs=[-0.1, -float("inf"), -0.3], kept_token_ids=[[7], [5], [9]])
    assert Trace.from_sequences([excluded]).kept_counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept_token_ids": [[7, 5], [3, 4], [9]]}, "token 1: the kept set (3, 4) lacks the token that was taken, 8"),
        ({"kept_token_ids": [[7, 7], [8], [9]]}, "sequence 1, token 0: the kept set names token 7 twice"),
        ({"kept_token_ids": [[7], [8]]}, "sequence 1 has 3 token_ids but 2 kept_token_ids"),
        ({"kept_token_ids": [7, 8, 9]}, "kept_token_ids has one list of token ids for each token"),
        ({"kept_token_ids": [7, 8], "kept_counts": [1, 1, 1]}, "sequence 1: kept_counts add up to 3, kept_token_ids has 2 ids"),
        ({"kept_token_ids": [7, 8], "kept_counts": [3, -1, 0]}, "kept_counts add up to 2"),
        ({"kept_token_ids": None, "kept_counts": [1, 1, 1]}, "sequence 1: kept_counts without kept_token_ids"),
        ({"kept_token_ids": [[7, -1], [8], [9]]}, "token id -1 is no token"),
        ({"kept_token_ids": [[7, 2**40], [8], [9]]}, "kept_token_ids is not int32"),
        ({"kept_token_ids": None}, "some sequences have kept_token_ids and some have not"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_kept_sets_that_do_not_fit_are_one_line(changes, message):
    with pytest.raises(UsageError) as error:
        Trace.from_sequences([sequence(), sequence(**changes)], sampling=TOP_P)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"kept_token_ids": [5, 7, 6, 2, 4, 9]}, "sequence 0, token 1: the kept set (6) lacks the token that was taken, 8"),
        ({"kept_counts": [1, 2, 3]}, "token 0: the kept set (5) lacks the token that was taken, 7"),
        ({"kept_counts": [2, 1, 4]}, "kept_token_ids has 6 rows, kept tokens are 7"),
        ({"kept_counts": [7, -1, 0]}, "kept_counts must hold 0 or more, not -1"),
        ({"kept_counts": None}, "go together"),
    ],
    ids=str,
)  # fmt: skip
def test_a_tampered_file_is_one_line(tmp_path, columns, message):
    from pytest_logprob_parity.trace import file_format

    trace = Trace.from_sequences([sequence()], sampling=TOP_P)
    changed = {**trace.to_columns(), **{n: c if c is None else np.array(c, np.int32) for n, c in columns.items()}}
    path = tmp_path / "trace.safetensors"
    file_format.write(path, {n: c for n, c in changed.items() if c is not None}, {"trace": trace.to_metadata()})
    with pytest.raises(GoldenError) as error:
        Trace.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_beyond_the_vocabulary_are_refused(engine, rollouts, float32):
    ids = rollouts.kept_token_ids.copy()
    ids[-1] = 10**6
    tampered = over_kept_sets(rollouts).with_(kept_token_ids=ids)
    with pytest.raises(UsageError, match="has the token id 1000000 at position"):
        engine.replay(tampered)
    with pytest.raises(UsageError, match="a kept set has the token id 1000000 is beyond"):
        assert_trainer_parity(tampered, float32)


# -- the trainer ---------------------------------------------------------------------------------------------------------


def test_truncated_rollouts_are_scored_over_their_kept_sets(rollouts, float32):
    in_hand = over_kept_sets(rollouts)
    comparison = assert_trainer_parity(in_hand, float32)
    assert comparison.metrics["max_abs_diff"] < 1e-3
    assert comparison.actual.sampling.truncates
    assert assert_trainer_parity(rollouts, float32, trainer_tokens="kept").metrics["max_abs_diff"] < 1e-3
    one_by_one = score(in_hand, float32, batch_size=1).logprobs
    assert np.abs(one_by_one - comparison.actual.logprobs).max() < 1e-4
    no_label = in_hand.with_(sampling=Sampling(temperature=1.0))
    assert assert_trainer_parity(no_label, float32).metrics["max_abs_diff"] < 1e-3


def test_a_trainer_that_ignores_the_kept_sets_fails(rollouts, float32):
    in_hand = over_kept_sets(rollouts)

    def ignores(ids, mask, temperature, **more):
        return float32(ids, mask, temperature)

    ignores.renormalises, ignores.dtype = True, "float32"
    comparison = compare_with_trainer(in_hand, ignores)
    assert comparison.verdict == "fail"
    assert (comparison.findings[0].layer, comparison.findings[0].candidates[0]) == ("semantic", "truncation")
    with pytest.raises(UsageError, match="give a scorer that renormalises over the kept tokens"):
        assert_trainer_parity(in_hand, lambda *_: None)


def test_a_column_over_all_tokens_fails_and_one_over_the_kept_sets_passes(rollouts, float32):
    free, masked = rollouts.untruncated_logprobs, score(over_kept_sets(rollouts), float32).logprobs
    over_all, over_kept = (rollouts.with_(trainer_logprobs=column) for column in (free, masked))
    assert assert_trainer_parity(over_kept, trainer_dtype="float32", trainer_tokens="kept").passed
    assert assert_trainer_parity(over_kept, float32, trainer_dtype="float32", trainer_tokens="kept").passed
    alone = compare_with_trainer(over_all, trainer_dtype="float32", trainer_tokens="kept")
    assert (alone.verdict, alone.findings[0].candidates[0]) == ("fail", "truncation")
    named = compare_with_trainer(over_all, float32, trainer_dtype="float32", trainer_tokens="kept")
    assert (named.verdict, named.findings[0].cause) == ("fail", "truncation")
    assert "the trainer computes over all tokens, not over those that truncation kept" in named.findings[0].evidence


def test_kept_sets_of_other_steps_fail(rollouts, float32):
    """Shifted by one token, and the token that was taken put in: a mask that was sliced wrongly downstream."""
    in_hand = over_kept_sets(rollouts)
    sets = sets_of(in_hand)
    shifted = [sorted({token, *ids}) for token, ids in zip(in_hand.token_ids.tolist(), [*sets[1:], sets[0]], strict=True)]
    counts = np.array([len(ids) for ids in shifted], np.int32)
    tampered = in_hand.with_(kept_counts=counts, kept_token_ids=np.concatenate(shifted).astype(np.int32))
    assert compare_with_trainer(tampered, float32).verdict == "fail"


def test_what_cannot_be_compared_says_what_to_give(rollouts, float32):
    in_hand = over_kept_sets(rollouts)
    lacking = in_hand.with_(kept_counts=None, kept_token_ids=None)
    with pytest.raises(UsageError, match="give kept_token_ids"):
        assert_trainer_parity(lacking, float32)
    counts = np.zeros_like(in_hand.kept_counts)
    with pytest.raises(UsageError, match="tokens have no kept set: give kept_token_ids for every token"):
        assert_trainer_parity(in_hand.with_(kept_counts=counts, kept_token_ids=in_hand.kept_token_ids[:0]), float32)
    with pytest.raises(UsageError, match="trainer_tokens='kept': these rollouts are not of a truncated distribution"):
        assert_trainer_parity(lacking.with_(sampling=Sampling()), float32, trainer_tokens="kept")
    with pytest.raises(UsageError, match="known are all, kept"):
        assert_trainer_parity(in_hand, float32, trainer_tokens="kep")


def test_large_kept_sets_make_small_batches(rollouts, float32, monkeypatch):
    from pytest_logprob_parity.trainer import scoring

    in_hand, sizes = over_kept_sets(rollouts), []

    def counted(ids, mask, temperature, **more):
        sizes.append(len(ids))
        return float32(ids, mask, temperature, **more)

    counted.renormalises = True
    usual = score(in_hand, counted).logprobs
    assert max(sizes) == 16
    sizes.clear()
    monkeypatch.setattr(scoring, "_MOST_KEPT", 1)
    assert np.abs(score(in_hand, counted).logprobs - usual).max() < 1e-4
    assert sizes == [1] * in_hand.num_sequences
