"""The trainer's side: its logprobs of an engine's tokens, on the real engine and by several scorers."""

import numpy as np
import pytest
import torch

from conftest import MODEL
from pytest_logprob_parity import (
    EngineSpec,
    MismatchError,
    Sampling,
    Trace,
    TransformersScorer,
    UsageError,
    assert_trainer_chain,
    assert_trainer_parity,
    check_golden,
    scorer,
    trainer_chain,
)
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.trainer.parity import compare_with_trainer
from pytest_logprob_parity.trainer.scoring import score


@pytest.fixture(scope="module")
def float32():
    return TransformersScorer(MODEL)


@pytest.fixture(scope="module")
def float64():
    return TransformersScorer(MODEL, dtype="float64")


@pytest.fixture(scope="module")
def rollouts(pool):
    """64 rollouts of the float32 engine at T=0.7."""
    import random

    import arith

    rng = random.Random(1)
    prompts = [[{"role": "user", "content": arith.make_problem(rng).question}] for _ in range(8)]
    return pool.engine(EngineSpec(MODEL, dtype="float32")).generate(
        prompts, Sampling(temperature=0.7, max_tokens=32, n=8, seed=1)
    )


@pytest.fixture(scope="module")
def batch(rollouts):
    """Token ids and mask [6, L] of some rollouts, padded on the right."""
    rows = [[*rollouts.prompt(i), *rollouts.completion(i)] for i in range(0, 48, 8)]
    ids, mask = (torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long) for _ in range(2))
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
    return ids, mask


# -- the scorer ----------------------------------------------------------------------------------------------------------


def test_float32_is_float64_up_to_its_rounding(rollouts, float32, float64):
    apart = np.abs(score(rollouts, float32).logprobs - score(rollouts, float64).logprobs)[rollouts.mask]
    assert np.sqrt(np.mean(apart**2)) < 2e-6
    assert np.quantile(apart, 0.99) < 1e-5  # the few beyond are sums on the edge between two answers
    assert apart.max() < 5e-5


@pytest.mark.parametrize(
    "settings", [{"packed": True}, {"chunk_tokens": 7}, {"divides": "logits"}, {"head_dtype": "float64"}], ids=str
)
def test_packing_chunks_and_where_it_divides_change_nothing_that_matters(batch, float32, settings):
    other = TransformersScorer(MODEL, **settings)(*batch, 0.7)
    assert (other - float32(*batch, 0.7)).abs().max() < 2e-5


def test_padding_may_stand_on_either_side(batch, float32):
    ids, mask = batch
    right = float32(ids, mask, 0.7)
    shifts = (1 - mask).sum(1).tolist()
    left = [torch.stack([row.roll(n) for row, n in zip(x, shifts, strict=True)]) for x in (ids, mask)]
    moved = float32(*left, 0.7)
    for n, length in enumerate(mask.sum(1).tolist()):
        assert (moved[n, -(length - 1) :] - right[n, : length - 1]).abs().max() < 2e-5
        assert not right[n, length - 1 :].any()  # padding has no logprob


def test_a_batch_of_any_size_gives_the_same(rollouts, float32):
    one, many = (score(rollouts, float32, batch_size=n).logprobs for n in (1, 64))
    assert np.abs(one - many)[rollouts.mask].max() < 2e-5


# -- parity --------------------------------------------------------------------------------------------------------------


def test_a_float32_engine_and_a_float32_trainer_agree_token_by_token(rollouts, float32):
    comparison = assert_trainer_parity(rollouts, float32)
    assert comparison.metrics["n_sequences"] == 64
    assert comparison.metrics["rms_diff"] < 1e-5  # the bar is 1e-4
    assert comparison.metrics["max_abs_diff"] < 1e-3  # so every ratio is within 1 +- 1e-3


def test_a_trainer_is_judged_for_the_update_that_it_makes(rollouts, float32):
    """0.0015 nats, one way in a whole sequence, take every sequence out of GSPO's clip of 3e-4; no token feels them."""
    tokens = np.diff(rollouts.sequence_offsets)
    off = np.repeat(np.where(np.arange(len(tokens)) % 2, 1, -1) * 0.0015, tokens).astype(np.float32)
    moved = rollouts.with_(logprobs=rollouts.logprobs + off)
    verdicts = {name: compare_with_trainer(moved, float32, objective=name).verdict for name in ("token", "sequence")}
    assert verdicts == {"token": "pass", "sequence": "fail"}


def test_any_callable_is_a_scorer(rollouts, float32):
    @scorer(dtype="float32", divides="logits", name="mine")
    def by_hand(token_ids, attention_mask, temperature):
        logits = float32.model(input_ids=token_ids, attention_mask=attention_mask).logits / temperature
        return logits[:, :-1].log_softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]

    assert assert_trainer_parity(rollouts, by_hand).actual.engine == "mine"

    def with_a_first_column(*arguments):
        values = by_hand(*arguments)
        return torch.cat([torch.zeros_like(values[:, :1]), values], 1)

    assert compare_with_trainer(rollouts, with_a_first_column).metrics["rms_diff"] < 1e-5  # not declared: bfloat16's limits


def test_a_trainer_that_divides_rollouts_asked_for_raw_fails_for_that_reason(pool, questions, float32):
    engine = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float32", logprobs_mode="raw_logprobs"))
    raw = engine.generate(questions(16), Sampling(temperature=0.7, max_tokens=32, seed=1))
    with pytest.raises(MismatchError) as error:
        assert_trainer_parity(raw, float32)
    headline = (
        "fail: The logprobs of the two sides have different meanings: raw in the rollout, processed (T=0.7) in the trainer"
    )
    assert str(error.value).startswith(headline)
    assert error.value.comparison.findings[0].cause == "raw_vs_processed"


def test_a_trainer_that_forgets_the_temperature_or_shifts_by_one_is_told_so(rollouts, float32):
    def no_temperature(ids, mask, _):
        return float32(ids, mask, 1.0)

    def shifted(ids, mask, temperature):
        return float32(ids, mask, temperature).roll(1, 1)

    no_temperature.dtype = shifted.dtype = "float32"
    (finding,) = compare_with_trainer(rollouts, no_temperature).findings
    assert (finding.layer, finding.cause) == ("semantic", "temperature")
    assert finding.values["fault"] == "undivided"
    (finding,) = compare_with_trainer(rollouts, TransformersScorer(f"{MODEL}-step2")).findings
    assert (finding.layer, finding.cause) == ("weights", None)  # other weights are not a temperature
    assert compare_with_trainer(rollouts, shifted).findings[0].cause == "shifted_positions"


def test_rollouts_labelled_with_another_temperature_than_they_were_sampled_at(rollouts, float32):
    labelled = rollouts.with_(sampling=Sampling(temperature=1.0))  # as a reader does that is not told the sampling
    comparison = compare_with_trainer(labelled, float32)
    (finding,) = comparison.findings
    assert (finding.layer, finding.cause) == ("semantic", "temperature")
    assert finding.values["fault"] == "other_temperature"
    assert finding.values["temperature"] == pytest.approx(0.7, abs=5e-4)
    assert "golden" not in " ".join([comparison.headline, *comparison.notes, finding.evidence])


@pytest.mark.parametrize("scale", [2, 0.5, 1.25, 0.875])
def test_a_scale_that_models_have_is_no_proven_temperature(rollouts, float32, scale):
    """Logits that are half as large, and a temperature twice as high, give the same numbers."""
    few = rollouts.with_(logprobs=score(rollouts, float32, temperature=0.7 / scale).logprobs)
    (finding,) = compare_with_trainer(_without_top_k(few), float32).findings
    assert (finding.cause, finding.candidates) == (None, ("temperature", "logits"))


@pytest.fixture(scope="module")
def few(pool, questions):
    """Rollouts at T=0.7, fewer than `rollouts` and of transformers."""
    engine = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float32"))
    return engine.generate(questions(16), Sampling(temperature=0.7, max_tokens=24, n=2, seed=1))


def test_raw_logprobs_whose_label_says_processed_cannot_be_told_from_a_temperature_of_1(few, float32):
    raw = score(few, float32, temperature=1.0).logprobs
    (finding,) = compare_with_trainer(_without_top_k(few, logprobs=raw), float32).findings
    assert (finding.layer, finding.cause, finding.candidates) == ("semantic", None, ("raw_vs_processed", "temperature"))
    assert finding.values["temperature"] == pytest.approx(1, abs=5e-4)
    assert "raw logprobs (logprobs_mode, vLLM's default) with a label that says processed" in finding.evidence


@pytest.mark.parametrize(
    ("scaled", "reading"),
    [(lambda t: t * t, "divided_twice"), (lambda t: 1 / t, "multiplied")],
    ids=["twice", "times"],
)
def test_a_trainer_that_scales_otherwise_is_another_reading_of_a_temperature(few, float32, scaled, reading):
    @scorer(dtype="float32")
    def otherwise(token_ids, attention_mask, temperature):
        return float32(token_ids, attention_mask, scaled(temperature))

    (finding,) = compare_with_trainer(_without_top_k(few), otherwise).findings
    assert (finding.layer, finding.cause) == ("semantic", "temperature")
    assert (finding.values["fault"], finding.values["or"]) == ("other_temperature", reading)


def _without_top_k(trace, **changes):
    """As most batches of trainers come."""
    return trace.with_(top_token_ids=trace.top_token_ids[:, :0], top_logprobs=trace.top_logprobs[:, :0], **changes)


@pytest.fixture(scope="module")
def truncated(pool, questions):
    """Rollouts under top-k 3, of a label that says nothing of it."""
    engine = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float32"))
    trace = engine.generate(questions(12), Sampling(temperature=1.2, top_k=3, max_tokens=24, n=4, seed=1))
    return trace.with_(sampling=Sampling(temperature=1.2))


def test_truncated_rollouts_whose_label_lost_it(truncated, few, float32):
    for trace, by_top_k in ((truncated, True), (_without_top_k(truncated), False)):
        (finding,) = compare_with_trainer(trace, float32).findings
        assert (finding.layer, finding.cause, finding.candidates[0]) == ("semantic", None, "truncation")
        assert (finding.values["excluding"] > 0) == by_top_k
    filled = np.where(np.arange(few.num_tokens) % 3, few.logprobs, 0).astype(np.float32)
    other = TransformersScorer(f"{MODEL}-step2")
    for trace, trainer in ((few, other), (_without_top_k(few), other), (few.with_(logprobs=filled), float32)):
        (finding,) = compare_with_trainer(trace, trainer).findings
        assert "truncation" not in finding.candidates


def test_tokens_that_were_drawn_from_other_distributions_are_noted(truncated, rollouts, float32):
    """Raw logprobs agree with the trainer whatever the sampler did; the trainer's entropy does not agree with its tokens."""
    drawn = compare_with_trainer(rollouts, float32)
    assert {"entropy", "drawn_otherwise"} & {note.key for note in drawn.notes} == {"entropy"}
    numbers = drawn.metrics
    assert abs(numbers["surprise"] - numbers["trainer_entropy"]) < 4 * numbers["surprise_error"]
    raw = _without_top_k(truncated, logprobs=score(truncated, float32).logprobs)
    otherwise = compare_with_trainer(raw, float32)
    assert otherwise.verdict == "pass"
    (note,) = (note for note in otherwise.notes if note.key == "drawn_otherwise")
    assert "more likely than tokens sampled from its distributions" in note
    assert "truncation or a lower temperature" in note
    hotter = rollouts.with_(sampling=Sampling(), logprobs=score(rollouts, float32, temperature=1.0).logprobs)
    labelled = compare_with_trainer(_without_top_k(hotter), float32)
    assert (labelled.verdict, "drawn_otherwise") == ("pass", next(n.key for n in labelled.notes if n.key.startswith("drawn")))
    assert "trainer_entropy" not in compare_with_trainer(rollouts, lambda ids, mask, t: float32(ids, mask, t)).metrics


def test_no_trainer_is_asked_for_a_top_k(few):
    comparison = compare_with_trainer(few, TransformersScorer(f"{MODEL}-step2"))
    assert comparison.verdict == "fail"
    assert "top_k" not in {note.key for note in comparison.notes}


def test_rollouts_of_several_weights_are_held_against_one(few, float32):
    newer = np.arange(few.num_tokens) % 2 == 1
    other = score(few, TransformersScorer(f"{MODEL}-step2")).logprobs
    versions = np.where(newer, 4, 3).astype(np.int32)
    mixed = _without_top_k(few, logprobs=np.where(newer, few.logprobs, other), weight_versions=versions)
    (finding,) = compare_with_trainer(mixed, float32).findings
    assert (finding.layer, finding.cause, finding.candidates[0]) == ("weights", None, "stale_weights")
    assert finding.values["versions"] == 2
    assert f" {newer.sum():,} tokens of version 4 (" in finding.evidence
    assert " tokens of version 3 (RMS 0." in finding.evidence
    one = mixed.with_(weight_versions=np.full(mixed.num_tokens, 4, np.int32))
    assert "versions" not in compare_with_trainer(one, float32).findings[0].values


def test_tokens_at_which_min_tokens_let_no_sequence_end_are_left_out(pool, float32):
    engine = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float32"))
    short = [f"What is {n} + {50 - n}?" for n in range(12, 24)]
    trace = engine.generate(short, Sampling(temperature=1.0, min_tokens=20, max_tokens=40, n=4, seed=1))
    told = trace.with_(sampling=Sampling(temperature=1.0, max_tokens=40))
    assert compare_with_trainer(told, float32).verdict == "fail"  # the engine leaves the end out, the trainer does not
    comparison = assert_trainer_parity(trace, float32)
    assert comparison.metrics["n_tokens"] == trace.num_tokens - 48 * 20 > 100
    assert "960 tokens left out: before min_tokens=20" in " ".join(comparison.notes)
    raw = trace.with_(logprobs=score(told, float32).logprobs, logprobs_mode="raw_logprobs")  # of before that
    assert assert_trainer_parity(raw, float32).metrics["n_tokens"] == trace.num_tokens
    with pytest.raises(UsageError, match="have no token that can be compared with a trainer: before min_tokens=40"):
        assert_trainer_parity(trace.with_(sampling=Sampling(min_tokens=40, max_tokens=40)), float32)


def test_truncated_rollouts_are_compared_over_their_kept_sets_or_without_truncation(pool, questions, float32, tmp_path):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    top_k = Sampling(temperature=0.7, top_k=5, max_tokens=32, n=4, seed=1, logprobs=5)
    trace = engine.generate(questions(8), top_k)
    assert "without_truncation" in {note.key for note in assert_trainer_parity(trace, float32).notes}
    trace = trace.with_(untruncated_logprobs=None, kept_counts=None, kept_token_ids=None)
    assert assert_trainer_parity(trace, float32).metrics["max_abs_diff"] < 1e-3
    with pytest.raises(UsageError, match="computes one over all tokens: give a scorer that renormalises"):
        assert_trainer_parity(trace, lambda *_: None)
    short = trace.with_(top_token_ids=trace.top_token_ids[:, :2], top_logprobs=trace.top_logprobs[:, :2])
    with pytest.raises(UsageError, match="top-2 logprobs do not list the whole truncated support of"):
        assert_trainer_parity(short, float32)
    top_p = Sampling(temperature=0.7, top_p=0.9, max_tokens=32, n=4, seed=1)
    path = tmp_path / "golden.safetensors"
    check_golden(path, engine, prompts=questions(8), sampling=top_p, update=True, repeats=0)
    comparison = assert_trainer_parity(Golden.load(path), float32)
    assert comparison.metrics["max_abs_diff"] < 1e-3
    assert "without_truncation" in {note.key for note in comparison.notes}


def test_penalties_are_refused_with_the_reason(pool, questions, float32):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    trace = engine.generate(questions(2), Sampling(repetition_penalty=1.1, max_tokens=8))
    with pytest.raises(UsageError, match="a trainer applies no penalty"):
        assert_trainer_parity(trace, float32)


def test_what_the_environment_wrote_is_context_and_not_compared(pool, float32):
    turns = [
        [{"role": "user", "content": f"What is {n} + 4?"}, {"role": "assistant"}, {"role": "user", "content": "Sure?"},
         {"role": "assistant"}]
        for n in range(10, 20)
    ]  # fmt: skip
    trace = pool.engine(EngineSpec(MODEL, dtype="float32")).generate(turns, Sampling(temperature=0.7, max_tokens=24, seed=1))
    assert not trace.mask.all()
    comparison = assert_trainer_parity(trace, float32)
    assert comparison.metrics["n_tokens"] == trace.mask.sum()


# -- the head ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(pool):
    """bfloat16 rollouts by head dtype."""
    import random

    import arith

    rng = random.Random(2)
    prompts = [[{"role": "user", "content": arith.make_problem(rng).question}] for _ in range(25)]
    sampling = Sampling(temperature=0.7, max_tokens=32, n=8, seed=1)
    settings = {"bfloat16": {}, "float32": {"hf_overrides": {"head_dtype": "float32"}}}
    return {
        head: pool.engine(EngineSpec(MODEL, dtype="bfloat16", **given)).generate(prompts, sampling)
        for head, given in settings.items()
    }


@pytest.mark.parametrize("engine_head", ["bfloat16", "float32"])
@pytest.mark.parametrize("trainer_head", ["bfloat16", "float32"])
def test_a_head_in_another_precision_on_one_side_is_named(heads, engine_head, trainer_head):
    trainer = TransformersScorer(MODEL, dtype="bfloat16", head_dtype=trainer_head)
    told = [note for note in compare_with_trainer(heads[engine_head], trainer).notes if note.key == "head_precision"]
    assert bool(told) == (engine_head != trainer_head)
    if told:
        assert ("on no grid" in told[0]) == (engine_head == "float32")


def test_one_side_alone_is_the_cause_where_it_fails(heads):
    def findings(engine_head, trainer_head):
        trainer = TransformersScorer(MODEL, dtype="bfloat16", head_dtype=trainer_head)
        comparison = compare_with_trainer(heads[engine_head], trainer, {"rms_diff": 0.005})
        return comparison.verdict, [finding.cause for finding in comparison.findings]

    for one, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        assert findings(one, other) == ("fail", ["head_precision"])
        assert findings(one, one) == ("fail", [None])  # too narrow for any: the head is not accused


def test_a_float32_head_helps_on_both_sides_and_not_on_one(heads):
    def rms(engine_head, trainer_head):
        trainer = TransformersScorer(MODEL, dtype="bfloat16", head_dtype=trainer_head)
        return compare_with_trainer(heads[engine_head], trainer).metrics["rms_diff"]

    assert rms("float32", "float32") < 0.9 * min(rms("bfloat16", "bfloat16"), rms("float32", "bfloat16"))


# -- the chain -----------------------------------------------------------------------------------------------------------


def test_the_chain_from_trainer_to_engine_holds_and_says_where_it_breaks(pool, questions, float32):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    trace = engine.generate(questions(12), Sampling(temperature=1.0, max_tokens=24, seed=1))
    chain = assert_trainer_chain(engine, float32, trace)
    assert [link.comparison.verdict for link in chain.links] == ["pass"] * 4
    other = TransformersScorer(f"{MODEL}-step2")
    assert [link.name for link in trainer_chain(engine, other, trace).broken] == ["trainer = engine prefill"]
    with pytest.raises(MismatchError, match="the chain breaks at: trainer = engine prefill\n"):
        assert_trainer_chain(engine, other, trace)
    cut = engine.generate(questions(2), Sampling(top_p=0.9, max_tokens=4))
    with pytest.raises(UsageError, match="sample without truncation and penalties"):
        trainer_chain(engine, float32, cut)


def test_the_chain_at_another_temperature_goes_by_way_of_the_trainer(pool, questions, float32):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    trace = engine.generate(questions(12), Sampling(temperature=0.7, max_tokens=24, seed=1))
    chain = assert_trainer_chain(engine, float32, trace)
    middle = [(link.name, link.comparison.verdict) for link in chain.links][1:3]
    assert middle == [("trainer, undivided = engine prefill", "pass"), ("trainer = engine decode", "pass")]

    @scorer(dtype="float32", name="never divides")
    def never(token_ids, attention_mask, temperature):
        return float32(token_ids, attention_mask, 1.0)

    assert [link.name for link in trainer_chain(engine, never, trace).broken] == ["trainer = engine decode"]


# -- bad input -----------------------------------------------------------------------------------------------------------


def rollout(**changes):
    return {"prompt_token_ids": [5, 6], "token_ids": [7, 8], "logprobs": [-1.0, -2.0]} | changes


@pytest.mark.parametrize(
    ("sequence", "says"),
    [
        (rollout(token_ids=[7, 9999]), "token id 9999 is beyond the 384 of transformers float32: another tokenizer or model"),
        (rollout(token_ids=[7, -100]), "token id -100 is no token: a label or a filler among the ids"),
        (rollout(prompt_token_ids=[]), "prompt 0 is empty"),
        (rollout(mask=[False, False]), "every token of these rollouts is masked"),
        (rollout(logprobs=[None, None]), "these rollouts have no logprobs"),
        (
            rollout(logprobs=[0.3, 0.9]),
            "the largest logprob of these rollouts is +0.9: a logprob is at most 0; are they probabilities?",
        ),
        (rollout(logprobs=[-1.0]), "has 2 token_ids but 1 logprobs"),
    ],
)
def test_rollouts_that_cannot_be_scored_are_one_line(float32, sequence, says):
    with pytest.raises(UsageError) as error:
        assert_trainer_parity(Trace.from_sequences([sequence]), float32)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_numbers_that_only_the_trainer_lacks_accuse_no_engine(rollouts, float32):
    def broken(token_ids, attention_mask, temperature):
        logprobs = float32(token_ids, attention_mask, temperature)
        logprobs[0, -3:] = float("nan")
        return logprobs

    comparison = compare_with_trainer(rollouts, broken)
    assert comparison.verdict == "fail"
    (finding,) = comparison.findings
    assert (finding.layer, finding.candidates) == ("weights", ("weights_differ", "adapter", "attention_mask"))
    assert "the trainer gives NaN or +inf for" in finding.evidence


def test_zeros_in_place_of_missing_logprobs_are_noted(rollouts, float32):
    filled = np.where(np.arange(rollouts.num_tokens) % 7, rollouts.logprobs, 0).astype(np.float32)
    comparison = compare_with_trainer(rollouts.with_(logprobs=filled), float32)
    assert comparison.verdict == "fail"
    assert "fillers" in {note.key for note in comparison.notes}
    unknown = compare_with_trainer(rollouts.with_(dtype="int4"), float32)
    (told,) = [note for note in unknown.notes if note.key == "unknown_dtype"]
    assert told == "the rollouts' dtype is unknown: the limits are those of bfloat16"
    assert "unknown_dtype" not in {note.key for note in comparison.notes}


def test_a_scorer_of_no_known_dtype():
    with pytest.raises(UsageError, match=r"scorer.dtype='flaot32'.: known are .*, did you mean 'float32'"):
        scorer(dtype="flaot32")
    with pytest.raises(UsageError, match=r"scorer.head_dtype='bf16'.: known are"):
        scorer(dtype="bfloat16", head_dtype="bf16")


def test_another_tokenizer_is_told_by_the_texts(float32):
    trace = Trace.from_sequences([rollout()], token_texts={7: "something else"})
    with pytest.raises(UsageError, match="has another tokenizer than the rollouts: token 7 is"):
        assert_trainer_parity(trace, float32)


def test_logprobs_of_another_shape_and_things_that_are_no_scorer(float32):
    trace = Trace.from_sequences([rollout()])
    with pytest.raises(UsageError, match=r"gave logprobs of shape \[1, 9\] for token ids of shape \[1, 4\]: expected \[1, 3\]"):
        assert_trainer_parity(trace, lambda ids, mask, t: torch.zeros((1, 9)))
    with pytest.raises(UsageError, match="a scorer is a callable"):
        assert_trainer_parity(trace, "float32")
    with pytest.raises(UsageError, match=r"cannot be called as .token ids, attention mask, temperature.: too many positional"):
        assert_trainer_parity(trace, lambda ids, mask: ids)
    with pytest.raises(UsageError, match="gave tuple: one tensor or array of logprobs is expected"):
        assert_trainer_parity(trace, lambda ids, mask, t: (torch.zeros((1, 3)), None))
    with pytest.raises(UsageError, match=r"batch_size=2.5: must be a whole number, 1 or more"):
        assert_trainer_parity(trace, float32, batch_size=2.5)
    with pytest.raises(UsageError, match=r"dtype=.bfloat16..: the model is loaded already, in float32"):
        TransformersScorer(float32.model, dtype="bfloat16")
    with pytest.raises(UsageError, match="did you mean 'float32'"):
        TransformersScorer(MODEL, dtype="float23")


# -- the fixture ---------------------------------------------------------------------------------------------------------


def test_the_fixture_loads_each_scorer_once(run_inner, pytester):
    pytester.makeini(f"[pytest]\nparity_engine =\n    model={MODEL}\n")
    pytester.makepyfile("""
        def test_it(trainer_scorer):
            one = trainer_scorer(dtype="float32")
            assert one is trainer_scorer(dtype="float32")
            assert (one.dtype, trainer_scorer(dtype="bfloat16").dtype) == ("float32", "bfloat16")
    """)
    run_inner().assert_outcomes(passed=1)
    pytester.makeini("[pytest]\n")
    result = run_inner()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*trainer_scorer(): name a model, or set model=... under parity_engine in the ini file"])
    marked = f"@pytest.mark.logprob_parity(model={MODEL!r}, engine='transformers')"
    pytester.makepyfile(
        test_marked=f"""
        import pytest

        {marked}
        def test_it(trainer_scorer):
            assert trainer_scorer(dtype="float32").dtype == "float32"
    """
    )
    run_inner("test_marked.py").assert_outcomes(passed=1)
