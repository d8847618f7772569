"""Frameworks: their formulas, metrics and readers; the packages' own functions; the miniature repos on a real engine.

For every framework: its formula against float64 - its own function (where it is installed) against its formula - both, on a
real model, against the transformers scorer - its reader against the trace that the batch was made of.
"""

import dataclasses
import importlib.util
import json
import math
import random
import re
from types import SimpleNamespace

import arith
import numpy as np
import pytest
import torch

from conftest import MODEL, ROOT
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    MismatchError,
    Sampling,
    Trace,
    TransformersScorer,
    UsageError,
    assert_trainer_parity,
)
from pytest_logprob_parity.spec import PROFILES, RL_ON_CPU
from pytest_logprob_parity.trainer.frameworks import FRAMEWORKS, framework
from pytest_logprob_parity.trainer.frameworks.base import Pairs
from pytest_logprob_parity.trainer.frameworks.verl import MODES as VERLS_MODES
from pytest_logprob_parity.trainer.scoring import score
from pytest_logprob_parity.trainer.transformers_scorer import entropy_of

EXAMPLES = ROOT / "examples" / "frameworks"
#: Those whose packages `make test` installs: these tests fail where one of them is missing.
REAL = ("trl", "verl")
#: They give no temperature to their trainer.
DTYPES = {"trl": "float32"}  # of their miniature repos; the others' is bfloat16
WITHOUT_T = ("nemo-aligner", "deepspeed-chat")
#: Rounding of the formulas at |logprob| of about 10, in nats.
ROOM = {torch.float64: 2e-6, torch.float32: 2e-6, torch.bfloat16: 0.15}


def example(name):
    """The module that makes a batch of a trace in a framework's miniature repo."""
    spec = importlib.util.spec_from_file_location(f"batch_of_{name.replace('-', '_')}", EXAMPLES / name / "batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for key, value in vars(module).items() if key.endswith("_of"))


@pytest.fixture(scope="module")
def scorer():
    return TransformersScorer(MODEL)


@pytest.fixture(scope="module")
def rollouts(scorer):
    """12 answers to 6 problems, with the tiny model's own float32 logprobs at T=0.7."""
    rng = random.Random(5)
    ids = scorer.tokenizer
    sequences = []
    for _ in range(6):
        problem = arith.make_problem(rng)
        chat = [{"role": "user", "content": problem.question}]
        prompt = ids.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        for _ in range(2):
            answer = ids(arith.make_answer(problem, rng), add_special_tokens=False)["input_ids"]
            sequences.append({"prompt_token_ids": prompt, "token_ids": answer, "logprobs": [-1.0] * len(answer)})
    about = {"sampling": Sampling(temperature=0.7), "engine": "vllm", "dtype": "float32"}
    blank = Trace.from_sequences(sequences, **about)
    scored = score(blank, scorer)
    noise = np.random.default_rng(0).normal(0, 1e-6, blank.num_tokens)
    return blank.with_(logprobs=np.minimum(scored.logprobs + noise, 0).astype(np.float32))


@pytest.fixture
def with_a_tool(rollouts):
    """The same with a tool's tokens in the middle of every second completion."""
    mask = rollouts.mask.copy()
    for i in range(0, rollouts.num_sequences, 2):
        start, stop = rollouts.bounds(i)
        mask[start + (stop - start) // 3 : start + (stop - start) // 2] = False
    return rollouts.with_(mask=mask, logprobs=np.where(mask, rollouts.logprobs, 0).astype(np.float32))


# -- formulas ---------------------------------------------------------------------------------------------------------


def logits_and_ids(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(3, 17, 500, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(500, (3, 17), generator=generator)


def exact(logits, ids, temperature):
    return (logits.double() / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_formula_is_that_of_float64(name, dtype, temperature):
    logits, ids = logits_and_ids(dtype)
    before = logits.clone()
    values = framework(name).logprobs(logits, ids, temperature)
    wanted = exact(logits, ids, 1.0 if name in WITHOUT_T else temperature)
    assert values.shape == ids.shape
    assert (values.double() - wanted).abs().max() <= ROOM[dtype]
    assert torch.equal(before, logits)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_the_dtype_a_framework_answers_in(name):
    """Half-precision logits: some make float32 of them, the others round every logprob."""
    logits, ids = logits_and_ids(torch.bfloat16)
    values = framework(name).logprobs(logits, ids, 1.0)
    in_float32 = name in ("trl", "openrlhf", "nemo-rl")
    assert values.dtype == (torch.float32 if in_float32 else torch.bfloat16)
    off = (values.double() - exact(logits, ids, 1.0)).abs().max()
    assert off < 2e-6 if in_float32 else off > 1e-3


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_where_a_framework_divides(name):
    """float16 logits near its largest number: / 0.7 overflows in that dtype, and does not in float32."""
    logits, ids = torch.full((1, 1, 4), 60000.0, dtype=torch.float16), torch.tensor([[1]])
    value = float(framework(name).logprobs(logits, ids, 0.7)[0, 0])
    assert math.isfinite(value) == (name in WITHOUT_T or framework(name).divides == "float32")


def test_nemo_aligner_by_a_large_gap():
    logits = torch.zeros(1, 1, 4)
    logits[0, 0, 1] = 200.0
    assert float(framework("nemo-aligner").logprobs(logits, torch.tensor([[2]]), 1.0)) == -200.0


# -- the packages' own functions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REAL)
def test_the_real_function_is_the_formula(name, dtype, temperature):
    logits, ids = logits_and_ids(dtype)
    real = framework(name).installed()(logits.clone(), ids, temperature)
    formula = framework(name).logprobs(logits, ids, temperature)
    assert real.dtype == formula.dtype
    assert (real - formula).abs().max() <= (2e-6 if formula.dtype == torch.float32 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trls_fused_head(dtype):
    """The formula is that of the kernel which GRPOTrainer calls on hidden states: float32, 1 / T after the matrix product."""
    from trl.kernels import ChunkedLogProbFunction

    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 64, generator=generator).to(dtype) / 3 for n in (40, 500))
    ids = torch.randint(500, (40,), generator=generator)
    real = ChunkedLogProbFunction.apply(hidden, weight, None, ids, 0.7, 4096)[0]
    formula = framework("trl").logprobs(hidden @ weight.T, ids, 0.7)
    assert real.dtype == formula.dtype == torch.float32
    assert (real - formula).abs().max() <= 4e-6


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_are_those_of_trl_and_verl(temperature):
    from trl.trainer.utils import entropy_from_logits as trls
    from verl.utils.torch_functional import entropy_from_logits as verls

    logits = logits_and_ids(torch.float64)[0] / temperature
    logits[..., 7] = -torch.inf  # a word that is left out has no part in it
    ours = entropy_of(logits, logits.logsumexp(-1))
    for theirs in (trls, verls):
        assert (ours - theirs(logits.clamp(min=-1e4))).abs().max() <= 1e-9


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", [name for name in FRAMEWORKS if name not in REAL])
def test_others_say_what_is_missing_or_agree(name, temperature):
    logits, ids = logits_and_ids(torch.float32)
    try:
        real = framework(name).installed()
    except EngineError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith(f"{framework(name).title}'s own function is not available: ")
        assert "\n" not in said
        return
    before = logits.clone()
    assert (real(logits, ids, temperature) - framework(name).logprobs(logits, ids, temperature)).abs().max() <= 2e-6
    assert torch.equal(before, logits)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_scores_as_transformers_does(name, rollouts, scorer):
    """By the real function where it is installed, on the logits of a real model."""
    theirs = framework(name).scorer(scorer.model)
    own = "'s own function on" if name in REAL else ("'s own function on", "'s formula on")
    assert any(part in theirs.name for part in ([own] if isinstance(own, str) else own))
    plain = rollouts.with_(sampling=Sampling()) if name in WITHOUT_T else rollouts
    ours, values = score(plain, scorer), score(plain, theirs)
    assert np.abs(values.logprobs - ours.logprobs).max() <= 2e-6
    assert values.dtype == "float32"


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sides():
    """Rollout and trainer logprobs [B, L] in float64, their mask, and the same as Pairs; the last row has no token."""
    rng = np.random.default_rng(3)
    rollout = -rng.exponential(0.7, (6, 30))
    trainer = np.minimum(rollout + rng.normal(0, 0.5, rollout.shape) + 2 * (rng.random(rollout.shape) < 0.05), 0)
    mask = np.arange(30) < np.array([30, 12, 1, 25, 7, 0])[:, None]
    row = np.nonzero(mask)[0]
    return rollout, trainer, mask, Pairs(rollout=rollout[mask], trainer=trainer[mask], sequence=row, sequences=len(mask))


def agree(got, wanted, rel=1e-9):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=rel, abs=1e-9), name


def test_trls_metrics(sides):
    rollout, trainer, mask, pairs = sides
    apart = np.abs(trainer - rollout)[mask]
    ratio = np.array([math.exp((row * m).sum()) for row, m in zip(trainer - rollout, mask, strict=True)])
    assert (ratio > 3).any()
    ratio[ratio > 3.0] = 0.0
    agree(
        framework("trl").metrics(pairs),
        {
            "sampling/sampling_logp_difference/mean": apart.mean(),
            "sampling/sampling_logp_difference/max": apart.max(),
            "sampling/importance_sampling_ratio/min": ratio.min(),
            "sampling/importance_sampling_ratio/mean": ratio.mean(),
            "sampling/importance_sampling_ratio/max": ratio.max(),
        },
    )


@pytest.mark.parametrize("threshold", [2.0, "0.5_2.0"])
@pytest.mark.parametrize("level", ["token", "sequence", None])
def test_verls_metrics_are_those_of_verl(sides, level, threshold):
    """Against the functions of the installed package, by its configuration."""
    from verl import DataProto
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
    from verl.utils.debug.metrics import calculate_debug_metrics

    rollout, trainer, mask, pairs = sides
    old, new, m = torch.tensor(trainer), torch.tensor(rollout), torch.tensor(mask).long()
    settings = {"rollout_is": level, "rollout_is_threshold": threshold, "rollout_is_batch_normalize": level is not None}
    _, _, theirs = compute_rollout_correction_and_rejection_mask(old, new, m, **settings)
    batch = {"responses": m, "old_log_probs": old, "rollout_log_probs": new, "response_mask": m}
    theirs |= calculate_debug_metrics(DataProto.from_dict(tensors=batch))
    assert len(theirs) > (25 if level else 15)
    verl = framework("verl")
    ours = verl.metrics(pairs, **verl.configured({"algorithm": {"rollout_correction": settings}}))
    # float32 where veRL makes float32 of it
    agree(ours, {name: float(value) for name, value in theirs.items()}, rel=1e-5)


def test_verls_entropy_is_that_of_its_mode(sides):
    from verl.trainer.ppo.core_algos import agg_loss

    *_, mask, pairs = sides
    entropies = np.random.default_rng(4).exponential(0.5, mask.shape)
    pairs, verl = dataclasses.replace(pairs, entropies=entropies[mask]), framework("verl")
    for mode in VERLS_MODES:
        actor = {"loss_agg_mode": mode, "loss_scale_factor": 40}
        config = {"algorithm": {"rollout_correction": {"rollout_is": None}}, "actor_rollout_ref": {"actor": actor}}
        ours = verl.metrics(pairs, **verl.configured(config))["actor/entropy"]
        theirs = agg_loss(torch.tensor(entropies), torch.tensor(mask).double(), mode, loss_scale_factor=40)
        assert ours == pytest.approx(float(theirs), rel=1e-7), mode
    assert "actor/entropy" not in verl.metrics(pairs, loss_agg_mode="seq-mean-token-sum-norm")  # by a width that is not known
    with pytest.raises(UsageError, match="loss_agg_mode='mean': known are token-mean"):
        verl.metrics(pairs, loss_agg_mode="mean")
    assert framework("trl").metrics(pairs)["entropy"] == pytest.approx(entropies[mask].mean())


def test_openrlhfs_metrics(sides):
    rollout, trainer, mask, pairs = sides
    ratio = np.exp(trainer - rollout)
    wanted = {
        "vllm_kl": (rollout - trainer)[mask].sum() / mask.sum(),
        "is_filter_ratio": ((ratio < 0.5) | (ratio > 5.0))[mask].sum() / mask.sum(),
    }
    assert wanted["is_filter_ratio"] > 0
    agree(framework("openrlhf").metrics(pairs), wanted)


def test_nemo_rls_metrics(sides):
    g, p, mask, pairs = sides
    n = mask.sum() + 1e-8
    middle = np.log(0.5 * np.exp(p) + 0.5 * np.exp(g))
    js = 0.5 * (np.exp(p - middle) - (p - middle) - 1) + 0.5 * (np.exp(g - middle) - (g - middle) - 1)
    wanted = {
        "token_mult_prob_error": (np.exp(np.abs(g - p) * mask) * mask).sum() / n,
        "gen_kl_error": ((np.exp(p - g) - (p - g) - 1) * mask).sum() / n,
        "policy_kl_error": ((np.exp(g - p) - (g - p) - 1) * mask).sum() / n,
        "js_divergence_error": (js * mask).sum() / n,
        "sampling_importance_ratio": (np.exp(p - g) * mask).sum() / n,
        "approx_entropy": -(np.exp(p - g) * p * mask).sum() / n,
    }
    agree(framework("nemo-rl").metrics(pairs), wanted)


def test_nemo_aligners_metrics(sides):
    rollout, trainer, mask, pairs = sides
    ratio = torch.tensor(np.exp(trainer - rollout)[mask])
    wanted = {"ppo_ratio": ratio.mean().item(), "ppo_ratio_clamped": ratio.clamp(0.8, 1.2).mean().item()}
    agree(framework("nemo-aligner").metrics(pairs), wanted)


def test_pipelinerls_metrics(sides):
    old, new, mask, pairs = sides
    lengths = mask.sum(1)

    def samples(x):
        return sum((row * m).sum() / n for row, m, n in zip(x, mask, lengths, strict=True) if n) / len(mask)

    ratio = np.exp(new - old)
    wanted = {
        "rl/kl_new_old": samples(ratio - (new - old) - 1),
        "rl/ratio_new_old": samples(ratio),
        "rl/mean_abs_log_ratio_new_old": samples(np.abs(new - old)),
        "rl/clamp_log_ratio_new_old_indicator": samples((ratio < 0.98) | (ratio > 1.02)),
        "rl/new_logprobs": samples(new),
        "rl/old_logprobs": samples(old),
        "rl/ess": ratio[mask].sum() ** 2 / (ratio[mask] ** 2).sum() / mask.sum(),
    }
    agree(framework("pipelinerl").metrics(pairs), wanted)


def test_deepspeed_chat_logs_nothing_and_says_so(rollouts):
    logged = framework("deepspeed-chat").log(rollouts, rollouts)
    assert logged.metrics == {}
    assert logged.lines == ("deepspeed-chat: logs no metric of its rollouts and its trainer",)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_metrics_of_no_tokens_and_of_absurd_ones(name):
    nothing = np.empty(0)
    framework(name).metrics(Pairs(rollout=nothing, trainer=nothing, sequence=np.empty(0, np.int64), sequences=3))
    rollout, trainer = np.array([-1e4, -1.0]), np.array([-0.1, -1e4])
    far = framework(name).metrics(Pairs(rollout=rollout, trainer=trainer, sequence=np.array([0, 0]), sequences=1))
    assert not any(math.isnan(value) for key, value in far.items() if "pearson" not in key)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_thresholds_are_those_of_metrics_and_tolerances_are_limits(name, rollouts, scorer):
    row = framework(name)
    assert set(row.thresholds) <= set(row.log(rollouts, rollouts).metrics)
    assert_trainer_parity(rollouts, row.scorer(scorer.model), tolerance=name) if name not in WITHOUT_T else None
    assert row.mistakes


def test_what_is_beyond_a_threshold_is_marked(rollouts):
    worse = rollouts.with_(logprobs=rollouts.logprobs - np.float32(0.3))
    text = "\n".join(framework("nemo-rl").log(rollouts, worse).lines)
    assert "token_mult_prob_error 1.35 (normal: 0.999999 to 1.05)" in text
    assert all(len(line) <= 120 for line in framework("verl").log(rollouts, worse).lines)


# -- readers ----------------------------------------------------------------------------------------------------------


def same_rollouts(read, wanted, places=None):
    places = range(wanted.num_sequences) if places is None else places
    assert read.num_sequences == len(places)
    for got, i in enumerate(places):
        assert read.prompt(got) == wanted.prompt(i)
        assert read.completion(got) == wanted.completion(i)
        (a, b), (c, d) = read.bounds(got), wanted.bounds(i)
        assert read.mask[a:b].tolist() == wanted.mask[c:d].tolist()
        assert read.logprobs[a:b].tolist() == wanted.logprobs[c:d].tolist()


@pytest.mark.parametrize("name", ["trl", "verl", "openrlhf", "nemo-rl"])
def test_a_batch_is_read_as_the_trace_it_was_made_of(name, with_a_tool):
    batch = example(name)(with_a_tool)
    for given in (batch, {key: value.numpy() for key, value in batch.items()}, SimpleNamespace(**batch)):
        read = framework(name).read(given, sampling=with_a_tool.sampling, dtype="float32")
        same_rollouts(read, with_a_tool)
        assert read.sampling == with_a_tool.sampling
        assert (read.engine, read.dtype, read.logprobs_mode) == ("vllm", "float32", "processed_logprobs")


def test_a_real_dataproto_is_read(rollouts):
    from verl import DataProto

    batch = DataProto.from_dict(tensors=example("verl")(rollouts), meta_info={"temperature": 0.7})
    same_rollouts(framework("verl").read(batch, sampling=rollouts.sampling), rollouts)


@pytest.mark.parametrize("name", WITHOUT_T)
def test_trainers_without_engine_logprobs_are_read_as_raw(name, rollouts, scorer):
    read = framework(name).read(example(name)(rollouts, scorer))
    assert (read.logprobs_mode, read.path, read.engine) == ("raw_logprobs", "prefill", name)
    raw = score(rollouts.with_(sampling=Sampling()), scorer)
    assert read.completion(3) == rollouts.completion(3)
    # the padded side moves nothing but the last digits
    assert np.abs(read.logprobs - raw.logprobs).max() < 1e-4


def test_pipelinerls_records_are_read(rollouts, scorer, tmp_path):
    records = example("pipelinerl")(rollouts, scorer.tokenizer)
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    objects = [SimpleNamespace(**record) for record in records]
    for given in (records, objects, str(path)):
        read = framework("pipelinerl").read(given, sampling=rollouts.sampling, tokenizer=scorer.tokenizer)
        same_rollouts(read, rollouts)
        assert read.weight_versions.tolist() == [0] * rollouts.num_tokens
        assert read.num_prompts == rollouts.num_prompts
        assert read.token_texts


@pytest.mark.parametrize("prompts", [True, False], ids=["older trainer", "use_v1"])
def test_verls_hook_checks_what_its_debug_metrics_are_given(rollouts, scorer, monkeypatch, prompts):
    """Its own function on its own DataProto; `use_v1` hands over no prompts."""
    from verl import DataProto
    from verl.utils.debug import metrics as module

    monkeypatch.setattr(module, "calculate_debug_metrics", module.calculate_debug_metrics)  # put back afterwards
    batch = dict(example("verl")(rollouts))
    if not prompts:
        batch = {name: batch[name] for name in ("responses", "response_mask", "rollout_log_probs")}
    right = batch["rollout_log_probs"] - 1e-4 * batch["response_mask"]
    checks = framework("verl").watch(every=2, dtype="bfloat16", trainer_dtype="bfloat16", temperature=0.7)
    assert "training/rollout_probs_diff_max" in module.calculate_debug_metrics(
        DataProto.from_dict({**batch, "old_log_probs": right})
    )
    off = DataProto.from_dict({**batch, "old_log_probs": torch.roll(right, 1, 1)})
    module.calculate_debug_metrics(off)  # the second one is not looked at
    assert [check.verdict for check in checks] == ["pass"]
    with pytest.raises(MismatchError) as failed:
        module.calculate_debug_metrics(off)
    assert failed.value.comparison.findings[0].cause == "shifted_positions"


def test_rows_of_async_grpo_are_read(rollouts):
    """TRL's own RolloutSample, which has prompt and completion in one; a token of a tool is masked."""
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    rows = []
    for i in range(rollouts.num_sequences):
        prompt, written, (a, b) = rollouts.prompt(i), rollouts.completion(i), rollouts.bounds(i)
        mask = np.r_[np.zeros(len(prompt), np.int64), np.ones(len(written), np.int64)]
        rows.append(
            RolloutSample(
                prompt=[],
                completion=[],
                input_ids=np.array(prompt + written),
                completion_mask=mask,
                old_log_probs=np.r_[np.zeros(len(prompt), np.float32), rollouts.logprobs[a:b]],
                advantage=0.0,
                model_version=3,
                group_id=0,
                metrics={},
            )
        )
    trl = framework("trl")
    read = trl.read(rows, sampling=rollouts.sampling)
    same_rollouts(read, rollouts)
    assert set(read.weight_versions.tolist()) == {3}
    rows[2].completion_mask[len(rollouts.prompt(2)) + 1] = 0
    assert trl.read(rows, sampling=rollouts.sampling).mask.sum() == rollouts.num_tokens - 1
    rows[1].completion_mask[:] = 0
    assert trl.read(rows, sampling=rollouts.sampling).num_sequences == rollouts.num_sequences - 1
    rows[0].old_log_probs = rows[0].old_log_probs[1:]
    with pytest.raises(UsageError, match=r"^trl: row 0 has \d+ input_ids, \d+ of completion_mask, \d+ old_log_probs$"):
        trl.read(rows)
    with pytest.raises(UsageError, match="row 0 has no input_ids"):
        trl.read([{"prompt": "1 + 1"}])


def test_pipelinerls_own_texts_and_the_trainers_recomputation_are_read(rollouts, scorer):
    """Its `make_training_text` lays the chat template over a completion that ends in its end token: the text has two."""
    tokenizer = scorer.tokenizer
    records = example("pipelinerl")(rollouts, tokenizer)
    for i, record in enumerate(records):
        written = tokenizer.decode(rollouts.completion(i), skip_special_tokens=False)
        record["text"] = tokenizer.decode(rollouts.prompt(i)) + written + "<|end|>"
        record["new_logprobs"] = [value - 0.001 for value in record["logprobs"]]
    records[0]["text"] += "<|end|>"
    read = framework("pipelinerl").read(records, sampling=rollouts.sampling, tokenizer=tokenizer)
    same_rollouts(read.with_(trainer_logprobs=None), rollouts)
    assert np.abs(read.trainer_logprobs - rollouts.logprobs + 0.001).max() < 1e-6
    records[3]["text"] = records[3]["text"].removesuffix("<|end|>") + " and more<|end|>"
    with pytest.raises(UsageError, match="the text of record 3 is not the text of its token ids"):
        framework("pipelinerl").read(records, tokenizer=tokenizer)
    records[3] = {**records[2], "new_logprobs": records[2]["new_logprobs"][1:]}
    with pytest.raises(UsageError, match=r"record 3 has .* new_logprobs and .* logprobs: one for each label"):
        framework("pipelinerl").read(records)
    del records[3]["new_logprobs"]
    with pytest.raises(UsageError, match="new_logprobs"):
        framework("pipelinerl").read(records)


def test_jagged_rows_of_verl_are_read_with_the_trainers_column(rollouts):
    """What `trainer.use_v1` holds: nested tensors, no padding and no attention_mask."""
    from tensordict import TensorDict

    bounds = [rollouts.bounds(i) for i in range(rollouts.num_sequences)]

    def nested(rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    logprobs = [rollouts.logprobs[a:b] for a, b in bounds]
    batch = {
        "prompts": nested([rollouts.prompt(i) for i in range(len(bounds))]),
        "responses": nested([rollouts.completion(i) for i in range(len(bounds))]),
        "response_mask": nested([np.ones(b - a, np.int64) for a, b in bounds]),
        "rollout_log_probs": nested(logprobs),
        "old_log_probs": nested([row - np.float32(0.001) for row in logprobs]),
    }
    read = framework("verl").read
    held = read(TensorDict(batch, batch_size=len(bounds)), sampling=rollouts.sampling, dtype="float32")
    same_rollouts(held, rollouts)
    assert held.trainer_logprobs == pytest.approx(rollouts.logprobs - 0.001, abs=1e-6)
    for column, line in (
        (nested([np.exp(row) for row in logprobs]), "are these probabilities?"),
        (nested([row[:-1] for row in logprobs]), "entries, responses have"),
        (torch.zeros(len(bounds), 3), "is padded and the responses are jagged"),
    ):
        with pytest.raises(UsageError, match=line):
            read({**batch, "old_log_probs": column})


@pytest.mark.parametrize("padding", [0, 5], ids=["as it is by default", "the tokenizer's"])
def test_jagged_rows_that_verl_padded_are_read(rollouts, padding):
    """Its own `to_padded_tensor()`: everything is padded on the right, and there is no attention_mask."""
    from tensordict import TensorDict
    from verl import DataProto

    rollouts = rollouts.with_(prompt_token_ids=np.where(rollouts.prompt_token_ids == padding, 1, rollouts.prompt_token_ids))
    count = rollouts.num_sequences

    def nested(rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    columns = {
        "prompts": [rollouts.prompt(i) for i in range(count)],
        "responses": [rollouts.completion(i) for i in range(count)],
        "response_mask": [np.ones(len(rollouts.completion(i)), np.int64) for i in range(count)],
        "rollout_log_probs": [rollouts.logprobs[slice(*rollouts.bounds(i))] for i in range(count)],
    }
    columns["old_log_probs"] = [row - np.float32(0.001) for row in columns["rollout_log_probs"]]
    columns["entropy"] = [-row for row in columns["rollout_log_probs"]]
    jagged = TensorDict({name: nested(rows) for name, rows in columns.items()}, batch_size=count)
    padded = jagged.to_padded_tensor(padding=padding)
    for name in set(columns) - {"prompts", "responses"}:
        padded[name] = jagged[name].to_padded_tensor(padding=0)
    read, tokenizer = framework("verl").read, SimpleNamespace(pad_token_id=padding, batch_decode=lambda ids: map(str, ids))
    for batch in (padded, DataProto(batch=padded)):
        held = read(batch, sampling=rollouts.sampling, dtype="float32", tokenizer=tokenizer)
        same_rollouts(held, rollouts)
        assert held.trainer_logprobs == pytest.approx(rollouts.logprobs - 0.001, abs=1e-6)
        assert held.trainer_entropies == pytest.approx(-rollouts.logprobs)
    if padding:
        with pytest.raises(UsageError, match=rf"prompts of row \d+ end with \d+ times token {padding}, .*give the tokenizer"):
            read(padded)


TRAINERS = {
    "trl": ("sampling_per_token_logps", "old_per_token_logps"), "verl": ("rollout_log_probs", "old_log_probs"),
    "openrlhf": ("rollout_log_probs", "action_log_probs"), "nemo-rl": ("generation_logprobs", "prev_logprobs"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_a_batch_brings_the_trainers_column_with_it(name, rollouts):
    batch, (engines, trainers) = example(name)(rollouts), TRAINERS[name]
    own, read = batch[engines], framework(name).read
    assert read(batch).trainer_logprobs is None
    held = read({**batch, trainers: own - 0.01})
    assert held.trainer_logprobs == pytest.approx(held.logprobs - 0.01, abs=1e-6)
    for wrong, line in (
        (own[:, :-1], "expected"), (own.exp(), "is at most 0; are these probabilities?"), (own * 0, "has not computed it"),
        (own.long(), "logprobs are floats"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=line):
            read({**batch, trainers: wrong})


def test_nan_stays_nan_and_none_becomes_it(rollouts):
    batch = example("trl")(rollouts)
    batch["sampling_per_token_logps"][0, 1] = math.nan
    read = framework("trl").read(batch)
    assert np.isnan(read.logprobs[1])
    assert np.isnan(read.logprobs).sum() == 1
    lists = {key: value.tolist() for key, value in example("trl")(rollouts).items()}
    lists["sampling_per_token_logps"][0][1] = None
    assert np.isnan(framework("trl").read(lists).logprobs[1])


def test_bfloat16_logprobs_are_read(rollouts):
    batch = example("verl")(rollouts)
    batch["rollout_log_probs"] = batch["rollout_log_probs"].bfloat16()
    assert np.abs(framework("verl").read(batch).logprobs - rollouts.logprobs).max() < 0.05


# -- the traps --------------------------------------------------------------------------------------------------------


def with_(**changes):
    """A change of a batch: each value a function of the column, or what it becomes; None takes it away."""

    def change(batch):
        for name, value in changes.items():
            if value is None:
                del batch[name]
            else:
                batch[name] = value(batch[name]) if callable(value) else value
        return batch

    return change


def at(place, value):
    def change(column):
        column = column.clone()
        column[place] = value
        return column

    return change


def flipped(column):
    return column.flip(1)


def shifted_right(column):
    return column.roll(1, 1)


def one_less(column):
    return column[:, 1:]


def one_more(column):
    return torch.nn.functional.pad(column, (1, 0))


TRAPS = [
    ("trl", with_(sampling_per_token_logps=one_less), "sampling_per_token_logps is [12, N], expected [12, N]: one for each of"),
    ("trl", with_(sampling_per_token_logps=shifted_right), "the column is shifted by a token, or the mask was overwritten"),
    ("trl", with_(sampling_per_token_logps=None), "no sampling_per_token_logps in this batch: TRL has them with use_vllm"),
    ("trl", with_(sampling_per_token_logps=torch.zeros_like), "is 0.0 everywhere: it stands for missing logprobs"),
    ("trl", with_(sampling_per_token_logps=at(3, 0.0)), "of row 3 is 0.0 for all of N tokens: it stands for missing logprobs"),
    ("trl", with_(sampling_per_token_logps=lambda c: c * math.nan), "is NaN everywhere: the engine gave no logprobs"),
    ("trl", with_(sampling_per_token_logps=torch.exp), "a logprob is at most 0; are these probabilities?"),
    ("trl", with_(prompt_mask=flipped), "prompt_mask of row 2 is padded on the right; expected padding on the left"),
    ("trl", with_(completion_mask=flipped), "is padded on the left; expected padding on the right"),
    ("trl", with_(completion_mask=at((0, 2), 0)), "completion_mask of row 0 has a hole at 2: expected one run of ones"),
    ("trl", with_(completion_mask=torch.zeros_like), "mask_truncated_completions hides all of them"),
    ("trl", with_(completion_mask=at((0, 0), 2)), "completion_mask holds 2: a mask has zeros and ones"),
    ("trl", with_(completion_ids=lambda c: c.float()), "completion_ids is float32 [12, N]: token ids are whole numbers"),
    ("trl", with_(prompt_ids=lambda c: c[1:], prompt_mask=lambda c: c[1:]), "11 rows of prompt_ids, 12 of completion_ids"),
    ("trl", with_(completion_ids=None), "no completion_ids in this batch; it has prompt_ids, prompt_mask, "),
    ("verl", with_(rollout_log_probs=None), "no rollout_log_probs in this batch: veRL has them with actor_rollout_ref.rollout"),
    ("verl", with_(rollout_log_probs=one_more), "rollout_log_probs is [12, N], expected [12, N]: one for each of responses"),
    ("verl", with_(rollout_log_probs=shifted_right), "the column is shifted by a token, or the mask was overwritten"),
    (
        "verl",
        with_(response_mask=at(0, 0)),
        "where by the mask the engine wrote nothing: the column is shifted by a token, or",
    ),
    (
        "verl",
        with_(response_mask=torch.ones_like),
        "response_mask is 1 where attention_mask is 0: it belongs to other responses",
    ),
    ("verl", with_(attention_mask=one_less), "attention_mask is [12, N], expected [12, N]: prompts and responses"),
    ("verl", with_(attention_mask=at((slice(None), 0), 1)), "attention_mask of the prompts of row 2 has a hole at 1"),
    ("verl", with_(prompts=lambda c: c[1:]), "11 rows of prompts, 12 of responses"),
    (
        "verl",
        with_(responses=lambda c: torch.nested.nested_tensor(list(c))),
        "prompts is padded and the responses are jagged: give all columns as the trainer made them",
    ),
    ("openrlhf", with_(rollout_log_probs=None), "OpenRLHF asks its engine for them only if is_correction_level is not"),
    ("openrlhf", with_(rollout_log_probs=one_more), "one less than sequences, place t for token t + 1"),
    ("openrlhf", with_(action_mask=one_more), "action_mask is [12, N], expected [12, N]: one less than sequences"),
    ("openrlhf", with_(rollout_log_probs=shifted_right), "the column is shifted by a token, or the mask was overwritten"),
    ("openrlhf", with_(attention_mask=flipped), "is padded on the left; expected padding on the right"),
    ("openrlhf", with_(attention_mask=at((0, slice(30, None)), 0)), "action_mask of row 0 marks token "),
    ("openrlhf", with_(prompts=["some other text"] * 12), "prompts[0] is not the text of its token ids from character 0 on"),
    ("nemo-rl", with_(generation_logprobs=one_less), "its loss cuts the first one off"),
    ("nemo-rl", with_(generation_logprobs=shifted_right), "the column is shifted by a token, or the mask was overwritten"),
    ("nemo-rl", with_(generation_logprobs=torch.zeros_like), "is 0.0 everywhere"),
    ("nemo-rl", with_(token_mask=one_less), "token_mask is [12, N], expected [12, N]: that of input_ids"),
    ("nemo-rl", with_(input_lengths=lambda c: c - 4), "token_mask of row 0 marks token N, input_lengths is N"),
    ("nemo-rl", with_(sample_mask=lambda c: c[1:]), "sample_mask is [11], expected [12]: one for each row of input_ids"),
    ("nemo-rl", with_(token_mask=at((0, 0), 1)), "marks the first token of the row, which cannot have a logprob"),
    ("nemo-aligner", with_(logprobs=one_more), "one less than response_tokens, place t for token t + 1"),
    ("nemo-aligner", with_(response_lengths=lambda c: c * 0 + 3), "response_lengths counts the prompt too"),
    ("nemo-aligner", with_(prompt_lengths=None), "no prompt_lengths in this batch; it has response_tokens, "),
    ("deepspeed-chat", with_(logprobs=one_more), "one less than input_ids, place t for token t + 1"),
    ("deepspeed-chat", with_(input_ids=lambda c: c.flip(0)), "input_ids do not begin with prompts: rows were dropped"),
    ("deepspeed-chat", with_(attention_mask=at((0, -1), 1)), "is a pad token inside?) of row 0 has a hole"),
    ("deepspeed-chat", with_(attention_mask=at((slice(None), 0), 1)), "of the prompts of row 2 has a hole at 1"),
]


@pytest.mark.parametrize(("name", "change", "line"), TRAPS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(TRAPS)])
def test_a_trap_is_refused_in_a_line(name, change, line, rollouts, scorer):
    batch = change(example(name)(*((rollouts, scorer) if name in WITHOUT_T else (rollouts,))))
    with pytest.raises(UsageError) as refused:
        framework(name).read(batch, tokenizer=scorer.tokenizer)
    text = str(refused.value)
    assert text.startswith(f"{name}: ")
    assert "\n" not in text
    assert _shape(line) in _shape(text)


def _shape(text):
    return "".join("0" if c.isdigit() or c == "N" else c for c in text).replace("000", "0").replace("00", "0")


def record_with(**changes):
    def change(records):
        records[1] = {**records[1], **{k: v(records[1]) if callable(v) else v for k, v in changes.items()}}
        return records

    return change


RECORD_TRAPS = [
    (record_with(logprobs=lambda r: r["logprobs"][:-1]), "logprobs for N labels: one for each label that is not -100"),
    (record_with(labels=lambda r: r["labels"][1:]), "input_ids and N labels"),
    (record_with(labels=lambda r: [*r["labels"][1:], -100]), "has -100 inside or after its completion: PipelineRL puts"),
    (
        record_with(
            labels=lambda r: [*r["labels"][:-3], -100, *r["labels"][-2:]],
            logprobs=lambda r: r["logprobs"][:-1],
        ),
        "has -100 inside or after its completion",
    ),
    (record_with(labels=lambda r: [i if i == -100 else i + 1 for i in r["labels"]]), "has labels that are not its input_ids"),
    (record_with(labels=lambda r: r["input_ids"], logprobs=lambda r: [-1.0] * len(r["input_ids"])), "has no prompt"),
    (record_with(labels=lambda r: [-100] * len(r["labels"])), "logprobs for 0 labels"),
    (record_with(logprobs=None), "record 1 has no logprobs"),
    (record_with(input_ids=lambda r: [float(i) for i in r["input_ids"]]), "input_ids are whole numbers, one for each token"),
    (record_with(prompt_tokens=5), "prompt ids, the server counted 5: it used another chat template"),
    (record_with(text=lambda r: r["text"].replace("=", " =")), "the text of record 1 is not the text of its token ids from"),
    (
        record_with(logprobs=lambda r: [0.0] * len(r["logprobs"])),
        "logprobs of record 1 is 0.0 everywhere: it stands for missing",
    ),
    (record_with(metadata={"model_version": "abc"}), "record 1 has model_version 'abc': a version of the weights is a whole"),
    (lambda records: [], "no records"),
]


@pytest.mark.parametrize(("change", "line"), RECORD_TRAPS, ids=range(len(RECORD_TRAPS)))
def test_a_records_trap_is_refused_in_a_line(change, line, rollouts, scorer):
    records = change(example("pipelinerl")(rollouts, scorer.tokenizer))
    with pytest.raises(UsageError) as refused:
        framework("pipelinerl").read(records, tokenizer=scorer.tokenizer)
    assert str(refused.value).startswith("pipelinerl: ")
    assert "\n" not in str(refused.value)
    assert _shape(line) in _shape(str(refused.value))


def test_a_damaged_jsonl_is_refused(rollouts, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in example("pipelinerl")(rollouts))
    path.write_text(text[:-40])
    with pytest.raises(UsageError, match=r"^pipelinerl: line 12 of .* is not JSON: the file is damaged or incomplete$"):
        framework("pipelinerl").read(path)
    with pytest.raises(UsageError, match=r"^pipelinerl: .* cannot be read"):
        framework("pipelinerl").read(tmp_path / "none.jsonl")


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.parametrize("given", [None, "text", 3, [], {}, [None], ["x"]], ids=repr)
def test_what_is_no_batch_is_refused_in_a_line(name, given):
    with pytest.raises(UsageError) as refused:
        framework(name).read(given)
    assert "\n" not in str(refused.value)


def test_a_framework_nobody_knows():
    with pytest.raises(UsageError, match="no framework 'vrl', did you mean 'verl'"):
        framework("vrl")


# -- trainer parity in a framework's words ----------------------------------------------------------------------------


def test_a_trainer_that_forgets_the_temperature_fails_in_a_frameworks_words(rollouts, scorer):
    """NeMo-Aligner's formula on rollouts at T=0.7: what its recipe does. Without a top-k the cause has no name yet."""
    with pytest.raises(AssertionError) as failed:
        assert_trainer_parity(rollouts, framework("nemo-aligner").scorer(scorer.model), metrics="verl")
    assert "logged       verl: training/rollout_probs_diff_valid 1, " in str(failed.value)


def test_metrics_are_in_the_comparison(rollouts, scorer):
    comparison = assert_trainer_parity(rollouts, scorer, metrics="trl")
    assert comparison.logged.framework == "trl"
    assert comparison.logged.metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1, abs=1e-3)
    assert comparison.to_json()["logged"]["lines"] == list(comparison.logged.lines)
    assert assert_trainer_parity(rollouts, scorer).logged is None


# -- --parity-metrics -------------------------------------------------------------------------------------------------

OWN_ROLLOUTS = """
import os
from pytest_logprob_parity import Trace

def test_rollouts(golden_trace):
    off = float(os.environ.get("OFF", 0))
    sequences = [
        dict(prompt_token_ids=[1, n], token_ids=[*range(3, 43)], logprobs=[-0.5 - off - 0.01 * i for i in range(40)])
        for n in range(30)
    ]
    golden_trace.check(Trace.from_sequences(sequences, dtype="float32"))
"""


def test_a_check_shows_a_frameworks_metrics_where_they_are_asked_for(pytester, run_inner, monkeypatch):
    """In the summary of a check that passed, in the message of one that failed, and in the record of both."""
    pytester.makepyfile(OWN_ROLLOUTS)
    run_inner("--update-golden")
    silent = run_inner()
    assert "probs_diff" not in silent.stdout.str()
    passed = run_inner("--parity-metrics=verl", "--junitxml=out.xml")
    passed.stdout.fnmatch_lines(["    verl: training/rollout_probs_diff_valid 1, training/rollout_probs_diff_max 0,"])
    assert "rollout_corr/k3_kl" in (pytester.path / "out.xml").read_text()
    monkeypatch.setenv("OFF", "0.2")
    failed = run_inner("--parity-metrics=nemo-rl")
    # d = -0.2 everywhere: exp(0.2), exp(-0.2) + 0.2 - 1
    failed.stdout.fnmatch_lines(["E * logged *nemo-rl: token_mult_prob_error 1.221 (normal: 0.999999 to 1.05),*"])
    assert "gen_kl_error 0.01873 (normal: 0 to 0.002)" in failed.stdout.str()


def test_a_framework_that_is_none_is_refused_before_anything_runs(pytester):
    result = pytester.runpytest_inprocess("--parity-metrics=vrl")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--parity-metrics: invalid choice: 'vrl' (choose from *trl*, *verl*"])


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_pages_snippets_run(rollouts, scorer):
    """docs/reference/frameworks.md, every snippet, with the batch that it says it has in hand."""
    page = (ROOT / "docs" / "reference" / "frameworks.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    told = {name for text in snippets for name in FRAMEWORKS if f'framework("{name}")' in text}
    assert told == set(FRAMEWORKS)
    for text in snippets:
        name = next((name for name in FRAMEWORKS if f'framework("{name}")' in text), "trl")
        trace = score(rollouts.with_(sampling=Sampling()), scorer) if name in WITHOUT_T else rollouts
        batch = example(name)(*((trace, scorer) if name in WITHOUT_T else (trace,)))
        if name in TRAINERS:  # its own numbers, as another kernel gives them
            engines, trainers = TRAINERS[name]
            batch[trainers] = batch[engines] - 1e-6
        names = {"batch": batch, "model": scorer.model, "tokenizer": scorer.tokenizer, "engine": _Replays(trace)}
        exec(compile(text, f"docs/reference/frameworks.md, {name}", "exec"), names)


class _Replays:
    """An engine that says of given tokens what it said before."""

    def __init__(self, trace):
        self.trace = trace

    def replay(self, trace, path="decode"):
        assert trace.completion(0) == self.trace.completion(0)
        return self.trace


def test_the_page_names_every_mistake_and_metric(rollouts):
    page = " ".join((ROOT / "docs" / "reference" / "frameworks.md").read_text().split())
    for name in FRAMEWORKS:
        row = framework(name)
        assert row.title in page
        for mistake in row.mistakes:
            assert mistake in page, mistake
        for metric in row.log(rollouts, rollouts).metrics:
            assert metric.removeprefix("training/").removeprefix("rollout_corr/").removeprefix("rl/") in page, metric


# -- profiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FRAMEWORKS, "pipelinerl-v1-first"])
def test_profiles_pin_what_can_be_read_back(name):
    from pytest_logprob_parity.spec.engine_arguments import vllm_engine_arguments

    profile = framework(name).profile if name in FRAMEWORKS else name
    known = vllm_engine_arguments()
    assert set(PROFILES[profile]) <= set(known)
    spec = EngineSpec(MODEL, profile=profile)
    assert spec.pins(cpu=True) == {**PROFILES[profile], **RL_ON_CPU, "seed": 0}
    assert spec.pins(cpu=False) == {**PROFILES[profile], "seed": 0}
    assert spec.replace(dtype="float32").pins(cpu=False)["dtype"] == "float32"


def test_serving_pins_nothing():
    assert EngineSpec(MODEL, profile="serving").pins(cpu=True) == {"seed": 0}


# -- the miniature repos, on real engines -----------------------------------------------------------------------------


#: Those whose repos run each day; the others run each night.
DAILY = ("pipelinerl", "trl", "verl")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DAILY else pytest.mark.nightly)
        for name in sorted(FRAMEWORKS, key=lambda name: framework(name).profile)
    ],
)
def test_the_miniature_repo_of_a_framework(name, run_inner, pool):
    """Real rollouts under the framework's profile, read from its batch, held against its own scorer."""
    here = EXAMPLES / name
    result = run_inner("--rootdir", str(here), "-c", str(here / "pyproject.toml"), str(here))
    result.assert_outcomes(passed=1)
    spec = EngineSpec(MODEL, dtype=DTYPES.get(name, "bfloat16"), profile=framework(name).profile, enforce_eager=True)
    used = pool.engine(spec).config.values
    assert {key: used[key] for key in spec.pins(cpu=True)} == spec.pins(cpu=True)


def test_pipelinerls_first_v1_run_is_named_by_its_raw_logprobs(pool, questions):
    """The recipe that the article begins with: at T=0.7 the gate fails, and says why."""
    engine = pool.engine(EngineSpec(MODEL, profile="pipelinerl-v1-first", enforce_eager=True))
    rollouts = engine.generate(questions(6), Sampling(temperature=0.7, n=4, seed=1))
    with pytest.raises(AssertionError) as failed:
        assert_trainer_parity(rollouts, framework("pipelinerl").scorer(MODEL, dtype="bfloat16"), metrics="pipelinerl")
    finding = failed.value.comparison.findings[0]
    assert (finding.layer, finding.cause) == ("semantic", "raw_vs_processed")
    assert "logged       pipelinerl: rl/kl_new_old " in str(failed.value)
