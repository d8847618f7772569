"""Verdicts: is it different, does it matter, is it shown. Made-up traces whose faults are planted, and clean ones beside."""

import json
import math

import numpy as np
import pytest
from made_up import gate, keys, make_trace, moved, noise, outcomes, reference_of

from pytest_logprob_parity import GoldenError, Sampling, Trace, UsageError, check_golden, compare
from pytest_logprob_parity.comparison.evidence import Evidence
from pytest_logprob_parity.comparison.free_generation.compare import compare_free_run
from pytest_logprob_parity.comparison.free_generation.judge import judge_free_run, predicted_divergences
from pytest_logprob_parity.comparison.judge import judge
from pytest_logprob_parity.comparison.permutation_test import block_permutation_test
from pytest_logprob_parity.comparison.tolerance import default_tolerance, with_floor
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.golden.noise_floor import NoiseFloor
from pytest_logprob_parity.trace.batch_composition import BatchCompositions

#: What shape noise in bfloat16 looks like: RMS between two replays, in nats; most tokens never move.
BFLOAT16_NOISE = 0.009


class ShapeNoise:
    """An engine whose noise is a function of the batch shape: the same shape gives the same bits again.

    `replay(number)` draws a shape for each of 8 blocks, as recording does; 5 of them make a noise floor.
    """

    def __init__(self, trace, rms=BFLOAT16_NOISE, seed=0):
        self.trace, self.seed = trace, seed
        between_two = rms / math.sqrt(2)
        self.shapes = np.stack([noise(trace, between_two, seed=[seed, shape]) for shape in range(40)])
        self.blocks = np.repeat(np.arange(trace.num_sequences) % 8, np.diff(trace.sequence_offsets))

    def replay(self, number):
        rng = np.random.default_rng([self.seed, 99, number])
        drawn = rng.integers(0, len(self.shapes), 8)
        change = self.shapes[drawn[self.blocks], np.arange(self.trace.num_tokens)]
        return (self.trace.logprobs + change).astype(np.float32)

    def floor(self, repeats=5, *, reproduces=True):
        return NoiseFloor(np.stack([self.replay(n) for n in range(repeats)]), BatchCompositions(), reproduces)


def judged(trace, actual, *, level="rl", setup="compatible", **evidence):
    """The verdict of a check with this evidence, under the limits that a check would take."""
    limits = with_floor(default_tolerance(trace.dtype), evidence.get("floor"))
    return judge(trace, actual, limits, level, Evidence(setup=setup, **evidence))


# -- does it matter: fail, pass, unverified ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shift", "verdict"),
    [
        ("float32", 1.9e-3, "pass"), ("float32", 2.1e-3, "fail"),  # the objective's limit is 0.002
        ("bfloat16", 4e-3, "pass"), ("bfloat16", 6e-3, "unverified"), ("bfloat16", 9e-3, "fail"),  # and noise moves a mean
    ],
)  # fmt: skip
def test_a_mean_fails_beyond_its_limit_and_what_noise_makes_of_it(dtype, shift, verdict):
    trace = make_trace(dtype=dtype)
    result = compare(expected=trace, actual=moved(trace, shift))
    assert (result.verdict, gate(result, "mean_diff").outcome) == (verdict, verdict)
    assert gate(result, "mean_diff").value == pytest.approx(shift, rel=1e-3)


def test_within_all_limits_and_shown_to_be_passes():
    trace = make_trace()
    result = compare(expected=trace, actual=moved(trace, noise(trace, BFLOAT16_NOISE)))
    assert (result.verdict, outcomes(result)) == ("pass", {})
    assert all(g.low <= g.value <= g.high <= g.limit for g in result.gates)


def test_an_estimate_below_with_a_bound_above_the_limit_is_unverified():
    trace = make_trace(sequences=10, dtype="float32")
    change = np.repeat(np.random.default_rng(5).normal(0, 1, 10), 40)
    change = 0.0015 + 0.0015 * (change - change.mean()) / change.std()  # the mean is inside, how far it may be is not
    result = compare(expected=trace, actual=moved(trace, change))
    mean = gate(result, "mean_diff")
    assert (result.verdict, mean.ok, mean.sure) == ("unverified", True, False)
    assert mean.value == pytest.approx(0.0015, rel=1e-3)
    assert mean.high > mean.limit > mean.value


def test_under_95_percent_of_the_tokens_is_unverified_and_a_failure_in_the_rest_still_fails():
    trace = make_trace()
    mask = np.arange(2000) < 1899
    assert compare(expected=trace, actual=trace.with_(mask=mask)).verdict == "unverified"
    assert compare(expected=trace, actual=trace.with_(mask=np.arange(2000) < 1901)).verdict == "pass"
    assert compare(expected=trace, actual=moved(trace, 0.1).with_(mask=mask)).verdict == "fail"


def test_fewer_than_8_sequences_are_too_few_to_generalise():
    for sequences, verdict in ((7, "unverified"), (8, "pass")):
        trace = make_trace(sequences)
        result = compare(expected=trace, actual=moved(trace, noise(trace, 1e-3)))
        assert result.verdict == verdict, result.headline
    trace = make_trace(5)
    assert compare(expected=trace, actual=moved(trace, 0.1)).verdict == "fail"  # what is seen is seen


def test_bits_that_came_back_on_the_same_setup_need_no_other_sequences():
    trace = make_trace(3)
    assert judged(trace, trace, setup="same").verdict == "pass"
    assert judged(trace, trace, setup="compatible").verdict == "unverified"


def test_identical_sequences_count_once():
    one = make_trace(1)
    again = {"token_ids": np.tile(one.token_ids, 50), "logprobs": np.tile(one.logprobs, 50)}
    trace = make_trace(50, prompts=1, **again)
    result = compare(expected=trace, actual=moved(trace, np.tile(noise(one, 1e-3), 50)))
    assert (result.verdict, result.shown.prompts) == ("unverified", 1)
    apart = make_trace(50, prompts=1)  # of the same prompt, and each another
    assert compare(expected=apart, actual=moved(apart, noise(apart, 1e-3))).verdict == "pass"


def test_one_nan_fails_whatever_else_is_seen():
    trace = make_trace()
    for level in ("bitwise", "noise", "rl"):
        result = judged(trace, moved(trace, np.where(np.arange(2000) == 77, np.nan, 0)), level=level)
        assert (result.verdict, result.headline.key, result.metrics["n_nan"]) == ("fail", "nan", 1)


def test_a_pass_says_what_holds_of_other_prompts_and_what_would_not_have_passed():
    trace = make_trace(200, 64)
    result = compare(expected=trace, actual=moved(trace, 5e-4))
    shown = result.shown
    assert (result.verdict, shown.prompts, shown.sequences, shown.bad_prompts) == ("pass", 200, 200, 0)
    assert shown.share == pytest.approx(0.015, abs=2e-4)  # statistics.md: 0 bad of 200 prove their share
    assert (shown.sequences_allowed, shown.reach) == (gate(result, "outlier_sequences").limit, pytest.approx(0.019, abs=1e-3))
    assert shown.tokens_allowed == gate(result, "outlier_tokens").limit
    assert [line.partition(":")[0] for line in result.shows] == ["shown", "no check passes, in any setup, with", "power"]


@pytest.mark.parametrize(("rms", "verdict"), [(0.009, "pass"), (0.03, "pass"), (0.055, "unverified"), (0.09, "fail")])
def test_error_rates_at_50_sequences_of_64_tokens(rms, verdict):
    """k3, about half the square of the RMS: 5e-4 matters, and bfloat16's noise adds 5e-4 to pass and 2e-3 to fail."""
    trace = make_trace(50, 64)
    rng = np.random.default_rng(8)
    assert {compare(expected=trace, actual=moved(trace, rng.normal(0, rms, 3200))).verdict for _ in range(20)} == {verdict}


# -- outliers ---------------------------------------------------------------------------------------------------------


def planted(count, nats):
    """A change of 200 x 64 tokens: one token of `count` sequences is off by `nats`, up and down in turn."""
    change = np.zeros((200, 64))
    change[np.arange(count), 7] = nats * (-1.0) ** np.arange(count)
    return change.ravel()


def test_sequences_with_an_outlier_token_pass_up_to_a_limit_and_fail_beyond_another():
    """Half precision puts a few so far off. The negative control: float32 puts none there."""
    trace = make_trace(200, 64)
    few, many = (getattr(gate(compare(expected=trace, actual=trace), "outlier_tokens"), n) for n in ("limit", "fail_limit"))
    assert (few, few < many) == (3, True)
    for count, verdict in ((few, "pass"), (few + 1, "unverified"), (many, "unverified"), (many + 1, "fail")):
        found = gate(compare(expected=trace, actual=moved(trace, planted(int(count), 0.6))), "outlier_tokens")
        assert (found.value, found.outcome) == (count, verdict)
    in_one = np.zeros(12_800)
    in_one[:8] = 0.6  # in one sequence, which counts once
    assert gate(compare(expected=trace, actual=moved(trace, in_one)), "outlier_tokens").value == 1
    float32 = make_trace(200, 64, dtype="float32")
    for nats, verdict in ((0.2, "pass"), (0.6, "fail")):
        found = gate(compare(expected=float32, actual=moved(float32, planted(1, nats))), "outlier_tokens")
        assert found.outcome == verdict


def test_sequences_that_are_off_as_a_whole_fail_although_every_average_is_small():
    trace = make_trace(200, 64)

    def wrong(count):
        change = np.random.default_rng(0).normal(0, 0.2, 12_800) * np.repeat(np.arange(200) < count, 64)
        return compare(expected=trace, actual=moved(trace, change))

    limit, most = (getattr(gate(wrong(0), "outlier_sequences"), name) for name in ("limit", "fail_limit"))
    assert wrong(int(limit)).verdict == "pass"
    assert outcomes(wrong(int(limit) + 1)) == {"outlier_sequences": "unverified"}
    assert outcomes(wrong(int(most) + 1)) == {"outlier_sequences": "fail"}


def test_15_percent_of_sequences_100_times_worse_fail():
    trace = make_trace(200, 64)
    scale = np.where(np.arange(200) % 20 < 3, 0.3, 0.003)
    change = np.random.default_rng(0).normal(0, 1, 12_800) * np.repeat(scale, 64)
    result = compare(expected=trace, actual=moved(trace, change))
    assert (result.verdict, gate(result, "outlier_sequences").value) == ("fail", 30)


def test_what_is_an_outlier_grows_with_the_floor_and_what_matters_does_not():
    trace = make_trace()
    plain = default_tolerance("bfloat16")
    quiet, loud = (with_floor(plain, ShapeNoise(trace, rms).floor()) for rms in (0.005, 0.04))
    assert (quiet.outlier, quiet.sequence_rms) == (plain.outlier, plain.sequence_rms)
    assert loud.outlier == pytest.approx(30 * 0.04, rel=0.1)
    assert loud.sequence_rms == pytest.approx(5 * 0.04, rel=0.1)
    for name in ("mean_diff", "k3", "clip_share", "weight_variance"):
        assert getattr(loud, name) == getattr(plain, name)
    change = np.where(np.arange(2000) < 40, 0.18 * (-1.0) ** np.arange(2000), 0)  # one sequence
    assert outcomes(judged(trace, moved(trace, change))) == {"outlier_sequences": "unverified"}
    assert judged(trace, moved(trace, change), floor=ShapeNoise(trace, 0.04).floor()).verdict == "pass"


# -- levels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "verdicts"),
    [
        ("none", ("pass", "pass", "pass")),
        ("shape noise", ("fail", "pass", "pass")),
        ("a shift of half the limit", ("fail", "fail", "pass")),
        ("a shift of five times the limit", ("fail", "fail", "fail")),
    ],
)
def test_a_level_says_what_fails(change, verdicts):
    engine = ShapeNoise(make_trace())
    shift = {"a shift of half the limit": 1e-3, "a shift of five times the limit": 1e-2}.get(change, 0)
    now = engine.trace if change == "none" else engine.trace.with_(logprobs=engine.replay(77))
    for level, verdict in zip(("bitwise", "noise", "rl"), verdicts, strict=True):
        result = judged(
            engine.trace, moved(now, shift), level=level, floor=engine.floor(), draw=lambda: engine.replay(5) + shift
        )
        assert result.verdict == verdict, (level, result.headline)


def test_a_level_that_is_none():
    with pytest.raises(UsageError, match="level='nose': known are bitwise, noise, rl, did you mean 'noise'"):
        compare(expected=make_trace(), actual=make_trace(), level="nose")


def test_any_other_bit_fails_where_recording_got_every_bit_back_and_is_held_against_noise_elsewhere():
    engine = ShapeNoise(make_trace())
    now = moved(engine.trace, np.where(np.arange(2000) == 5, 1e-6, 0))
    result = judged(engine.trace, now, floor=engine.floor(), setup="same", draw=lambda: engine.replay(5))
    assert (result.verdict, result.difference.different) == ("fail", True)
    assert math.isnan(result.difference.p_value)  # that needs no p-value
    result = judged(engine.trace, now, floor=engine.floor(reproduces=False), setup="same", draw=lambda: engine.replay(5))
    assert (result.verdict, result.difference.different) == ("pass", False)
    assert result.difference.p_value > 0.01


def test_noise_cannot_be_told_from_a_difference_without_a_floor_or_an_engine():
    engine = ShapeNoise(make_trace())
    now = engine.trace.with_(logprobs=engine.replay(0))
    without = judged(engine.trace, now, level="noise")
    assert (without.verdict, without.headline.key, without.difference.key) == ("unverified", "difference_unknown", "no_floor")
    alone = judged(engine.trace, now, level="noise", floor=engine.floor())
    assert (alone.verdict, alone.headline.key, alone.difference.key) == ("unverified", "difference_unknown", "no_engine")
    assert judged(engine.trace, engine.trace, level="noise").verdict == "pass"  # bit for bit needs neither


def test_at_level_rl_the_defaults_stand_in_for_a_missing_floor_and_the_verdict_says_so():
    trace = make_trace()
    result = judged(trace, moved(trace, noise(trace, 0.005)))
    assert (result.verdict, keys(result)) == ("pass", ["no_floor", "top_k_judged"])
    with_one = judged(trace, moved(trace, noise(trace, 0.005)), floor=ShapeNoise(trace).floor())
    assert (with_one.verdict, keys(with_one)) == ("pass", ["top_k_judged"])


# -- is it different: the block permutation test ----------------------------------------------------------------------


def p_value(engine, candidate, repeats=5, draws=999):
    return block_permutation_test(engine.floor(repeats).logprobs, candidate, engine.blocks, draws=draws).p_value


def test_nulls_are_rejected_as_often_as_they_should_be():
    """300 engines that did not change: at 0.05 no more rejections than chance explains once in 1,000 times."""
    from scipy.stats import binom

    trace = make_trace(24, 16)
    p = np.array([p_value(e := ShapeNoise(trace, seed=n), e.replay(5)) for n in range(300)])
    assert np.sum(p <= 0.05) <= binom.ppf(0.999, 300, 0.05)
    assert np.sum(p <= 0.01) <= binom.ppf(0.999, 300, 0.01)
    assert np.sum(p <= 0.5) >= binom.ppf(0.001, 300, 0.3)  # and it is no test that never rejects


@pytest.mark.parametrize(
    ("name", "which"),
    [("bias", "p_bias"), ("spread", "p_spread"), ("spread", "p_rank")],
)
def test_faults_of_the_floors_own_size_are_found(name, which):
    engine = ShapeNoise(make_trace())
    planted = 0.3 * BFLOAT16_NOISE if name == "bias" else noise(engine.trace, 2 * BFLOAT16_NOISE, seed=4)
    test = block_permutation_test(engine.floor().logprobs, engine.replay(5) + planted, engine.blocks)
    assert test.p_value <= 0.01
    assert getattr(test, which) <= 0.01
    assert str(test).startswith("p = ")


def test_a_bias_is_found_in_both_directions_and_a_calmer_engine_is_no_fault():
    engine = ShapeNoise(make_trace())
    for sign in (-1, 1):
        assert p_value(engine, engine.replay(5) + sign * 0.3 * BFLOAT16_NOISE) <= 0.01
    calm = engine.floor().logprobs.mean(axis=0)
    assert p_value(engine, calm) > 0.01


def test_the_generating_run_is_neither_repeat_nor_centre():
    """Its tokens were chosen by its own noise: it looks like another engine, and every clean check would fail."""
    engine = ShapeNoise(make_trace(200, 16))
    generating = engine.trace.with_(logprobs=engine.replay(50) + np.float32(1e-3))
    assert p_value(engine, generating.logprobs) <= 0.01
    result = judged(
        generating, generating.with_(logprobs=engine.replay(60)), level="noise", floor=engine.floor(),
        draw=lambda: engine.replay(5),
    )  # fmt: skip
    assert (result.verdict, result.difference.different) == ("pass", False)


def test_without_any_noise_equal_is_equal_and_different_is_certain():
    trace = make_trace()
    floor = NoiseFloor(np.stack([trace.logprobs] * 5), BatchCompositions(), reproduces=True)
    blocks = ShapeNoise(trace).blocks
    test = block_permutation_test(floor.logprobs, trace.logprobs, blocks)
    assert (test.p_value, test.p_bias, test.p_spread, test.p_rank) == (1, 1, 1, 1)
    test = block_permutation_test(floor.logprobs, trace.logprobs + np.float32(1e-4), blocks)
    assert test.p_value == 1 / 10_000
    assert (floor.rms, floor.changed) == (0, 0)
    now = moved(trace, 1e-4)
    for level, verdict in (("noise", "fail"), ("rl", "pass")):
        assert judged(trace, now, level=level, floor=floor, draw=lambda: now.logprobs).verdict == verdict


def test_ties_count():
    """Thousands of tokens whose logprob is exactly 0 in every replay: no evidence, and no alarm."""
    trace = make_trace(logprobs=np.where(np.arange(2000) % 100 == 0, -0.5, 0))
    engine = ShapeNoise(trace)
    engine.shapes[:, trace.logprobs == 0] = 0
    p = [p_value(engine, engine.replay(n)) for n in range(5, 45)]
    assert np.mean(np.array(p) <= 0.05) < 0.2
    assert p_value(engine, engine.floor().logprobs[0]) > 0.05


def test_fewer_than_8_blocks_allow_no_test():
    engine = ShapeNoise(make_trace(7))
    assert block_permutation_test(engine.floor().logprobs, engine.replay(5), engine.blocks) is None
    now = engine.trace.with_(logprobs=engine.replay(5))
    result = judged(engine.trace, now, level="noise", floor=engine.floor(), draw=lambda: now.logprobs)
    assert (result.verdict, result.headline.key, result.difference.key) == ("unverified", "difference_unknown", "few_blocks")


# -- support flips ----------------------------------------------------------------------------------------------------

#: Probabilities at every position, and how they are truncated; the golden's token is the `rank`th of them.
TRUNCATED = {
    "top-p": ([0.5, 0.25, 0.12, 0.06, 0.04, 0.03], 4, {"top_p": 0.9}),  # mass before: 0, 0.5, 0.75, 0.87
    "top-k": ([0.5, 0.26, 0.24], 3, {"top_k": 3}),  # nats above the last one kept: 0.73, 0.08, 0
    "min-p": ([0.5, 0.26, 0.16, 0.08], 3, {"min_p": 0.3}),  # nats above the threshold: 1.2, 0.55, 0.065
}


def truncated_trace(how, rank, sequences=50, tokens=40):
    """A golden in which every token is the `rank`th (from 1) of TRUNCATED[how]."""
    probabilities, kept, sampling = TRUNCATED[how]
    count = sequences * tokens
    renormalised = np.log(probabilities[:kept]) - math.log(sum(probabilities[:kept]))
    top = np.full((count, 5), -np.inf)
    top[:, :kept] = renormalised
    return make_trace(
        sequences,
        tokens,
        logprobs=np.full(count, renormalised[rank - 1]),
        top_logprobs=top,
        top_token_ids=np.tile(np.arange(5), (count, 1)),
        untruncated_logprobs=np.full(count, math.log(probabilities[rank - 1])),
        sampling=Sampling(**sampling),
    )


def excluded(trace, count):
    return moved(trace, np.where(np.arange(trace.num_tokens) < count, -np.inf, 0))


@pytest.mark.parametrize(
    ("how", "rank", "deep"),
    [
        ("top-p", 4, False), ("top-p", 3, True), ("top-p", 1, True),
        ("top-k", 3, False), ("top-k", 2, False), ("top-k", 1, True),
        ("min-p", 3, False), ("min-p", 2, True), ("min-p", 1, True),
    ],
)  # fmt: skip
def test_a_token_excluded_deep_inside_is_an_outlier_and_one_near_the_edge_is_none(how, rank, deep):
    """The noise that puts one token far off excludes one: both are of one budget. Several in one sequence make it one that is
    off as a whole.
    """
    trace = truncated_trace(how, rank)
    for count in (1, 5):
        result = judged(trace, excluded(trace, count))
        assert (gate(result, "outlier_tokens").value, gate(result, "nucleus_flips").value) == (deep, count)
        assert result.verdict == ("unverified" if deep and count > 1 else "pass"), result.headline


def test_the_nearest_edge_counts():
    """A token deep inside the nucleus of top-p may be the last one that top-k keeps."""
    trace = truncated_trace("top-k", 3)
    both = trace.with_(sampling=Sampling(top_k=3, top_p=0.999))
    assert judged(both, excluded(both, 1)).verdict == "pass"


def test_flips_near_the_edge_are_allowed_at_the_goldens_own_rate():
    trace = truncated_trace("top-p", 4)

    def floor(flips):
        repeats = np.stack([trace.logprobs] * 5)
        for number in range(5):
            repeats[number, np.arange(flips) + 50 * number] = -np.inf
        return NoiseFloor(repeats, BatchCompositions(), reproduces=True)

    assert (floor(0).flips, floor(4).flips) == (0, 4)
    counts = ((0, 4, "pass"), (0, 6, "unverified"), (0, 11, "fail"), (4, 25, "pass"), (4, 40, "unverified"), (40, 150, "pass"))
    for own, now, verdict in counts:
        result = judged(trace, excluded(trace, now), floor=floor(own))
        assert (result.verdict, gate(result, "nucleus_flips").outcome) == (verdict, verdict), (own, now, result.headline)


def test_a_reference_of_some_sequences_gives_flips_no_other_budget():
    """Where it has none in a twentieth of the tokens, the others may have some; no more pass than without a reference."""
    trace = truncated_trace("top-p", 4)
    reference = reference_of(trace, np.zeros(trace.num_tokens), covered=0.05)
    for now in (0, 4, 25, 100):
        with_, without = (judged(trace, excluded(trace, now), reference=known) for known in (reference, None))
        assert gate(with_, "nucleus_flips").limit == gate(without, "nucleus_flips").limit
        assert gate(with_, "nucleus_flips").ok or now == 100, now
    assert not gate(with_, "nucleus_flips").ok


def test_the_allowed_number_of_flips_is_a_whole_one():
    """As many as the limit says, whatever rounding does to number / tokens * tokens."""
    for tokens, flips in ((41, 7), (27, 29), (41, 28)):
        trace = make_trace(10, tokens, sampling=Sampling(top_p=0.9))
        result = compare(expected=trace, actual=trace, tolerance={"support_flips": flips / trace.num_tokens})
        assert gate(result, "nucleus_flips").limit == flips


def test_a_token_that_appears_in_the_support_is_a_flip_and_never_deep():
    trace = truncated_trace("top-p", 1)
    result = judged(excluded(trace, 2), trace)
    assert (result.metrics["support_flips"], gate(result, "outlier_tokens").value) == (2, 0)
    assert result.verdict == "pass"


def test_without_truncation_every_flip_fails():
    trace = make_trace()
    assert judged(trace, excluded(trace, 1)).verdict == "fail"


# -- the free run -----------------------------------------------------------------------------------------------------


def free_run(trace, tokens=None, near_tie=0.1, **changes):
    """The free run of a trace: its own tokens where `tokens` does not replace them."""
    again = trace.with_(token_ids=trace.token_ids if tokens is None else np.asarray(tokens, np.int32), **changes)
    return compare_free_run(trace, again, near_tie)


def verdict_on(trace, run, *, exact=False, same_stream=False, mean_abs_diff=0.003):
    headline, finding = judge_free_run(run, trace, exact=exact, same_stream=same_stream, mean_abs_diff=mean_abs_diff)
    return headline, finding.cause if finding else None


def greedy_trace(gap):
    """A greedy golden whose two likeliest tokens are `gap` nats apart."""
    top = np.tile([-0.3, -0.3 - gap], (2000, 1))
    return make_trace(
        sampling=Sampling(temperature=0), top_logprobs=top, top_token_ids=np.tile([1, 2], (2000, 1)), logprobs=top[:, 0]
    )


def other_tokens(trace, sequences):
    """Its tokens, with other ones from the middle of the first `sequences` on."""
    tokens = trace.token_ids.copy()
    for sequence in range(sequences):
        tokens[sequence * 40 + 20 : sequence * 40 + 40] += 1000
    return tokens


def test_greedy_may_take_either_of_two_near_ties_and_nothing_else():
    for gap, problem in ((0.05, None), (0.5, "not_the_likeliest")):
        trace = greedy_trace(gap)
        headline, cause = verdict_on(trace, free_run(trace, other_tokens(trace, 3)))
        assert (headline and headline.key) == problem
        assert cause == ("seed_stream" if problem else None)


def test_sampled_flips_are_held_against_the_rate_that_the_noise_predicts():
    """About half of E|d| a token; a near tie of the logprobs says nothing of a sampled token."""
    trace = make_trace(sampling=Sampling(temperature=1.0))
    predicted = predicted_divergences(trace, 0.003)
    assert predicted == pytest.approx(50 * (1 - (1 - 0.0015) ** 40))
    for flips, problem in ((4, False), (30, True)):
        headline, cause = verdict_on(trace, free_run(trace, other_tokens(trace, flips)), same_stream=True)
        assert bool(headline) == problem
        assert cause == ("seed_stream" if problem else None)
    assert not verdict_on(trace, free_run(trace, other_tokens(trace, 30)))[0]  # another stream: fresh draws


def test_bits_of_the_logprobs_without_those_of_the_tokens_are_another_seed_stream():
    trace = make_trace(sampling=Sampling(temperature=1.0))
    headline, cause = verdict_on(trace, free_run(trace, other_tokens(trace, 1)), exact=True)
    assert (headline.key, cause) == ("generates_other_tokens", "seed_stream")
    assert "1 of 50 completions have other tokens" in headline


def test_greedy_in_place_of_sampled_writes_likelier_tokens():
    trace = make_trace(sampling=Sampling(temperature=1.0))
    likelier = np.where(np.arange(2000) % 40 >= 20, -0.05, trace.logprobs).astype(np.float32)
    run = free_run(trace, other_tokens(trace, 50), logprobs=likelier)
    headline, _ = verdict_on(trace, run)
    assert (headline.key, run.likelihood_shift > 0) == ("sampler_changed", True)
    fresh = make_trace(seed=5).logprobs  # the negative control: another draw from the same distribution
    assert not verdict_on(trace, free_run(trace, other_tokens(trace, 50), logprobs=fresh))[0]


def test_one_seed_for_all_writes_fewer_completions():
    columns = {"prompt_token_ids": [1], "prompt_offsets": [0, 1], "group": np.zeros(50), "sampling": Sampling()}
    trace = make_trace(**columns)
    run = free_run(trace, np.tile(trace.token_ids[:40], 50))
    headline, _ = verdict_on(trace, run)
    assert (headline.key, run.distinct) == ("sampler_changed", (50, 1))
    assert "1 distinct completion (golden: 50)" in headline


def test_stops_are_judged_where_the_tokens_came_back():
    trace = make_trace(finish_reasons=np.ones(50))
    run = free_run(trace, finish_reasons=np.full(50, 2, np.uint8))
    assert (run.diverged, run.stops_changed) == (0, 50)
    headline, cause = verdict_on(trace, run)
    assert (headline.key, cause) == ("stops_elsewhere", None)
    assert "0 of 50 completions have other tokens, 50 stop at another position" in headline
    assert free_run(trace).same


def test_an_end_token_at_the_last_allowed_place_has_two_finish_reasons_and_either_passes():
    trace = make_trace(finish_reasons=np.ones(50), sampling=Sampling(max_tokens=40))
    run = free_run(trace, finish_reasons=np.full(50, 2, np.uint8))
    assert (run.stops_changed, run.relabelled, run.same) == (0, 50, False)
    assert verdict_on(trace, run) == (None, None)
    assert "50 report the other of two finish reasons that both hold" in str(run)


@pytest.mark.parametrize("by", [-1000.0, -9999.0, 1000.0])
def test_numbers_whose_ratios_under_or_overflow_fail_and_do_not_crash(by):
    trace = make_trace()
    result = compare(expected=trace, actual=trace.with_(logprobs=trace.logprobs + np.float32(by)))
    assert (result.verdict, result.metrics["ess"] <= 1) == ("fail", True)


def test_tokens_that_did_not_come_back_are_told_and_fail_at_level_bitwise():
    trace = make_trace()
    other = trace.token_ids.copy()
    other[-40:] += 1
    fewer = trace.with_(token_ids=other)
    told = compare(expected=trace, actual=fewer)
    assert told.passed
    assert "not_compared" in keys(told)
    assert [told.metrics[name] for name in ("n_tokens", "missing_sequences", "diverged_sequences")] == [1960, 0, 1]
    result = compare(expected=trace, actual=fewer, level="bitwise")
    assert (result.verdict, result.headline.key) == ("fail", "tokens_missing")
    assert result.headline.startswith("40 of the golden's 2000 tokens are missing in this run")


@pytest.mark.parametrize("name", ["torch.float32", "FLOAT32", "fp32"])
def test_a_dtype_is_known_by_its_other_names(name):
    assert make_trace(dtype=name).dtype == "float32"


def test_limits_for_a_dtype_that_nobody_knows_are_bfloat16s_and_say_so():
    trace = make_trace(dtype="unknown")
    result = compare(expected=trace, actual=trace.with_(logprobs=trace.logprobs + np.float32(1e-4)))
    (note,) = (note for note in result.notes if note.key == "no_floor")
    assert note.endswith("the defaults of bfloat16, because the dtype 'unknown' is not known")


def test_mostly_excluded_tokens_show_nothing():
    trace = make_trace()
    excluded = np.where(np.arange(2000) % 40 < 30, -np.inf, trace.logprobs).astype(np.float32)
    result = compare(expected=trace.with_(logprobs=excluded), actual=trace.with_(logprobs=excluded + np.float32(1e-4)))
    assert (result.verdict, result.headline.key, result.metrics["n_excluded"]) == ("unverified", "mostly_excluded", 1500)


def test_an_exclusion_that_the_runs_own_top_k_contradicts_was_reported_wrongly():
    trace = make_trace()
    top = trace.with_(top_token_ids=trace.token_ids[:, None], top_logprobs=trace.logprobs[:, None])
    lost = trace.logprobs.copy()
    lost[7] = -np.inf
    found = compare(expected=top, actual=top.with_(logprobs=lost)).findings[0]
    assert (found.cause, "-inf for 1 that its top-k keeps" in found.evidence) == ("wrong_values", True)


def test_a_free_run_decides_only_where_the_logprobs_agree():
    trace = make_trace(sampling=Sampling(temperature=1.0))
    run = free_run(trace, other_tokens(trace, 40))
    same = judged(trace, trace, setup="same", free_run=run)
    assert (same.verdict, same.findings[-1].cause) == ("fail", "seed_stream")
    worse = judged(trace, moved(trace, 0.1), setup="same", free_run=run)
    assert worse.headline.key == "not_close"
    assert not [f for f in worse.findings if f.layer == "sampling"]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_single_sequence_is_compared_bit_for_bit_and_shows_no_more(tmp_path):
    trace = make_trace(1)
    assert compare(expected=trace, actual=trace).verdict == "pass"
    result = compare(expected=trace, actual=moved(trace, 1e-6))
    assert result.verdict == "unverified"
    recorded = check_golden(tmp_path / "g.safetensors", trace, update=True)
    assert {"chance", "one_prompt"} <= set(keys(recorded))
    assert check_golden(tmp_path / "g.safetensors", trace).verdict == "pass"


def test_one_token():
    trace = make_trace(1, 1)
    assert compare(expected=trace, actual=trace).verdict == "pass"
    assert compare(expected=trace, actual=moved(trace, 1e-6)).verdict == "unverified"
    assert compare(expected=trace, actual=moved(trace, -7)).verdict == "fail"
    eight = make_trace(8, 1)
    assert compare(expected=eight, actual=moved(eight, 1e-6)).verdict == "pass"


def test_repeats_that_contain_nan_are_damage(tmp_path):
    trace = make_trace(mask=np.arange(2000) % 40 > 0)
    repeats = np.stack([trace.logprobs] * 3)
    repeats[:, ~trace.mask] = np.nan  # masked tokens have none
    path = tmp_path / "g.safetensors"
    Golden(trace=trace, floor=NoiseFloor(repeats, BatchCompositions(), reproduces=True)).save(path)
    assert Golden.load(path).floor.rms == 0
    repeats[1, 7] = np.nan
    Golden(trace=trace, floor=NoiseFloor(repeats, BatchCompositions(), reproduces=True)).save(path)
    with pytest.raises(GoldenError, match=r"damaged: .*its noise floor contains NaN"):
        Golden.load(path)


@pytest.mark.parametrize(
    "repeats", [np.zeros((1, 5), np.float32), np.zeros((3, 5)), np.zeros(5, np.float32)], ids=["one", "float64", "flat"]
)
def test_a_floor_that_is_none(repeats):
    with pytest.raises(UsageError, match=r"a noise floor is float32 \[2 or more repeats, tokens\]"):
        NoiseFloor(repeats, BatchCompositions(), reproduces=True)


@pytest.mark.parametrize(
    "wrong", [{"weights": (0.5, 0.6, 0, 0)}, {"batch_sizes": (0, 1, 2, 3)}, {"blocks": 0}, {"fillers": -1}]
)
def test_a_distribution_of_shapes_that_is_none(wrong):
    with pytest.raises(UsageError, match="BatchCompositions: "):
        BatchCompositions(**wrong)
    assert BatchCompositions.from_json(BatchCompositions().to_json()) == BatchCompositions()


def test_a_floor_without_a_number_says_nothing_and_one_of_other_tokens_is_refused(recwarn):
    trace = make_trace()
    floor = NoiseFloor(np.full((2, trace.num_tokens), np.nan, np.float32), BatchCompositions(), True)
    assert compare(expected=trace, actual=trace, floor=floor).verdict == "pass"
    assert not recwarn.list
    with pytest.raises(UsageError, match="the floor has 2000 tokens, the expected trace 80"):
        compare(expected=make_trace(2), actual=make_trace(2), floor=floor)


def test_a_floor_of_other_tokens_is_damage(tmp_path):
    trace = make_trace()
    floor = ShapeNoise(make_trace(51)).floor()
    Golden(trace=trace, floor=floor).save(tmp_path / "g.safetensors")
    with pytest.raises(GoldenError, match=r"its noise floor is \[5, 2040\], its tokens are 2000"):
        Golden.load(tmp_path / "g.safetensors")


def test_a_floor_comes_back_whole(tmp_path):
    trace = make_trace()
    floor = ShapeNoise(trace).floor()
    Golden(trace=trace, floor=floor, tolerance={"rms_diff": 0.1}).save(tmp_path / "g.safetensors")
    golden = Golden.load(tmp_path / "g.safetensors")
    np.testing.assert_array_equal(golden.floor.logprobs, floor.logprobs)
    assert (golden.floor.compositions, golden.floor.reproduces, golden.tolerance) == (
        BatchCompositions(),
        True,
        {"rms_diff": 0.1},
    )


def test_thousands_of_tokens_with_exactly_equal_logprobs(recwarn):
    trace = make_trace(200, 64, logprobs=np.full(12_800, -0.6931472))
    assert compare(expected=trace, actual=trace).verdict == "pass"
    assert compare(expected=trace, actual=moved(trace, np.where(np.arange(12_800) == 9, 1e-3, 0))).verdict == "pass"
    assert compare(expected=trace, actual=moved(trace, 0.01)).verdict == "fail"
    assert not recwarn.list


def test_tokens_excluded_on_both_sides_agree_and_are_compared(recwarn):
    trace = excluded(make_trace(sampling=Sampling(top_p=0.9)), 300)
    result = compare(expected=trace, actual=trace)
    assert (result.verdict, result.metrics["n_excluded"], result.metrics["coverage"]) == ("pass", 300, 1)
    assert compare(expected=trace, actual=moved(trace, 0.1)).verdict == "fail"
    assert not recwarn.list


def test_nothing_but_excluded_tokens_is_never_green(tmp_path):
    trace = excluded(make_trace(sampling=Sampling(top_p=0.9)), 2000)
    result = compare(expected=trace, actual=trace)
    assert (result.verdict, result.headline.key, result.metrics["n_tokens"]) == ("unverified", "nothing_compared", 0)
    with pytest.raises(UsageError, match="not recorded: it could never pass"):
        check_golden(tmp_path / "g.safetensors", trace, update=True)


@pytest.mark.parametrize("holes", [1, 200])
def test_a_golden_with_a_hole_could_never_pass_and_is_not_recorded(tmp_path, holes):
    trace = moved(make_trace(), np.where(np.arange(2000) < holes, np.nan, 0))
    assert compare(expected=trace, actual=trace).verdict == "fail"  # a hole on both sides would hide the next one
    with pytest.raises(UsageError, match=f"not recorded: it could never pass: {holes} of 2000 logprobs"):
        check_golden(tmp_path / "g.safetensors", trace, update=True)
    assert not (tmp_path / "g.safetensors").exists()


def test_a_comparison_is_json_whatever_it_holds():
    trace = make_trace()
    for actual in (trace, moved(trace, 0.1), moved(trace, np.nan)):
        told = compare(expected=trace, actual=actual).to_json()
        json.dumps(told, allow_nan=False)
        assert {"level", "setup", "difference", "shows", "gates"} <= set(told)


def test_where_nothing_was_compared_nothing_is_said_to_differ():
    trace = make_trace()
    gone = trace.with_(logprobs=np.full_like(trace.logprobs, -np.inf))
    result = compare(expected=gone, actual=gone)
    assert (result.verdict, result.difference.different, result.difference.key) == ("unverified", None, "nothing_compared")


# -- small goldens, short completions, other orders ----------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 4, 6])
def test_one_outlier_token_makes_no_outlier_sequence_however_short(length):
    trace = make_trace(64, length)
    change = np.zeros((64, length))
    change[3, 0] = -0.45  # within what one token may be off
    limits = {"mean_diff": 1, "k3": 1, "clip_share": 1}
    result = compare(expected=trace, actual=moved(trace, change.ravel()), tolerance=limits)
    assert (result.verdict, gate(result, "outlier_sequences").value) == ("pass", 0)
    change[:5] = -0.45  # whole sequences are something else
    result = compare(expected=trace, actual=moved(trace, change.ravel()), tolerance=limits)
    assert (result.verdict, gate(result, "outlier_sequences").value) == ("fail", 5)


def test_rollouts_in_another_order_find_their_partners():
    trace = make_trace(16, 8, group=np.repeat(np.arange(4), 4))
    order = np.random.default_rng(0).permutation(16)
    rows = np.concatenate([np.arange(*trace.bounds(i)) for i in order])
    shuffled = Trace.from_arrays(
        prompt_token_ids=trace.prompt_token_ids, prompt_offsets=trace.prompt_offsets, token_ids=trace.token_ids[rows],
        sequence_offsets=trace.sequence_offsets, logprobs=trace.logprobs[rows], group=trace.group[order],
        sampling=trace.sampling, dtype=trace.dtype,
    )  # fmt: skip
    result = compare(expected=trace, actual=shuffled)
    assert (result.verdict, result.metrics["coverage"]) == ("pass", 1.0)


def test_numbers_of_numpy_are_limits_too():
    trace = make_trace(16, 8)
    assert compare(expected=trace, actual=trace, tolerance={"rms_diff": np.float32(0.06)}).passed


def test_deep_inside_the_nucleus_goes_by_the_floors_rms_and_not_by_its_noisiest_token():
    repeats = np.zeros((5, 10_000), np.float32)
    repeats[0, 7] = 0.9
    floor = NoiseFloor(repeats, BatchCompositions(), True)
    assert with_floor(default_tolerance("bfloat16"), floor).support_depth == default_tolerance("bfloat16").support_depth


def test_other_bits_are_a_difference_where_no_shape_moved_one_and_matter_where_they_matter():
    trace = make_trace(200, 64)
    floor = NoiseFloor(np.stack([trace.logprobs] * 5), BatchCompositions(), True)
    now = moved(trace, -0.4 * (np.arange(12_800) == 5))
    for level, verdict in (("noise", "fail"), ("rl", "pass")):
        result = judged(trace, now, level=level, floor=floor, draw=lambda: now.logprobs)
        assert (result.verdict, result.difference.different) == (verdict, True)


# -- the free run -------------------------------------------------------------------------------------------------------


def test_few_rare_answers_come_and_go_by_chance_and_one_seed_for_a_group_does_not():
    rng = np.random.default_rng(3)

    def rollouts(answers):
        sequences = [
            {"prompt_token_ids": [1], "token_ids": [int(a), 2], "logprobs": [-0.1, -0.1], "ranks": [1, 1]} for a in answers
        ]
        return Trace.from_sequences(sequences, sampling=Sampling(temperature=0.7, n=64), dtype="bfloat16")

    def draw(main):
        return np.where(rng.random(64) < main, 0, rng.integers(10, 60, 64))

    failures = 0
    for _ in range(60):
        golden = rollouts(draw(0.9))
        free = compare_free_run(golden, rollouts(draw(0.9)), 0.25)
        failures += bool(judge_free_run(free, golden, exact=False, same_stream=False, mean_abs_diff=0)[0])
    assert failures == 0
    golden = rollouts(draw(0.2))
    free = compare_free_run(golden, rollouts([7] * 64), 0.25)
    assert free.distinct[1] == 1
    assert judge_free_run(free, golden, exact=False, same_stream=False, mean_abs_diff=0)[0].key == "sampler_changed"


def greedy_rollouts(tokens, gaps, ranks=None, top=True, **sampling):
    """Greedy rollouts of two tokens each: first 5 or 6, `gaps` nats below the other of the two."""
    sequences = []
    for prompt, (token, gap) in enumerate(zip(tokens, gaps, strict=True)):
        first = {token: -0.7 - gap, 11 - token: -0.7}
        rows = {"top_logprobs": [first, {2: -0.1}]} if top else {}
        rank = 1 + (gap > 0) if ranks is None else ranks
        sequences.append(
            {"prompt_token_ids": [prompt], "token_ids": [token, 2], "logprobs": [-0.7 - gap, -0.1], "ranks": [rank, 1], **rows}
        )
    return Trace.from_sequences(sequences, sampling=Sampling(temperature=0, **sampling), dtype="bfloat16")


def verdict_of_greedy(golden, regenerated, near_tie=0.25):
    free = compare_free_run(golden, regenerated, near_tie)
    return free, judge_free_run(free, golden, exact=False, same_stream=False, mean_abs_diff=0)[0]


@pytest.mark.parametrize("ties", [0, 3, 8])
def test_exact_ties_rank_second_and_are_as_likely(ties):
    """vLLM counts ranks with >=. The negative control: a token below the largest by more than a near tie."""
    golden = greedy_rollouts([5] * 8, [0.0] * 8, ranks=2)
    turned = [6] + [5] * 7
    free, headline = verdict_of_greedy(
        golden, greedy_rollouts(turned, [0.0] * 8).with_(ranks=np.array([2, 1] * ties + [1, 1] * (8 - ties), np.int32))
    )
    assert (free.diverged, free.not_likeliest, headline) == (1, (0, 0), None)
    free, headline = verdict_of_greedy(golden, greedy_rollouts(turned, [0.5] + [0.0] * 7))
    assert (headline.key, free.not_likeliest) == ("not_the_likeliest", (0, 1))
    assert "1 generated token is not the likeliest (golden: 0)" in headline


def test_a_near_tie_is_one_by_the_limit_that_the_caller_measured():
    golden, turned = greedy_rollouts([5] * 8, [0.0] * 8), greedy_rollouts([6] * 8, [0.1] * 8)
    for near_tie, counted in ((0.25, 0), (0.05, 8)):
        free, headline = verdict_of_greedy(golden, turned, near_tie)
        assert (free.not_likeliest[1], bool(headline)) == (counted, bool(counted))


def test_without_a_top_k_rank_2_may_be_an_exact_tie_and_rank_3_is_not():
    golden = greedy_rollouts([5] * 8, [0.0] * 8, top=False)
    for rank, fails in ((2, False), (3, True)):
        assert bool(verdict_of_greedy(golden, greedy_rollouts([6] * 8, [0.0] * 8, ranks=rank, top=False))[1]) is fails


def test_raw_logprobs_do_not_show_what_penalties_made_the_likeliest():
    """A few more such tokens are no evidence there; many more are."""
    golden = greedy_rollouts([5] * 40, [0.5] * 4 + [0.0] * 36, repetition_penalty=1.2).with_(logprobs_mode="raw_logprobs")
    for count, fails in ((7, False), (30, True)):
        other = greedy_rollouts([6] * 40, [0.5] * count + [0.0] * (40 - count), repetition_penalty=1.2)
        assert bool(verdict_of_greedy(golden, other.with_(logprobs_mode="raw_logprobs"))[1]) is fails


def test_greedy_that_takes_what_is_not_likeliest_fails_with_a_top_1_too():
    def rollouts(token, listed):
        top = {"logprobs": [-0.1, -0.1], "top_logprobs": [{listed: -0.1}, {2: -0.1}]}
        sequences = [top | {"prompt_token_ids": [i], "token_ids": [token, 2], "ranks": [1, 1]} for i in range(8)]
        return Trace.from_sequences(sequences, sampling=Sampling(temperature=0, logprobs=1), dtype="bfloat16")

    golden, below = rollouts(5, 5), np.tile(np.array([-2.4, -0.1], np.float32), 8)
    free, headline = verdict_of_greedy(golden, rollouts(6, 5).with_(logprobs=below))
    assert (headline.key, free.not_likeliest) == ("not_the_likeliest", (0, 8))
    free, headline = verdict_of_greedy(
        golden, rollouts(6, 6)
    )  # it says that they are: what the golden lists leaves them no room
    first = free.divergences[0]
    assert (headline.key, first.sequence, first.position) == ("not_the_likeliest", 0, 0)


# -- stops --------------------------------------------------------------------------------------------------------------


def ending(*last, reason="stop", temperature=0.7, gap=0.1):
    """20 rollouts [8, 9, *last]; the third token is `gap` nats from the likeliest other one."""
    tokens, logprobs = [8, 9, *last], [-0.1, -0.1, -0.6, *[-0.1] * (len(last) - 1)]
    tops = [{}, {}, {2: -0.6, 7: -0.6 - gap}, *[{}] * (len(last) - 1)]
    sequence = {"token_ids": tokens, "logprobs": logprobs, "top_logprobs": tops, "finish_reason": reason}
    sampling = Sampling(temperature=temperature, max_tokens=4)
    return Trace.from_sequences([{"prompt_token_ids": [i], **sequence} for i in range(20)], sampling=sampling)


@pytest.mark.parametrize(
    ("now", "diverged", "stopped"),
    [
        (ending(7, 7, reason="length"), 0, 20),  # the end token in the golden, another one now
        (ending(2, 7, reason="length"), 0, 20),  # the end token no longer ends it
        (ending(2, reason="length"), 0, 20),
        (ending(7), 20, 0),  # the negative control: another last token, and both end there
    ],
    ids=["other", "goes on", "cut", "control"],
)
def test_a_turn_that_ends_elsewhere_is_a_stop_however_it_does(now, diverged, stopped):
    for golden, other in ((ending(2), now), (now, ending(2))):
        free = compare_free_run(golden, other, 0.25)
        assert (free.diverged, free.stops_changed) == (diverged, stopped)
        assert f"{diverged} of 20 completions have other tokens" in str(free)
        assert ("20 stop at another position" in str(free)) == bool(stopped)


def test_an_end_token_that_was_not_drawn_is_chance_and_one_that_does_not_end_is_none():
    golden, drawn, ignored = ending(2), ending(7, 7, reason="length"), ending(2, 7, reason="length")
    for now, exact, fails in ((drawn, False, False), (drawn, True, True), (ignored, False, True)):
        free = compare_free_run(golden, now, 0.25)
        assert bool(judge_free_run(free, golden, exact=exact, same_stream=False, mean_abs_diff=0)[0]) is fails


def test_greedy_may_end_one_turn_later_by_a_near_tie_alone():
    for gap, fails in ((0.1, False), (0.6, True)):
        golden, now = ending(2, temperature=0.0, gap=gap), ending(7, 7, reason="length", temperature=0.0, gap=gap)
        now = now.with_(top_logprobs=now.top_logprobs[:, :0], top_token_ids=now.top_token_ids[:, :0])
        assert bool(verdict_of_greedy(golden, now)[1]) is fails
