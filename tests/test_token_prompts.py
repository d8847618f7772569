"""Models without a tokenizer, and named tokens (logit_bias, bad_words, allowed_token_ids), on a real engine."""

import dataclasses
import shutil

import numpy as np
import pytest

from conftest import MODEL
from pytest_logprob_parity import EngineSpec, Golden, MismatchError, Sampling, UsageError, check_golden, compare
from pytest_logprob_parity.check.context import Context
from pytest_logprob_parity.trainer.scoring import score

PROMPTS = [[3, 40 + i, 50, 60 + i, 70, 4] for i in range(6)]
#: Tokens that the tiny model writes often: digits and words of its answers.
SAMPLING = Sampling(temperature=0.7, max_tokens=24, seed=2, logprobs=8)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The tiny model without its tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "tiny"
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    return str(folder)


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_a_model_without_a_tokenizer_is_recorded_and_checked_by_token_ids(pool, bare, tmp_path, kind):
    engine = pool.engine(EngineSpec(bare, engine=kind, dtype="float32"))
    assert engine.tokenizer is None
    path = tmp_path / "golden.safetensors"
    recorded = check_golden(path, engine, prompts=PROMPTS, sampling=SAMPLING, update=True, repeats=2)
    assert recorded.recorded
    golden = Golden.load(path)
    assert golden.fingerprint["tokenizer"] == "none"
    assert golden.trace.text(7) == "<7>"
    again = check_golden(path, engine, prompts=PROMPTS, sampling=SAMPLING)
    assert (again.verdict, again.metrics["n_changed"]) == ("pass", 0)
    warmer = golden.trace.with_(sampling=dataclasses.replace(SAMPLING, temperature=0.8))
    wrong = engine.replay(warmer).with_(sampling=SAMPLING)
    with pytest.raises(MismatchError, match="temperature"):
        check_golden(path, wrong, context=Context())
    for prompts, told in ((["1 + 1"], "is a text"), ([[{"role": "user", "content": "1"}]], "is a list of messages")):
        with pytest.raises(UsageError, match=rf"prompts\[0\] {told}, .* has no tokenizer: give the prompt as token ids"):
            engine.generate(prompts)


def test_skip_tokenizer_init_needs_no_tokenizer_in_the_engine_and_refuses_bad_words(pool, questions):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32", skip_tokenizer_init=True))
    trace = engine.generate(questions(3), SAMPLING)
    np.testing.assert_array_equal(engine.replay(trace).logprobs, trace.logprobs)
    with pytest.raises(UsageError, match=r"this engine has no tokenizer \(skip_tokenizer_init\), vLLM would ignore them"):
        engine.generate(questions(1), Sampling(bad_words=["apples"]))


def often(trace, count):
    """The ids that a trace lists most often."""
    return [int(i) for i in np.bincount(trace.top_token_ids[trace.top_token_ids >= 0]).argsort()[::-1][:count]]


@pytest.fixture(scope="module")
def named(pool, questions):
    """Samplings that name tokens, by field, with the engine, and what it writes under each."""
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    free = engine.generate(questions(8), SAMPLING)
    ids = often(free, 40)
    word = next(free.text(t) for t in ids if free.text(t).isdigit())
    samplings = {
        "logit_bias": dataclasses.replace(SAMPLING, logit_bias={t: 1.5 if i % 2 else -1.0 for i, t in enumerate(ids[:12])}),
        "bad_words": dataclasses.replace(SAMPLING, bad_words=(word,)),
        "allowed_token_ids": dataclasses.replace(SAMPLING, allowed_token_ids=tuple(ids)),
    }
    return engine, samplings, {name: engine.generate(questions(8), sampling) for name, sampling in samplings.items()}


@pytest.mark.parametrize(
    ("field", "cause"), [("logit_bias", "logit_bias"), ("bad_words", "banned_tokens"), ("allowed_token_ids", "banned_tokens")]
)
def test_named_tokens_are_replayed_and_named_where_one_side_lacks_them(pool, named, field, cause):
    engine, samplings, traces = named
    trace, sampling = traces[field], samplings[field]
    np.testing.assert_array_equal(engine.replay(trace).logprobs, trace.logprobs)
    reference = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float64"))
    assert compare(expected=trace, actual=reference.replay(trace)).verdict == "pass"
    without = dataclasses.replace(sampling, **{field: ()})
    dropped = engine.replay(trace.with_(sampling=without))
    labelled = compare(expected=trace, actual=dropped)
    hidden = compare(expected=trace, actual=dropped.with_(sampling=sampling))
    for result in (labelled, hidden):
        assert result.verdict == "fail", result.headline
        assert cause in [f.cause for f in result.findings], [str(f) for f in result.findings]


def test_a_golden_with_a_logit_bias_and_bad_words_is_recorded_and_checked(named, questions, tmp_path):
    engine, samplings, _ = named
    sampling = dataclasses.replace(samplings["logit_bias"], bad_words=samplings["bad_words"].bad_words, top_p=0.95)
    path = tmp_path / "golden.safetensors"
    check_golden(path, engine, prompts=questions(6), sampling=sampling, update=True, repeats=2)
    assert Golden.load(path).trace.sampling == sampling
    assert Golden.load(path).reference is not None
    assert check_golden(path, engine, prompts=questions(6), sampling=sampling).metrics["n_changed"] == 0


def test_a_trainer_refuses_rollouts_with_named_tokens(named):
    with pytest.raises(UsageError, match="a trainer applies no logit bias, and excludes no tokens"):
        score(named[2]["logit_bias"], lambda ids, mask, temperature: None)
