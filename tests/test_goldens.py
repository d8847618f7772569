"""The repo's own goldens, under golden/: what a downstream repo would write, held against the engine of today."""

import pytest

from pytest_logprob_parity import Sampling

pytestmark = pytest.mark.logprob_parity(model="models/tiny-arith")

TOOL_ROLLOUTS = [
    [
        {"role": "user", "content": f"{question} Use the calculator."},
        {"role": "assistant"},
        {"role": "tool", "content": result},
        {"role": "assistant"},
    ]
    for question, result in (
        ("Ada has 12 apples and buys 30 more. Ada gives 7 to Ben. How many apples are left?", "42"),
        ("Eve had 71 coins and lost 26. Then Gus brought 40. How many coins does Eve have now?", "45"),
        ("Dan fills 6 bags with 8 nuts each and finds 15 more. How many nuts does Dan have?", "48"),
        *(
            (f"Hana has {a} stamps and buys {b} more. How many stamps does Hana have?", str(a + b))
            for a, b in ((11, 23), (34, 15), (52, 31), (18, 27), (64, 19), (40, 44))
        ),
    )
]


@pytest.mark.logprob_parity(dtype="bfloat16")
def test_grpo_groups(parity_engine, golden_trace, questions):
    """8 prompts x 8 samples, as GRPO takes them."""
    sampling = Sampling(temperature=0.7, top_p=0.95, n=8, max_tokens=64, seed=1)
    result = golden_trace.check(parity_engine, prompts=questions(8), sampling=sampling)
    assert result.expected.num_sequences == 64
    assert result.policy_metrics["ess"] > 0.9


@pytest.mark.logprob_parity(dtype="bfloat16")
def test_two_turns_with_masked_tool_output(parity_engine, golden_trace):
    result = golden_trace.check(
        parity_engine, prompts=TOOL_ROLLOUTS, sampling=Sampling(temperature=0.7, n=2, max_tokens=32, seed=1)
    )
    trace = result.expected
    assert [s.turn for s in trace.segments()] == [0, 1] * 18
    assert result.metrics["n_tokens"] == trace.mask.sum() < trace.num_tokens


@pytest.mark.logprob_parity(dtype="float32")
def test_greedy_in_float32(parity_engine, golden_trace, questions):
    golden_trace.check(
        parity_engine,
        prompts=questions(8, seed=11),
        sampling=Sampling(temperature=0, max_tokens=64),
        replay=("decode", "prefill", "regenerate"),
    )
