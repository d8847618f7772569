"""compare(): identical tokens, d = actual - expected, and a verdict that says why."""

import copy
import math
import pickle

import numpy as np
import pytest

from pytest_logprob_parity import (
    MismatchError,
    ParityError,
    Sampling,
    Trace,
    UsageError,
    assert_logprobs_close,
    assert_tokens_equal,
    compare,
)
from pytest_logprob_parity.comparison.result import Note

TOKENS, SEQUENCES, VOCABULARY = 40, 10, 50


def make_trace(temperature=1.0, *, mode="processed_logprobs", seed=0, dtype="float32", logits=None, sampling=None):
    """A trace of a made-up policy; logprobs are processed by `temperature` where `mode` says so."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (TOKENS * SEQUENCES, VOCABULARY)) if logits is None else logits
    scaled = logits / (temperature if mode == "processed_logprobs" else 1)
    logprobs = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    order = np.argsort(-logprobs, axis=1)[:, :5]
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, len(logprobs))
    return Trace.from_arrays(
        prompt_token_ids=np.arange(SEQUENCES),
        prompt_offsets=np.arange(SEQUENCES + 1),
        token_ids=tokens,
        sequence_offsets=np.arange(SEQUENCES + 1) * TOKENS,
        logprobs=np.take_along_axis(logprobs, tokens[:, None], 1)[:, 0],
        top_token_ids=order,
        top_logprobs=np.take_along_axis(logprobs, order, 1),
        logprobs_mode=mode,
        sampling=sampling or Sampling(temperature=temperature),
        dtype=dtype,
        engine="vllm",
        engine_version="0.18.1",
    )


def moved(trace, change):
    """The trace with `change` added to its logprobs, and to what its top-k lists of the same tokens."""
    logprobs = (trace.logprobs + change).astype(np.float32)
    mine = trace.top_token_ids == trace.token_ids[:, None]
    return trace.with_(logprobs=logprobs, top_logprobs=np.where(mine, logprobs[:, None], trace.top_logprobs))


def test_the_same_numbers_pass_bit_for_bit():
    result = compare(expected=make_trace(), actual=make_trace())
    assert (result.verdict, result.headline.key, result.headline) == (
        "pass",
        "bit_identical",
        "400 logprobs agree bit for bit",
    )
    assert result.metrics["max_abs_diff"] == 0
    assert result.metrics["ess"] == 1


def test_sides_are_keywords_for_a_swap_flips_every_sign():
    with pytest.raises(TypeError):
        compare(make_trace(), make_trace())


def test_metrics_follow_their_formulas():
    expected = make_trace()
    change = np.random.default_rng(5).normal(0.01, 0.05, 400).astype(np.float32)
    actual = moved(expected, change)
    d = actual.logprobs.astype(np.float64) - expected.logprobs
    m = compare(expected=expected, actual=actual).metrics
    r = np.exp(d)
    wanted = {
        "mean_diff": d.mean(),
        "mean_abs_diff": abs(d).mean(),
        "rms_diff": math.sqrt((d**2).mean()),
        "max_abs_diff": abs(d).max(),
        "k1": -d.mean(),
        "k3": (r - 1 - d).mean(),
        "mean_ratio": r.mean(),
        "max_ratio": r.max(),
        "share_outside_clip": ((r < 0.8) | (r > 1.2)).mean(),
        "ess": r.sum() ** 2 / (r**2).sum() / len(r),
        "top1_agreement": 1,
    }
    assert {k: m[k] for k in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_entropy_comes_with_the_mass_that_it_covers():
    trace = make_trace()
    p = np.exp(trace.top_logprobs.astype(np.float64))
    m = compare(expected=trace, actual=trace).metrics
    assert m["entropy_expected"] == pytest.approx(-(p * np.log(p)).sum(1).mean(), rel=1e-5)
    assert m["entropy_mass_expected"] == pytest.approx(p.sum(1).mean(), rel=1e-5)


def gates_by_key(result):
    return {gate.key: gate for gate in result.gates}


@pytest.mark.parametrize(
    ("noise", "by_dtype"),
    [(1e-5, ("pass", "pass")), (5e-3, ("pass", "pass")), (0.02, ("unverified", "pass")), (0.1, ("fail", "fail"))],
)
def test_limits_are_the_objectives_and_the_dtype_says_what_is_noise(noise, by_dtype):
    results = []
    for dtype in ("float32", "bfloat16"):
        expected = make_trace(dtype=dtype)
        results.append(compare(expected=expected, actual=moved(expected, np.random.default_rng(3).normal(0, noise, 400))))
    assert tuple(r.verdict for r in results) == by_dtype
    limits = [gates_by_key(r)["k3"].limit for r in results]
    assert limits == pytest.approx([5e-4, 5e-4 + 0.5 * 0.045**2 / 2], rel=1e-3)  # half of the noise of bfloat16 beside it
    noted = [any(note.key == "beyond_dtype" for note in r.notes) for r in results]
    assert noted == [noise in (5e-3, 0.02), False]  # no update may feel it, and yet float32 does not explain it


def test_every_limit_can_be_changed_in_the_call():
    expected = make_trace()
    actual = moved(expected, 5e-3)
    assert compare(expected=expected, actual=actual).verdict == "fail"
    lax = {"mean_diff": 0.01, "rms_diff": 0.01, "sequence_rms": 0.01}
    result = compare(expected=expected, actual=actual, tolerance=lax)
    assert result.verdict == "pass"
    gates = gates_by_key(result)
    limits = {"mean_diff": 0.01, "k3": 0.01**2 / 2}
    assert {key: (gates[key].limit, gates[key].fail_limit) for key in limits} == {k: (x, x) for k, x in limits.items()}
    assert gates["outlier_sequences"].threshold == 0.01
    for limit in limits:  # what a caller sets has no room for noise
        strict = compare(expected=expected, actual=actual, tolerance=lax | {limit: 1e-6})
        assert [gate.key for gate in strict.gates if not gate.ok] == [limit]
    with pytest.raises(UsageError, match=r"no limit 'mean_dif', did you mean 'mean_diff'\?"):
        compare(expected=expected, actual=actual, tolerance={"mean_dif": 1})


@pytest.mark.parametrize(
    ("nats", "limit", "outcome"), [(0.4, 1, "pass"), (1.5, 1, "pass"), (3, 0, "unverified"), (-8, 0, "fail"), (8, 0, "fail")]
)
def test_one_outlier_token_passes_by_its_size(nats, limit, outcome):
    """One of up to 2 nats is allowed for; of more only what the golden's errors have; of more than 6 no noise has any."""
    expected = make_trace(dtype="bfloat16")
    change = np.zeros(400)
    change[123] = nats
    result = compare(expected=expected, actual=moved(expected, change), tolerance={"k3": 1e9, "mean_diff": 1})
    gate = gates_by_key(result)["outlier_tokens"]
    assert (result.verdict, gate.outcome, gate.limit) == (outcome, outcome, limit)
    assert (gate.value, gate.threshold, gate.unexplained) == (int(abs(nats) > 0.5), 0.5, 6)
    assert result.metrics["max_abs_diff"] == pytest.approx(abs(nats), rel=1e-5)
    assert (result.worst[0].sequence, result.worst[0].position) == (3, 3)


def test_an_outlier_token_counts_in_the_effects_whatever_its_size():
    expected = make_trace(dtype="bfloat16")
    change = np.zeros(400)
    change[123] = -0.6
    result = compare(expected=expected, actual=moved(expected, change))
    gate = gates_by_key(result)["k3"]
    assert (result.verdict, gate.outcome) == ("unverified", "unverified")
    assert gate.value == pytest.approx((math.exp(-0.6) - 1 + 0.6) / 400, rel=1e-4)


@pytest.mark.parametrize(
    ("noise", "outcome"), [(0.05, "pass"), (0.3, "unverified"), (0.8, "unverified"), (1.2, "fail")]
)  # fmt: skip
def test_one_sequence_gone_wrong_does_not_pass(noise, outcome):
    expected = make_trace(dtype="bfloat16")
    change = np.zeros(400)
    change[80:120] = np.random.default_rng(0).normal(0, noise, 40)
    result = compare(expected=expected, actual=moved(expected, change))
    gate = gates_by_key(result)["outlier_sequences"]
    assert (result.verdict, gate.outcome) == (outcome, outcome)
    assert (gate.value, gate.limit, gate.fail_limit) == (int(outcome != "pass"), 0, 3)
    assert (gate.threshold, gate.unexplained) == (0.15, 0.6)
    assert (gate.worst > 0.6) is (outcome == "fail")
    assert result.shown.bad_prompts == gate.value


def test_one_nan_fails_before_anything_else():
    expected = make_trace()
    change = np.zeros(400)
    change[7] = np.nan
    result = compare(expected=expected, actual=moved(expected, change))
    assert (result.verdict, result.headline.key, result.headline) == ("fail", "nan", "1 of 400 logprobs are NaN or +inf")


def test_all_nan_is_never_green():
    trace = make_trace()
    nothing = trace.with_(logprobs=np.full(400, np.nan, np.float32))
    assert compare(expected=trace, actual=nothing).verdict == "fail"
    assert compare(expected=nothing, actual=trace).verdict == "unverified"


def test_holes_in_the_golden_are_counted_and_inf_is_no_logprob():
    trace = make_trace()
    holes = np.zeros(400)
    holes[:100] = np.nan
    result = compare(expected=moved(trace, holes), actual=trace)
    assert (result.verdict, result.headline.key, result.metrics["n_missing"]) == ("unverified", "low_coverage", 100)
    holes = np.zeros(400)
    holes[3] = np.inf
    assert compare(expected=moved(trace, holes), actual=trace).verdict == "fail"


def test_a_candidate_that_masks_nearly_everything_does_not_pass():
    trace = make_trace()
    mask = np.zeros(400, bool)
    mask[:5] = True
    assert compare(expected=trace, actual=trace.with_(mask=mask)).verdict == "unverified"


def test_huge_differences_overflow_nothing(recwarn):
    trace = make_trace()
    result = compare(expected=moved(trace, -1000), actual=trace)
    assert result.verdict == "fail"
    assert math.isfinite(result.metrics["ess"])
    assert not recwarn.list


def test_support_flips_are_counted_apart_and_never_averaged_in():
    sampling = Sampling(temperature=0.7, top_p=0.9)
    expected = make_trace(0.7, dtype="bfloat16", sampling=sampling)
    change = np.zeros(400)
    change[[5, 300]] = -np.inf
    result = compare(expected=expected, actual=moved(expected, change))
    assert result.verdict == "pass"
    assert (result.metrics["support_flips"], result.metrics["n_tokens"], result.metrics["max_abs_diff"]) == (2, 398, 0)
    change[:20] = -np.inf
    assert compare(expected=expected, actual=moved(expected, change)).verdict == "fail"


def test_without_truncation_not_one_token_may_be_excluded():
    expected = make_trace(dtype="bfloat16")
    change = np.zeros(400)
    change[5] = -np.inf
    assert compare(expected=expected, actual=moved(expected, change)).verdict == "fail"


def test_masked_tokens_are_never_compared():
    trace = make_trace()
    mask = np.ones(400, bool)
    mask[10:20] = False
    change = np.where(mask, 0, 5)
    result = compare(expected=trace.with_(mask=mask), actual=moved(trace, change))
    assert (result.verdict, result.metrics["n_tokens"], result.metrics["coverage"]) == ("pass", 390, 1)


def test_raw_against_processed_is_a_finding_and_no_subtraction():
    logits = np.random.default_rng(0).normal(0, 2, (400, VOCABULARY))
    expected = make_trace(0.7, logits=logits)
    actual = make_trace(0.7, mode="raw_logprobs", logits=logits)
    result = compare(expected=expected, actual=actual)
    assert result.verdict == "fail"
    assert (result.findings[0].layer, result.findings[0].cause) == ("semantic", "raw_vs_processed")
    assert result.headline.key == "other_meanings"
    assert result.findings[1].cause == "temperature"
    assert result.findings[1].values["temperature"] == pytest.approx(0.7, abs=1e-4)
    assert math.isnan(result.metrics["mean_diff"])
    assert result.gates == ()


def test_a_label_is_a_claim_and_the_numbers_win():
    logits = np.random.default_rng(0).normal(0, 2, (400, VOCABULARY))
    honest = make_trace(0.7, logits=logits)
    lying = make_trace(0.7, mode="raw_logprobs", logits=logits).with_(logprobs_mode="processed_logprobs")
    result = compare(expected=honest, actual=lying)
    assert (result.findings[0].layer, result.findings[0].cause) == ("semantic", "raw_vs_processed")
    mislabelled = honest.with_(logprobs_mode="raw_logprobs")
    result = compare(expected=honest, actual=mislabelled)
    assert result.verdict == "pass"
    assert [(note.key, note.endswith("a label is wrong")) for note in result.notes[:1]] == [("labels", True)]


def test_meanings_that_coincide_are_comparable():
    for sampling in (Sampling(), Sampling(temperature=0)):
        expected = make_trace(sampling=sampling)
        assert compare(expected=expected, actual=expected.with_(logprobs_mode="raw_logprobs", path="prefill")).passed


def test_other_tokens_are_compared_up_to_where_they_diverge():
    expected = make_trace()
    tokens = expected.token_ids.copy()
    tokens[[20, 399]] += 1
    result = compare(expected=expected, actual=expected.with_(token_ids=tokens))
    assert (result.metrics["n_tokens"], result.metrics["diverged_sequences"]) == (400 - 20 - 1, 2)
    assert (result.verdict, result.headline.key) == ("unverified", "low_coverage")
    assert result.metrics["coverage"] == pytest.approx(0.9475)


def test_nothing_in_common_is_never_green():
    other = make_trace().with_(prompt_token_ids=np.arange(100, 110, dtype=np.int32))
    result = compare(expected=make_trace(), actual=other)
    assert (result.verdict, result.headline.key, result.metrics["coverage"]) == ("unverified", "nothing_compared", 0)


def test_the_assertion_reads_like_assert_close():
    expected = make_trace(dtype="bfloat16")
    with pytest.raises(MismatchError) as error:
        assert_logprobs_close(expected=expected, actual=moved(expected, 0.3))
    told = str(error.value)
    assert told.startswith("fail: Logprobs are not close: share of ratios outside the clip 100 % (more than ")
    outcomes = {gate.key: gate.outcome for gate in error.value.comparison.gates}
    failed = {"mean_diff", "k3", "clip_share", "outlier_sequences"}
    assert {key for key, outcome in outcomes.items() if outcome == "fail"} == failed
    assert told.count("<-- exceeds") == len(failed)
    for part in ("|mean difference|", "greatest     |d| 0.3 nats at sequence", "k3", "ESS", "token and the text before it"):
        assert part in told
    assert error.value.comparison.verdict == "fail"


def test_assert_tokens_equal_names_the_first_difference():
    trace = make_trace()
    assert_tokens_equal(expected=trace, actual=trace)
    tokens = trace.token_ids.copy()
    tokens[45] = 49 if tokens[45] != 49 else 48
    with pytest.raises(ParityError, match="sequence 1 differs at position 5"):
        assert_tokens_equal(expected=trace, actual=trace.with_(token_ids=tokens))


def test_a_note_is_its_text_and_keeps_its_key():
    note = Note("excluded", "2 tokens are excluded on both sides")
    for again in (note, copy.deepcopy(note), pickle.loads(pickle.dumps(note))):
        assert (again, again.key) == ("2 tokens are excluded on both sides", "excluded")
