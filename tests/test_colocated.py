"""Colocated with a trainer: new weights, then sleep and wake. vLLM sleeps on GPUs only."""

import pytest

from conftest import MODEL
from pytest_logprob_parity import EngineSpec, Sampling, UsageError, assert_weight_update

STEP_2 = f"{MODEL}-step2"
SAMPLING = Sampling(temperature=0.7, max_tokens=32, ignore_eos=True, seed=1)


@pytest.mark.gpu
def test_the_new_weights_are_still_there_after_sleep_and_wake(pool, questions):
    engine = pool.engine(EngineSpec(MODEL, dtype="float32", enable_sleep_mode=True))
    before = engine.generate(questions(16), SAMPLING)
    engine.update_weights(STEP_2, clear_cache=True)
    engine.sleep(level=1)
    engine.wake_up()
    trace = engine.generate(questions(16), SAMPLING)
    assert assert_weight_update(trace, before=MODEL, after=STEP_2, clear_cache=True).passed
    engine.sleep(level=2)  # nothing is kept: what wakes up has no weights until it gets some
    engine.wake_up(["weights"])
    engine.update_weights(MODEL, clear_cache=True)
    engine.wake_up(["kv_cache"])
    trace = engine.replay(before)
    assert assert_weight_update(trace, before=STEP_2, after=MODEL, clear_cache=True).passed


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_an_engine_that_cannot_sleep_says_why_and_goes_on(pool, kind):
    import torch

    if kind == "vllm" and torch.cuda.is_available():
        pytest.skip("on a GPU vLLM can: see the test above")
    engine = pool.engine(EngineSpec(MODEL, engine=kind, dtype="float32"))
    says = {"vllm": "the CPU build of vLLM refuses sleep: it needs a GPU", "transformers": "transformers has no sleep"}
    with pytest.raises(UsageError, match=says[kind]):
        engine.sleep()
    assert engine.generate([[5, 6]], Sampling(max_tokens=2)).num_sequences == 1
