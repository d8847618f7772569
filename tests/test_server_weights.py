"""Weight updates over a server: a real `logprob-parity serve --weight-updates`, and a gateway that plants the faults."""

import json
import re
import urllib.error
import urllib.request

import numpy as np
import pytest
from gateway import Gateway
from safetensors.torch import load_file, save_file
from serving import KEY

from conftest import MODEL
from pytest_logprob_parity import (
    EngineError,
    EngineSpec,
    MismatchError,
    Sampling,
    UsageError,
    assert_updated_equals_cold,
    assert_weight_update,
)
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.engines.server.guard import DEVELOPMENT, Keys, RefusedError, check_development

STEP_2 = f"{MODEL}-step2"
SAMPLING = Sampling(temperature=0.7, max_tokens=128, ignore_eos=True, seed=1)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    """The tests have the server's key."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)


@pytest.fixture(scope="module")
def _gateway(server):
    gateway = Gateway(server)
    yield gateway
    gateway.close()


@pytest.fixture
def gateway(_gateway):
    _gateway.heal()
    return _gateway


@pytest.fixture
def there(gateway):
    """An engine on the server, which has its checkpoint's weights before and after the test."""
    spec = EngineSpec(MODEL, engine="vllm-server", dtype="float32", url=gateway.url, retries=0)
    with Pool() as pool:
        yield pool.engine(spec)
    gateway.heal()
    with Pool() as pool:
        pool.engine(spec).update_weights(MODEL, clear_cache=True)


@pytest.fixture
def updated(there, questions):
    def update(weights=STEP_2, at_token=8, **how):
        return there.update_weights(weights, at_token=at_token, prompts=questions(8), sampling=SAMPLING, **how)

    return update


def check(trace, **how):
    return assert_weight_update(trace, before=MODEL, after=STEP_2, **how)


def findings_of(trace, **how):
    with pytest.raises(MismatchError) as error:
        check(trace, **how)
    assert error.value.comparison.verdict == "fail"
    return error.value.comparison.findings


def asked(url, path, body=None, **headers):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


# -- updates that go as asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clear", [False, True])
def test_running_requests_go_on_with_the_new_weights(updated, there, questions, clear):
    trace = updated(clear_cache=clear)
    assert set(trace.weight_versions.tolist()) == {0, 1}
    np.testing.assert_array_equal(trace.engine_versions, trace.weight_versions)  # vLLM's own spans
    starts = [int(np.count_nonzero(trace.weight_versions[a:b] == 0)) for a, b in map(trace.bounds, range(8))]
    assert max(starts) >= 8  # at the token or later: the server goes on until the pause reaches it
    comparison = check(trace, clear_cache=clear)
    assert comparison.passed
    assert any(note.key == "weight_labels" and "all 1,024 tokens" in note for note in comparison.notes)
    told = np.concatenate([trace.engine_versions[1:], [1]]).astype(np.int32)
    (finding,) = findings_of(trace.with_(engine_versions=told), clear_cache=clear)
    assert finding.cause == "version_label"
    assert (finding.values["labelled"], finding.values["written_by"]) == (1, 0)
    afterwards = there.generate(questions(8), SAMPLING)
    assert set(afterwards.weight_versions.tolist()) == {1}
    assert check(afterwards, clear_cache=clear).passed


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_requests_that_end_before_the_update(there, questions, mode):
    """They are long enough that all have reached the engine by then: it would make later ones wait."""
    long = Sampling(temperature=0.7, max_tokens=256, ignore_eos=True, seed=1)
    trace = there.update_weights(STEP_2, at_token=128, prompts=questions(8), sampling=long, mode=mode, clear_cache=True)
    assert set(trace.weight_versions.tolist()) == {0} == set(trace.engine_versions.tolist())
    assert (trace.num_tokens == 8 * 256) == (mode == "wait")
    with pytest.raises(MismatchError, match="cannot show whether the update arrived: no token was written after it"):
        check(trace, mode=mode, clear_cache=True)
    assert check(there.generate(questions(8), SAMPLING), mode=mode, clear_cache=True).passed


def test_an_updated_server_gives_what_a_fresh_engine_does(there, questions):
    comparison = assert_updated_equals_cold(there, STEP_2, prompts=questions(8), sampling=SAMPLING)
    assert comparison.metrics["rms_diff"] < 1e-5
    assert any(note.key == "checksums" and "agree" in note for note in comparison.notes)


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_finish_without_a_load(updated, gateway, there):
    """vLLM publishes the new label all the same: only the logprobs say that nothing came."""
    before = there.weight_checksums()
    assert before
    gateway.before = lambda number, path: (200, "{}") if path == "/update_weights" else None
    trace = updated()
    np.testing.assert_array_equal(trace.engine_versions, trace.weight_versions)
    (finding,) = findings_of(trace)
    assert (finding.layer, finding.cause) == ("weights", "stale_weights")
    assert not finding.values["came"]
    assert there.weight_checksums() == before


def test_a_layer_that_the_weights_did_not_reach(updated, tmp_path):
    old, new = load_file(f"{MODEL}/model.safetensors"), load_file(f"{STEP_2}/model.safetensors")
    save_file({name: (old if ".layers.2." in name else new)[name] for name in new}, tmp_path / "model.safetensors")
    (finding,) = findings_of(updated(tmp_path))
    assert (finding.cause, finding.values["stale_parts"]) == ("stale_weights", ["layer 2"])


def test_a_cache_that_was_not_cleared(updated, gateway):
    gateway.edit = lambda path, body: (path.replace("clear_cache=true", "clear_cache=false"), body)
    (finding,) = findings_of(updated(clear_cache=True), clear_cache=True)
    assert (finding.layer, finding.cause) == ("weights", "stale_kv_cache")


def test_a_wrong_label_fails_at_its_token(updated, gateway, there):
    def edit(path, body):
        return path, json.dumps({"weight_version": "step-9"}).encode() if path == "/finish_weight_update" else body

    gateway.edit = edit
    trace = updated()
    (finding,) = findings_of(trace)
    assert (finding.layer, finding.cause) == ("weights", "version_label")
    first = int(np.argmax(trace.weight_versions == 1))
    assert re.search(rf"^sequence 0, token {first}: the engine labels it with a label that was not set, version 1 wrote it; "
                     rf"\d+ of 1,024 tokens have a wrong label$", finding.evidence)  # fmt: skip
    assert any(note.key == "weight_labels" and "'step-9'" in note for note in there.remarks())
    with pytest.raises(EngineError, match=r"calls its weights 'step-9' after an update that named them '.*step2@"):
        there.update_weights(STEP_2)


def test_an_update_by_somebody_else_is_noticed(there, server, questions):
    there.update_weights(STEP_2)
    asked(server, "/update_weight_version", {"new_version": "theirs"}, Authorization=f"Bearer {KEY}")
    with pytest.raises(EngineError, match=r"^somebody else has updated the weights of the server at .*'theirs' now, and were"):
        there.generate(questions(2), SAMPLING)
    with Pool() as pool:
        notes = pool.engine(there.spec).remarks()
    assert any(note.key == "weight_labels" and "it calls its weights 'theirs'" in note for note in notes)


# -- input that is none -----------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_leaves_the_server(there, tmp_path, questions):
    before = there.generate(questions(2), SAMPLING)
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(f"{MODEL}/model.safetensors")
    save_file({n: (t[:, :-1] if n == "model.embed_tokens.weight" else t).contiguous() for n, t in tensors.items()},
              other / "model.safetensors")  # fmt: skip
    for weights, how, message in (
        (STEP_2, {"mode": "kepe"}, r"^mode='kepe': known are keep, wait, abort, v0"),
        (STEP_2, {"mode": "v0"}, r"^mode='v0': over a server an update is between a pause and a resume"),
        (tmp_path / "nowhere", {}, r"^the server at .* takes no such weights: weight update: there is no folder .*nowhere$"),
        (other, {}, r"^weight update: 'model.embed_tokens.weight' is \[\d+, \d+\] in .*other and"),
        (tensors, {}, r"^weight updates over a server take a checkpoint folder that the server can read, not tensors$"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            there.update_weights(weights, **how)
        assert "\n" not in str(error.value)
    np.testing.assert_allclose(there.generate(questions(2), SAMPLING).logprobs, before.logprobs, atol=5e-5)


def test_an_adapter_is_refused_before_a_server_is_asked(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with (
        Pool() as pool,
        pytest.raises(UsageError, match=r"is an adapter, which servers do not take; merge it \(merge_adapter\)$"),
    ):
        pool.engine(EngineSpec(MODEL, engine="vllm-server", url="http://127.0.0.1:9")).update_weights(tmp_path)


def test_what_only_the_server_can_see_is_looked_at_there(there, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(type(there), "_check_for_server", lambda self, update: None)  # as where the client has no such folder
    with pytest.raises(UsageError, match=r"takes no such weights: .*model.safetensors cannot be read"):
        there.update_weights(tmp_path)


def test_a_load_that_fails_says_that_the_engine_may_be_broken(there, gateway):
    gateway.before = lambda number, path: (
        (500, '{"error": "out of memory"}')
        if (number, path) == (1, "/finish_weight_update")
        else None  # 0: a look whether it is there
    )
    with pytest.raises(
        EngineError,
        match=r"failed at /finish_weight_update \(status 500\): out of memory; loading .* ended "
        r"there: the engine may hold parts of both checkpoints, or end at the next request",
    ) as error:
        there.update_weights(STEP_2)
    assert "\n" not in str(error.value)
    gateway.heal()
    key = {"Authorization": f"Bearer {KEY}"}
    assert json.loads(asked(gateway.url, "/is_paused", **key)[1]) == {"is_paused": False}
    assert asked(gateway.url, "/start_weight_update", {}, **key)[0] == 200  # somebody begins one and leaves
    with Pool() as pool:
        pool.engine(there.spec).update_weights(STEP_2)
        assert pool.engine(there.spec).weight_version == 0  # another handle: it has taken none


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (("/weight_info", "/start_weight", "/finish_weight"),
         r"lacks /start_weight_update, /finish_weight_update, /weight_info of vLLM's weight API \(it has /pause, /resume, "
         r"/update_weights, /collective_rpc\)"),
        (tuple(DEVELOPMENT), "has nothing of vLLM's weight API"),
        (("/inference",), r"lacks /inference/v1/generate of vLLM's weight API"),
    ],
)  # fmt: skip
def test_half_of_the_weight_api_is_one_line(gateway, questions, hidden, message):
    gateway.hidden = hidden
    spec = EngineSpec(MODEL, engine="vllm-server", dtype="float32", url=gateway.url, retries=0)
    start = rf": it takes no weight updates; start it with `logprob-parity serve {MODEL} --dtype float32 --port \d+ --weight-"
    with Pool() as pool, pytest.raises(UsageError, match=message + ".*" + start):
        pool.engine(spec).update_weights(STEP_2, prompts=questions(2), sampling=SAMPLING)


def test_a_server_without_our_extension_reloads_by_its_own(there, gateway, questions):
    """As `VLLM_SERVER_DEV_MODE=1 vllm serve`: vLLM's reload, and a label beside it."""

    def edit(path, body):
        return path, body.replace(b"logprob_parity_", b"no_such_")

    gateway.edit = edit
    trace = there.update_weights(STEP_2, at_token=8, prompts=questions(8), sampling=SAMPLING)
    assert check(trace).passed
    np.testing.assert_array_equal(trace.engine_versions, trace.weight_versions)


# -- who may ask ------------------------------------------------------------------------------------------------------


def test_routes_that_change_the_engine_need_the_key_and_no_web_page(server):
    from vllm.entrypoints.rl.online.api_router import router

    assert {route.path for route in router.routes} <= DEVELOPMENT
    for path in sorted(DEVELOPMENT):
        assert asked(server, path)[0] == 401, path
        assert asked(server, path, {})[0] == 401, path
    key = {"Authorization": f"Bearer {KEY}"}
    assert asked(server, "/weight_info", **key)[0] == 200
    status, text = asked(server, "/pause", {}, Origin="http://example.com", **key)
    assert (status, "web pages may not ask" in text) == (403, True)


def test_weight_updates_are_served_on_this_machine_only(capsys):
    from pytest_logprob_parity.cli.command import main

    assert main(["serve", MODEL, "--weight-updates", "--host", "0.0.0.0"]) == 2
    assert "it listens on this machine only; leave --host out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "peer", "status"),
    [((), "127.0.0.1", None), ((), "::1", None), ((), "10.0.0.7", 403), (("k",), "10.0.0.7", 401)],
)
def test_without_a_key_only_this_machine_may_change_the_engine(keys, peer, status):
    scope = {"path": "/collective_rpc", "root_path": "", "headers": [], "client": (peer, 5)}
    if status is None:
        check_development(scope, Keys(keys))
        return
    with pytest.raises(RefusedError) as error:
        check_development(scope, Keys(keys))
    assert error.value.status == status
    check_development({**scope, "path": "/v1/completions"}, Keys(keys))  # vLLM's own to guard
