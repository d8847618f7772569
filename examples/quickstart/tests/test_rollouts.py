import pytest
from rollouts import PROMPTS, SAMPLING


@pytest.mark.logprob_parity(model="../../models/tiny-arith", dtype="bfloat16")
def test_rollouts(parity_engine, golden_trace):
    golden_trace.check(parity_engine, prompts=PROMPTS, sampling=SAMPLING)
