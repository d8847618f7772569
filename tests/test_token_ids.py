"""Token ids that are none: refused where they come in, in one line, and harmless where they get further."""

import asyncio
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pytest_logprob_parity import Sampling, Trace, UsageError
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.server.guard import (
    LARGEST_REQUEST,
    GoneError,
    Keys,
    RefusedError,
    check_request,
    path_of,
    read_body,
)
from pytest_logprob_parity.engines.vllm.forced_decode import FORCED, forced_token, install
from pytest_logprob_parity.errors import GoldenError
from pytest_logprob_parity.trace import file_format

NO_IDS = ["abc", 5, True, None, {"0": 1}, [8], [10**12], [-1], [1.5], [6.0], [True], ["7"], [[1]], [None], [{}], []]


def parameters(forced):
    return SimpleNamespace(extra_args={FORCED: forced})


# -- the sampler, which must not raise --------------------------------------------------------------------------------


def runner_of(*requests):
    """A model runner as vLLM's V1 has it, with 8 logits, whose sampler draws token 0: one request for each SamplingParams."""
    sampler = SimpleNamespace(sample=lambda logits, metadata: (torch.zeros(len(logits), dtype=torch.int64), None))
    named = {str(i): SimpleNamespace(sampling_params=p, output_token_ids=[]) for i, p in enumerate(requests)}
    return SimpleNamespace(sampler=sampler, input_batch=SimpleNamespace(req_ids=list(named)), requests=named)


@pytest.mark.parametrize("ids", NO_IDS)
def test_what_is_no_id_forces_nothing_and_its_neighbours_are_forced(ids):
    runner = runner_of(parameters([7]), parameters(ids), None, SimpleNamespace(extra_args=None), parameters((5,)))
    assert install(SimpleNamespace(model_runner=runner)) == "sampler"
    sampled, _ = runner.sampler.sample(torch.zeros(5, 8), None)
    assert sampled.tolist() == [7, 0, 0, 0, 5]


def test_ids_are_held_to_the_width_of_the_logits():
    assert forced_token(parameters([7, 8]), 0, 8) == 7
    assert forced_token(parameters([7, 8]), 1, 8) is None
    assert forced_token(parameters([7, 8]), 1, 9) == 8
    assert forced_token(parameters([7, 8]), 2, 9) is None


@pytest.mark.parametrize("ids", NO_IDS)
def test_the_v0_engine_draws_on_as_well(ids, monkeypatch):
    """vLLM up to 0.10, whose sampler is a module."""
    module = SimpleNamespace(_sample=lambda probs, logprobs, metadata: ([([0], [0]) for _ in metadata.seq_groups], None))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.sampler", module)

    def group(forced):
        data = SimpleNamespace(get_output_len=lambda: 0)
        return SimpleNamespace(sampling_params=parameters(forced), do_sample=True, seq_ids=[3], seq_data={3: data})

    runner = type("ModelRunner", (), {"__module__": "vllm.worker.model_runner"})()
    assert install(SimpleNamespace(model_runner=runner)) == "sampler"
    drawn, _ = module._sample(torch.zeros(2, 8), None, SimpleNamespace(seq_groups=[group(ids), group([7])]))
    assert drawn == [([0], [0]), ([7], [0])]


def test_a_real_engine_outlives_them(engine):
    """Past every check: handed to the engine itself. It draws in their place, and forces the others of the batch."""
    good = Request(prompt_token_ids=[9, 8], sampling=Sampling(max_tokens=2), forced_token_ids=[5, 6])
    bad = [
        Request(prompt_token_ids=[9, 8], sampling=Sampling(max_tokens=2), forced_token_ids=ids)
        for ids in ([384, 5], [-1, 5], [10**12, 5])
    ]
    answers = engine._backend().run([good, *bad, good])
    assert answers[0].token_ids.tolist() == answers[-1].token_ids.tolist() == [5, 6]
    for answer in answers[1:-1]:
        assert 0 <= answer.token_ids[0] < 384
        assert answer.token_ids[1] == 5


# -- a replay, which says where ---------------------------------------------------------------------------------------


def trace_with(token=5, prompt=9):
    rows = [
        {"prompt_token_ids": [9, 8], "token_ids": [5, 6], "logprobs": [-1.0, -1.0]},
        {"prompt_token_ids": [7, prompt], "token_ids": [5, 6, token], "logprobs": [-1.0, -1.0, -1.0]},
    ]
    return Trace.from_sequences(rows, sampling=Sampling(max_tokens=4))


@pytest.mark.parametrize("path", ["decode", "prefill", "window"])
@pytest.mark.parametrize(
    ("trace", "where"),
    [(trace_with(token=384), "sequence 1 of the trace has the token id 384 at position 2"),
     (trace_with(prompt=2**31 - 1), "prompt 1 of the trace has the token id 2147483647 at position 1")],
)  # fmt: skip
def test_a_trace_of_another_vocabulary_is_refused_before_it_is_sent(engine, path, trace, where):
    assert engine.config.vocabulary == 384
    with pytest.raises(UsageError, match=rf"^{where}; the engine's vocabulary has 384 tokens, ids 0 to 383$"):
        engine.replay(trace, path)
    assert engine.replay(trace_with(token=383), path).num_tokens == 5  # the last id there is


@pytest.mark.parametrize(
    ("prompts", "where"), [([[9], [9, 384]], r"prompts\[1\]"), ([[-1]], r"prompts\[0\]"), ([[2**70]], "prom")]
)
def test_a_prompt_of_other_ids_is_refused(engine, prompts, where):
    with pytest.raises(UsageError, match=rf"^{where}.* has the token id .*; the engine's vocabulary has 384 tokens"):
        engine.generate(prompts, Sampling(max_tokens=2))
    assert engine.generate([[383]], Sampling(max_tokens=2)).num_sequences == 1


# -- a file, which is damaged -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "id_"), [("token_ids", -1), ("prompt_token_ids", -7), ("top_token_ids", -2)])
def test_a_file_with_ids_below_zero_is_damaged(tmp_path, column, id_):
    rows = [{"prompt_token_ids": [9], "token_ids": [5, 6], "logprobs": [-1.0, -1.0], "top_logprobs": [{5: -1.0}, {}]}]
    trace = Trace.from_sequences(rows)
    trace.save(tmp_path / "good.safetensors")
    loaded = Trace.load(tmp_path / "good.safetensors")
    assert loaded.top_token_ids.tolist() == [[5], [-1]]  # a place of the top-k that is not used
    columns = {name: np.array(values) for name, values in trace.to_columns().items()}
    columns[column].flat[-1] = id_
    file_format.write(tmp_path / "bad.safetensors", columns, {"trace": trace.to_metadata()})
    with pytest.raises(GoldenError, match=rf"damaged: .* column {column}, row \d: token id {id_} is no token") as caught:
        Trace.load(tmp_path / "bad.safetensors")
    assert caught.value.replaceable
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=rf"Trace column {column}, row \d+: token id {id_} is no token"):
        trace.with_(**{column: columns[column]})


# -- a request to a server, without one -------------------------------------------------------------------------------


def scope_of(path="/v1/completions", method="POST", root="", **headers):
    named = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "method": method, "path": path, "root_path": root, "headers": named}


class Sender:
    """What a client sends, piece by piece; it leaves after the last one where `leaves`."""

    def __init__(self, *pieces, leaves=False):
        self.pieces, self.leaves, self.read = list(pieces), leaves, 0

    async def receive(self):
        if not self.pieces:
            return {"type": "http.disconnect"}
        self.read += 1
        piece = self.pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(self.pieces) or self.leaves}


def check(body, scope=None, keys=(), vocabulary=8, longest=16):
    """What the app reads of a request: all its messages up to the client's leaving."""

    async def run():
        sender = Sender(*(body if isinstance(body, list) else [body]))
        receive = await check_request(scope or scope_of(), sender.receive, Keys(keys), vocabulary, longest)
        messages = []
        while not messages or messages[-1]["type"] != "http.disconnect":
            messages.append(await receive())
        return messages

    return asyncio.run(run())


def forced(ids, **others):
    return json.dumps({"vllm_xargs": {FORCED: ids}, **others}).encode()


@pytest.mark.parametrize("ids", [ids for ids in NO_IDS if ids not in (None, [])])
@pytest.mark.parametrize("where", ["vllm_xargs", "extra_args", "deep"])
def test_forced_ids_are_checked_wherever_they_stand(ids, where):
    key = {FORCED: ids}
    body = {
        "vllm_xargs": {"vllm_xargs": key},
        "extra_args": {"sampling_params": {"extra_args": key}},
        "deep": {"a": [[{"b": key}]]},
    }
    with pytest.raises(RefusedError, match=FORCED) as caught:
        check(json.dumps(body[where]).encode())
    assert caught.value.status == 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [forced([7] * 16), forced([0]), forced([]), forced(None), b"{", b"", b"\xff", b'{"a": "' + b"x" * 9999]
)
def test_what_the_engine_can_take_or_vllm_refuses_is_handed_on_whole(body):
    for pieces in ([body], [body[:5], body[5:9], b"", body[9:]]):
        first, *rest = check(pieces)
        assert first == {"type": "http.request", "body": body, "more_body": False}
        assert [message["type"] for message in rest] == ["http.disconnect"]


def test_native_trace_replay_is_checked_as_well():
    with pytest.raises(
        RefusedError, match=r"trace_decode_token_ids\[1\] is 8: token ids of this engine are whole numbers from 0 to 7"
    ):
        check(json.dumps({"sampling_params": {"trace_decode_token_ids": [7, 8]}}).encode())
    check(json.dumps({"sampling_params": {"trace_decode_token_ids": None}}).encode())


def test_without_a_vocabulary_ids_are_whole_numbers_of_32_bits():
    check(forced([2**31 - 1]), vocabulary=None, longest=None)
    with pytest.raises(RefusedError, match="whole numbers, 0 and above"):
        check(forced([2**31]), vocabulary=None, longest=None)


def test_a_body_is_read_within_its_bound():
    async def read(sender, **headers):
        return await read_body(sender.receive, scope_of(**headers), 10)

    assert asyncio.run(read(Sender(b"12345", b"67890"))) == b"1234567890"
    for sender, headers in (
        (Sender(b"12345", b"678901"), {}),
        (Sender(b"1"), {"content_length": "11"}),
        (Sender(b"1"), {"content_length": "9" * 5000}),
        (Sender(*[b"1234567890"] * 1000), {}),
    ):
        with pytest.raises(RefusedError, match="the body is larger than 10 bytes") as caught:
            asyncio.run(read(sender, **headers))
        assert caught.value.status == 413
        assert not sender.pieces  # read to its end, so that the client reads the answer
    for sender in (Sender(), Sender(b"12", leaves=True)):
        with pytest.raises(GoneError):
            asyncio.run(read(sender))
    with pytest.raises(RefusedError, match=f"larger than {LARGEST_REQUEST:,} bytes"):
        check(b"", scope_of(content_length=str(LARGEST_REQUEST + 1)))


def test_what_cannot_carry_tokens_is_not_read():
    """Its body goes to the app as it comes, streamed."""
    for scope in (
        scope_of(method="GET"),
        scope_of(content_type="application/octet-stream"),
        scope_of("/v1/x", authorization="Bearer n"),
    ):
        assert [m.get("body") for m in check([forced(["x"]), b"2"], scope, keys=["k"])] == [forced(["x"]), b"2", None]
    for scope in (scope_of("/invocations"), scope_of("/v1/x", authorization="Bearer k")):
        with pytest.raises(RefusedError, match="is 'x'"):
            check([forced(["x"])], scope, keys=["k"])


def test_keys_are_those_that_vllm_takes():
    keys = Keys(["k", "", "ä"])
    for given in ("Bearer k", "bearer k", "BEARER k"):
        assert keys.allow(scope_of(authorization=given))
    for given in ("k", "Bearer", "Bearer ", "Bearer  k", "Basic k", "Bearer K", "Bearer k ", "Bearer kk", "\xff"):
        assert not keys.allow(scope_of(authorization=given))
    assert not keys.allow(scope_of())
    assert Keys([]).allow(scope_of())
    assert Keys([""]).allow(scope_of())


@pytest.mark.parametrize(
    ("path", "root", "own"),
    [("/a", "", "/a"), ("/r/a", "/r", "/a"), ("/r/a", "/r/", "/a"), ("/ra", "/r", "/ra"), ("/a", "/r", "/a"),
     ("/r", "/r", "/r"), ("/r/r/a", "/r", "/r/a")],
)  # fmt: skip
def test_paths_are_of_the_server_behind_its_root(path, root, own):
    assert path_of(scope_of(path, root=root)) == own
