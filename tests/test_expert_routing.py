"""A mixture of experts: which experts each token was routed to, recorded, replayed, compared, and against the trainer's."""

import numpy as np
import pytest
from made_up import make_trace, moved

from conftest import MODEL
from pytest_logprob_parity import (
    EngineSpec,
    Sampling,
    Trace,
    UsageError,
    compare,
)
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.vllm.completions import completion_of
from pytest_logprob_parity.errors import EngineError
from pytest_logprob_parity.trace import completion_rows

MOE = f"{MODEL}-moe"
SPEC = EngineSpec(MOE, dtype="bfloat16")
LAYERS, K, EXPERTS = 3, 2, 8


def prompts(count):
    import random

    import arith

    rng = random.Random(2)
    return [[{"role": "user", "content": arith.make_problem(rng).question}] for _ in range(count)]


def routing(tokens, seed=0):
    """Experts [tokens, LAYERS, K], margins and inputs [tokens, LAYERS] of a router in which every tenth choice is a tie."""
    rng = np.random.default_rng(seed)
    margins = rng.exponential(1.0, (tokens, LAYERS)) + 0.6
    margins[::10] = 0.01
    return {
        "routed_experts": rng.random((tokens, LAYERS, EXPERTS)).argsort(axis=-1)[..., :K].astype(np.int16),
        "router_margins": margins.astype(np.float16),
        "router_inputs": rng.normal(0, 1, (tokens, LAYERS)).astype(np.float16),
    }


def others(experts):
    """Other experts than these in every place."""
    return ((experts + 1) % EXPERTS).astype(np.int16)


def notes(comparison, key="expert_routing"):
    return [str(note) for note in comparison.notes if note.key == key]


# -- the columns ------------------------------------------------------------------------------------------------------


def test_a_trace_keeps_its_routing_in_its_file(tmp_path):
    trace = make_trace(10, 10, **routing(100))
    trace.save(tmp_path / "trace.safetensors")
    read = Trace.load(tmp_path / "trace.safetensors")
    for name in ("routed_experts", "router_margins", "router_inputs"):
        assert np.array_equal(getattr(read, name), getattr(trace, name))
        assert getattr(read, name).dtype == getattr(trace, name).dtype


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"routed_experts": np.zeros((100, 6), np.int16)}, r"routed_experts has the shape \(100, 6\)"),
        ({"routed_experts": np.zeros((99, 3, 2), np.int16)}, "routed_experts has 99 rows, tokens are 100"),
        ({"routed_experts": None}, "router_margins is .100, 3., and there is no routed_experts"),
        (
            {"router_inputs": np.zeros((100, 2), np.float16)},
            r"router_inputs is \[100, 2\], and routed_experts is \[100, 3, 2\]",
        ),
        ({"routed_experts": np.full((100, 3, 2), -2, np.int16)}, "has the expert -2; experts are 0 and above"),
    ],
)
def test_columns_that_are_no_routing(change, says):
    with pytest.raises(UsageError, match=says):
        make_trace(10, 10, **(routing(100) | change))


def test_a_routing_that_lacks_some_tokens():
    columns = routing(100)
    columns["routed_experts"][40:45] = -1
    with pytest.raises(
        UsageError, match="is missing for 5 of 100 tokens, the first at row 40: give the routing of every token"
    ):
        make_trace(10, 10, **columns)


# -- rows of an engine ------------------------------------------------------------------------------------------------


def test_an_engines_rows_are_those_of_all_tokens_but_the_last():
    whole = routing(14)["routed_experts"]
    assert np.array_equal(completion_rows(whole, 5, 10), whole[4:])  # row 4 is the last prompt token's: it predicts the first
    assert np.array_equal(completion_rows(whole[4:], 5, 10), whole[4:])


def test_layers_without_a_router_are_left_out():
    whole = routing(14)["routed_experts"]
    dense = np.concatenate([np.zeros_like(whole[:, :1]), whole], axis=1)
    assert np.array_equal(completion_rows(dense, 5, 10), whole[4:])


def test_rows_that_are_not_a_completions():
    whole = routing(14)["routed_experts"].astype(np.int32)
    with pytest.raises(UsageError, match="has 13 rows for a prompt of 5 and a completion of 10 tokens: expected 10, .* or 14"):
        completion_rows(whole[1:], 5, 10)
    with pytest.raises(UsageError, match=r"is int32 \[14, 6\]: expected whole numbers \[tokens, layers, experts per token\]"):
        completion_rows(whole.reshape(14, 6), 5, 10)
    hole = whole.copy()
    hole[4:7] = -1
    with pytest.raises(UsageError, match=r"not filled at token 0 of the completion \(3 of 10 rows have no experts\): a prefix"):
        completion_rows(hole, 5, 10)
    padded = whole.copy()
    padded[-1] = 0
    with pytest.raises(UsageError, match="not filled at token 9 of the completion"):
        completion_rows(padded, 5, 10)
    twice = whole.copy()
    twice[8, 1] = 3
    with pytest.raises(UsageError, match=r"names \[3, 3\] at token 4, layer 1: expected as many different experts"):
        completion_rows(twice, 5, 10)


def test_the_engines_own_routing_is_taken_and_held_to_its_tokens():
    """What vLLM returns with `enable_return_routed_experts`, which needs a GPU: here its outputs are made by hand."""
    from types import SimpleNamespace

    whole = routing(14)["routed_experts"].astype(np.uint8)
    request = Request(prompt_token_ids=list(range(5)), sampling=Sampling(logprobs=1))
    logprobs = [{7: SimpleNamespace(logprob=-1.0, rank=1)} for _ in range(10)]

    def answer(rows):
        written = SimpleNamespace(token_ids=[7] * 10, logprobs=logprobs, finish_reason="length", routed_experts=rows)
        return completion_of(request, SimpleNamespace(outputs=[written]))

    assert np.array_equal(answer(whole).routing.experts, whole[4:])
    with pytest.raises(EngineError, match="the engine's routing is not of its tokens: routed_experts has 9 rows"):
        answer(whole[5:])


def test_rollouts_bring_their_routing():
    whole = routing(14)["routed_experts"]
    sequence = {"prompt_token_ids": [1] * 5, "token_ids": [2] * 10, "logprobs": [-1.0] * 10}
    trace = Trace.from_sequences([sequence | {"routed_experts": whole}, sequence | {"routed_experts": whole[4:].tolist()}])
    assert np.array_equal(trace.routed_experts, np.concatenate([whole[4:]] * 2))
    with pytest.raises(UsageError, match="some sequences have routed_experts and some have not"):
        Trace.from_sequences([sequence | {"routed_experts": whole}, sequence])
    with pytest.raises(UsageError, match=r"sequence 1: routed_experts is \[tokens, 2, 2\], of sequence 0 \[tokens, 3, 2\]"):
        Trace.from_sequences([sequence | {"routed_experts": whole}, sequence | {"routed_experts": whole[:, :2]}])
    with pytest.raises(UsageError, match="sequence 0: routed_experts has 12 rows"):
        Trace.from_sequences([sequence | {"routed_experts": whole[:12]}])


def test_tokens_of_the_environment_have_no_routing():
    whole = routing(10)["routed_experts"]
    whole[3:6] = -1
    mask = [True] * 3 + [False] * 3 + [True] * 4
    sequence = {"prompt_token_ids": [1] * 5, "token_ids": [2] * 10, "logprobs": [-1.0] * 10, "mask": mask}
    trace = Trace.from_sequences([sequence | {"routed_experts": whole}])
    assert np.array_equal(trace.routed_experts, whole)


# -- two sides in hand ------------------------------------------------------------------------------------------------


def test_the_same_experts_are_no_note():
    trace = make_trace(**routing(2000))
    same = compare(expected=trace, actual=trace)
    assert same.metrics["routing_agreement"] == 1
    assert not notes(same)
    assert "routing_agreement" not in compare(expected=trace, actual=trace.with_(routed_experts=None, router_margins=None, router_inputs=None)).metrics  # fmt: skip


def test_flips_at_ties_are_no_finding():
    """A failure beside them has another cause."""
    trace = make_trace(**routing(2000))
    experts = trace.routed_experts.copy()
    experts[::10, 1] = others(experts[::10, 1])
    result = compare(expected=trace, actual=moved(trace, 0.4).with_(routed_experts=experts))
    assert result.verdict == "fail"
    assert result.metrics["routing_ties"] == result.metrics["routing_flips"] == 200
    assert not [finding for finding in result.findings if finding.cause == "expert_routing"]
    (note,) = notes(result)
    assert "200 of 2,000 tokens have another expert in some layer (the same experts by layer: 100.00%, 90.00%, 100.00%)" in note
    assert "200 of them at a tie between experts, 0 in a router that was given something else" in note


def test_a_router_that_chooses_otherwise_is_the_cause_where_it_carries_the_difference():
    trace = make_trace(**routing(2000))
    experts, change = trace.routed_experts.copy(), np.zeros(2000)
    experts[5::10, 1:] = others(experts[5::10, 1:])
    change[5::10] = 0.8 * np.random.default_rng(0).choice([-1, 1], 200)
    result = compare(expected=trace, actual=moved(trace, change).with_(routed_experts=experts))
    (finding,) = result.findings
    assert (finding.layer, finding.cause, finding.values["first_layer"]) == ("path", "expert_routing", 1)
    assert "from layer 1 on routers that were given the same choose other experts: 200 of 2,000 tokens" in finding.evidence
    # the same flips, but the difference is everywhere: something else is wrong
    result = compare(expected=trace, actual=moved(trace, change + 0.5).with_(routed_experts=experts))
    assert not [finding for finding in result.findings if finding.cause == "expert_routing"]


def test_another_number_of_experts_is_the_cause():
    trace = make_trace(**routing(2000))
    fewer = moved(trace, 0.5).with_(routed_experts=trace.routed_experts[..., :1])
    (finding,) = compare(expected=trace, actual=fewer).findings
    assert (finding.cause, finding.evidence) == ("expert_routing", "2 experts for each token in the golden, 1 in this run")


def test_the_routing_of_another_model_is_not_compared():
    trace = make_trace(**routing(2000))
    columns = {name: column[:, :2] for name, column in routing(2000).items()}
    (note,) = notes(compare(expected=trace, actual=trace.with_(**columns)))
    assert note == "expert routing not compared: 3 layers in the golden, 2 in this run: the routing of another model"
