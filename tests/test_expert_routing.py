"""A mixture of experts: which experts each token was routed to, recorded, replayed, compared, and against the trainer's."""

import numpy as np
import pytest
from made_up import make_trace, moved

from conftest import MODEL
from pytest_logprob_parity import (
    EngineSpec,
    MismatchError,
    Sampling,
    Trace,
    TransformersScorer,
    UsageError,
    assert_trainer_parity,
    check_golden,
    compare,
)
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.vllm.completions import completion_of
from pytest_logprob_parity.errors import EngineError
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.trace import completion_rows
from pytest_logprob_parity.trainer.parity import compare_with_trainer

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
    with pytest.raises(UsageError, match="is missing for 5 of 100 tokens, the first at row 40: give the routing of"):
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
    with pytest.raises(UsageError, match=r"has 13 rows for a prompt of 5 and a completion of 10 tokens: expected 10, .* or 14"):
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
    with pytest.raises(
        UsageError, match=r"sequence 1: routed_experts is \[tokens, 2, 2\], that of sequence 0 \[tokens, 3, 2\]"
    ):
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
    without = trace.with_(routed_experts=None, router_margins=None, router_inputs=None)
    assert "routing_agreement" not in compare(expected=trace, actual=without).metrics


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
    result = compare(expected=trace, actual=moved(trace, 0.5).with_(routed_experts=experts))
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


def test_routers_that_are_given_something_else_from_a_layer_on_are_a_candidate():
    """As where a layer's experts are weighed otherwise, and as where some of its weights are others."""
    trace = make_trace(**routing(2000))
    inputs = trace.router_inputs.copy()
    inputs[:, 1:] *= np.float16(1.2)
    (finding,) = compare(expected=trace, actual=moved(trace, 0.4).with_(router_inputs=inputs)).findings
    assert (finding.cause, finding.candidates[:2]) == (None, ("expert_routing", "weights_differ"))
    assert "the routers up to layer 0 are given the same and choose the same experts; that of layer 1 is" in finding.evidence
    inputs[:, 0] *= np.float16(1.2)  # from the first layer on: what comes before all experts differs
    assert not compare(expected=trace, actual=moved(trace, 0.4).with_(router_inputs=inputs)).findings


# -- the real engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden(pool, tmp_path_factory):
    """The path of a golden of 48 sequences of 24 prompts, with its noise floor."""
    path = tmp_path_factory.mktemp("experts") / "golden.safetensors"
    sampling = Sampling(temperature=0.7, max_tokens=48, n=2, seed=1)
    keeps, pool.keeps_place = pool.keeps_place, False  # it starts in this process, where tests reach its worker
    try:
        check_golden(path, pool.engine(SPEC), prompts=prompts(24), sampling=sampling, update=True, repeats=2)
    finally:
        pool.keeps_place = keeps
    return path


@pytest.fixture(scope="module")
def trace(golden):
    return Golden.load(golden).trace


@pytest.fixture
def planted(pool):
    """`planted(plant)`: the engine with a fault in its worker; `plant(worker)` returns how to take it back."""
    engine, undo = pool.engine(SPEC), []

    def plant_on_worker(plant):
        engine.on_worker(lambda worker: undo.append(plant(worker)))
        return engine

    yield plant_on_worker
    for back in undo:
        back()


def routers(worker):
    return [layer.mlp.experts.router for layer in worker.model_runner.model.model.layers]


def setting(name, value):
    """Plants a value in an attribute of every router."""

    def plant(worker):
        before = [(router, getattr(router, name)) for router in routers(worker)]
        for router, _ in before:
            setattr(router, name, value)
        return lambda: [setattr(router, name, old) for router, old in before]

    return plant


def the_next_best(worker):
    """Every seventh row of a batch leaves its best expert out."""
    import torch
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    right = cpu_router._softmax_topk

    def wrong(logits, k, renormalize):
        best = logits.topk(k + 1, dim=-1).indices
        chosen = torch.where((torch.arange(len(logits)) % 7 == 0)[:, None], best[:, 1:], best[:, :k])
        return logits.gather(-1, chosen).softmax(-1).float(), chosen.to(torch.int32)

    cpu_router._softmax_topk = wrong
    return lambda: setattr(cpu_router, "_softmax_topk", right)


def test_a_golden_of_a_mixture_has_its_routing(trace):
    assert trace.routed_experts.shape == (trace.num_tokens, LAYERS, K)
    assert trace.router_margins.shape == trace.router_inputs.shape == (trace.num_tokens, LAYERS)
    assert 0 <= trace.routed_experts.min() <= trace.routed_experts.max() == EXPERTS - 1
    assert (trace.router_margins >= 0).all()
    assert len(np.unique(trace.routed_experts)) == EXPERTS


def test_the_healthy_engine_passes_and_routes_as_recorded(pool, golden, trace):
    engine = pool.engine(SPEC)
    result = check_golden(golden, engine)
    assert (result.verdict, result.metrics["routing_agreement"]) == ("pass", 1)
    assert not notes(result)
    again = engine.replay(trace)
    for name in ("routed_experts", "router_margins", "router_inputs"):
        assert np.array_equal(getattr(again, name), getattr(trace, name))


def test_other_batches_and_another_precision_are_no_fault(pool, trace):
    """Forced one by one, and a float32 engine's tokens in bfloat16: flips are at ties."""
    from pytest_logprob_parity.engines.replay import forced_request

    backend = pool.backend(SPEC)
    segments = list(trace.segments())[::-1][:12]
    for segment in segments:
        (answer,) = backend.run([forced_request(trace, segment, tells_kept=True)])
        same = answer.routing.experts == trace.routed_experts[segment.start : segment.stop]
        assert same.all(axis=(1, 2)).mean() > 0.9
    scored = score_of_float32(trace)
    result = compare(expected=scored, actual=trace)
    assert result.verdict != "fail"
    assert 0 < result.metrics["routing_flips"] < 0.05 * trace.num_tokens


def score_of_float32(trace):
    """The trace as transformers computes it in float32, with its experts."""
    from pytest_logprob_parity.trainer.expert_routing import with_watched_routers
    from pytest_logprob_parity.trainer.scoring import score

    watching = with_watched_routers(trace, TransformersScorer(MOE))
    scored = score(trace, watching)
    return trace.with_(logprobs=scored.logprobs, routed_experts=watching.experts, router_margins=None, router_inputs=None)


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        (setting("top_k", 1), "2 experts for each token in the golden, 1 in this run"),
        (setting("top_k", 3), "2 experts for each token in the golden, 3 in this run"),
        (the_next_best, "this run uses experts that are not the best of its own router's logits, for "),
    ],
    ids=["one expert fewer", "one expert more", "the next best"],
)
def test_another_choice_of_experts_fails_with_its_cause(planted, golden, plant, says):
    with pytest.raises(MismatchError) as error:
        check_golden(golden, planted(plant), replay=("decode",))
    (finding,) = error.value.comparison.findings
    assert (finding.layer, finding.cause) == ("path", "expert_routing")
    assert finding.evidence.startswith(says)


def test_outputs_that_are_weighed_otherwise_have_it_as_the_first_candidate(planted, golden):
    """`norm_topk_prob` lost: the first layer routes as ever, what the others are given is something else."""
    with pytest.raises(MismatchError) as error:
        check_golden(golden, planted(setting("renormalize", False)), replay=("decode",), tolerance={"k3": 1e-4})
    finding = error.value.comparison.findings[0]
    assert (finding.cause, finding.candidates[0], finding.values["moved"]) == (None, "expert_routing", 1)
    assert "the experts of layer 0, how their outputs are weighed, or the attention of layer 1" in finding.evidence


def changed(folder, change):
    """The mixture with `change(name, tensor)` in place of each tensor, as a trace's engine would load it."""
    from pathlib import Path

    from pytest_logprob_parity.checkpoint.rewrite import rewrite_checkpoint

    rewrite_checkpoint(Path(MOE), folder, change, "changed")
    return EngineSpec(str(folder), dtype="bfloat16")


def test_routers_with_other_weights_are_the_cause(pool, trace, tmp_path):
    """They stand in another order in the last layer."""
    spec = changed(tmp_path / "rolled", lambda n, t: t.roll(1, 0) if "layers.2.mlp.gate" in n else t)
    result = compare(expected=trace, actual=pool.engine(spec).replay(trace))
    (finding,) = result.findings
    assert (result.verdict, finding.cause, finding.values["first_layer"]) == ("fail", "expert_routing", 2)
    assert finding.evidence.startswith("from layer 2 on routers that were given the same choose other experts: ")


def test_other_weights_and_another_temperature_are_not_taken_for_the_routers(pool, trace, tmp_path):
    import torch

    def noisy(name, tensor):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
        return (tensor.float() + 0.3 * tensor.float().std() * noise).to(tensor.dtype) if tensor.dim() > 1 else tensor

    result = compare(expected=trace, actual=pool.engine(changed(tmp_path / "noisy", noisy)).replay(trace))
    assert result.verdict == "fail"
    assert result.metrics["routing_real_flips"] > 50  # the experts follow what the routers are given
    assert not [f for f in result.findings if "expert_routing" in (f.cause, *f.candidates)]
    hotter = pool.engine(SPEC).replay(trace.with_(sampling=Sampling(temperature=1.2, max_tokens=48, n=2, seed=1)))
    result = compare(expected=trace, actual=hotter.with_(sampling=trace.sampling))
    (finding,) = result.findings
    assert "temperature" in finding.candidates
    assert "expert_routing" not in finding.candidates


# -- the trainer's side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_trainers_experts_are_compared_and_replayed(trace, packed):
    result = assert_trainer_parity(trace, TransformersScorer(MOE, dtype="bfloat16", packed=packed))
    assert 0.98 < result.metrics["trainer_routing_agreement"] < 1
    assert 0 < result.metrics["trainer_routing_flipped"] < 0.05
    assert result.metrics["rms_diff_replayed_routing"] < result.metrics["rms_diff"]
    (note,) = notes(result)
    assert note.startswith("expert routing: the trainer uses the rollouts' experts for 99.")
    assert "With the rollouts' experts in place of its own (routing replay) the RMS difference is 0.00" in note


def test_a_trainer_whose_routers_differ_is_told_what_replay_removes(trace):
    """Each of its routers leaves its best expert out."""
    from pytest_logprob_parity.trainer.transformers_routers import routers_of

    trainer = TransformersScorer(MOE)
    healthy = compare_with_trainer(trace, trainer)
    assert "expert_routing" not in [finding.cause for finding in healthy.findings]
    for router in routers_of(trainer.model):
        router.register_forward_hook(_next_best)
    result = compare_with_trainer(trace, trainer)
    assert result.verdict == "fail"
    (finding,) = result.findings
    assert (finding.layer, finding.cause) == ("path", "expert_routing")
    assert finding.values["replayed"] < finding.values["own"] / 5
    assert finding.evidence.startswith("the trainer routes 100.0% of the tokens to other experts than the engine did; with the")


def _next_best(router, _inputs, output):
    logits, weights, _ = output
    chosen = logits.topk(router.top_k + 1, dim=-1).indices[:, 1:]
    return logits, logits.float().gather(-1, chosen).softmax(-1).to(weights.dtype), chosen


def test_a_routing_of_another_model_is_refused(trace):
    columns = {name: getattr(trace, name)[:, :2] for name in ("routed_experts", "router_margins", "router_inputs")}
    says = "routed_experts are of 2 layers with 2 experts for each token, up to number 7; the trainer's model has 3 layers of 8"
    with pytest.raises(UsageError, match=says):
        compare_with_trainer(trace.with_(**columns), TransformersScorer(MOE))
    many = trace.with_(routed_experts=(trace.routed_experts + 100).astype(np.int16))
    with pytest.raises(UsageError, match=r"up to number 107; .* the routing is another model's"):
        compare_with_trainer(many, TransformersScorer(MOE))


def test_a_dense_trainer_has_no_routing_to_compare(trace):
    """Nor has a function, whose model nobody sees."""
    trainer = TransformersScorer(MOE)
    result = compare_with_trainer(trace, lambda ids, mask, temperature: trainer(ids, mask, temperature))
    assert result.passed
    assert not notes(result)
