"""Async tests: `check_async` on a real `AsyncLLM`, in the event loops of pytest-asyncio and of anyio's plugin."""

import asyncio
import threading

import pytest

from conftest import MODEL
from pytest_logprob_parity import ParityError, UsageError
from pytest_logprob_parity.engines.event_loop import ask_in_loop, beside_the_loop

#: The same file for both plugins; OWN says whether an AsyncLLM that the event loop has built takes the pool's place.
CONFTEST = f"""
import os
import pytest
{{imports}}

if "OWN" in os.environ:
    {{fixture}}
    async def parity_engine_factory({{argument}}):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            {MODEL!r}, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False, generation_config="vllm",
            async_scheduling=False, worker_extension_cls="pytest_logprob_parity.engines.forced_decode.WorkerExtension",
            distributed_executor_backend="vllm.v1.executor.uniproc_executor.UniProcExecutor",  # one process, as on a GPU
        )
        llm = AsyncLLM.from_engine_args(arguments)
        yield llm
        {{end}}
"""
TESTS = f"""
import asyncio
import os
import signal
import pytest

pytestmark = [{{mark}}, pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")]
PROMPTS = [[9, 8, 7 + i] for i in range(16)]
PLAIN = dict(max_tokens=24, seed=1)  # raw logprobs are processed ones here


async def test_the_loop_goes_on(parity_engine, golden_trace):
    ticks = 0

    async def clock():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    beside = asyncio.create_task(clock())
    result = await golden_trace.check_async(parity_engine, prompts=PROMPTS, sampling=PLAIN)
    beside.cancel()
    assert ticks > 10
    assert result.recorded or result.metrics["n_changed"] == 0


async def test_raw_logprobs(parity_engine, golden_trace):
    await golden_trace.check_async(parity_engine, prompts=PROMPTS, sampling=PLAIN | {{{{"temperature": 0.7, "top_p": 0.9}}}})


@pytest.mark.skipif("OWN" not in os.environ, reason="needs an AsyncLLM")
async def test_a_call_that_would_stop_the_loop(parity_engine):
    parity_engine.generate(PROMPTS, PLAIN)


@pytest.mark.skipif("OWN" not in os.environ, reason="needs an AsyncLLM")
async def test_threads_may_ask_too(parity_engine):
    trace = await asyncio.to_thread(parity_engine.generate, PROMPTS, PLAIN)
    assert (trace.num_sequences, trace.logprobs_mode) == (16, "raw_logprobs")


@pytest.mark.skipif(os.environ.get("OWN") != "pytest-asyncio", reason="the other run leaves its AsyncLLM as it is")
async def test_an_engine_core_that_is_stopped(parity_engine, parity_engine_factory):
    parity_engine._backend()._llm._seconds = 1
    os.kill(parity_engine_factory.engine_core.resources.engine_manager.processes[0].pid, signal.SIGSTOP)
    await asyncio.to_thread(parity_engine.generate, PROMPTS, PLAIN)
"""
PLUGINS = {
    "pytest-asyncio": {
        "imports": "import pytest_asyncio",
        "fixture": '@pytest_asyncio.fixture(scope="session", loop_scope="session")',
        "argument": "",
        "end": "llm.shutdown()",
        "mark": 'pytest.mark.asyncio(loop_scope="session")',
    },
    "anyio": {
        "imports": '@pytest.fixture(scope="session")\ndef anyio_backend(): return "asyncio"',
        "fixture": '@pytest.fixture(scope="session")',
        "argument": "anyio_backend",
        "end": "pass  # nobody ends it",
        "mark": "pytest.mark.anyio",
    },
}


@pytest.mark.parametrize("plugin", ["pytest-asyncio", pytest.param("anyio", marks=pytest.mark.nightly)])
def test_an_async_llm_is_held_against_the_golden_of_another_engine(pytester, run_inner, monkeypatch, plugin, run_forked):
    """Recorded in this process, checked on an AsyncLLM with vLLM's raw logprobs: the same bits where raw is processed, and a
    failure where it is not. A run that leaves the AsyncLLM to the interpreter's end prints nothing after it.
    """
    pytester.makeini("[pytest]\nparity_repeats = 0\nparity_reference = none\nasyncio_default_fixture_loop_scope = session")
    if plugin == "anyio":
        pytester.makeini("[pytest]\nparity_repeats = 0\nparity_reference = none")
    pytester.makeconftest(CONFTEST.format(**PLUGINS[plugin]))
    pytester.makepyfile(test_it=TESTS.format(**PLUGINS[plugin]))
    run_inner("--update-golden").assert_outcomes(passed=2, skipped=3)
    run_inner("--parity-level=bitwise").assert_outcomes(passed=2, skipped=3)
    monkeypatch.setenv("OWN", plugin)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    result = run_forked("-p", "no:cacheprovider", timeout=300)
    stopped = "E *EngineError: own engine (AsyncLLM): no answer to 'generate' within 1 s; its engine core was ended, *"
    result.stdout.fnmatch_lines(
        ["logprob-parity: own engine, vllm 0.32.0: differs from profile rl: logprobs_mode is 'raw_logprobs'*",
         "E *MismatchError: fail: The logprobs of the two sides have different meanings: processed (T=0.7, top-p 0.9) in the "
         "golden, raw in this run",
         "E *UsageError: an AsyncLLM answers in its event loop, which a blocking call would stop: `await *check_async*",
         *([stopped] if plugin == "pytest-asyncio" else []),
         "*pass (* level rl, objective token) golden/test_it/test_the_loop_goes_on-*: * logprobs agree*"]
    )  # fmt: skip
    result.assert_outcomes(passed=2, **({"failed": 3} if plugin == "pytest-asyncio" else {"failed": 2, "skipped": 1}))
    assert "Traceback" not in result.stderr.str()
    assert "Logging error" not in result.stderr.str()


# -- without an engine ------------------------------------------------------------------------------------------------


def test_what_a_factory_may_not_give(pytester, run_inner):
    """The negative control is the AsyncLLM above."""
    pytester.makeconftest("""
        import pytest

        @pytest.fixture(scope="session")
        def parity_engine_factory():
            async def make(spec):
                return None
            return make
    """)
    pytester.makepyfile("def test_it(parity_engine): pass")
    run_inner().stdout.fnmatch_lines(["E *UsageError: parity_engine_factory gave a coroutine: make it an async fixture, or *"])


def test_a_loop_that_has_ended():
    """An engine that an earlier test's event loop has built."""
    ended = asyncio.new_event_loop()
    ended.close()

    async def ask():
        await beside_the_loop(lambda: ask_in_loop(ended, asyncio.sleep, 5), "check_async")

    with pytest.raises(UsageError, match="belongs to another event loop, which is closed: let its fixture and its tests share"):
        asyncio.run(ask())


def test_outside_of_asyncio():
    async def ask():
        await beside_the_loop(lambda: None, "check_async")

    with pytest.raises(UsageError, match="check_async needs an event loop of asyncio"):
        ask().send(None)


def test_a_cancelled_check_ends_what_it_waits_for_and_asks_for_no_more():
    """The negative control: before the cancellation it did ask."""
    asked, ended = [], threading.Event()

    async def answer():
        asked.append(1)
        await asyncio.sleep(600)

    def work():
        for _ in range(2):
            with pytest.raises(ParityError, match="cancelled"):
                ask_in_loop(None, answer, 0)
        ended.set()

    async def check():
        await asyncio.wait_for(beside_the_loop(work, "check_async"), 0.2)

    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        asyncio.run(check())
    assert ended.is_set()
    assert asked == [1]


def test_checks_of_one_loop_take_turns(pool):
    """Two at once would be two threads in one engine; a blocking call meanwhile is refused: it would wait for ever."""
    here, most = [], []

    def work():
        with pool.turn():
            here.append(1)
            most.append(len(here))
            threading.Event().wait(0.05)
            here.pop()

    async def check():
        both = [asyncio.create_task(beside_the_loop(work, "check_async")) for _ in range(2)]
        while not here:
            await asyncio.sleep(0.001)
        with pytest.raises(UsageError, match="another check is under way beside this event loop"), pool.turn():
            pass
        await asyncio.gather(*both)

    asyncio.run(check())
    assert most == [1, 1]
