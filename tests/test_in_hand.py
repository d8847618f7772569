"""The trainer's column beside the rollouts': compared in hand, and with a scorer as reference evaluation. Real GRPOTrainers."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import MODEL
from pytest_logprob_parity import EngineSpec, MismatchError, Sampling, Trace, TransformersScorer, UsageError, scorer
from pytest_logprob_parity.trainer.frameworks import framework
from pytest_logprob_parity.trainer.parity import assert_trainer_parity, compare_with_trainer
from pytest_logprob_parity.trainer.scoring import score

SAMPLING = Sampling(temperature=0.7, max_tokens=24, seed=1)
QUESTIONS = (
    "What is 12 + 30?",
    "Ada has 12 apples and buys 30 more. Ada gives 7 to Ben. How many apples are left?",
    "Kim has 18 books. Leo has 9 more than Kim. How many books do they have together?",
    "5 + 5?",
)


def causes(comparison):
    return [finding.cause or finding.candidates[0] for finding in comparison.findings]


# -- a real GRPOTrainer ------------------------------------------------------------------------------------------------


class Synced:
    """What TRL asks to bring its weights to the engine."""

    def __init__(self, trainer, engine):
        self.trainer, self.engine = trainer, engine

    def sync_weights(self):
        self.engine.update_weights({name: w.detach().clone() for name, w in self.trainer.model.state_dict().items()})


@pytest.fixture
def grpo(pool, tmp_path, monkeypatch):
    """`grpo(subclass, steps, **config)`: a GRPOTrainer whose rollouts are our engine's, with its weights after every step."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))

    def rollout(prompts, trainer):
        trace = engine.generate(prompts, SAMPLING)
        every = range(trace.num_sequences)
        return {
            "prompt_ids": [trace.prompt(i) for i in every],
            "completion_ids": [trace.completion(i) for i in every],
            "logprobs": [trace.logprobs[slice(*trace.bounds(i))].tolist() for i in every],
        }

    def make(kind=lambda base: base, steps=1, dropout=0.0, **config):
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
        settings = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 2, "max_steps": steps,
            "temperature": SAMPLING.temperature, "max_completion_length": SAMPLING.max_tokens, "report_to": [],
            "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False,
            "learning_rate": 1e-4, "logging_steps": 1, **config,
        }  # fmt: skip
        trainer = kind(GRPOTrainer)(
            model=model,
            processing_class=AutoTokenizer.from_pretrained(MODEL),
            reward_funcs=lambda completions, **_: [float(len(str(c)) % 7) for c in completions],
            args=GRPOConfig(**settings),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in QUESTIONS] * 4),
            rollout_func=rollout,
        )
        # as with use_vllm=True, whose own engine does not start here
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Synced(trainer, engine), -1
        return trainer

    return make


def shifted(base):
    class Shifted(base):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            return {**batch, "old_per_token_logps": torch.roll(batch["old_per_token_logps"], 1, 1)}

    return Shifted


def without_a_mask(base):
    class WithoutAMask(base):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, *others, **named):
            return super()._get_per_token_logps_and_entropies(model, ids, torch.ones_like(mask), *others, **named)

    return WithoutAMask


def kept(base):
    class Kept(base):
        def _generate_and_score_completions(self, inputs):
            self.batch = super()._generate_and_score_completions(inputs)
            return self.batch

    return Kept


#: Daily: by sequence and by token, and both things that may become of one, each once.
NIGHTLY = [pytest.param(mode, marks=pytest.mark.nightly) for mode in ("sequence_truncate", "token_mask")]


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate", *NIGHTLY])
def test_a_healthy_trainer_passes_its_own_watch_and_its_metrics_are_ours(grpo, mode):
    """Three steps: the rollouts of the second and third are of weights that updates brought."""
    trainer = grpo(steps=3, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=1.00001)
    checks = framework("trl").watch(trainer, every=1, dtype="float32")
    trainer.train()
    assert [check.verdict for check in checks] == ["pass", "pass", "pass"]
    history = [entry for entry in trainer.state.log_history if "sampling/sampling_logp_difference/mean" in entry]
    for check, logged in zip(checks, history, strict=True):
        for name, value in check.logged.metrics.items():
            assert value == pytest.approx(logged[name], abs=1e-6), name


def test_the_scorers_entropy_is_the_one_that_the_trainer_logs(grpo):
    trainer = grpo(kept, learning_rate=0.0)
    trainer.train()
    (logged,) = (entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry)
    trl = framework("trl")
    rollouts = trl.read({**trainer.batch, "old_per_token_logps": None}, sampling=SAMPLING, dtype="float32")
    told = compare_with_trainer(rollouts, trl.scorer(trainer.model), metrics="trl", config=trainer.args)
    assert told.logged.metrics["entropy"] == pytest.approx(logged, abs=1e-6)
    assert told.metrics["trainer_entropy"] == pytest.approx(logged, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "config", "named"),
    [(shifted, {}, "shifted_positions"), (without_a_mask, {}, "attention_mask"), (kept, {"temperature": 1.0}, "temperature"),
     (kept, {"dropout": 0.2}, "dropout")],
    ids=["one token off", "no attention mask", "another temperature", "dropout left on"],
)  # fmt: skip
def test_a_trainers_fault_fails_in_hand_and_a_scorer_names_it(grpo, kind, config, named):
    trainer = grpo(lambda base: kept(kind(base)), learning_rate=0.0, **config)
    trainer.train()
    trl = framework("trl")
    rollouts = trl.read(trainer.batch, sampling=SAMPLING, dtype="float32")
    in_hand = compare_with_trainer(rollouts, trainer_dtype="float32", metrics="trl", config=trainer.args)
    assert in_hand.verdict == "fail"
    assert in_hand.logged.metrics["sampling/sampling_logp_difference/max"] > 0.1
    modes = [module.training for module in trainer.model.modules()]
    told = compare_with_trainer(rollouts, trl.scorer(trainer.model), trainer_dtype="float32")
    assert (told.verdict, causes(told)) == ("fail", [named])
    assert next(str(n) for n in told.notes if n.key == "reference_evaluation").endswith("the trainer is wrong")
    assert [module.training for module in trainer.model.modules()] == modes


def test_watch_stops_a_training_whose_columns_disagree(grpo):
    trainer = grpo(shifted)
    framework("trl").watch(trainer, dtype="float32")
    with pytest.raises(MismatchError) as caught:
        trainer.train()
    assert causes(caught.value.comparison) == ["shifted_positions"]


class Batches:
    """A trainer by what `watch` reads of it, which has these batches to train on."""

    def __init__(self, *batches, **arguments):
        self.model = SimpleNamespace(training=True, dtype=torch.float32)
        self.args, self.batches = SimpleNamespace(temperature=1.0, bf16=False, **MODES | arguments), list(batches)

    def _generate_and_score_completions(self, inputs):
        return self.batches.pop(0)


MODES = {f"vllm_importance_sampling_{name}": value for name, value in
         {"mode": "sequence_mask", "clip_max": 3.0, "clip_min": None}.items()}  # fmt: skip


def batch_of(rows, *, apart=1e-5, masked=False):
    generator = torch.Generator().manual_seed(rows)
    logprobs = -torch.rand(rows, 12, generator=generator) - 0.1
    ones = torch.ones(rows, 12, dtype=torch.long)
    return {
        "prompt_ids": torch.arange(rows)[:, None] + 5, "prompt_mask": ones[:, :1], "completion_mask": ones * (not masked),
        "completion_ids": torch.randint(5, 99, (rows, 12), generator=generator), "sampling_per_token_logps": logprobs,
        "old_per_token_logps": logprobs - apart * torch.rand(rows, 12, generator=generator),
    }  # fmt: skip


def test_a_batch_that_says_too_little_stops_no_training_and_the_next_one_is_looked_at():
    trainer = Batches(batch_of(4), batch_of(8, masked=True), batch_of(16), batch_of(8, apart=1.0), batch_of(16, apart=1.0))
    checks = framework("trl").watch(trainer, every=2, dtype="float32")
    with pytest.warns(UserWarning, match="unverified: Inconclusive"):
        trainer._generate_and_score_completions({})
    assert [check.verdict for check in checks] == ["unverified"]
    assert checks[0].findings == ()  # nothing is off, and nothing is accused
    with pytest.warns(UserWarning, match="every completion of this batch is masked"):
        trainer._generate_and_score_completions({})
    trainer._generate_and_score_completions({})
    assert [check.verdict for check in checks] == ["unverified", "pass"]
    trainer._generate_and_score_completions({})  # every second one
    with pytest.raises(MismatchError):
        trainer._generate_and_score_completions({})
    assert [check.verdict for check in checks] == ["unverified", "pass", "fail"]


def test_a_watched_batch_that_lacks_a_column_is_a_line():
    for column in ("completion_mask", "old_per_token_logps", "sampling_per_token_logps"):
        trainer = Batches({name: value for name, value in batch_of(8).items() if name != column})
        framework("trl").watch(trainer)
        with pytest.raises(UsageError, match=r"no completion_mask|no logprobs of a trainer|no sampling_per_token_logps"):
            trainer._generate_and_score_completions({})


@pytest.mark.parametrize(
    ("without", "line"),
    [("model", "has no model: watch"), ("args", "has no args, temperature, bf16: watch"),
     ("_generate_and_score_completions", "takes a GRPOTrainer")],
)  # fmt: skip
def test_a_trainer_that_lacks_what_is_read_is_refused_before_it_trains(without, line):
    trainer = Batches(batch_of(8))
    given = SimpleNamespace(model=trainer.model, args=trainer.args, _generate_and_score_completions=lambda inputs: None)
    delattr(given, without)
    with pytest.raises(UsageError, match=line):
        framework("trl").watch(given)
    for every in (0, True, 1.5):
        with pytest.raises(UsageError, match="must be a whole number, 1 or more"):
            framework("trl").watch(trainer, every=every)


def test_rows_that_mask_truncated_completions_hides_are_left_out(grpo):
    trainer = grpo(kept, mask_truncated_completions=True)
    trainer.train()
    masked = int((trainer.batch["completion_mask"].sum(1) == 0).sum())
    assert 0 < masked < 8
    trl = framework("trl")
    rollouts = trl.read(trainer.batch, sampling=SAMPLING, dtype="float32")
    assert rollouts.num_sequences == 8 - masked
    assert compare_with_trainer(rollouts, trainer_dtype="float32").metrics["rms_diff"] < 1e-4
    hidden = {**trainer.batch, "completion_mask": torch.zeros_like(trainer.batch["completion_mask"])}
    with pytest.raises(UsageError, match="mask_truncated_completions hides all of them"):
        trl.read(hidden)


# -- two columns ------------------------------------------------------------------------------------------------------


def columns(change, *, sequences=24, length=20, prompts=12, seed=0, **labels):
    """Made-up rollouts whose trainer gives their logprobs plus `change(rng, [N])`."""
    rng = np.random.default_rng(seed)
    total = sequences * length
    logprobs = -rng.exponential(0.7, total)
    widths = 3 + np.arange(prompts)
    return Trace.from_arrays(
        prompt_token_ids=np.concatenate([np.full(w, g + 1) for g, w in enumerate(widths)]),
        prompt_offsets=np.concatenate([[0], np.cumsum(widths)]), group=np.arange(sequences) % prompts,
        token_ids=rng.integers(0, 300, total), sequence_offsets=np.arange(0, total + 1, length),
        logprobs=logprobs, trainer_logprobs=logprobs + change(rng, total), dtype="bfloat16",
        sampling=Sampling(temperature=0.7), **labels,
    )  # fmt: skip


def test_two_columns_that_agree_up_to_noise_pass_and_a_copy_says_that_it_shows_nothing():
    noisy = compare_with_trainer(columns(lambda rng, n: rng.normal(0, 0.01, n)), trainer_dtype="bfloat16")
    assert (noisy.verdict, "copied" in [note.key for note in noisy.notes]) == ("pass", False)
    copied = compare_with_trainer(columns(lambda rng, n: np.zeros(n)))
    assert (copied.verdict, "copied" in [note.key for note in copied.notes]) == ("pass", True)


@pytest.mark.parametrize("objective", ["token", "sequence", "truncated", "unclipped"])
def test_one_wild_token_fails_under_every_objective(objective):
    rollouts = columns(lambda rng, n: rng.normal(0, 0.01, n) + 8 * (np.arange(n) == 77))
    assert compare_with_trainer(rollouts, objective=objective).verdict == "fail"


def test_nan_of_the_trainer_fails_and_nan_of_the_rollouts_is_no_fault():
    wrong = columns(lambda rng, n: np.where(np.arange(n) == 5, np.nan, 0.001))
    assert compare_with_trainer(wrong).metrics["n_nan"] == 1
    assert compare_with_trainer(wrong).verdict == "fail"
    silent = columns(lambda rng, n: rng.normal(0, 0.001, n))
    gaps = np.where(np.arange(silent.num_tokens) % 50 == 0, np.nan, silent.logprobs).astype(np.float32)
    assert compare_with_trainer(silent.with_(logprobs=gaps)).verdict == "pass"


def columns_of(rollout, trainer, **more):
    """Rollouts [sequences, tokens] and the trainer's column, each sequence of a prompt of its own."""
    count, length = rollout.shape
    return Trace.from_arrays(
        prompt_token_ids=np.arange(count) + 5, prompt_offsets=np.arange(count + 1),
        sequence_offsets=np.arange(count + 1) * length, token_ids=np.arange(count * length) % 290 + 10,
        logprobs=rollout.ravel().astype(np.float32), trainer_logprobs=trainer.ravel().astype(np.float32), sampling=Sampling(),
        dtype="float32", **more,
    )  # fmt: skip


def drawn(sequences, tokens=40, seed=0):
    return -np.random.default_rng(seed).exponential(0.6, (sequences, tokens)) - 1e-3


def first_cause(trace):
    (finding,) = compare_with_trainer(trace, trainer_dtype="float32").findings
    return finding.cause, finding.candidates[:1]


def test_samples_that_are_alike_are_still_rows_in_another_order():
    two = drawn(2) * (drawn(2, seed=1) < -0.3)
    rows = two[np.arange(24) % 2] - 1e-4
    assert first_cause(columns_of(rows, rows[np.random.default_rng(0).permutation(24)])) == ("wrong_token", ())


def test_a_logarithm_of_a_probability_that_is_0_in_float16_is_no_truncation():
    rows = drawn(64)
    rows[:20, 5] = -18
    with np.errstate(divide="ignore"):
        halves = np.log(np.exp(rows).astype(np.float16)).astype(np.float32)
    assert first_cause(columns_of(rows, halves)) == ("wrong_values", ())


def test_zeros_of_greedy_tokens_may_be_a_temperature_near_0():
    assert first_cause(columns_of(drawn(64) / 20, np.zeros((64, 40)))) == (None, ("wrong_values",))


def test_the_first_token_of_each_turn_without_a_number():
    rows = drawn(64)
    lacking = np.where(np.arange(40) == 0, np.nan, rows)
    assert first_cause(columns_of(rows, lacking)) == (None, ("shifted_positions",))
    with pytest.raises(UsageError, match="no logprob of the first token of any of their 64 turns"):
        compare_with_trainer(columns_of(lacking, rows))


@pytest.mark.parametrize("seed", range(4))
def test_one_off_between_turns_is_seen_beside_what_tools_wrote(seed):
    rows = drawn(64, seed=seed)
    written = np.tile(np.arange(40) % 10 >= 3, 64)
    assert first_cause(columns_of(rows, np.roll(rows, 1, 1), mask=written)) == ("shifted_positions", ())


def test_rows_that_are_off_as_a_whole_are_told_from_tokens():
    rows = drawn(32)
    half = np.where(np.arange(32)[:, None] % 2, rows - np.random.default_rng(1).exponential(1, rows.shape), rows)
    assert first_cause(columns_of(rows, half)) == (None, ("prompt",))


@pytest.mark.parametrize(("sequences", "tokens", "rare"), [(8, 30, 0.01), (16, 30, 0.005), (32, 40, 0.002), (32, 40, 0.05)])
def test_tokens_that_are_rare_and_not_drawn_accuse_no_sampler(sequences, tokens, rare):
    """Nearly certain distributions: what is rare is often not drawn at all, and then nothing shows how often it would be."""
    noted = 0
    for seed in range(40):
        hit = np.random.default_rng(seed).random((sequences, tokens)) < rare
        logprobs = np.where(hit, np.log(rare), np.log1p(-rare))
        entropies = np.full(logprobs.size, -(rare * np.log(rare) + (1 - rare) * np.log1p(-rare)), np.float32)
        told = compare_with_trainer(columns_of(logprobs, logprobs + 1e-6, trainer_entropies=entropies), trainer_dtype="float32")
        noted += any(note.key == "drawn_otherwise" for note in told.notes)
    assert noted == 0


def test_a_mismatch_beyond_all_bounds_has_metrics():
    config = {"rollout_correction": {"rollout_is": "sequence", "rollout_is_threshold": "0.5_2.0"}}
    told = compare_with_trainer(columns_of(drawn(8), drawn(8) - 30), metrics="verl", config=config)
    assert told.verdict == "fail"
    assert told.logged.metrics["rollout_corr/rollout_is_mean"] == 0


@pytest.mark.parametrize(
    ("more", "line"),
    [({"trainer_dtype": "flaot32"}, "trainer_dtype='flaot32': known are"),
     ({"config": {}}, "config= is the configuration of a framework: name the framework"),
     ({"metrics": "trl", "config": {"vllm_importance_sampling_mode": "token_mask"}}, "no vllm_importance_sampling_clip_max")],
)  # fmt: skip
def test_what_is_asked_for_wrongly_is_a_line(more, line):
    with pytest.raises(UsageError, match=line):
        compare_with_trainer(columns_of(drawn(8), drawn(8)), **more)


def test_without_a_column_and_without_a_scorer_nothing_can_be_compared():
    trace = columns(lambda rng, n: np.zeros(n)).with_(trainer_logprobs=None)
    with pytest.raises(UsageError, match=r"no logprobs of a trainer \(trainer_logprobs\)"):
        assert_trainer_parity(trace)


def test_the_column_is_kept_in_a_file(tmp_path):
    trace = columns(lambda rng, n: np.zeros(n))
    trace.save(tmp_path / "t.safetensors")
    assert np.array_equal(Trace.load(tmp_path / "t.safetensors").trainer_logprobs, trace.trainer_logprobs)


def test_two_columns_take_neither_torch_nor_transformers():
    code = (
        "import sys, numpy as np\n"
        "from pytest_logprob_parity import Trace, assert_trainer_parity\n"
        "n = 480; l = -np.random.default_rng(0).exponential(0.7, n)\n"
        "t = Trace.from_arrays(prompt_token_ids=np.arange(24), prompt_offsets=np.arange(25), token_ids=np.arange(n),\n"
        "    sequence_offsets=np.arange(0, n + 1, 20), logprobs=l, trainer_logprobs=l + 0.001, dtype='bfloat16')\n"
        "assert_trainer_parity(t)\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules), 'loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_scorer_shows_that_the_rollouts_are_wrong(pool):
    """The engine is the one that is wrong: its rollouts are labelled with another temperature than they were sampled at."""
    trace = pool.engine(EngineSpec(MODEL, dtype="float32")).generate(
        [[{"role": "user", "content": q}] for q in QUESTIONS], Sampling(temperature=0.7, max_tokens=24, n=4, seed=1)
    )
    labelled = trace.with_(sampling=Sampling(temperature=1.0, max_tokens=24, n=4, seed=1))
    trainer = TransformersScorer(MODEL)
    column = np.nan_to_num(compare_with_trainer(labelled, trainer).actual.logprobs)
    told = compare_with_trainer(labelled.with_(trainer_logprobs=column), trainer, trainer_dtype="float32")
    assert (told.verdict, causes(told)) == ("fail", ["temperature"])
    assert next(str(n) for n in told.notes if n.key == "reference_evaluation").endswith("the rollouts are wrong")


def test_two_columns_that_agree_with_each_other_and_not_with_the_scorer_fail(rollouts):
    """Both sides may be wrong alike: an update that neither took."""
    held = rollouts.with_(trainer_logprobs=rollouts.logprobs + np.float32(1e-6))
    assert compare_with_trainer(held, trainer_dtype="float32").passed
    told = compare_with_trainer(held, TransformersScorer(f"{MODEL}-step2"), trainer_dtype="float32")
    assert told.verdict == "fail"
    assert next(str(n) for n in told.notes if n.key == "reference_evaluation").endswith("the two agree (RMS 1e-06)")


# -- what the trainer did otherwise -------------------------------------------------------------------------------------


def with_column(rollouts, change):
    """The rollouts beside a trainer whose numbers are `change(rows)` of the right ones, by sequence."""
    right = np.nan_to_num(compare_with_trainer(rollouts, TransformersScorer(MODEL)).actual.logprobs)
    rows = [right[slice(*rollouts.bounds(i))] for i in range(rollouts.num_sequences)]
    return rollouts.with_(trainer_logprobs=np.concatenate(change(rows)).astype(np.float32))


def of_another_prompt(change):
    """The trainer's own numbers where each prompt is another one."""

    def columns(rollouts):
        model = TransformersScorer(MODEL)
        prompts = [change(rollouts, i) for i in range(rollouts.num_sequences)]
        offsets = np.concatenate([[0], np.cumsum([len(p) for p in prompts])]).astype(np.int64)
        other = rollouts.with_(
            prompt_token_ids=np.concatenate(prompts).astype(np.int32), prompt_offsets=offsets,
            group=np.arange(rollouts.num_sequences, dtype=np.int32),
        )  # fmt: skip
        return rollouts.with_(trainer_logprobs=np.nan_to_num(score(other, model).logprobs))

    return columns


def neighbours_swapped(rows):
    """Each row has the numbers of another one of about its length, as far as it goes."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    partner = dict(zip(order.tolist(), order.reshape(-1, 2)[:, ::-1].ravel().tolist(), strict=True))
    return [np.resize(rows[partner[i]], len(row)) for i, row in enumerate(rows)]


def packed_before(rollouts, i):
    return [t for j in range(i) for t in (*rollouts.prompt(j), *rollouts.completion(j))] + rollouts.prompt(i)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        (of_another_prompt(lambda r, i: r.prompt(i)[1:] or r.prompt(i)), "prompt"),
        (of_another_prompt(lambda r, i: r.prompt(i)[:-1] or r.prompt(i)), "prompt"),
        (of_another_prompt(lambda r, i: [*r.prompt(i), r.prompt(i)[0]]), "prompt"),
        (of_another_prompt(packed_before), "packing"),
        (lambda r: with_column(r, neighbours_swapped), "wrong_token"),
        (lambda r: with_column(r, lambda rows: [row[::-1] for row in rows]), "wrong_token"),
        (lambda r: with_column(r, lambda rows: [np.full(len(row), row.mean()) for row in rows]), "wrong_values"),
        (lambda r: with_column(r, lambda rows: [np.roll(row, n % 3 + 1) for n, row in enumerate(rows)]), "shifted_positions"),
    ],
    ids=["first token missing", "last token missing", "a token more", "packed", "rows", "backwards", "means", "shifted by row"],
)  # fmt: skip
def test_what_the_trainer_did_otherwise_is_named_where_it_gives_its_numbers(rollouts, columns, named):
    told = compare_with_trainer(columns(rollouts), TransformersScorer(MODEL), trainer_dtype="float32")
    assert (told.verdict, [finding.cause for finding in told.findings]) == ("fail", [named])


def by_transformers(
    rollouts, change=lambda ids, _: (ids, torch.ones_like(ids)), *, positions=False, of=lambda x: x, model=MODEL
):
    """A trainer's column by transformers alone, a row at a time: `change(ids, length)` gives ids and mask of each row;
    positions by the mask, as veRL counts them, or by transformers itself; `of` is done to the logits.
    """
    from transformers import AutoModelForCausalLM

    model, rows = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), []
    for i in range(rollouts.num_sequences):
        length = len(rollouts.completion(i))
        ids, mask = change(torch.tensor([[*rollouts.prompt(i), *rollouts.completion(i)]]), length)
        more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
        with torch.no_grad():
            logits = of(model(input_ids=ids, attention_mask=mask, **more).logits) / rollouts.sampling.temperature
        values = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        rows.append(values[-length:])
    return rollouts.with_(trainer_logprobs=torch.cat(rows).numpy())


@pytest.mark.parametrize("positions", [False, True], ids=["transformers' positions", "the mask's"])
def test_a_word_that_was_taken_for_padding_is_found(rollouts, positions):
    commonest = int(np.bincount(rollouts.token_ids).argmax())
    told = compare_with_trainer(
        by_transformers(rollouts, lambda ids, _: (ids, (ids != commonest).long()), positions=positions),
        TransformersScorer(MODEL),
        trainer_dtype="float32",
    )
    (finding,) = told.findings
    assert (told.verdict, finding.cause) == ("fail", "attention_mask"), str(finding)
    assert (finding.values["fault"], finding.values["token"]) == ("hidden_token", commonest)


def test_rollouts_of_one_word_alone_can_be_asked_about():
    """Without that word nothing is left to ask about."""
    rows = drawn(8, 6)
    one = columns_of(rows, rows - 1).with_(token_ids=np.full(48, 22, np.int32))
    right = score(one, TransformersScorer(MODEL)).logprobs
    told = compare_with_trainer(one.with_(logprobs=right), TransformersScorer(MODEL), trainer_dtype="float32")
    assert (told.verdict, told.findings[0].cause) == ("fail", None)


def test_where_sequences_part_says_what_is_off(rollouts):
    """They agree up to a token: that was another one, or what stands before it was hidden."""

    def others(ids, length):
        ids = ids.clone()
        ids[0, -length + 5] = (ids[0, -length + 5] + 1) % 256
        return ids, torch.ones_like(ids)

    def hidden(ids, length):
        mask = torch.ones_like(ids)
        mask[0, -length + 4 : -length + 8] = 0
        return ids, mask

    for change, first in ((others, "wrong_token"), (hidden, "attention_mask")):
        told = compare_with_trainer(by_transformers(rollouts, change), TransformersScorer(MODEL), trainer_dtype="float32")
        (finding,) = told.findings
        assert (told.verdict, finding.cause, finding.candidates[0]) == ("fail", None, first)
        assert finding.values["pattern"] == "from_a_token_on"


@pytest.mark.parametrize("of", [lambda x: 8 * (x / 8).tanh(), lambda x: x * (x / 8).tanh()], ids=["cap", "x tanh x"])
def test_a_function_of_the_logits_is_told_from_other_weights(rollouts, of):
    told = compare_with_trainer(by_transformers(rollouts, of=of), TransformersScorer(MODEL), trainer_dtype="float32")
    (finding,) = told.findings
    assert (told.verdict, finding.cause, finding.candidates[0]) == ("fail", None, "logits")


def test_other_weights_are_no_function_of_the_logits(rollouts):
    other = by_transformers(rollouts, model=f"{MODEL}-step2")
    (finding,) = compare_with_trainer(other, TransformersScorer(MODEL), trainer_dtype="float32").findings
    assert finding.candidates[0] != "logits"


def test_what_nothing_explains_has_candidates_and_no_name(rollouts):
    """The negative control: noise that no mistake makes."""
    rng = np.random.default_rng(0)
    noisy = with_column(rollouts, lambda rows: [row - rng.exponential(0.3, len(row)) for row in rows])
    told = compare_with_trainer(noisy, TransformersScorer(MODEL), trainer_dtype="float32")
    assert (told.verdict, [finding.cause for finding in told.findings]) == ("fail", [None])


# -- a live model ------------------------------------------------------------------------------------------------------


@pytest.fixture
def live():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    model.lm_head.eval()  # one module that is not as the others are
    return model


def test_a_live_model_is_left_as_it_was_found(live, pool):
    rollouts = pool.engine(EngineSpec(MODEL, dtype="float32")).generate(["1 + 1", "2 + 2"], SAMPLING)
    modes, gradients = [m.training for m in live.modules()], [p.requires_grad for p in live.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare_with_trainer(rollouts, TransformersScorer(live))
        assert torch.is_autocast_enabled("cpu")
    assert [m.training for m in live.modules()] == modes
    assert [p.requires_grad for p in live.parameters()] == gradients
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda m: m.eval(), "training modes"), (lambda m: m.requires_grad_(False), "gradients asked for"),
     (lambda m: m.lm_head.weight.data.mul_(1.0), "")],
    ids=["eval", "frozen", "nothing"],
)  # fmt: skip
def test_a_scorer_that_changes_its_model_is_refused(live, rollouts, change, what):
    inner = TransformersScorer(live)

    class Careless:
        model, dtype = live, "float32"

        def __call__(self, ids, mask, temperature):
            change(self.model)
            return inner(ids, mask, temperature)

    if not what:
        assert compare_with_trainer(rollouts, Careless()).metrics["rms_diff"] < 1e-4
        return
    with pytest.raises(UsageError, match=f"Careless changed its model while it scored .{what}"):
        compare_with_trainer(rollouts, Careless())


def test_a_peft_model_scores_with_its_adapter(live, pool):
    from peft import LoraConfig, get_peft_model

    rollouts = pool.engine(EngineSpec(MODEL, dtype="float32")).generate(["1 + 1", "2 + 2", "3 + 4"] * 3, SAMPLING)
    adapted = get_peft_model(live, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=True))
    assert compare_with_trainer(rollouts, TransformersScorer(adapted)).metrics["rms_diff"] < 1e-4  # B is 0: nothing is added
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.5)
    scored = compare_with_trainer(rollouts, TransformersScorer(adapted))
    with torch.no_grad():
        ids = torch.tensor([[*rollouts.prompt(0), *rollouts.completion(0)]])
        adapted.eval()
        logits = adapted(input_ids=ids).logits / 0.7
    own = logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[-len(rollouts.completion(0)) :, 0]
    start, stop = rollouts.bounds(0)
    assert np.abs(scored.actual.logprobs[start:stop] - own.numpy()).max() < 1e-4
    assert scored.metrics["rms_diff"] > 0.01


# -- a trainer that is asked again --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rollouts(pool):
    prompts = [[{"role": "user", "content": q}] for q in QUESTIONS] + ["7 + 8 = ", "What is 3 times 9, and why?", "1", "2 + 3"]
    return pool.engine(EngineSpec(MODEL, dtype="float32")).generate(
        prompts, Sampling(temperature=0.7, max_tokens=24, n=2, seed=1)
    )


def test_a_scorer_with_dropout_is_named_by_asking_it_twice(rollouts, live):
    for module in live.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    trainer = TransformersScorer(live)
    assert compare_with_trainer(rollouts, trainer).passed
    told = compare_with_trainer(rollouts, trainer.as_trained())
    assert (told.verdict, causes(told)) == ("fail", ["dropout"])
    assert TransformersScorer(live.eval()).as_trained() is None


def test_a_scorer_whose_mask_lets_padding_in_is_named_by_asking_it_row_by_row(rollouts):
    model = TransformersScorer(MODEL)

    @scorer(dtype="float32", name="left padded, no mask")
    def without_mask(ids, mask, temperature):
        lengths = mask.sum(1)
        moved = torch.stack([torch.roll(row, int(ids.shape[1] - n)) for row, n in zip(ids, lengths, strict=True)])
        values = model(moved, torch.ones_like(mask), temperature)
        return torch.stack([torch.roll(row, -int(ids.shape[1] - n)) for row, n in zip(values, lengths, strict=True)])

    told = compare_with_trainer(rollouts, without_mask)
    assert (told.verdict, causes(told)) == ("fail", ["attention_mask"])
