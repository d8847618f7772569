"""Real engines: pinned and read back, replayed bit for bit, one start for each spec, and clear when they fail."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import MODEL, ROOT, forked_code
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    IncomparableError,
    Pool,
    Sampling,
    UsageError,
    check_golden,
    compare,
    open_engine,
)
from pytest_logprob_parity.checkpoint.prompts import _is_hole, check_prompts
from pytest_logprob_parity.engines.backend import Request, ResolvedConfig
from pytest_logprob_parity.engines.process import ProcessBackend
from pytest_logprob_parity.engines.vllm.eager_ranks import count_ranks_eagerly
from pytest_logprob_parity.engines.vllm.own_engine import Face

GROUPS = Sampling(temperature=0.7, top_p=0.95, n=8, max_tokens=64, seed=3)


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_tiny_model_behaves_like_a_trained_one(engine):
    """Right often enough to be a model, wrong often enough that RL has room; sure of most tokens, not of all."""
    import arith

    rng = random.Random("not the training seed")
    problems = [arith.make_problem(rng) for _ in range(200)]
    prompts = [[{"role": "user", "content": p.question}] for p in problems]
    trace = engine.generate(prompts, Sampling(temperature=0, max_tokens=64))
    texts = [engine.tokenizer.decode(trace.completion(i), skip_special_tokens=True) for i in range(200)]
    right = sum(arith.reward(p, t) for p, t in zip(problems, texts, strict=True)) / 200
    assert 1 / 3 <= right <= 2 / 3
    p = np.exp(trace.top_logprobs.astype(np.float64))
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
    assert 0.02 < entropy.mean() < 0.5
    assert (entropy > 0.5).mean() > 0.03


# -- what was asked is what runs --------------------------------------------------------------------------------------


def test_every_pinned_value_is_read_back(engine):
    values = engine.config.values
    for name, value in engine.spec.pins(cpu=True).items():
        assert values[name] == value
    assert engine.config.unverified == ()
    assert engine.config.forcing == "sampler"


def test_a_value_that_the_engine_replaced_is_an_error_that_names_it(pool):
    """There are no CUDA graphs on a CPU; vLLM drops the wish without a word."""
    handle = pool.engine(EngineSpec(MODEL, dtype="bfloat16", compilation_config={"cudagraph_mode": "FULL"}))
    told = r"vllm 0\.32\.0 did not take compilation_config: asked for .'cudagraph_mode': 'FULL'., .* uses .*'NONE'"
    with pytest.raises(EngineError, match=told):
        handle.generate(["1 + 1"])


def test_the_engines_own_reason_in_one_line_and_no_second_try(pool):
    handle = pool.engine(EngineSpec(MODEL, max_model_len=1_000_000))
    with pytest.raises(EngineError, match="did not start") as first:
        handle.generate(["1 + 1"])
    assert "\n" not in str(first.value)
    assert "max_model_len (1000000) is greater than the derived max_model_len" in str(first.value)
    starts = len(pool.starts)
    with pytest.raises(EngineError) as second:
        handle.generate(["1 + 1"])
    assert second.value is first.value
    assert len(pool.starts) == starts


def test_unknown_engine_arguments(pool):
    with pytest.raises(UsageError, match=r"'max_modle_len'.*did you mean 'max_model_len'\?"):
        pool.engine(EngineSpec(MODEL, max_modle_len=5)).generate(["1 + 1"])


@pytest.mark.parametrize(
    ("missing", "told"),
    [("folder", "no such folder"), ("config.json", "has no config.json"), ("tokenizer.json", "has no tokenizer")],
)
def test_a_model_folder_that_is_not_whole(pool, tmp_path, missing, told):
    import shutil

    if missing != "folder":
        shutil.copytree(MODEL, tmp_path / "m")
        (tmp_path / "m" / missing).unlink()
    starts = len(pool.starts)
    with pytest.raises(UsageError, match=told):
        pool.engine(EngineSpec(str(tmp_path / "m"))).generate(["1 + 1"])
    assert len(pool.starts) == starts


# -- replay -----------------------------------------------------------------------------------------------------------


def test_an_eager_engine_counts_ranks_without_compiling_the_count(engine, monkeypatch):
    import torch
    from vllm.v1.sample.ops import logprobs as ops

    assert engine.config.values["enforce_eager"]
    bare = ops.batched_count_greater_than
    compiled = torch.compile(bare, backend="eager")
    rows = torch.randn(5, 40).round(decimals=1)  # ties count
    assert torch.equal(bare(rows, rows[:, :1]), compiled(rows, rows[:, :1]))
    monkeypatch.setattr(ops, "batched_count_greater_than", compiled)
    for eager, device in ((False, "cpu"), (True, "cuda")):
        worker = SimpleNamespace(
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(enforce_eager=eager), device_config=SimpleNamespace(device_type=device)
            )
        )
        assert not count_ranks_eagerly(worker)
        assert ops.batched_count_greater_than is compiled
    worker.vllm_config.device_config.device_type = "cpu"
    assert count_ranks_eagerly(worker)
    assert ops.batched_count_greater_than is bare


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_decode_replay_and_free_run_reproduce_the_recording_bit_for_bit(pool, questions, dtype):
    engine = pool.engine(EngineSpec(MODEL, dtype=dtype))
    trace = engine.generate(questions(8), GROUPS)
    replayed = engine.replay_all(trace, ["decode", "regenerate"])
    np.testing.assert_array_equal(replayed["decode"].logprobs, trace.logprobs)
    np.testing.assert_array_equal(replayed["decode"].top_logprobs, trace.top_logprobs)
    np.testing.assert_array_equal(replayed["regenerate"].token_ids, trace.token_ids)
    assert (replayed["decode"].replay, replayed["decode"].forcing) == ("decode", "sampler")


def test_decode_replay_forces_tokens_that_the_engine_would_never_write(engine, questions):
    """The negative control: forcing must not depend on the engine agreeing."""
    trace = engine.generate(questions(4), Sampling(temperature=0, max_tokens=20))
    shuffled = trace.with_(token_ids=np.roll(trace.token_ids, 7))
    replayed = engine.replay(shuffled)
    assert replayed.logprobs.mean() < -3
    np.testing.assert_array_equal(replayed.token_ids, shuffled.token_ids)


def test_prefill_agrees_with_raw_decode_in_float32(pool, questions):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32"))
    trace = engine.generate(questions(8), Sampling(max_tokens=40, seed=5))
    replayed = engine.replay(trace, "prefill")
    result = compare(expected=trace, actual=replayed)
    assert (replayed.replay, result.verdict) == ("prefill", "pass")
    assert result.metrics["max_abs_diff"] < 1e-4


def test_windows_replay_part_of_a_long_rollout(engine, questions):
    trace = engine.generate(questions(8), Sampling(max_tokens=60, min_tokens=40, seed=5))
    replayed = engine.replay(trace, "window", windows=3, width=8)
    covered = int(replayed.mask.sum())
    assert covered == 8 * 3 * 8
    result = compare(expected=trace, actual=replayed)
    assert (result.verdict, result.metrics["n_tokens"]) == ("pass", covered)


def test_min_tokens_survives_the_replay(engine, questions):
    """Without the stop ids that min_tokens masks, a replay would show tokens at -inf, or other masses."""
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=50, min_tokens=40, seed=2)
    trace = engine.generate(questions(6), sampling)
    np.testing.assert_array_equal(engine.replay(trace).logprobs, trace.logprobs)


def test_penalties_survive_the_replay(engine, questions):
    sampling = Sampling(temperature=0.7, repetition_penalty=1.1, frequency_penalty=0.2, max_tokens=40, seed=2)
    trace = engine.generate(questions(6), sampling)
    np.testing.assert_array_equal(engine.replay(trace).logprobs, trace.logprobs)


def test_a_temperature_that_vllm_raises_is_the_traces_and_the_test_may_ask_for_it_again(pool, questions, tmp_path):
    """vLLM samples with 0.01 where 0.005 is asked for. The negative control: another temperature is another golden."""
    engine, reference = (pool.engine(EngineSpec(MODEL, dtype="float32", engine=kind)) for kind in ("vllm", "transformers"))
    arguments = {"prompts": questions(8), "sampling": Sampling(temperature=0.005, max_tokens=20, seed=3)}
    path, told = (
        tmp_path / "golden.safetensors",
        "temperature 0.005 was asked for; vllm samples with 0.01, its smallest above 0",
    )
    assert told in check_golden(path, engine, update=True, **arguments).notes
    again = check_golden(path, engine, **arguments)
    assert (again.verdict, again.metrics["n_changed"], told in again.notes) == ("pass", 0, True)
    assert compare(expected=again.expected, actual=reference.replay(again.expected)).verdict == "pass"
    with pytest.raises(IncomparableError, match=r"with temperature=0\.01, the test now samples with temperature=0\.02"):
        check_golden(path, engine, prompts=questions(8), sampling=Sampling(temperature=0.02, max_tokens=20, seed=3))


def test_groups_have_a_seed_for_each_sequence(engine, questions):
    trace = engine.generate([*questions(1), *questions(1)], Sampling(temperature=1.2, n=4, max_tokens=40, seed=9))
    assert trace.group.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert trace.sample.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert trace.seeds.tolist() == list(range(9, 17))
    assert len({tuple(trace.completion(i)) for i in range(8)}) > 4  # equal prompts, different completions


def test_two_turns_with_masked_tool_output(engine):
    question = "Ada has 12 apples and buys 30 more. Ada gives 7 to Ben. How many apples are left? Use the calculator."
    rollout = [
        {"role": "user", "content": question},
        {"role": "assistant"},
        {"role": "tool", "content": "42"},
        {"role": "assistant"},
    ]
    trace = engine.generate([rollout], Sampling(temperature=0.7, n=4, max_tokens=30, seed=1))
    masked = "".join(trace.text(t) for t in trace.token_ids[~trace.mask])
    assert masked == "<|tool|>42<|end|><|assistant|>" * 4
    assert [s.turn for s in trace.segments()] == [0, 1] * 4
    replayed = engine.replay_all(trace, ["decode", "regenerate"])
    np.testing.assert_array_equal(replayed["decode"].logprobs[trace.mask], trace.logprobs[trace.mask])
    assert np.isnan(replayed["decode"].logprobs[~trace.mask]).all()
    np.testing.assert_array_equal(replayed["regenerate"].token_ids, trace.token_ids[trace.mask])


def test_processed_logprobs_are_what_transformers_computes(pool, questions):
    """The reference: the same tokens, forced through another implementation in float64."""
    vllm = pool.engine(EngineSpec(MODEL, dtype="float32"))
    reference = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float64"))
    sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.1, n=2, max_tokens=30, seed=4)
    trace = vllm.generate(questions(24), sampling)
    result = compare(expected=trace, actual=reference.replay(trace))
    assert result.verdict == "pass", result.headline
    assert result.metrics["max_abs_diff"] < 1e-4
    wrong = reference.replay(trace.with_(sampling=Sampling(**{**sampling.to_json(), "temperature": 0.714})))
    assert not compare(expected=trace, actual=wrong.with_(sampling=sampling)).passed  # a temperature wrong by 2 %


def test_raw_logprobs_and_prefill_are_what_transformers_computes(pool, questions):
    reference = pool.engine(EngineSpec(MODEL, engine="transformers", dtype="float64", logprobs_mode="raw_logprobs"))
    trace = reference.generate(questions(3), Sampling(max_tokens=20, seed=4))
    for path in ("decode", "prefill"):
        assert compare(expected=trace, actual=reference.replay(trace, path)).metrics["max_abs_diff"] < 1e-5


# -- what cannot be done is refused by name ---------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context(engine):
    with pytest.raises(UsageError, match=r"prompts\[1\] has 1,100 tokens; the engine's context \(max_model_len\) is 1,024"):
        engine.generate([[5, 6], [7] * 1100])


def test_more_logprobs_than_the_engine_gives(engine):
    with pytest.raises(UsageError, match="the engine gives at most 20; set max_logprobs"):
        engine.generate(["1 + 1"], Sampling(logprobs=30))


@pytest.mark.parametrize("prompts", [[], "a string", [""], [[]], [{"role": "user"}], [3]])
def test_prompts_that_are_none(engine, prompts):
    with pytest.raises(UsageError, match="prompts"):
        engine.generate(prompts)


@pytest.mark.parametrize("bad", [{"presence_penalty": 5}, {"stop_token_ids": (10**6,), "min_tokens": 2}])
def test_a_request_that_is_refused_leaves_the_engine_alive(pool, engine, bad):
    assert engine.config.forcing == "sampler"  # it is alive
    starts = len(pool.starts)
    with pytest.raises(UsageError, match=r"vllm 0\.32\.0 refuses a request: "):
        engine.generate(["1 + 1"], Sampling(**bad))
    with pytest.raises(UsageError, match=r"refuses a request: .*out of vocabulary"):
        engine._backend().run(
            [Request(prompt_token_ids=prompt, sampling=Sampling()) for prompt in ([10, 11], [999_999])]
        )  # the first was taken already
    assert engine.generate(["1 + 1"], Sampling(max_tokens=2)).num_sequences == 1
    assert len(pool.starts) == starts


def test_a_tool_call_is_no_turn_to_write_and_images_are_refused():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "calc"}]}
    assert not _is_hole(call)
    assert _is_hole({"role": "assistant", "content": None})
    with pytest.raises(UsageError, match=r"prompts\[0\] has 'multi_modal_data', which is not supported"):
        check_prompts([{"prompt_token_ids": [5], "multi_modal_data": {}}])


# -- starts, ends, deaths ---------------------------------------------------------------------------------------------


def test_one_start_for_each_spec_and_a_process_for_the_one_that_comes_back(questions):
    mark = {"OFFSPRING": uuid.uuid4().hex}
    code = textwrap.dedent(f"""
        import os
        import numpy as np
        from pytest_logprob_parity import EngineSpec, Pool, Sampling
        os.environ |= {mark!r}
        with Pool() as pool:
            a, b = EngineSpec({MODEL!r}, dtype="bfloat16"), EngineSpec({MODEL!r}, dtype="float32")
            prompts = [[10, 11, 12], [13, 14]]
            first = pool.engine(a).generate(prompts, Sampling(max_tokens=8))
            pool.engine(a).generate(prompts)
            pool.engine(b).generate(prompts)
            for _ in range(2):
                again = pool.engine(a).replay(first)
                pool.engine(b).generate(prompts)
            assert np.array_equal(again.logprobs, first.logprobs)
            print([(s.spec.dtype, s.own_process) for s in pool.starts])
    """)
    done = subprocess.run(forked_code(code), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == ["[('bfloat16', False), ('float32', False), ('bfloat16', True)]"], done.stderr[
        -3000:
    ]
    _check_none_is_left(mark)


def test_nothing_is_left_behind_after_a_crash():
    """Whoever opened the engine dies without closing it; the engine's own process must not stay."""
    code = textwrap.dedent(f"""
        import os
        from pytest_logprob_parity import EngineSpec, Pool
        pool = Pool()
        spec = EngineSpec({MODEL!r}, engine="transformers", dtype="float32")
        from pytest_logprob_parity.engines.process import ProcessBackend
        backend = ProcessBackend.start(spec, *pool.folders(spec))
        print(backend._process.pid, flush=True)
        os._exit(9)
    """)
    done = subprocess.run(forked_code(code), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 9
    pid = int(done.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the engine's process is still there")


def test_an_engine_process_that_is_killed_says_so(child):
    backend = child()
    backend._process.kill()
    with pytest.raises(EngineError, match=r"the engine's process died \(exit status -9\)"):
        backend.run([])


def test_an_engine_process_that_does_not_answer_is_ended_and_the_next_use_starts_anew(child):
    """It was stopped: a call has no end. The negative control: the next engine, without a call that hangs, is left alone."""
    spec = EngineSpec(MODEL, engine="transformers", dtype="float32")
    with Pool(call_timeout=60) as pool:
        pool._alive[spec] = stopped = child(limit=0.5)
        os.kill(stopped._process.pid, signal.SIGSTOP)
        told = (
            r"the engine: no answer to 'run' of 1 requests within 0\.5 s; its process was ended, whose last lines are: it left "
            r"no message; ini parity_call_timeout \(without pytest: call_timeout=\) allows more, 0 sets no limit"
        )
        with pytest.raises(EngineError, match=told):
            pool.engine(spec).generate([[5, 6]], Sampling(max_tokens=2))
        assert stopped._process.returncode == -signal.SIGKILL
        assert pool.engine(spec).generate([[5, 6]], Sampling(max_tokens=2)).num_sequences == 1
        assert len(pool.starts) == 1


def test_a_request_that_the_stopped_process_does_not_even_read(child):
    """More than a pipe holds: it is the sending that hangs."""
    stopped = child(limit=0.5)
    os.kill(stopped._process.pid, signal.SIGSTOP)
    with pytest.raises(EngineError, match="no answer to 'run' of 400 requests within"):
        stopped.run([Request(prompt_token_ids=list(range(5000)), sampling=Sampling())] * 400)


def test_a_stopped_process_is_closed_in_order(child):
    """It goes on, reads the end of the line and exits; nobody has to kill it."""
    stopped = child()
    os.kill(stopped._process.pid, signal.SIGSTOP)
    stopped.close()
    assert stopped._process.returncode == 0


def test_a_start_that_takes_too_long_is_remembered_as_one_that_failed():
    with Pool(start_timeout=0.5) as pool:
        engine = pool.beside(EngineSpec(MODEL, dtype="bfloat16"))
        with pytest.raises(EngineError, match=r"no answer to 'start' within 0\.5 s; .*; ini parity_start_timeout") as first:
            engine.generate([[5, 6]])
        with pytest.raises(EngineError) as second:
            engine.generate([[5, 6]])
    assert second.value is first.value


@pytest.mark.parametrize("bad", [-1, "soon", float("nan"), float("inf"), True, None])
def test_time_outs_that_are_none(bad):
    with (
        pytest.raises(UsageError, match=r"call_timeout: .* must be a number of seconds, or 0 for no limit"),
        open_engine(EngineSpec(MODEL), call_timeout=bad),
    ):
        pass


@pytest.fixture
def child():
    """`child(limit)`: the far end of an engine's process that nothing was started in yet."""
    children = []

    def make(limit=60):
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "pytest_logprob_parity.engines.child", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the backend closes it
        children.append(ProcessBackend(process, ours, log, "the engine"))
        children[-1].config = ResolvedConfig(engine="transformers", version="5", dtype="float32", values={})
        children[-1]._seconds = limit
        return children[-1]

    yield make
    for backend in children:
        backend.close()


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "used"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, used):
    """OpenMP itself tells what it has read, when torch is loaded."""
    code = textwrap.dedent(f"""
        from pytest_logprob_parity import EngineSpec, Pool
        Pool().engine(EngineSpec({MODEL!r}))
        import torch
    """)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    told = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "OMP_DISPLAY_ENV": "true", **given},
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    assert f"OMP_WAIT_POLICY = '{used}'" in told


# -- engines that somebody else built ---------------------------------------------------------------------------------


def test_the_users_own_llm_is_used_as_it_is(questions):
    """Built by the repo under test: nothing is pinned, what differs from `rl` is shown, closing it is theirs."""
    code = textwrap.dedent(f"""
        import os
        os.environ |= {{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}}
        import numpy as np
        from vllm import LLM
        from pytest_logprob_parity import Pool, Sampling
        llm = LLM({MODEL!r}, dtype="bfloat16", enforce_eager=True, enable_chunked_prefill=False)
        with Pool(notify=print) as pool:
            engine = pool.adopt(llm)
            assert pool.adopt(llm) is engine
            trace = engine.generate([[10, 11, 12], [13, 14]], Sampling(temperature=0.7, max_tokens=8))
            assert np.array_equal(engine.replay(trace).logprobs, trace.logprobs)
            print(trace.logprobs_mode)
        print(len(llm.generate(["1 + 1"], use_tqdm=False)))
    """)
    done = subprocess.run(forked_code(code), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "vllm" not in line or "own engine" in line]
    assert "differs from profile rl: logprobs_mode is 'raw_logprobs' (rl: 'processed_logprobs')" in done.stdout
    assert lines[-2:] == ["raw_logprobs", "1"]


def test_the_users_own_llm_in_another_process_ends_in_order(pytester, run_forked):
    """Nobody ends it, and nothing is printed after pytest's last line: left to itself, vLLM would log to a stream that pytest
    has closed.
    """
    pytester.makeini("[pytest]\nparity_repeats = 0\nparity_reference = none")
    pytester.makeconftest(
        f"""
        import os
        import pytest

        @pytest.fixture(scope="session")
        def parity_engine_factory():
            os.environ |= {{"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}}
            from vllm import LLM
            extension = "pytest_logprob_parity.engines.forced_decode.WorkerExtension"
            return LLM(
                {MODEL!r}, dtype="bfloat16", enforce_eager=True, worker_extension_cls=extension,
                distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",  # one process, as on a GPU
            )
        """
    )
    pytester.makepyfile(
        test_it="""
        def test_it_answers(parity_engine, golden_trace):
            golden_trace.check(parity_engine, prompts=[[9, 8, 7]], sampling=dict(max_tokens=8))
        """
    )
    result = run_forked("-p", "no:cacheprovider", "--update-golden", timeout=300)
    result.assert_outcomes(passed=1)
    for word in ("Traceback", "Logging error", "[shutdown]"):
        assert word not in result.stderr.str()


class SlowLlm:
    """An `LLM` whose engine core, in another process, takes its time."""

    def __init__(self, seconds):
        self.seconds, self.ended = seconds, 0
        self.llm_engine = self.engine_core = self

    def generate(self):
        time.sleep(self.seconds)
        return "an answer"

    def shutdown(self):
        self.ended += 1


def test_an_own_engine_that_hangs_is_ended_and_not_asked_again():
    """pytest shows an `LLM` in a failure, for which that asks its engine core: left alone, it would hang the report, too."""
    llm = SlowLlm(30)
    face = Face(llm, 0.1)
    with pytest.raises(
        EngineError, match=r"own engine \(SlowLlm\): no answer to 'generate' within 0\.1 s; its engine .* ended"
    ) as first:
        face.generate()
    with pytest.raises(EngineError) as second:
        face.generate()
    assert second.value is first.value
    assert llm.ended == 1
    assert Face(SlowLlm(0), 5).generate() == "an answer"


def test_open_engine_needs_no_pytest():
    with open_engine(EngineSpec(MODEL, engine="transformers", dtype="float32")) as engine:
        assert engine.generate([[5, 6]], Sampling(max_tokens=4)).num_tokens <= 4


def test_no_vllm_installed():
    """In an environment without vLLM the error says what to install."""
    code = textwrap.dedent(f"""
        import sys
        sys.modules["vllm"] = None  # as if it were not there
        from pytest_logprob_parity import EngineError, EngineSpec, Pool
        try:
            Pool().engine(EngineSpec({MODEL!r})).config
        except EngineError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "install pytest-logprob-parity[vllm] for GPUs or [cpu]" in done.stdout
    assert done.stdout.count("\n") == 1


def _check_none_is_left(mark):
    """No process with this in its environment lives on; its own children inherit it, those of other tests do not."""
    (wanted,) = (f"{name}={value}".encode() for name, value in mark.items())
    for _ in range(100):
        left = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    left.append((folder / "cmdline").read_text())
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(left)


@pytest.mark.usefixtures("in_this_process")
def test_an_engine_whose_process_lost_its_groups_starts_anew(pool):
    """As after the end of somebody else's LLM in this process, which takes vLLM's parallel groups with it."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = pool.engine(EngineSpec(MODEL, dtype="float32", max_num_seqs=7))
    before = engine.generate([[1, 2, 3]], Sampling(max_tokens=4, seed=1))
    cleanup_dist_env_and_memory()
    again = engine.generate([[1, 2, 3]], Sampling(max_tokens=4, seed=1))
    assert np.array_equal(again.logprobs, before.logprobs)
