"""The noise floor on a real engine: what recording keeps, what it refuses, and what a check makes of it."""

import dataclasses
import shutil

import numpy as np
import pytest

from conftest import MODEL
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    Golden,
    IncomparableError,
    MismatchError,
    Sampling,
    Trace,
    UsageError,
    check_golden,
)
from pytest_logprob_parity.check.chance_to_pass import chance_to_pass
from pytest_logprob_parity.comparison.tolerance import default_tolerance, with_floor
from pytest_logprob_parity.engines.backend import Completion, ResolvedConfig
from pytest_logprob_parity.engines.batch_compositions import replay_in_batch_compositions
from pytest_logprob_parity.golden.noise_floor import NoiseFloor
from pytest_logprob_parity.trace.batch_composition import BatchCompositions

SAMPLING = Sampling(temperature=0.7, max_tokens=12, n=3, seed=1, logprobs=2)
OWN_SCHEDULE = 24  # sequences, all in one call; in sampled batch compositions a call has 3 of a block and at most 8 fillers


@pytest.fixture(scope="module")
def engine(pool):
    """An engine with two threads: with one, no other batch gives other bits on some processors. `seed` makes it another
    engine than that of other tests.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        engine = pool.beside(EngineSpec(MODEL, dtype="bfloat16", seed=1))
        assert engine.config.dtype == "bfloat16"  # it has started
        yield engine


@pytest.fixture(scope="module")
def prompts(questions):
    """8 prompts of 156 tokens and more: shorter ones leave nothing for the batch shape to move."""
    texts = [message[0]["content"] for message in questions(7 * 8)]
    return [[{"role": "user", "content": " ".join(texts[i : i + 7])}] for i in range(0, len(texts), 7)]


@pytest.fixture(scope="module")
def recorded(engine, prompts, tmp_path_factory):
    """One recording: its path and what it said."""
    path = tmp_path_factory.mktemp("golden") / "g.safetensors"
    return path, check_golden(path, engine, prompts=prompts, sampling=SAMPLING, update=True)


@pytest.fixture
def compatible(recorded, tmp_path):
    """The golden as another version of the engine would have recorded it: a copy with another fingerprint."""

    def make(part="engine", **values):
        golden = Golden.load(recorded[0])
        prints = {**golden.fingerprint, part: {**golden.fingerprint[part], **(values or {"version": "0.31.0"})}}
        path = tmp_path / "compatible.safetensors"
        dataclasses.replace(golden, fingerprint=prints).save(path)
        return path

    return make


@pytest.fixture
def plant(engine, pool, monkeypatch):
    """`plant(fault)`: the engine answers `fault(run, requests)` in place of `run(requests)`, for this test."""

    def plant(fault):
        backend = pool.backend(engine.spec)
        run = backend.run
        monkeypatch.setattr(backend, "run", lambda requests: fault(run, requests), raising=False)

    return plant


def forced_noise(make):
    """A fault: `make(count, requests)` is added to the logprobs of forced tokens."""

    def fault(run, requests):
        answers = run(requests)
        if requests[0].forced_token_ids is None:
            return answers
        return [
            dataclasses.replace(a, logprobs=(a.logprobs + make(len(a.logprobs), requests)).astype(np.float32)) for a in answers
        ]

    return fault


def free_run_under(**changes):
    """A fault: what is sampled freely is sampled with other parameters."""

    def fault(run, requests):
        free = requests[0].forced_token_ids is None
        return run(
            [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, **changes)) if free else r for r in requests]
        )

    return fault


def other_seeds(run, requests):
    """A fault: the free run draws other random numbers."""
    return run([dataclasses.replace(r, seed=None if r.seed is None else r.seed + 1000) for r in requests])


def some_alone(run, requests):
    """No fault: another scheduler, which runs every third request of a large batch in a batch of its own."""
    if len(requests) < OWN_SCHEDULE:
        return run(requests)
    together = iter(run([r for i, r in enumerate(requests) if i % 3]))
    return [next(together) if i % 3 else run([r])[0] for i, r in enumerate(requests)]


def mismatch(path, engine, **arguments):
    with pytest.raises(MismatchError) as error:
        check_golden(path, engine, **arguments)
    return error.value.comparison


# -- sampled batch compositions ----------------------------------------------------------------------------------------


class Recorder:
    """A backend that forces what it is asked to, and remembers how many requests each call had."""

    config = ResolvedConfig(engine="fake", version="1", dtype="float32", values={})

    def __init__(self, *, obeys=True):
        self.calls, self._obeys = [], obeys

    def run(self, requests):
        self.calls.append([r.prompt_token_ids[0] for r in requests])
        return [self._answer(np.array(r.forced_token_ids, np.int32), r.prompt_token_ids[0]) for r in requests]

    def _answer(self, tokens, prompt):
        said = tokens if self._obeys else tokens + 1
        return Completion(
            token_ids=said, logprobs=np.full(len(said), -1.0 - prompt, np.float32), finish_reason="length",
            **dict.fromkeys(("ranks", "top_token_ids", "top_logprobs"), np.empty((len(said), 0))),
        )  # fmt: skip


def plain_trace(sequences):
    return Trace.from_sequences(
        [
            {
                "prompt_token_ids": [i],
                "token_ids": [5, 6, 7],
                "logprobs": [-1.0 - i, np.nan, -1.0 - i],
                "mask": [True, False, True],
            }
            for i in range(sequences)
        ]
    )


def test_every_block_of_every_repeat_draws_a_shape_of_its_own():
    trace, shapes = plain_trace(40), BatchCompositions(batch_sizes=(1, 3), weights=(0.5, 0.5), fillers=2)
    backend = Recorder()
    logprobs = replay_in_batch_compositions(backend, trace, shapes, 0)
    np.testing.assert_array_equal(logprobs, trace.logprobs)  # its own numbers at its own tokens, NaN where masked
    sizes = {len(call) for call in backend.calls}
    assert sizes == {1, 2, 3, 4, 5}
    blocks = [{i % 8 for i in call} for call in backend.calls]
    assert max(len(b) for b in blocks) > 1  # fillers come from other blocks


def test_a_draw_can_be_repeated_and_no_two_are_alike():
    trace, calls = plain_trace(40), []
    for number in (0, 1, 1):
        backend = Recorder()
        replay_in_batch_compositions(backend, trace, BatchCompositions(), number)
        calls.append(backend.calls)
    assert calls[1] == calls[2]
    assert calls[0] != calls[1]


def test_a_replay_that_did_not_force_is_an_error_and_no_noise():
    with pytest.raises(
        EngineError, match=r"replay in sampled batch compositions did not force the tokens: .* token 6 in place of 5"
    ):
        replay_in_batch_compositions(Recorder(obeys=False), plain_trace(8), BatchCompositions(), 0)


# -- recording --------------------------------------------------------------------------------------------------------


def test_recording_keeps_five_repeats_that_differ_and_its_own_schedule_reproduces(recorded):
    path, told = recorded
    golden = Golden.load(path)
    floor, trace = golden.floor, golden.trace
    assert floor.logprobs.shape == (5, trace.num_tokens)
    assert floor.reproduces
    assert len({row.tobytes() for row in floor.logprobs}) > 1
    assert 0 < floor.rms <= floor.max_abs < 0.5
    assert 0 < floor.changed < 1
    assert told.recorded
    assert [note.key for note in told.notes] == ["floor", "reference", "floor_seconds", "chance"]
    assert told.notes[0] == floor.describe()
    assert golden.reference is not None
    assert told.shown is None  # against itself it has shown nothing of other prompts
    assert min(np.diff(trace.prompt_offsets)) >= 156


def test_a_second_recording_gives_the_same_bytes(recorded, engine, prompts, tmp_path):
    check_golden(tmp_path / "again.safetensors", engine, prompts=prompts, sampling=SAMPLING, update=True)
    assert (tmp_path / "again.safetensors").read_bytes() == recorded[0].read_bytes()


def test_an_engine_that_does_not_agree_with_itself_is_not_recorded(engine, questions, plant, tmp_path):
    rng = np.random.default_rng(0)
    plant(forced_noise(lambda count, _: -abs(rng.normal(0, 0.3, count))))
    told = (
        r"not recorded: this engine does not agree with itself beyond what bfloat16 explains: the same tokens on its own "
        r"schedule: Logprobs are not close: "
    )
    with pytest.raises(EngineError, match=told):
        check_golden(tmp_path / "g.safetensors", engine, prompts=questions(3), sampling=SAMPLING, update=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("what", "told"), [(-0.3, "Logprobs are not close: "), (np.nan, r"\d+ of \d+ logprobs are NaN")])
def test_an_engine_that_is_wrong_in_small_batches_only_is_not_recorded(engine, questions, plant, tmp_path, what, told):
    plant(forced_noise(lambda _, requests: what if len(requests) < 18 else 0))
    with pytest.raises(EngineError, match=rf"the same tokens in other batch compositions, repeat 1 of 5: {told}"):
        check_golden(tmp_path / "g.safetensors", engine, prompts=questions(6), sampling=SAMPLING, update=True)
    assert not list(tmp_path.iterdir())


def test_a_loud_floor_is_kept_and_moves_no_limit_of_the_objective(engine, questions, plant, tmp_path):
    rng = np.random.default_rng(0)

    def loud(count, _):
        made = rng.normal(0, 0.02, count)
        return made - made.mean()

    plant(forced_noise(loud))
    path, arguments = tmp_path / "g.safetensors", {"prompts": questions(6), "sampling": SAMPLING, "update": True}
    check_golden(path, engine, **arguments)
    golden = Golden.load(path)
    assert golden.floor.rms == pytest.approx(2**0.5 * 0.02, rel=0.3)
    assert not golden.floor.reproduces
    limits = default_tolerance("bfloat16")
    louder = with_floor(limits, golden.floor)
    felt = ("mean_diff", "k3", "clip_share", "weight_variance")
    assert [getattr(louder, name) for name in felt] == [getattr(limits, name) for name in felt]
    assert louder.outlier == max(0.5, 30 * golden.floor.rms)
    check_golden(path, engine, **arguments, tolerance={"rms_diff": 0.1})
    golden = Golden.load(path)
    assert golden.tolerance == {"rms_diff": 0.1}  # and it is this golden's from now on
    again = check_golden(path, golden.trace.with_(logprobs=golden.floor.logprobs[0]))
    (gate,) = (g for g in again.gates if g.key == "k3")
    assert (gate.limit, gate.fail_limit) == pytest.approx((0.1**2 / 2, 0.1**2 / 2))


def test_a_golden_too_small_for_a_clean_engine_says_what_is_missing(engine, questions, tmp_path):
    told = check_golden(tmp_path / "g.safetensors", engine, prompts=questions(1), sampling=SAMPLING, update=True, repeats=2)
    golden = Golden.load(tmp_path / "g.safetensors")
    assert golden.floor.repeats == 2
    chance = chance_to_pass(golden, with_floor(default_tolerance("bfloat16"), golden.floor), 0.02)
    assert (chance.prompts, chance.share) == (1, 0)  # 3 sequences are fewer than a verdict on other prompts needs
    notes = {note.key: note for note in told.notes}
    assert notes["chance"].startswith("simulated: 0 of 40 fault-free engines of another version pass with this 1 prompt; ")
    assert chance.needed is None or chance.needed > 2
    assert ("more prompts would not" if chance.needed is None else f"with {chance.needed} prompts like these") in notes[
        "chance"
    ]
    assert "one_prompt" in notes


def test_a_floor_that_no_shape_moved_says_nothing_of_other_builds():
    still = NoiseFloor(np.zeros((3, 4), np.float32), BatchCompositions(), reproduces=True)
    assert (
        still.describe()
        == "noise floor of 3 repeats: bit-identical in all batch compositions tried; another version may still differ"
    )
    moved = NoiseFloor(np.float32([[0, 0], [0, 0.5]]), BatchCompositions(), reproduces=True)
    for number in ("RMS 0.35 nats", "at most 0.5 nats", "50.0% of the logprobs"):
        assert number in moved.describe()


def test_what_a_golden_cannot_show(engine, tmp_path):
    told = check_golden(
        tmp_path / "g.safetensors", engine, prompts=[[5, 6]], sampling=Sampling(max_tokens=4), update=True, repeats=0
    )
    notes = {note.key: note for note in told.notes}
    assert notes["floor"] == "no noise floor: the defaults of its dtype stand in"
    assert notes.keys() >= {"cannot_tell_raw", "one_prompt", "chance"}
    assert "noise floor" not in notes["floor_seconds"]
    assert Golden.load(tmp_path / "g.safetensors").floor is None


@pytest.mark.parametrize("repeats", [1, -1, True, 2.5])
def test_repeats_that_are_none(engine, tmp_path, repeats):
    with pytest.raises(UsageError, match="a noise floor needs 2 repeats or more; 0 records none"):
        check_golden(tmp_path / "g.safetensors", engine, prompts=[[5]], update=True, repeats=repeats)


# -- which engine may be held against it ------------------------------------------------------------------------------


def test_the_same_engine_gives_every_bit_back(recorded, engine):
    for level in ("bitwise", "noise", "rl"):
        result = check_golden(recorded[0], engine, level=level, replay=("decode",))
        assert (result.verdict, result.setup, result.level) == ("pass", "same", level)
        assert (result.difference.different, result.difference.key) == (False, "bits")


def test_another_version_is_compatible_and_says_so(compatible, engine):
    result = check_golden(compatible(), engine)
    assert (result.verdict, result.setup) == ("pass", "compatible")


def test_ones_own_rollouts_have_no_fingerprint(recorded, engine, tmp_path):
    Golden(trace=Golden.load(recorded[0]).trace).save(tmp_path / "own.safetensors")
    assert check_golden(tmp_path / "own.safetensors", engine).setup == "unknown"


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("chat_template.jinja", lambda text: text + "\n", "another chat template: tiny-arith"),
        ("tokenizer.json", lambda text: text + "\n", "another tokenizer: tiny-arith"),
        ("config.json", lambda text: text.replace('"rms_norm_eps": ', '"rms_norm_eps": 1'), "another model: tiny-arith"),
    ],
)
def test_another_model_tokenizer_or_template_is_incomparable_before_an_engine_starts(
    recorded, pool, tmp_path, file, change, told
):
    shutil.copytree(MODEL, tmp_path / "other")
    before = (tmp_path / "other" / file).read_text()
    (tmp_path / "other" / file).write_text(change(before))
    assert (tmp_path / "other" / file).read_text() != before
    starts = len(pool.starts)
    with pytest.raises(IncomparableError, match=f"was recorded with {told}"):
        check_golden(recorded[0], pool.engine(EngineSpec(str(tmp_path / "other"), dtype="bfloat16")))
    assert len(pool.starts) == starts


# -- levels on a real engine ------------------------------------------------------------------------------------------


def test_another_schedule_is_different_and_within_shape_noise(recorded, compatible, engine, plant):
    plant(some_alone)
    # An engine that gave every bit back, and now does not, has changed.
    assert mismatch(recorded[0], engine, level="noise", replay=("decode",)).headline.key == "bits_not_reproduced"
    assert mismatch(recorded[0], engine).headline.key == "bits_not_reproduced"
    path = compatible()
    assert mismatch(path, engine, level="bitwise", replay=("decode",)).headline.key == "not_bit_identical"
    result = check_golden(path, engine, level="noise")
    assert result.metrics["n_changed"] > 0
    assert (result.verdict, result.difference.different) == ("pass", False)
    assert result.difference.p_value > 0.01
    assert check_golden(path, engine).verdict == "pass"


# -- the free run on a real engine ------------------------------------------------------------------------------------


def test_greedy_in_place_of_sampled(recorded, compatible, engine, plant):
    plant(free_run_under(temperature=0.0))
    same = mismatch(recorded[0], engine)
    assert (same.findings[-1].layer, same.findings[-1].cause) == ("sampling", "seed_stream")
    assert same.headline.key == "generates_other_tokens"
    other = mismatch(compatible(), engine)
    assert (other.headline.key, other.free_run.distinct[1]) == ("sampler_changed", 8)  # one for each prompt
    assert other.free_run.distinct[0] > 12


def test_another_seed_stream(recorded, compatible, engine, plant):
    plant(other_seeds)
    assert mismatch(recorded[0], engine).findings[-1].cause == "seed_stream"
    batch = mismatch(compatible("config", max_num_seqs=128), engine)  # draws from the same stream all the same
    assert (batch.setup, batch.findings[-1].cause) == ("compatible", "seed_stream")
    version = check_golden(compatible(), engine)  # may draw from another one: fresh tokens of the same distribution
    assert version.notes[0].key == "free_generation"


def test_stops(compatible, engine, plant):
    plant(free_run_under(max_tokens=10))
    headline = mismatch(compatible(), engine).headline
    assert headline.key == "stops_elsewhere"
    assert "0 of 24 completions have other tokens" in headline


# -- other weights: the last one, for it takes the shared engine's place ------------------------------------------------


def test_weights_nudged_a_little_are_beyond_shape_noise_and_do_not_matter(recorded, pool, tmp_path):
    """One layer's weights are 1 % off: no margin is reached, and yet it is no batch shape that did that."""
    nudged = pool.engine(EngineSpec(nudge(tmp_path / "nudged", 0.01), dtype="bfloat16", seed=1))
    result = mismatch(recorded[0], nudged, level="noise")
    assert (result.headline.key, result.difference.key) == ("beyond_noise", "permutation_test")
    assert result.setup == "compatible"
    assert check_golden(recorded[0], nudged).difference.different


def nudge(folder, share):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    spread = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    weights[name] = (weights[name].float() * (1 + share * spread)).to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)
