"""Causes read off two traces, without an engine: each leaves its arithmetic behind, and kernel noise leaves none of it."""

import dataclasses
import json

import numpy as np
import pytest

from pytest_logprob_parity import Sampling, Trace, compare
from pytest_logprob_parity.comparison.evidence import Evidence
from pytest_logprob_parity.comparison.judge import judge
from pytest_logprob_parity.comparison.result import SIDES
from pytest_logprob_parity.comparison.tolerance import default_tolerance

VOCABULARY, SEQUENCES, LENGTH, PROMPT = 512, 60, 20, 12


def processed(logits, sampling, in_prompt, written):
    """Logprobs [..., V] as vLLM processes logits: penalties, temperature, truncation; in float64, by definition.

    `in_prompt` [..., V] says which tokens stand in the prompt, `written` [..., V] how often each was written before.
    """
    x = logits.copy()
    if sampling.allowed_token_ids:
        x[..., ~np.isin(np.arange(VOCABULARY), sampling.allowed_token_ids)] = -np.inf
    for token, bias in sampling.logit_bias:
        x[..., token] += bias
    seen = (written > 0) | in_prompt
    r = sampling.repetition_penalty
    x = np.where(seen, np.where(x > 0, x / r, x * r), x)
    x -= sampling.presence_penalty * (written > 0) + sampling.frequency_penalty * written
    x /= sampling.temperature
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    if not sampling.truncates:
        with np.errstate(divide="ignore"):
            return np.log(p)
    order = np.argsort(-p)
    falling = np.take_along_axis(p, order, -1)
    keep = np.cumsum(falling, -1) - falling < sampling.top_p
    if sampling.top_k:
        keep &= np.arange(VOCABULARY) < sampling.top_k
    keep &= falling >= sampling.min_p * falling[..., :1]
    logprobs = np.full(p.shape, -np.inf)
    with np.errstate(divide="ignore"):
        kept = np.where(keep, falling, 0)
        np.put_along_axis(logprobs, order, np.log(kept / kept.sum(-1, keepdims=True)), -1)
    return logprobs


class Policy:
    """Logits for every position, and traces of what an engine with this or that processing would report of its rollouts."""

    def __init__(self, sampling, seed=0, scale=2.5):
        self.sampling, self._traces = sampling, {}
        rng = np.random.default_rng(seed)
        self.logits = rng.normal(0, scale, (SEQUENCES, LENGTH, VOCABULARY)) + 2
        self.prompts = rng.integers(0, VOCABULARY, (SEQUENCES, PROMPT))
        self.in_prompt = (self.prompts[..., None] == np.arange(VOCABULARY)).any(1)[:, None]
        self.tokens = np.zeros((SEQUENCES, LENGTH), np.int64)
        self.written = np.zeros((SEQUENCES, LENGTH + 1, VOCABULARY), np.int64)
        for s in range(SEQUENCES):
            for i in range(LENGTH):
                self._repeat_some(rng, s, i)
                p = np.exp(processed(self.logits[s, i], sampling, self.in_prompt[s, 0], self.written[s, i]))
                self.tokens[s, i] = rng.choice(VOCABULARY, p=p / p.sum())
                self.written[s, i + 1] = self.written[s, i]
                self.written[s, i + 1, self.tokens[s, i]] += 1

    def _repeat_some(self, rng, s, i):
        """Raise a few tokens that stood before, so that positions have seen tokens among the likeliest."""
        known = np.concatenate([self.prompts[s], self.tokens[s, :i]])
        self.logits[s, i, rng.choice(known, 4)] += 5

    def trace(self, applied=None, *, k=5, noise=0.0, mode="processed_logprobs", change=None, dtype="float32", seed=1):
        """What an engine reports that applies `applied` (None: what was asked; "raw": nothing) to the policy's rollouts."""
        applied = self.sampling if applied is None else Sampling() if applied == "raw" else applied
        key = (self.logits[:2].tobytes(), self.sampling, applied, k, noise, mode, dtype, seed)
        if change is None and key in self._traces:
            return self._traces[key]
        rng = np.random.default_rng(seed)
        logits = self.logits + noise * rng.normal(size=self.logits.shape)
        table = processed(logits, applied, self.in_prompt, self.written[:, :-1]).reshape(-1, VOCABULARY)
        if change is not None:
            table = change(table)
        tokens = self.tokens.ravel()
        order = np.argsort(-table, axis=1, kind="stable")[:, :k]
        trace = Trace.from_arrays(
            prompt_token_ids=self.prompts.ravel(), prompt_offsets=np.arange(SEQUENCES + 1) * PROMPT, token_ids=tokens,
            sequence_offsets=np.arange(SEQUENCES + 1) * LENGTH, logprobs=table[np.arange(len(tokens)), tokens],
            top_token_ids=order, top_logprobs=np.take_along_axis(table, order, 1), sampling=self.sampling,
            logprobs_mode=mode, dtype=dtype, engine="made up", engine_version="1",
        )  # fmt: skip
        return trace if change is not None else self._traces.setdefault(key, trace)


_POLICIES = {}


def policy(**sampling):
    """The policy of a sampling, made once."""
    key = tuple(sorted(sampling.items()))
    if key not in _POLICIES:
        _POLICIES[key] = Policy(Sampling(**sampling))
    return _POLICIES[key]


def causes(comparison):
    """The semantic causes, named or first among the candidates."""
    return [f.cause or f.candidates[0] for f in comparison.findings if f.layer == "semantic"]


RECIPES = [
    {"temperature": 0.7},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 4},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
    {"temperature": 1.3},
    {"top_p": 0.9},
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.8},
    {"frequency_penalty": 0.6},
]


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_raw_for_processed_under_one_label_names_every_step_that_is_missing(recipe, noise):
    rollouts = policy(**recipe)
    result = compare(expected=rollouts.trace(k=8), actual=rollouts.trace("raw", noise=noise, k=8))
    steps = {"temperature": "temperature" in recipe, "truncation": {"top_p", "top_k"} & set(recipe),
             "penalties": any("penalty" in name for name in recipe)}  # fmt: skip
    assert result.verdict == "fail"
    assert causes(result)[0] == "raw_vs_processed", [str(f) for f in result.findings]
    assert set(causes(result)[1:]) == {name for name, there in steps.items() if there}, [str(f) for f in result.findings]
    other = compare(expected=rollouts.trace("raw", noise=noise, k=8), actual=rollouts.trace(k=8))
    assert causes(other)[0] == "raw_vs_processed", [str(f) for f in other.findings]


def one_less(recipe, *names):
    return Sampling(**{name: value for name, value in recipe.items() if name not in names})


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        (("temperature",), ["temperature"]),
        (("top_p",), ["truncation"]),
        (("repetition_penalty",), ["penalties"]),
        (("temperature", "top_p"), ["temperature", "truncation"]),
        (("temperature", "repetition_penalty"), ["temperature", "penalties"]),
        (("top_p", "repetition_penalty"), ["penalties", "truncation"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_several_causes_come_out_as_several(left_out, told, noise):
    recipe = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
    rollouts = policy(**recipe)
    actual = rollouts.trace(one_less(recipe, *left_out), noise=noise, k=8)
    result = compare(expected=rollouts.trace(k=8), actual=actual)
    assert causes(result) == told, [str(f) for f in result.findings]


def finding(result, cause):
    (found,) = [f for f in result.findings if cause in (f.cause, *f.candidates[:1])]
    return found


def test_a_temperature_is_named_with_its_value_and_uncertainty():
    rollouts = policy(temperature=0.7)
    result = compare(expected=rollouts.trace(), actual=rollouts.trace("raw"))
    text = "temperature 0.7 was applied to the golden and not to this run (fitted 0.7000 +- "
    assert text in str(finding(result, "temperature"))
    assert result.headline.key == "wrong_label"
    twice = compare(expected=rollouts.trace(), actual=rollouts.trace(Sampling(temperature=0.49)))
    assert "applied to this run and not to the golden, or twice to this run" in str(finding(twice, "temperature"))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_sides_with_names_of_their_own_are_called_by_them_in_every_sentence(recipe):
    rollouts = policy(**recipe)
    golden, raw = rollouts.trace(k=8), rollouts.trace("raw", k=8)
    swapped = golden.with_(logprobs=np.roll(golden.logprobs, 1))
    for expected, actual in ((golden, raw), (raw, golden), (golden, swapped), (golden, golden.with_(logprobs=raw.logprobs))):
        ours, others = (
            judge(expected, actual, default_tolerance("float32"), "rl", Evidence(sides=sides))
            for sides in (SIDES, ("rollout", "trainer"))
        )
        assert ours.findings
        notes = [[str(note) for note in c.notes if note.key != "no_floor"] for c in (ours, others)]  # of goldens alone
        texts = [[c.headline, *map(str, c.findings), *n, str(c.difference)] for c, n in zip((ours, others), notes, strict=True)]
        assert texts[1] == [text.replace("the golden", "the rollout").replace("this run", "the trainer") for text in texts[0]]


def test_a_finding_has_the_numbers_of_its_evidence():
    rollouts = policy(temperature=0.7, top_p=0.9, repetition_penalty=1.1)
    result = compare(expected=rollouts.trace(k=8), actual=rollouts.trace("raw", k=8))
    for cause, name, value in (("temperature", "temperature", 0.7), ("penalties", "repetition_penalty", 1.1)):
        values = finding(result, cause).values
        assert values[name] == pytest.approx(value, abs=5 * values["error"] + 1e-3)
        assert f"from {values['positions']:,} positions" in finding(result, cause).evidence
    told = json.loads(json.dumps(result.to_json()["findings"], allow_nan=False))
    assert [set(of["values"]) for of in told] == [set(found.values) for found in result.findings]


def test_a_temperature_that_nobody_recorded_is_a_candidate_beside_other_scales_of_the_logits():
    rollouts = policy(temperature=0.7)
    found = finding(compare(expected=rollouts.trace(), actual=rollouts.trace(Sampling(temperature=0.9))), "temperature")
    assert (found.cause, found.candidates[:2]) == (None, ("temperature", "weights_differ"))
    assert found.values["temperature"] == pytest.approx(0.9, abs=1e-3)


def test_top_p_is_bounded_by_kept_sets_and_not_guessed():
    rollouts = policy(top_p=0.9)
    found = finding(compare(expected=rollouts.trace(k=20), actual=rollouts.trace("raw", k=20)), "truncation")
    assert "top-p 0.9 was applied to the golden and not to this run: " in found.evidence
    assert f"{found.values['kept_mass']:.2%} of the probability on average" in found.evidence
    assert 0.9 <= found.values["kept_mass"] < 1
    low, high = found.values["top_p"]
    assert f"it may be top-p between {low:.4g} and {high:.4g}" in found.evidence
    assert 0.85 < low <= 0.9 <= high < 0.93


def test_a_truncation_wider_than_the_recorded_top_k_shows_in_the_tokens_that_it_excludes_and_in_those_that_it_raises():
    rollouts = policy(temperature=1.3)
    actual = rollouts.trace(Sampling(temperature=1.3, top_k=12), k=5)
    found = finding(compare(expected=rollouts.trace(k=5), actual=actual), "truncation")
    assert "a truncation was applied to this run and not to the golden: it raises all tokens of a position" in found.evidence
    assert " and it excludes " in found.evidence
    assert "top-5 logprobs do not show the whole truncated support: record more logprobs" in found.evidence


def test_a_truncation_that_excludes_no_token_in_hand_shows_in_the_mass_that_it_cuts_away():
    rollouts = policy(temperature=0.7)
    actual = rollouts.trace(Sampling(temperature=0.7, min_p=1e-4), k=5)
    kept = np.isfinite(actual.logprobs)
    expected, actual = (t.with_(mask=kept) for t in (rollouts.trace(k=5), actual))
    found = finding(compare(expected=expected, actual=actual), "truncation")
    assert "it raises all tokens of a position by one constant" in found.evidence
    assert "excludes" not in found.evidence


def test_a_constant_that_no_truncation_can_add_is_none():
    rollouts = policy(temperature=0.7)
    golden = rollouts.trace(k=5)
    for constant in (-0.1, 0.3):  # lowered; and raised by more than the mass that is not listed
        moved = golden.with_(logprobs=golden.logprobs + np.float32(constant),
                             top_logprobs=golden.top_logprobs + np.float32(constant))  # fmt: skip
        result = compare(expected=golden, actual=moved)
        assert (result.verdict, causes(result)) == ("fail", ["wrong_values"])


def test_a_kept_set_that_was_not_made_a_distribution_again():
    rollouts = policy(temperature=0.7, top_p=0.9)

    def lost(table):
        untruncated = rollouts.trace(Sampling(temperature=0.7), k=VOCABULARY)
        whole = np.empty_like(table)
        np.put_along_axis(whole, untruncated.top_token_ids.astype(int), untruncated.top_logprobs.astype(float), 1)
        return np.where(np.isfinite(table), whole, -np.inf)

    result = compare(expected=rollouts.trace(k=8), actual=rollouts.trace(k=8, change=lost))
    assert "was not followed by a renormalisation in this run" in str(finding(result, "truncation"))


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("on_golden", [True, False])
def test_a_penalty_is_named_with_its_value(penalty, on_golden):
    value = 1.2 if penalty == "repetition_penalty" else 0.7
    rollouts = policy(temperature=0.7)
    other = rollouts.trace(dataclasses.replace(rollouts.sampling, **{penalty: value}), k=10)
    sides = (other, rollouts.trace(k=10)) if on_golden else (rollouts.trace(k=10), other)
    found = finding(compare(expected=sides[0], actual=sides[1]), "penalties")
    assert f"{penalty.replace('_', ' ')} {value} was applied to {'the golden' if on_golden else 'this run'}" in found.evidence


@pytest.mark.parametrize(
    ("fault", "cause", "how"),
    [
        (lambda t: t.with_(logprobs=t.top_logprobs[:, 0]), "wrong_token", "likeliest token"),
        (lambda t: t.with_(logprobs=np.roll(t.logprobs, 1)), "shifted_positions", "the token before"),
        (lambda t: t.with_(logprobs=np.roll(t.logprobs, -1)), "shifted_positions", "the token after"),
        (lambda t: t.with_(logprobs=np.float32(t.logprobs / np.log(2))), "wrong_values", "log2"),
        (lambda t: t.with_(logprobs=np.maximum(t.logprobs, np.float32(-1.0))), "wrong_values", "clipped at -1"),
        (lambda t: t.with_(logprobs=np.repeat(t.logprobs.reshape(SEQUENCES, -1).mean(1), LENGTH)), "wrong_values", "one value"),
        (lambda t: t.with_(logprobs=t.logprobs.reshape(SEQUENCES, -1)[::-1].ravel()), "wrong_token", "other tokens"),
    ],
    ids=["dict order", "shift", "shift back", "log2", "clipped", "mean", "neighbour"],
)
def test_a_number_that_its_own_top_k_contradicts_was_reported_wrongly(fault, cause, how):
    trace = policy(temperature=0.7).trace(k=VOCABULARY // 8)
    found = compare(expected=trace, actual=fault(trace)).findings[0]
    assert (found.layer, found.cause) == ("semantic", cause)
    assert how in found.evidence


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (lambda x: -x, "of 1,200 positions: these are probabilities, or the sign is wrong"),
        (np.exp, "are above 0 at 1,200 of 1,200 positions"),
        (lambda x: np.maximum(x, -1.0), "probabilities of one position add up to more than 1"),
        (lambda x: x / np.log(2), "is 1.443 times the golden's, as log2 is of the natural logarithm"),
        (lambda x: x - 0.1, "is the golden's -0.1: no distribution is normalised like that"),
    ],
    ids=["sign", "probabilities", "clipped", "log2", "constant"],
)
@pytest.mark.parametrize("recipe", [{"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}], ids=str)
def test_numbers_that_are_no_logprobs_are_called_that_and_no_temperature(recipe, fault, how):
    trace = policy(**recipe).trace()
    kept = np.isfinite(trace.top_logprobs)
    actual = trace.with_(
        logprobs=np.float32(fault(trace.logprobs)), top_logprobs=np.where(kept, np.float32(fault(trace.top_logprobs)), -np.inf)
    )
    (found,) = compare(expected=trace, actual=actual).findings
    assert (found.layer, found.cause) == ("semantic", "wrong_values")
    assert how in found.evidence


@pytest.mark.parametrize("ks", [(0, 5), (1, 5), (5, 0), (5, 1)], ids=str)
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_a_side_that_lists_fewer_tokens_is_no_side_that_truncates(ks, noise):
    rollouts = policy(temperature=0.7, top_p=0.9)
    golden, now = (rollouts.trace(k=k or 1, noise=n) for k, n in zip(ks, (0.0, noise), strict=True))
    golden, now = (t if k else without_top_k(t) for k, t in zip(ks, (golden, now), strict=True))
    comparison = compare(expected=golden, actual=now)
    assert comparison.verdict == "fail"
    assert not causes(comparison)


def test_a_side_that_processes_otherwise_is_not_raw():
    rollouts = policy(temperature=0.7)
    other = Sampling(top_p=0.9, repetition_penalty=1.1)
    named = causes(compare(expected=rollouts.trace(), actual=rollouts.trace(other)))
    assert "temperature" in named
    assert "raw_vs_processed" not in named


def test_penalties_that_both_sides_have_are_not_named_beside_a_repetition_that_one_lacks():
    asked = {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2}
    rollouts = policy(**asked)
    without = Sampling(**{**asked, "repetition_penalty": 1.0})
    found = [f for f in compare(expected=rollouts.trace(), actual=rollouts.trace(without)).findings if f.layer == "semantic"]
    assert [f.evidence.partition(" (")[0] for f in found] == [
        "repetition penalty 1.1 was applied to the golden and not to this run"
    ]


def test_what_a_temperature_leaves_is_noted_where_more_is_wrong_and_not_where_it_is_alone():
    rollouts = policy(temperature=0.7)

    def notes(noise):
        actual = rollouts.trace("raw", noise=noise)
        return [note for note in compare(expected=rollouts.trace(), actual=actual).notes if note.key == "left_unexplained"]

    assert not notes(0.0)
    (note,) = notes(0.3)
    assert note.endswith("more than noise: weights or path differ, too")


def test_a_negative_penalty_is_one_of_two_readings():
    rollouts = policy(temperature=0.7)
    rewarded = rollouts.trace(Sampling(temperature=0.7, presence_penalty=-0.5))
    found = compare(expected=rollouts.trace(), actual=rewarded).findings[0]
    text = "presence penalty 0.5 was applied to the golden and not to this run, or -0.5 to this run and none to the golden"
    assert text in found.evidence


@pytest.mark.parametrize("recipe", [{"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "min_p": 0.1}], ids=str)
def test_beside_other_faults_no_limit_is_named_but_the_recorded_one(recipe):
    rollouts = policy(**recipe)
    comparison = compare(expected=rollouts.trace(), actual=rollouts.trace("raw", noise=0.3))
    (found,) = [f for f in comparison.findings if f.cause == "truncation"]
    name = found.evidence.partition(" was applied to the golden")[0]
    assert name in ("a truncation", "top-p 0.9" if "top_p" in recipe else "min-p 0.1")


def test_a_shift_is_seen_without_a_top_k_and_nothing_else_is():
    rollouts = policy(temperature=0.7)
    alone = without_top_k(rollouts.trace())
    shifted = compare(expected=alone, actual=alone.with_(logprobs=np.roll(alone.logprobs, 1)))
    assert shifted.findings[0].cause == "shifted_positions"
    raw = compare(expected=alone, actual=without_top_k(rollouts.trace("raw")))
    assert not causes(raw)
    assert any(
        note.key == "top_k" and note.startswith("top-0: both sides list two tokens at 0 positions; 50 are")
        for note in raw.notes
    )


def test_a_top_k_of_one_serves_where_another_token_was_chosen():
    rollouts = policy(temperature=0.7)
    assert causes(compare(expected=rollouts.trace(k=1), actual=rollouts.trace("raw", k=1)))[0] == "raw_vs_processed"


def without_top_k(trace):
    return trace.with_(top_token_ids=trace.top_token_ids[:, :0], top_logprobs=trace.top_logprobs[:, :0])


@pytest.mark.parametrize("noise", [0.03, 0.3])
@pytest.mark.parametrize("recipe", RECIPES[:5], ids=str)
def test_noise_is_given_no_semantic_cause(recipe, noise):
    """Least squares would make a temperature of 1.007 of logit noise 0.3."""
    rollouts = policy(**recipe)
    result = compare(expected=rollouts.trace(k=8, noise=noise, seed=2), actual=rollouts.trace(k=8, noise=noise))
    assert not causes(result), [str(f) for f in result.findings]


@pytest.mark.parametrize(
    ("asked", "applied", "cause"),
    [({}, {"presence_penalty": 0.05}, "penalties"), ({}, {"repetition_penalty": 1.01}, "penalties"),
     ({"top_p": 0.9}, {"top_p": 0.892}, "truncation")],
    ids=str,
)  # fmt: skip
def test_a_proven_meaning_fails_although_all_sizes_pass(asked, applied, cause):
    rollouts = Policy(Sampling(**asked), scale=1.5)
    golden = rollouts.trace(dtype="bfloat16", k=20, noise=0.003)
    again, other = (rollouts.trace(s, dtype="bfloat16", k=20, noise=0.003, seed=2) for s in (None, Sampling(**applied)))
    assert (compare(expected=golden, actual=again).verdict, causes(compare(expected=golden, actual=again))) == ("pass", [])
    result = compare(expected=golden, actual=other)
    assert (result.verdict, [gate.key for gate in result.gates if not gate.ok]) == ("fail", [])
    assert causes(result) == [cause]


def test_a_truncation_that_excludes_sampled_tokens_is_not_the_recorded_one():
    rollouts = Policy(Sampling(top_k=50), scale=1.5)
    result = compare(expected=rollouts.trace(k=20), actual=rollouts.trace(Sampling(top_k=45), k=20, seed=2))
    assert (result.verdict, causes(result)) == ("fail", ["truncation"])  # and not raw for processed


@pytest.mark.parametrize(
    ("asked", "scale", "noise"),
    [({"top_k": 20}, 1.0, 0.03), ({"top_k": 50}, 1.0, 0.03), ({"min_p": 0.1, "temperature": 1.5}, 1.0, 0.02),
     ({"top_p": 0.5}, 0.5, 0.02)],
    ids=str,
)  # fmt: skip
def test_noise_at_the_edge_of_kept_sets_is_no_truncation(asked, scale, noise):
    """A golden excludes none of its own tokens, so noise can only exclude some: flips have a budget, and prove nothing."""
    rollouts = Policy(Sampling(**asked), scale=scale)
    result = compare(expected=rollouts.trace(dtype="bfloat16"), actual=rollouts.trace(dtype="bfloat16", noise=noise, seed=2))
    assert result.metrics["support_flips"] > 2
    assert not causes(result), [str(f) for f in result.findings]


def test_ties_at_the_edge_of_a_top_k_are_no_other_top_k():
    """One engine keeps all that are as likely as the fourth, the other one exactly four."""
    rollouts = Policy(Sampling(top_k=4), scale=1.5)
    one = rollouts.trace(k=10, dtype="bfloat16")
    top = one.top_logprobs.copy()
    tied = np.arange(len(top)) % 5 == 0
    top[tied, 4] = top[tied, 3]
    more = np.log1p(np.exp(np.where(tied, top[:, 3], -np.inf)))
    other = one.with_(top_logprobs=(top - more[:, None]).astype(np.float32), logprobs=(one.logprobs - more).astype(np.float32))
    for golden, now in ((one, other), (other, one)):
        assert "truncation" not in causes(compare(expected=golden, actual=now))


@pytest.mark.parametrize("constant", [3e-5, 1e-3])
@pytest.mark.parametrize("asked", [{}, {"top_p": 0.95}], ids=str)
def test_one_constant_a_position_that_nobody_feels_is_no_truncation(asked, constant):
    """A normaliser that is summed in another order."""
    rollouts = Policy(Sampling(**asked), scale=1.0)
    golden = rollouts.trace(dtype="bfloat16")
    up = golden.with_(logprobs=golden.logprobs + np.float32(constant), top_logprobs=golden.top_logprobs + np.float32(constant))
    for expected, actual in ((golden, up), (up, golden)):
        assert compare(expected=expected, actual=actual).verdict == "pass"


def test_columns_that_were_rounded_to_bfloat16_are_normalised():
    rollouts = Policy(Sampling(top_k=8), scale=1.0)
    golden = rollouts.trace(k=20, dtype="bfloat16")

    def rounded(column):
        bits = column.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    top = np.where(np.isfinite(golden.top_logprobs), rounded(golden.top_logprobs), -np.inf).astype(np.float32)
    now = golden.with_(logprobs=rounded(golden.logprobs), top_logprobs=top)
    assert compare(expected=golden, actual=now).verdict == "pass"


def test_labels_that_differ_by_a_hair_need_the_numbers():
    rollouts = Policy(Sampling(temperature=0.7), scale=1.5)
    golden, now = rollouts.trace(dtype="bfloat16", k=0), rollouts.trace(dtype="bfloat16", k=0, noise=0.05, seed=2)
    labelled = now.with_(sampling=dataclasses.replace(now.sampling, temperature=0.7001))
    assert compare(expected=golden, actual=labelled).verdict == compare(expected=golden, actual=now).verdict == "unverified"
    far = now.with_(sampling=dataclasses.replace(now.sampling, temperature=0.8))
    assert compare(expected=golden, actual=far).verdict == "fail"


def test_a_cause_in_a_few_sequences_is_found_there():
    rollouts = policy(temperature=0.7)
    golden, raw = rollouts.trace(), rollouts.trace("raw")
    few = np.arange(golden.num_tokens) < 10 * LENGTH
    mixed = golden.with_(
        logprobs=np.where(few, raw.logprobs, golden.logprobs),
        top_logprobs=np.where(few[:, None], raw.top_logprobs, golden.top_logprobs),
    )
    found = finding(compare(expected=golden, actual=mixed), "temperature")
    assert "of 60 sequences: temperature 0.7 was applied to the golden" in found.evidence


def test_ten_thousand_tokens_are_named_too():
    rollouts = policy(**RECIPES[3])
    golden, raw = rollouts.trace(k=20), rollouts.trace("raw", k=20)
    times = -(-10_000 // golden.num_tokens)

    def longer(trace):
        return trace.with_(
            prompt_token_ids=np.tile(trace.prompt_token_ids, times), prompt_offsets=np.arange(times * SEQUENCES + 1) * PROMPT,
            token_ids=np.tile(trace.token_ids, times), sequence_offsets=np.arange(times * SEQUENCES + 1) * LENGTH,
            logprobs=np.tile(trace.logprobs, times), ranks=np.tile(trace.ranks, times), mask=np.tile(trace.mask, times),
            top_token_ids=np.tile(trace.top_token_ids, (times, 1)), top_logprobs=np.tile(trace.top_logprobs, (times, 1)),
            **{name: np.arange(times * SEQUENCES, dtype=getattr(trace, name).dtype) for name in ("group", "episode")},
            **{name: np.tile(getattr(trace, name), times) for name in ("finish_reasons", "sample", "turn", "seeds")},
        )  # fmt: skip

    expected, actual = longer(golden), longer(raw)
    result = compare(expected=expected, actual=actual)
    assert causes(result)[0] == "raw_vs_processed"


def with_logits(rollouts, logits):
    """The same rollouts, by an engine that computes other logits."""
    copy = object.__new__(Policy)
    copy.__dict__ = {**rollouts.__dict__, "logits": logits}
    return copy


def rounded_logits(rollouts, bits):
    """What an engine reports whose head gives its logits in so many bits of mantissa: 8 is bfloat16."""
    mantissa, exponent = np.frexp(rollouts.logits)
    return with_logits(rollouts, np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent)).trace(dtype="bfloat16")


def test_the_heads_precision_is_read_off_the_grid_that_logits_lie_on():
    rollouts = policy(temperature=0.7)
    fine, coarse = rollouts.trace(dtype="bfloat16"), rounded_logits(rollouts, 4)
    for sides, told in (
        ((coarse, fine), "the golden's logits lie on a grid of"),
        ((fine, coarse), "those of this run lie on a"),
    ):
        found = compare(expected=sides[0], actual=sides[1]).findings
        assert [(f.layer, f.cause) for f in found] == [("head", "head_precision")]
        assert told in found[0].evidence
    bent = rollouts.trace(dtype="bfloat16", change=lambda table: table - 0.05 * np.arange(VOCABULARY) % 3)
    assert not [f for f in compare(expected=rounded_logits(rollouts, 8), actual=bent).findings if f.layer == "head"]


def test_other_logits_under_top_p_are_no_truncation_and_another_top_p_is_one():
    rollouts = policy(top_p=0.9)
    golden = rollouts.trace(k=8, noise=0.02, seed=2)
    damage = np.random.default_rng(3).normal(size=rollouts.logits.shape)
    for logits in (1.15 * rollouts.logits + 0.3 * damage, 1.3 * rollouts.logits + 0.8 * damage, rollouts.logits + damage):
        other = with_logits(rollouts, logits).trace(k=8, noise=0.02)
        result = compare(expected=golden, actual=other)
        assert (result.verdict, "truncation" in causes(result)) == ("fail", False), [str(f) for f in result.findings]
    for limit in ({"top_p": 0.8}, {"top_p": 0.9, "top_k": 3}):
        assert causes(compare(expected=golden, actual=rollouts.trace(Sampling(**limit), k=8, noise=0.02))) == ["truncation"]


def test_a_few_tokens_excluded_by_chance_are_no_truncation():
    golden = policy(temperature=0.7, top_p=0.999).trace(k=2)
    unlisted = np.flatnonzero((golden.top_token_ids != golden.token_ids[:, None]).all(axis=1))
    for count, told in ((19, []), (120, ["truncation"])):
        out = np.isin(np.arange(golden.num_tokens), unlisted[:count])
        result = compare(expected=golden, actual=golden.with_(logprobs=np.where(out, np.float32(-np.inf), golden.logprobs)))
        assert causes(result) == told, [str(f) for f in result.findings]


@pytest.mark.parametrize("limit", [{"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 4}], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_token_excluded_in_one_sequence_is_no_truncation(limit, k):
    rollouts = policy(temperature=0.7, **limit)
    golden, noisy = rollouts.trace(k=k), rollouts.trace(noise=0.5, k=k)
    one = np.arange(golden.num_tokens) < LENGTH
    logprobs = np.where(one, noisy.logprobs, golden.logprobs)
    logprobs[LENGTH // 2] = -np.inf
    top = np.where(one[:, None], noisy.top_logprobs, golden.top_logprobs)
    ids = np.where(one[:, None], noisy.top_token_ids, golden.top_token_ids)
    top[LENGTH // 2][ids[LENGTH // 2] == golden.token_ids[LENGTH // 2]] = -np.inf
    result = compare(expected=golden, actual=golden.with_(logprobs=logprobs, top_logprobs=top, top_token_ids=ids))
    assert (result.verdict, causes(result)) == ("fail", []), [str(f) for f in result.findings]


@pytest.mark.parametrize("temperature", [0.5, 0.7, 1.4])
@pytest.mark.parametrize("penalty", [{"presence_penalty": 1.0}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.3}], ids=str)
def test_a_penalty_comes_out_the_same_whatever_the_temperature(temperature, penalty):
    rollouts = policy(temperature=temperature, **penalty)
    for applied in ((None, "raw"), ("raw", None)):
        sides = [rollouts.trace(a, k=10, noise=0.01, seed=seed) for seed, a in enumerate(applied, start=1)]
        result = compare(expected=sides[0], actual=sides[1])
        assert causes(result) == ["raw_vs_processed", "temperature", "penalties"], [str(f) for f in result.findings]
        assert f"penalty {next(iter(penalty.values())):g} was applied" in finding(result, "penalties").evidence


def test_temperatures_that_the_labels_name_are_told_as_they_name_them():
    rollouts = policy(temperature=0.5)
    half = Sampling(temperature=0.25)
    actual = rollouts.trace(half, noise=0.01)
    labelled = compare(expected=rollouts.trace(), actual=actual.with_(sampling=half))
    assert "temperature 0.25 instead of 0.5, as the labels say" in finding(labelled, "temperature").evidence
    unlabelled = compare(expected=rollouts.trace(), actual=actual)
    assert [f.cause for f in unlabelled.findings] == [None, "temperature"]
    assert "or it was applied twice" in unlabelled.findings[0].evidence


@pytest.mark.parametrize("fault", [
    lambda lp: np.where(np.arange(len(lp)) == 5, lp - np.float32(0.3), lp),
    lambda lp: np.round(lp, 3),
    lambda lp: lp.astype(np.float16).astype(np.float32),
], ids=["one token", "3 decimals", "float16"])  # fmt: skip
def test_few_or_rounded_numbers_do_not_hide_what_is_wrong_with_all(fault):
    rollouts = policy(temperature=0.7)
    golden, raw, same = rollouts.trace(noise=0.02, seed=2), rollouts.trace("raw", noise=0.02), rollouts.trace(noise=0.02)
    result = compare(expected=golden, actual=raw.with_(logprobs=fault(raw.logprobs)))
    assert causes(result) == ["raw_vs_processed", "temperature", "wrong_values"], [str(f) for f in result.findings]
    assert ("rounded, by" in result.findings[-1].evidence) == (np.count_nonzero(fault(raw.logprobs) != raw.logprobs) > 1)
    assert causes(compare(expected=golden, actual=same.with_(logprobs=fault(same.logprobs)))) in ([], ["wrong_values"])


def test_a_truncation_that_the_kept_sets_contradict_is_not_the_recorded_one():
    rollouts = policy(temperature=0.7, top_p=0.9)
    raw = rollouts.trace(Sampling(temperature=0.7), k=20, noise=0.01)
    for applied, told in (({"top_k": 3}, "top-k 3"), ({"top_p": 0.9}, "top-p 0.9"), ({"min_p": 0.2}, "min-p between ")):
        golden = rollouts.trace(Sampling(temperature=0.7, **applied), k=20)
        result = compare(expected=golden, actual=raw)
        assert finding(result, "truncation").evidence.startswith(told), str(result.findings[0])


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("chosen", [True, False])
def test_whole_rows_that_are_shifted(shift, chosen):
    rollouts = policy(temperature=0.7)
    golden, now = rollouts.trace(noise=0.02, seed=2), rollouts.trace(noise=0.02)
    moved = now.with_(top_token_ids=np.roll(now.top_token_ids, shift, 0), top_logprobs=np.roll(now.top_logprobs, shift, 0),
                      logprobs=np.roll(now.logprobs, shift) if chosen else now.logprobs)  # fmt: skip
    assert causes(compare(expected=golden, actual=moved))[:1] == ["shifted_positions"]


@pytest.mark.parametrize(
    ("recorded", "applied", "told"),
    [
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.3}, "repetition penalty 1.3 instead of the recorded 1.1"),
        ({"presence_penalty": 0.5}, {"presence_penalty": 1.5}, "presence penalty 1.5 instead of the recorded 0.5"),
        ({"repetition_penalty": 0.9}, {}, "repetition penalty 0.9 was applied to the golden and not to this run"),
        ({"presence_penalty": -0.5}, {}, "presence penalty -0.5 was applied to the golden and not to this run"),
    ],
    ids=str,
)
def test_a_penalty_that_was_recorded_is_told_from_there(recorded, applied, told):
    rollouts = policy(**recorded)
    actual = rollouts.trace(Sampling(**applied), k=10, noise=0.01)
    text = finding(compare(expected=rollouts.trace(k=10), actual=actual), "penalties").evidence
    value, _, rest = told.partition(" penalty ")[2].partition(" ")
    assert text.startswith(told.partition(" penalty ")[0])
    assert rest in text
    assert float(text.split()[2]) == pytest.approx(float(value), rel=0.03)


@pytest.mark.parametrize(
    "penalties",
    [{"presence_penalty": 0.5, "frequency_penalty": 0.3}, {"repetition_penalty": 1.2, "presence_penalty": 0.8}],
    ids=str,
)
def test_several_penalties_come_out_as_several_or_as_their_layer(penalties):
    rollouts = policy(**penalties)
    result = compare(expected=rollouts.trace(k=20), actual=rollouts.trace("raw", k=20, noise=0.01))
    told = [f.evidence for f in result.findings if "penalties" in (f.cause, *f.candidates)]
    assert [text.partition(" was ")[0] for text in told] == [f"{n.replace('_', ' ')} {v:g}" for n, v in penalties.items()], told
    assert not causes(compare(expected=rollouts.trace(k=20), actual=rollouts.trace(k=20, noise=0.02)))
    few = compare(expected=rollouts.trace(k=5), actual=rollouts.trace("raw", k=5, noise=0.01))
    assert set(causes(few)) <= {"penalties", "raw_vs_processed"}
    assert " instead of " not in str(few)


@pytest.mark.parametrize(
    ("recorded", "applied"),
    [
        ({"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}, {}),
        ({}, {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}),
        ({}, {"repetition_penalty": 1.2, "presence_penalty": 0.5}),
        ({"repetition_penalty": 1.2}, {"presence_penalty": 0.5}),
        ({"presence_penalty": 0.5}, {"repetition_penalty": 1.2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_each_of_several_penalties_has_its_value(recorded, applied, temperature):
    rollouts = policy(temperature=temperature, **recorded)
    actual = rollouts.trace(Sampling(temperature=temperature, **applied), k=8)
    told = [f.evidence for f in compare(expected=rollouts.trace(k=8), actual=actual).findings if f.cause == "penalties"]
    asked = [(name, value, "the golden") for name, value in recorded.items()] + [(n, v, "this run") for n, v in applied.items()]
    assert len(told) == len(asked), told
    for name, value, side in asked:
        text = next(text for text in told if text.startswith(f"{name.replace('_', ' ')} {value:g} was applied to {side}"))
        assert float(text.partition("(fitted ")[2].split()[0]) == pytest.approx(value, rel=0.005), text


@pytest.mark.parametrize("penalty", [{"presence_penalty": 0.5}, {"frequency_penalty": 0.3}], ids=str)
@pytest.mark.parametrize("scale", [0.9, 1.15])
def test_logits_of_another_scale_are_told_from_a_temperature_by_a_penalty_that_both_sides_have(penalty, scale):
    """A temperature divides what a penalty has lowered; logits that come out larger do so before it."""
    rollouts = policy(temperature=0.7, **penalty)
    scaled = compare(expected=rollouts.trace(), actual=with_logits(rollouts, scale * rollouts.logits).trace())
    (found,) = scaled.findings
    assert (found.layer, found.cause, found.candidates) == ("weights", None, ("weights_differ", "head_precision"))
    divided = compare(expected=rollouts.trace(), actual=rollouts.trace(Sampling(temperature=0.7 / scale, **penalty)))
    assert causes(divided) == ["temperature"], [str(f) for f in divided.findings]


@pytest.mark.parametrize("fillers", ["likely", "none"])
def test_top_p_is_bounded_whatever_ids_an_engine_gives_to_places_that_it_does_not_use(fillers):
    """vLLM lists tokens that top-p excludes with -inf: low ids, which may be likely ones."""
    rollouts = policy(temperature=0.7, top_p=0.9)
    golden, raw = rollouts.trace(k=12), rollouts.trace("raw", k=12)
    out = np.isneginf(golden.top_logprobs)
    ids = np.where(out, -1, golden.top_token_ids)
    if fillers == "likely":
        last = raw.top_token_ids[:, -1]
        ids[:, -1] = np.where(out[:, -1] & (golden.token_ids != last), last, ids[:, -1])
    result = compare(expected=golden.with_(top_token_ids=ids), actual=raw)
    assert causes(result) == ["raw_vs_processed", "temperature", "truncation"]
    low, high = finding(result, "truncation").values["top_p"]
    assert low - 0.01 <= 0.9 <= high + 0.01
    assert high - low < 0.06


@pytest.mark.parametrize("on_golden", [True, False])
@pytest.mark.parametrize("limit", [{"top_p": 0.9}, {"top_k": 60}], ids=str)
def test_a_truncation_of_flat_distributions_is_told_by_the_mass_that_it_cuts_away(limit, on_golden):
    """All kept sets are wider than the list, and top-p leaves the same mass everywhere: nearly one constant for all numbers."""
    rollouts = Policy(Sampling(**limit), scale=0.2)
    cut, free = rollouts.trace(), rollouts.trace("raw")
    result = compare(expected=cut if on_golden else free, actual=free if on_golden else cut)
    side = "the golden and not to this run" if on_golden else "this run and not to the golden"
    assert finding(result, "truncation").evidence.startswith(f"a truncation was applied to {side}: it raises all tokens")
    assert set(causes(result)) <= {"truncation", "raw_vs_processed"}


@pytest.mark.parametrize("noise", [0.03, 0.06])
def test_a_temperature_is_within_its_error_where_noise_decides_what_top_p_keeps(noise):
    rollouts = policy(temperature=0.7, top_p=0.9)
    golden, now = rollouts.trace(noise=noise, seed=2), rollouts.trace(Sampling(temperature=1.0, top_p=0.9), noise=noise)
    text = finding(compare(expected=golden, actual=now), "temperature").evidence
    assert text.startswith("temperature 0.7 was applied to the golden and not to this run")
    fitted, _, error = text.partition("(fitted ")[2].split()[:3]
    assert abs(float(fitted) - 0.7) < 3 * float(error)


def test_what_a_top_k_of_one_may_not_show_is_said():
    rollouts = policy(temperature=0.7, top_p=0.9)
    for k, told in ((1, True), (5, False)):
        result = compare(expected=rollouts.trace(k=k), actual=rollouts.trace("raw", k=k))
        assert any(note.key == "top_k" and note.startswith("top-1: ") for note in result.notes) is told


def test_a_mixture_with_other_tokens_is_no_penalty():
    rollouts = policy(temperature=0.7)
    probabilities = np.exp(rollouts.logits - rollouts.logits.max(-1, keepdims=True))
    mixed = np.log(0.9 * probabilities + 0.1 / VOCABULARY * probabilities.sum(-1, keepdims=True))
    result = compare(expected=rollouts.trace(noise=0.02, seed=2), actual=with_logits(rollouts, mixed).trace(noise=0.02))
    assert (result.verdict, "penalties" in causes(result)) == ("fail", False), [str(f) for f in result.findings]


@pytest.mark.parametrize("cap", [20, 30, 50])
def test_logits_that_are_soft_capped_are_no_penalty(cap):
    """The likeliest tokens often stood before, and are bent most: so are others that are as likely."""
    rollouts = policy(temperature=0.7)
    capped = with_logits(rollouts, cap * np.tanh(rollouts.logits / cap)).trace()
    result = compare(expected=rollouts.trace(), actual=capped)
    assert (result.verdict, "penalties" in causes(result)) == ("fail", False), [str(f) for f in result.findings]


PLACE = np.tile(np.arange(LENGTH), SEQUENCES)


def may_end(least, seed=0):
    """A change of a table: a token that ends sequences is likely now and then, and left out before `least`."""
    end = int(np.setdiff1d(np.arange(VOCABULARY), policy().tokens)[0])
    share = np.random.default_rng(seed).exponential(0.2, SEQUENCES * LENGTH).clip(max=0.9)

    def change(table):
        p = np.exp(table)
        p[:, end] = np.where(least > PLACE, 0, p.sum(axis=1) * share / (1 - share))
        with np.errstate(divide="ignore"):
            return np.log(p / p.sum(axis=1, keepdims=True))

    return end, change


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_min_tokens_on_one_side_is_named_by_the_token_that_the_other_leaves_out(noise):
    (end, keeps), (_, ends) = may_end(8), may_end(0)
    asked = Sampling(min_tokens=8)
    golden = policy().trace(change=keeps).with_(sampling=asked)
    now = policy().trace(change=ends, noise=noise).with_(sampling=asked)
    for one, other in ((golden, now), (now, golden)):
        (finding,) = compare(expected=one, actual=other, tolerance={"noise_rms": 1e-3}).findings
        assert (finding.layer, finding.cause) == ("semantic", "min_tokens")
        assert f"token {end} there" in finding.evidence
    bare = golden.with_(top_logprobs=golden.top_logprobs[:, :0], top_token_ids=golden.top_token_ids[:, :0])
    off = np.where(PLACE // 8 == 0, 0.3 * (PLACE % 2), 0)
    told = compare(expected=bare, actual=bare.with_(logprobs=(bare.logprobs - off).astype(np.float32)))
    assert not any(f.cause == "min_tokens" for f in told.findings)  # nothing shows which token it would be


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_exactly_the_first_tokens_are_no_weights_doing(noise):
    def first(table):
        flatter = 0.6 * table - np.log(np.exp(0.6 * table).sum(axis=1, keepdims=True))
        return np.where(PLACE[:, None] == 0, flatter, table)

    (finding,) = compare(expected=policy().trace(), actual=policy().trace(change=first, noise=noise)).findings
    assert (finding.layer, finding.cause, finding.candidates[0]) == ("path", None, "chunked_prefill")
    some = policy().trace(change=lambda table: np.where(PLACE[:, None] % 5 == 0, first(np.roll(table, 1, 0)), table))
    assert all(f.candidates[:1] != ("chunked_prefill",) for f in compare(expected=policy().trace(), actual=some).findings)


def test_nan_in_a_row_says_that_the_others_have_none():
    golden = policy().trace()
    now = golden.with_(
        logprobs=np.where(np.arange(golden.num_tokens) // LENGTH == 3, np.nan, golden.logprobs).astype(np.float32)
    )
    finding = compare(expected=golden, actual=now).findings[0]
    assert (finding.layer, finding.candidates[0]) == ("path", "engine_build")
    assert f"in 1 of {SEQUENCES} sequences: wrong weights would cause them in all" in finding.evidence


def test_too_few_positions_for_a_temperature_prove_no_truncation():
    rollouts = policy(temperature=0.7, top_p=0.9)
    golden, raw = rollouts.trace(k=8), rollouts.trace("raw", k=8)
    few = np.arange(golden.num_tokens) < 2 * LENGTH
    assert not causes(compare(expected=golden.with_(mask=few), actual=raw.with_(mask=few)))


def test_a_top_k_that_lists_no_more_than_is_kept_says_so():
    rollouts = policy(temperature=0.7, top_k=4)
    for k, unsure in ((4, True), (8, False)):
        result = compare(expected=rollouts.trace(k=k), actual=rollouts.trace("raw", k=k))
        assert (
            any(note.key == "top_k" and "top-k 4 is not visible, record logprobs=5" in note for note in result.notes) == unsure
        )


# -- named tokens -----------------------------------------------------------------------------------------------------

BIAS = {token: 1.5 if token % 8 else -1.0 for token in range(0, VOCABULARY, 4)}


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(("share", "told"), [(0, "was applied to the golden and not to this run"), (2, "2.0")])
def test_a_recorded_logit_bias_that_one_side_lacks_or_has_twice_is_named(share, told, noise):
    rollouts = policy(temperature=0.7, logit_bias=tuple(BIAS.items()))
    other = dataclasses.replace(rollouts.sampling, logit_bias={t: share * b for t, b in BIAS.items()})
    result = compare(expected=rollouts.trace(k=10), actual=rollouts.trace(other, k=10, noise=noise))
    found = finding(result, "logit_bias")
    assert result.verdict == "fail"
    assert told in found.evidence
    assert abs(found.values["share"] - share) < 0.05
    assert causes(result) == ["logit_bias"]
    assert compare(expected=rollouts.trace(k=10), actual=rollouts.trace(k=10, noise=noise / 10)).verdict == "pass"


def test_a_logit_bias_that_nobody_recorded_is_read_off_the_tokens_that_it_moves():
    rollouts = policy(temperature=0.7)
    often = int(np.bincount(rollouts.trace(k=40).top_token_ids.ravel()).argmax())
    biased = dataclasses.replace(rollouts.sampling, logit_bias={often: 1.25})
    result = compare(expected=rollouts.trace(k=40), actual=rollouts.trace(biased, k=40))
    assert finding(result, "logit_bias").values["tokens"] == {str(often): pytest.approx(1.25, abs=0.01)}


def test_tokens_that_only_the_recorded_sampling_excludes_are_named():
    rollouts = policy(temperature=0.7, allowed_token_ids=tuple(range(0, VOCABULARY, 2)))
    free = dataclasses.replace(rollouts.sampling, allowed_token_ids=())
    result = compare(expected=rollouts.trace(k=10), actual=rollouts.trace(free, k=10))
    assert (result.verdict, causes(result)[0]) == ("fail", "banned_tokens")
    assert "allowed_token_ids was applied to the golden and not to this run" in finding(result, "banned_tokens").evidence


def test_tokens_that_only_this_run_excludes_are_named():
    rollouts = policy(temperature=0.4)
    gone = np.bincount(rollouts.tokens.ravel(), minlength=VOCABULARY).argsort()[-3:].tolist()
    kept = tuple(t for t in range(VOCABULARY) if t not in gone)
    result = compare(
        expected=rollouts.trace(k=10), actual=rollouts.trace(Sampling(temperature=0.4, allowed_token_ids=kept), k=10)
    )
    assert result.verdict == "fail"
    assert "a ban of" in finding(result, "banned_tokens").evidence
