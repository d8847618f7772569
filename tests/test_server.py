"""The same tests against a running server: one real `logprob-parity serve` for all, and a gateway that spoils its answers."""

import asyncio
import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import re
import signal
import socket
import socketserver
import textwrap
import threading
import time
import urllib.error
import urllib.request
from typing import Literal

import numpy as np
import pytest
from gateway import COMPLETIONS, Gateway
from serving import KEY, SECRET

from conftest import MODEL, ROOT, forked_workers
from pytest_logprob_parity import EngineSpec, ParityError, Sampling, check_golden, compare
from pytest_logprob_parity.check.ask import ask
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.engines.replay import forced_request
from pytest_logprob_parity.engines.server.client import Client
from pytest_logprob_parity.engines.server.wire import completion_of, post_of
from pytest_logprob_parity.errors import EngineError, IncomparableError, UsageError
from pytest_logprob_parity.golden import Golden
from pytest_logprob_parity.golden.fingerprint import differences
from pytest_logprob_parity.reasons import reason_of
from pytest_logprob_parity.report.results_file import read_results
from pytest_logprob_parity.spec.server_settings import ServerSettings

PROMPTS = [[9, 8, 7 + i] for i in range(4)]
SAMPLING = Sampling(temperature=0.7, top_p=0.9, max_tokens=24, n=2, seed=1)
TEST = f"""
import pytest

@pytest.mark.logprob_parity(model={MODEL!r}, dtype="float32")
def test_rollouts(parity_engine, golden_trace):
    golden_trace.check(
        parity_engine, prompts=[[9, 8, 7 + i] for i in range(6)],
        sampling={{"temperature": 0.7, "top_p": 0.9, "max_tokens": 16, "n": 2, "seed": 1}},
    )
"""


CONFIG = "/logprob_parity/config"


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
def clients():
    """Pools of their own: a server that did not answer is remembered by the one that asked."""
    pools = []

    def make(url, **settings):
        pools.append(Pool())
        return pools[-1].engine(spec_at(url, **settings))

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def here(request):
    """The same engine in this process."""
    from pytest_logprob_parity.plugin.stash import pool_of

    return pool_of(request.config).engine(EngineSpec(MODEL, dtype="float32"))


@pytest.fixture(scope="module")
def trace(here):
    return here.generate([[9, 8, 7 + i] for i in range(10)], SAMPLING)


@pytest.fixture(scope="module")
def golden(here, tmp_path_factory):
    path = tmp_path_factory.mktemp("goldens") / "golden.safetensors"
    check_golden(path, here, prompts=PROMPTS, sampling=SAMPLING, update=True, repeats=2)
    return path


def spec_at(url, **settings):
    return EngineSpec(**{"model": MODEL, "engine": "vllm-server", "dtype": "float32", "url": url, "retries": 2, **settings})


def plain(gateway):
    """As a gateway that lets OpenAI's routes through only."""
    gateway.hidden = ("/logprob_parity", "/server_info", "/collective_rpc", "/inference", "/version")


def seen(comparison_or_error):
    return comparison_or_error.comparison if isinstance(comparison_or_error, ParityError) else comparison_or_error


# -- what a server gives ----------------------------------------------------------------------------------------------


def test_concurrent_requests_give_the_logprobs_of_an_engine_in_this_process(server, clients, here, trace):
    there = clients(server)
    replayed, own = there.replay(trace), here.replay(trace)
    np.testing.assert_allclose(replayed.logprobs, own.logprobs, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(np.isneginf(replayed.top_logprobs), np.isneginf(own.top_logprobs))  # -9999.0 on the wire
    known = replayed.ranks > 0
    np.testing.assert_array_equal(replayed.ranks[known], own.ranks[known])
    assert known.mean() > 0.9
    assert not np.any(own.ranks[~known] <= 5)  # a rank is unknown only where the token is none of the top 5
    for path in ("prefill", "regenerate"):
        ours, theirs = here.replay(trace, path), there.replay(trace, path)
        np.testing.assert_array_equal(theirs.token_ids, ours.token_ids)
        np.testing.assert_allclose(theirs.logprobs, ours.logprobs, rtol=0, atol=5e-5)


def test_one_at_a_time_gives_its_bits(server, clients, here, questions):
    """In other batches the bits are others: see test_noise_floor.py."""
    trace = here.generate(questions(5), {**SAMPLING.to_json(), "max_tokens": 32})
    there = clients(server, concurrency=1)
    requests = [forced_request(trace, segment) for segment in trace.segments()]
    ours = [here._backend().run([request])[0] for request in requests]
    theirs = there._backend().run(requests)
    for one, other in zip(ours, theirs, strict=True):
        for column in ("token_ids", "logprobs", "top_token_ids", "top_logprobs"):
            assert getattr(one, column).tobytes() == getattr(other, column).tobytes(), column


def test_every_pin_is_read_back(server, clients, here):
    there = clients(server)
    assert there.config.unverified == ()
    assert there.config.forcing == "sampler"
    assert there.config.differences_from_rl() == {}
    apart = {name for name, _, _ in differences(here.fingerprint(), there.fingerprint())}
    assert apart == {"config.concurrency", "config.max_num_batched_tokens", "config.max_num_seqs", "engine.kind"}


@pytest.mark.parametrize(
    ("setting", "uses"),
    [({"logprobs_mode": "raw_logprobs"}, "processed_logprobs"), ({"dtype": "bfloat16"}, "float32"), ({"seed": 3}, "0"),
     ({"max_num_seqs": 7}, "128"), ({"profile": "serving", "enable_prefix_caching": True}, "False")],
)  # fmt: skip
def test_a_pin_that_the_server_does_not_have_is_an_error_that_names_it(server, clients, setting, uses):
    name = list(setting)[-1]
    with pytest.raises(EngineError, match=rf"^vllm 0.32.0 at {server} did not take {name}: asked for .* uses '?{uses}"):
        _ = clients(server, **setting).config


def test_a_golden_of_an_engine_is_checked_against_a_server(pytester, run_inner, server, gateway):
    pytester.makeini("[pytest]\nparity_repeats = 2\nparity_obtained = trace")
    pytester.makepyfile(test_it=TEST)
    run_inner("--update-golden").assert_outcomes(passed=1)
    (golden,) = pytester.path.glob("golden/*/*.safetensors")
    result = run_inner(f"--parity-server={server}/v1/")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  pass (compatible setup, level rl, objective token) golden/*: * logprobs agree*"])

    def shift(content):
        logprobs = content["choices"][0]["logprobs"]
        logprobs["token_logprobs"] = [value - 0.3 for value in logprobs["token_logprobs"]]

    gateway.after = shift
    result = run_inner(f"--parity-server={gateway.url}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E*MismatchError: fail: *", "E *this run *vllm-server 0.32.0, float32, processed logprobs, from a forced decode *",
         f"E *to accept *pytest test_it.py::test_rollouts --update-golden --parity-server {gateway.url}"]
    )  # fmt: skip
    before = golden.read_bytes()
    run_inner("--update-golden", f"--parity-server={server}").assert_outcomes(passed=1)
    assert Golden.load(golden).trace.engine == "vllm-server"
    assert golden.read_bytes() != before
    run_inner(f"--parity-server={server}").assert_outcomes(passed=1)


def test_a_check_against_a_server_loads_no_engine(pytester, run_inner, server):
    """So its process is up in seconds. The negative control: torch, once it is imported, is seen."""
    seen = """
        def test_last():
            import sys
            assert not {"vllm", "torch"} & {*sys.modules}

        def test_it_would_be_seen():
            import torch
            with pytest.raises(AssertionError):
                test_last()
    """
    pytester.makepyfile(test_it=TEST + textwrap.dedent(seen))
    run_inner("--update-golden", f"--parity-server={server}", "test_it.py::test_rollouts").assert_outcomes(passed=1)
    pytester.runpytest_subprocess(f"--parity-server={server}", "test_it.py").assert_outcomes(passed=3)


def test_the_address_is_an_engine_of_ones_own(pytester, run_inner, server):
    pytester.makeconftest(f"""
        import pytest

        @pytest.fixture(scope="session")
        def parity_engine_factory():
            return {server!r}
    """)
    pytester.makepyfile(f"""
        def test_it(parity_engine):
            assert parity_engine.spec.engine == "vllm-server"
            assert parity_engine.spec.model == {MODEL!r}
            assert parity_engine.config.dtype == "float32"
            assert parity_engine.generate([[9, 8, 7]], dict(max_tokens=4)).num_tokens == 4
    """)
    run_inner().assert_outcomes(passed=1)
    pytester.makeconftest((pytester.path / "conftest.py").read_text().replace(server, "http://127.0.0.1:9"))
    pytester.makepyfile("def test_it(parity_engine): pass")
    run_inner().stdout.fnmatch_lines(["E*EngineError: no server answers at http://127.0.0.1:9: *; start one: *"])


def test_four_workers_share_a_server_and_nothing_is_lost(pytester, run_forked, server):
    """16 goldens, recorded and checked by four workers; the reports of all workers are one."""
    pytester.makepyfile(
        test_it=f"""
        import pytest

        @pytest.mark.parametrize("number", range(16))
        @pytest.mark.logprob_parity(model={MODEL!r}, dtype="float32")
        def test_many(parity_engine, golden_trace, number):
            golden_trace.check(
                parity_engine, prompts=[[9, 8, 7 + number]],
                sampling=dict(temperature=0.7, max_tokens=4, n=8, seed=number), replay=("decode",),
            )
    """
    )
    options = (*forked_workers(4), f"--parity-server={server}", "-o", "parity_repeats=0", "-p", "no:cacheprovider")
    recorded = run_forked("--update-golden", *options, timeout=200)
    recorded.assert_outcomes(passed=16)
    recorded.stdout.fnmatch_lines(["logprob-parity: 16 recorded"])
    assert len(list(pytester.path.glob("golden/*/*.safetensors"))) == 16
    checked = run_forked("--parity-report=report", *options, timeout=200)
    checked.assert_outcomes(passed=16)
    checked.stdout.fnmatch_lines(["logprob-parity: 16 checked"])
    checks = read_results(pytester.path / "report" / "results.json")["checks"]
    assert sorted(c["node_id"] for c in checks) == sorted(f"test_it.py::test_many[{n}]" for n in range(16))
    assert {c["outcome"] for c in checks} == {"passed"}


# -- who may ask, and what --------------------------------------------------------------------------------------------


def asked(server, path, body=None, key=KEY, headers=(), method=None):
    """The status and text of an answer of the real server; `body` is JSON, or bytes as they are."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"}) | dict(headers)
    try:
        with urllib.request.urlopen(urllib.request.Request(server + path, data, named, method=method), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_our_route_needs_the_key_that_vllm_needs(server):
    for path, body in ((CONFIG, None), (CONFIG, {"asked": {"seed": 0}}), (f"/behind{CONFIG}", None), ("/v1/models", None)):
        for key in (None, "", "wrong", KEY[:-1], KEY + "x"):
            status, text = asked(server, path, body, key)
            assert status == 401
            assert "Unauthorized" in text
            assert "float32" not in text
        assert asked(server, path, body, KEY)[0] == 200
    assert asked(server, CONFIG, key=None, headers={"Authorization": f"Basic {KEY}"})[0] == 401
    assert asked(server, CONFIG, key=None, headers={"Authorization": f"bearer {KEY}"})[0] == 200


@pytest.mark.parametrize("path", ["/x/logprob_parity/config", "/logprob_parity/config/", "/v1/x/logprob_parity/config",
                                  "//logprob_parity/config", "/behind/behind/logprob_parity/config"])  # fmt: skip
def test_our_route_is_at_one_path(server, path):
    assert asked(server, path)[0] == 404
    assert asked(server, path, {"asked": {}})[0] in (404, 405)


@pytest.mark.parametrize(
    "name", ["hf_token", "api_key", "ssl_keyfile", "__dict__", "__class__", "model_config", "compute_hash", "no_such_thing", ""]
)
def test_what_is_no_engine_argument_or_secret_is_not_told(server, name):
    for wanted in ({name: None}, {"seed": 0, name: 1}):
        status, text = asked(server, CONFIG, {"asked": wanted})
        assert status == 400
        assert repr(name) in json.loads(text)["error"]["message"]
        assert SECRET not in text
        assert KEY not in text


@pytest.mark.parametrize(
    "wanted",
    [{"hf_overrides": {"__dict__": 1, "to_dict": 2, "_name_or_path": 3, "rope_theta": 1}}, {"compilation_config": {"x": 1}},
     {"model_loader_extra_config": 1}, {"seed": [[1]]}, {"dtype": None}, {"speculative_config": {"a": 1}}],
)  # fmt: skip
def test_what_is_told_of_an_argument_is_its_value_alone(server, wanted):
    status, text = asked(server, CONFIG, {"asked": wanted})
    assert status == 200
    told = json.loads(text, parse_constant=pytest.fail)
    assert SECRET not in text
    assert "<bound method" not in text
    assert len(text) < 100_000
    assert told["vocabulary"] == 384
    assert (told["values"].get("hf_overrides") or {}).get("__dict__") is None


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"[" * 10_000, 400), (b"[]", 400), (b'{"asked": 1}', 400), (b'{"asked": {}, "name": 1}', 400),
     (b"\xff", 400), (b'{"asked": {}}' + b" " * 1_000_000, 413), (b'{"asked": {}}', 200)],
)  # fmt: skip
def test_a_body_that_is_none_is_an_answer(server, body, status):
    got, text = asked(server, CONFIG, body)
    assert got == status
    assert "\n" not in text
    assert asked(server, CONFIG, b"{}", method="PUT")[0] == 405


def test_a_client_that_leaves_in_the_middle_is_no_error(server):
    host, port = server.removeprefix("http://").split(":")
    for path in (CONFIG, COMPLETIONS):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
        for _ in range(3):
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    assert asked(server, CONFIG)[0] == 200


PLAIN = {"model": MODEL, "prompt": [9, 8, 7], "max_tokens": 2, "temperature": 0.7, "return_token_ids": True}
#: What stands where forced token ids should, and what the line says of it.
NO_IDS = [
    ("abc", "is 'abc', no list of token ids"), (5, "is 5, no list"), ({"a": 1}, "is a dict of 1, no list"),
    (True, "is True, no list"),
    ([384], r"\[0\] is 384: token ids of this engine are whole numbers from 0 to 383"),
    ([1, 2, 10**12], r"\[2\] is 1000000000000"), ([-1], r"\[0\] is -1"), ([1.5], r"\[0\] is 1.5"), ([6.0], r"\[0\] is 6.0"),
    ([True], r"\[0\] is True"), (["7"], r"\[0\] is '7'"), ([[1]], r"\[0\] is a list of 1"), ([None], r"\[0\] is None"),
    ([1] * 1025, "has 1,025 token ids; max_model_len is 1,024"), ([1] * 10_000_000, "has 10,000,000 token ids; max"),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "message"), NO_IDS)
def test_forced_tokens_that_are_none_are_refused_and_the_engine_lives(server, ids, message):
    """By every route that hands parameters on, before the engine sees them: one of these would end it for everybody."""
    forced = {"logprob_parity_forced": ids}
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 2}
    posts = [(COMPLETIONS, {**PLAIN, "vllm_xargs": forced})]
    if not isinstance(ids, list) or len(ids) < 10_000:
        generate = {"token_ids": [9, 8], "sampling_params": {"max_tokens": 2}}
        posts += [
            ("/v1/chat/completions", {**chat, "vllm_xargs": forced}),
            ("/v1/chat/completions", {**chat, "vllm_xargs": forced, "stream": True}),
            ("/v1/responses", {"model": MODEL, "input": "1 + 1", "vllm_xargs": forced}),
            ("/v1/messages", {**chat, "vllm_xargs": forced}),
            ("/invocations", {**PLAIN, "vllm_xargs": forced}),
            ("/inference/v1/generate", {**generate, "sampling_params": {"max_tokens": 2, "extra_args": forced}}),
            ("/inference/v1/generate", {**generate, "sampling_params": {"trace_decode_token_ids": ids}}),
        ]
    for path, body in posts:
        status, text = asked(server, path, body)
        assert status == 400, path
        line = json.loads(text)["error"]["message"]
        assert re.search(rf"(logprob_parity_forced|trace_decode_token_ids) ?{message}", line), line
        assert "\n" not in line
        assert len(line) < 300
    status, text = asked(server, COMPLETIONS, {**PLAIN, "vllm_xargs": {"logprob_parity_forced": [5, 383]}})
    assert status == 200
    assert json.loads(text)["choices"][0]["token_ids"] == [5, 383]


def test_forced_tokens_are_found_however_they_are_written(server):
    plain = json.dumps({**PLAIN, "vllm_xargs": {"logprob_parity_forced": ["x"]}})
    escaped = plain.replace("parity_forced", "parity\\u005fforced")
    for body in (escaped.encode(), plain.encode("utf-16"), plain.encode("utf-8-sig")):
        status, text = asked(server, COMPLETIONS, body)
        assert status == 400
        assert "logprob_parity_forced[0] is 'x'" in text
    form = b"vllm_xargs=%7B%22logprob%5Fparity_forced%22%3A%5B%22x%22%5D%7D"
    status, text = asked(
        server, "/v1/audio/transcriptions", form, headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert (status, "forced tokens are taken in JSON bodies alone" in text) in ((400, True), (404, False))
    assert asked(server, COMPLETIONS, PLAIN)[0] == 200


def test_prompt_ids_of_a_forced_request_are_held_to_the_vocabulary(server):
    forced = {"vllm_xargs": {"logprob_parity_forced": [5, 6]}}
    for prompt, message in (
        ([9, 384], "prompt[1] is 384"),
        ([[9], [8, -1]], "prompt[1][1] is -1"),
        ([9, True], "prompt[1] is True"),
    ):
        status, text = asked(server, COMPLETIONS, {**PLAIN, **forced, "prompt": prompt})
        assert (status, message in text) == (400, True)
    for prompt in ("1 + 1", ["1 + 1", "2 + 2"], [[9, 8], [7]]):
        status, text = asked(server, COMPLETIONS, {**PLAIN, **forced, "prompt": prompt})
        assert status == 200
        assert all(choice["token_ids"] == [5, 6] for choice in json.loads(text)["choices"])


def test_a_request_without_the_key_is_refused_by_vllm_before_it_is_read(server):
    assert asked(server, COMPLETIONS, {**PLAIN, "vllm_xargs": {"logprob_parity_forced": ["x"]}}, key="wrong")[0] == 401


def test_an_answer_is_still_streamed(server):
    body = json.dumps({**PLAIN, "max_tokens": 30, "stream": True, "vllm_xargs": {"logprob_parity_forced": [5] * 30}}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(server + COMPLETIONS, body, headers), timeout=60) as answer:
        events = [line for line in answer if line.startswith(b"data: ")]
    assert len(events) > 5
    assert events[-1].strip() == b"data: [DONE]"


# -- how it is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(gateway, clients, here, concurrency):
    trace = here.generate(PROMPTS, {**SAMPLING.to_json(), "max_tokens": 4})
    there = clients(gateway.url, concurrency=concurrency)
    gateway.delay = 0.02
    there.replay(trace)
    assert gateway.most == concurrency


def test_a_server_that_fails_half_of_the_time_is_asked_again(gateway, clients, golden):
    """Every second request is answered by 503, 429, 502, or by a lost connection: the check passes, and counts them."""
    bad = [(503, "busy"), (429, "slow down"), (502, "<html>bad gateway</html>"), "drop"]

    def before(number, path):
        return bad[number // 2 % 4] if path == COMPLETIONS and number % 2 == 0 else None

    there = clients(gateway.url, retries=8)
    assert there.config.forcing == "sampler"
    gateway.before = before
    comparison = check_golden(golden, there, replay=("decode",))
    assert comparison.passed
    (told,) = [note for note in comparison.notes if note.startswith("requests sent again: ")]
    for reason in ("for status 503", "for status 429", "for status 502", "for connection lost"):
        assert reason in told
    gateway.before = lambda number, path: (503, "busy") if path == COMPLETIONS else None
    with pytest.raises(EngineError, match=r"\(status 503\) after 2 tries in .* s, 0\.1 s of it waited: busy$"):
        check_golden(golden, clients(gateway.url, retries=1))


def test_progress_is_told_in_long_work(gateway, trace, monkeypatch):
    monkeypatch.setattr("pytest_logprob_parity.engines.server.client._PROGRESS_SECONDS", 0.1)
    lines = []
    with Pool(notify=lines.append) as pool:
        gateway.delay = 0.05
        pool.engine(spec_at(gateway.url, concurrency=4)).replay(trace)
    assert [line for line in lines if line.startswith(f"{gateway.url}: ") and line.endswith(" of 20 requests")]
    assert [line for line in lines if line.startswith(f"connected to vllm-server {MODEL}")]


def test_ctrl_c_leaves_no_thread_and_no_request(gateway, clients, trace):
    there = clients(gateway.url.replace("127.0.0.1", "localhost"))  # a name, which a thread resolves
    assert there.config.forces
    gateway.delay = 30
    threads = {t for t in threading.enumerate() if "process_request" not in t.name}
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            there.replay(trace)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, handler)
    left = {t.name for t in threading.enumerate() if "process_request" not in t.name} - {t.name for t in threads}
    assert not left
    gateway.heal()
    assert there.replay(trace).num_tokens == trace.num_tokens  # and it can be asked again


def test_inside_of_a_running_loop(server, clients, trace):
    there = clients(server)

    async def test():
        return there.replay(trace)

    assert asyncio.run(test()).num_tokens == trace.num_tokens


# -- a server that says little ----------------------------------------------------------------------------------------


def test_a_plain_server_leaves_a_processed_golden_unverified(gateway, clients, golden):
    plain(gateway)
    there = clients(gateway.url)
    assert there.config.logprobs_mode == "processed_logprobs"  # measured: the logprobs move with the temperature
    assert there.config.dtype == "float32"
    assert {"the model's digest", "enable_prefix_caching", "async_scheduling", "dtype", "seed"} < set(there.config.unverified)
    with pytest.raises(ParityError) as caught:
        check_golden(golden, there)
    lines = str(caught.value).splitlines()
    assert seen(caught.value).verdict == "unverified"
    assert lines[0] == (
        "unverified: The server cannot be forced along the golden's tokens, and what is left, a prefill, gives raw logprobs: "
        "the golden's are processed (T=0.7, top-p 0.9)"
    )
    assert "logprob-parity serve MODEL" in str(caught.value)
    assert "could not be verified, for the engine does not tell: the model's digest, async_scheduling" in str(caught.value)
    with pytest.raises(EngineError, match="not recorded: its golden could not be replayed: this server cannot force"):
        check_golden(golden, there, prompts=[[9, 8, 7]], sampling=SAMPLING, update=True)


def test_a_plain_server_is_held_against_raw_logprobs_by_a_prefill(gateway, clients, here, tmp_path):
    """At T=1 without truncation raw is processed; an unchanged server passes, one whose numbers are off does not."""
    path = tmp_path / "golden.safetensors"
    sampling = Sampling(max_tokens=24, seed=1)
    check_golden(path, here, prompts=[[9, 8, 7 + i] for i in range(10)], sampling=sampling, update=True, repeats=2)
    plain(gateway)
    there = clients(gateway.url)
    comparison = check_golden(path, there)
    assert comparison.passed
    assert comparison.actual.path == "prefill"
    assert comparison.notes[0].startswith("not decoded, scored by a prefill: this server cannot force tokens")

    def shift(content):
        for position in content["choices"][0].get("prompt_logprobs") or []:
            for entry in (position or {}).values():
                entry["logprob"] -= 0.3

    gateway.after = shift
    with pytest.raises(ParityError, match=r"^fail: Logprobs are not close"):
        check_golden(path, there)


def test_the_development_mode_of_vllm_tells_nearly_all(gateway, clients, here, trace):
    """`vllm serve --worker-extension-cls ...` with VLLM_SERVER_DEV_MODE=1: no middleware of ours, and tokens can be forced."""
    gateway.hidden = ("/logprob_parity",)
    there = clients(gateway.url)
    assert there.config.unverified == ("the model's digest",)
    assert (there.config.forcing, there.config.version) == ("sampler", "0.32.0")
    np.testing.assert_allclose(there.replay(trace).logprobs, here.replay(trace).logprobs, rtol=0, atol=5e-5)
    with pytest.raises(EngineError, match="did not take enable_prefix_caching: asked for True"):
        _ = clients(gateway.url, enable_prefix_caching=True).config


@pytest.mark.parametrize("hidden", [(), ("/logprob_parity",), ("/logprob_parity/kept", "/collective_rpc")], ids=str)
def test_a_server_tells_what_truncation_kept(gateway, clients, here, trace, hidden, monkeypatch):
    """By our own route, or by vLLM's of its development mode; where both are hidden, a check replays once more."""
    gateway.hidden = hidden
    replayed = clients(gateway.url).replay(trace)
    assert (replayed.kept_counts is None) == (len(hidden) > 1)
    if len(hidden) < 2:
        np.testing.assert_allclose(replayed.untruncated_logprobs, trace.untruncated_logprobs, rtol=0, atol=5e-5)
        assert compare(expected=trace, actual=replayed).metrics["kept_sets_differ"] < 0.01
    answers = ask(clients(gateway.url), Golden(trace=trace, fingerprint={}), ["decode"])
    np.testing.assert_allclose(answers.policy_logprobs, trace.untruncated_logprobs, rtol=0, atol=5e-5)


def test_clients_at_the_same_time_take_their_own_kept_sets(server, clients, here):
    """Different prompts and different lengths, several runs each: what one took of another would not fit its tokens."""
    prompts = [[[9, 8, 7 + i + 10 * n] for i in range(6)] for n in range(3)]
    samplings = [Sampling(temperature=1.0, top_p=0.9, max_tokens=16 + 8 * n, n=2, seed=n) for n in range(3)]
    told = {}

    def work(n):
        engine = clients(server)
        told[n] = [engine.replay(engine.generate(prompts[n], samplings[n])) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == [0, 1, 2]
    for n, traces in told.items():
        alone = here.replay(traces[0])
        for trace in traces:
            assert trace.kept_counts.min() >= 1
            assert (trace.logprobs - trace.untruncated_logprobs).min() > -1e-4
        np.testing.assert_allclose(traces[0].untruncated_logprobs, alone.untruncated_logprobs, rtol=0, atol=5e-5)
        assert compare(expected=alone, actual=traces[0]).metrics["kept_sets_differ"] < 0.01, n


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{}", 400), (b'{"numbers": ["1"]}', 400), (b'{"numbers": [-1]}', 400), (b'{"numbers": [1]}', 200), (b"[", 400)],
)
def test_the_route_of_kept_sets_takes_numbers(server, body, status):
    told, content = asked(server, "/logprob_parity/kept", body)
    assert told == status
    assert status != 200 or json.loads(content) == {"kept": {}}
    assert asked(server, "/logprob_parity/kept", body, key="")[0] == 401
    assert asked(server, "/logprob_parity/kept")[0] == 405


def test_raw_and_processed_are_told_apart_by_measuring(gateway, server, clients):
    """A server whose logprobs stay as they are at another temperature is a raw one: profile rl does not get what it pins."""
    plain(gateway)
    first = {}

    def freeze(content):  # as raw_logprobs: the same numbers at every temperature
        logprobs = content["choices"][0]["logprobs"]
        logprobs["top_logprobs"] = first.setdefault("top", logprobs["top_logprobs"])

    gateway.after = freeze
    with pytest.raises(EngineError, match=r"did not take logprobs_mode: asked for 'processed_logprobs', .* 'raw_logprobs'"):
        _ = clients(gateway.url).config
    assert clients(gateway.url, profile="serving").config.logprobs_mode == "raw_logprobs"


def test_native_trace_replay_goes_by_the_generate_route():
    """The wire alone: Model Runner V2, which replays traces itself, runs on GPUs only."""
    request = Request(prompt_token_ids=[9, 8], sampling=Sampling(temperature=0.7, logprobs=2), forced_token_ids=[5, 6, 7])
    path, body = post_of(request, "native", "m")
    assert (path, body["model"], body["token_ids"]) == ("/inference/v1/generate", "m", [9, 8])
    assert body["sampling_params"]["trace_decode_token_ids"] == [5, 6, 7]
    assert json.dumps(body)

    def at(token, logprob, rank, *others):
        top = [{"token_id": t, "logprob": v, "rank": r} for t, v, r in ((token, logprob, rank), *others)]
        return {**top[0], "top_logprobs": top}

    content = [at(5, -0.5, 1, (1, -1.5, 2)), at(6, -3.0, 9, (2, -0.25, 1)), at(7, -9999.0, None, (3, -9999.0, 2))]
    choice = {"index": 0, "token_ids": [5, 6, 7], "finish_reason": "length", "logprobs": {"content": content}}
    completion = completion_of(request, {"choices": [choice]}, 1024)
    np.testing.assert_array_equal(completion.logprobs, np.float32([-0.5, -3.0, np.nan]))
    np.testing.assert_array_equal(completion.ranks, [1, 9, 0])
    np.testing.assert_array_equal(completion.top_token_ids[:2], [[5, 1], [2, -1]])
    np.testing.assert_array_equal(completion.top_logprobs[:2], np.float32([[-0.5, -1.5], [-0.25, -np.inf]]))
    truncated = dataclasses.replace(request, sampling=Sampling(temperature=0.7, top_p=0.9, logprobs=2), tells_kept=True)
    kept = completion_of(truncated, {"choices": [{**choice, "sampling_mask": [[5, 1], [6], [7]]}]}, 1024).kept
    assert (kept.counts.tolist(), kept.token_ids.tolist(), kept.untruncated_logprobs) == ([2, 1, 1], [5, 1, 6, 7], None)
    for mask in ([[5]], {"0": [5]}, [[5], [6], ["7"]]):
        with pytest.raises(EngineError, match="sampling_mask"):
            completion_of(truncated, {"choices": [{**choice, "sampling_mask": mask}]}, 1024)


# -- bad days ---------------------------------------------------------------------------------------------------------


def first_choice(edit):
    def after(content):
        edit(content["choices"][0])

    return after


def without(name):
    return first_choice(lambda choice: choice.pop(name))


def fewer(choice):
    choice["token_ids"] = choice["token_ids"][:-3]
    for column in choice["logprobs"].values():
        del column[-3:]


def as_texts(choice):
    choice["logprobs"]["top_logprobs"] = [{"some text": -1.0} for _ in choice["token_ids"]]


def other_prompt(choice):
    choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]


def half_the_logprobs(choice):
    for column in choice["logprobs"].values():
        del column[::2]


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (without("logprobs"), "answers without logprobs"),
        (without("token_ids"), "answers without token ids"),
        (lambda content: content.pop("choices"), "answers with no completion"),
        (first_choice(fewer), r"stopped after \d+ of \d+ tokens"),
        (first_choice(as_texts), "texts in place of token ids"),
        (first_choice(other_prompt), "took another prompt than was sent: 2 tokens, 3 were sent"),
        (first_choice(half_the_logprobs), r"answers with \d+ tokens and \d+ logprobs"),
        (first_choice(lambda choice: choice["logprobs"].update(top_logprobs="x")), "answers without logprobs"),
        (first_choice(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, "x")), "is no completion as vLLM"),
    ],
)
def test_an_answer_that_lacks_something_is_an_error_in_one_line(gateway, clients, golden, after, message):
    gateway.after = after
    before = golden.read_bytes()
    with pytest.raises(EngineError, match=message) as caught:
        check_golden(golden, clients(gateway.url))
    assert str(caught.value).startswith(f"vllm 0.32.0 at {gateway.url}: the server")
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineError, match=message):
        check_golden(golden, clients(gateway.url), prompts=[[9, 8, 7]], sampling=SAMPLING, update=True)
    assert golden.read_bytes() == before


def test_other_tokens_than_the_forced_ones_are_an_error(gateway, clients, golden):
    gateway.after = first_choice(lambda choice: choice["token_ids"].__setitem__(0, 3))
    with pytest.raises(EngineError, match="decode replay did not force the tokens: sequence 0 came back with token 3 in place"):
        check_golden(golden, clients(gateway.url))


@pytest.mark.parametrize("number", [None, math.nan])
def test_nan_fails_the_check(gateway, clients, golden, number):
    gateway.after = first_choice(lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(1, number))
    with pytest.raises(ParityError, match=r"^fail: 8 of \d+ logprobs are NaN"):
        check_golden(golden, clients(gateway.url))


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (200, "<html><body>Welcome</body></html>", "answers /v1/completions with something that is no JSON: '<html><body>Wel"),
        (200, "", "answers /v1/completions with something that is no JSON: ''"),
        (401, '{"error": "Unauthorized"}', r"wants another key for /v1/completions \(status 401\): none is in VLLM_API_KEY"),
        (404, "nothing here", r"has no /v1/completions \(status 404: nothing here\)"),
        (400, '{"error": {"message": "logprobs is too large"}}', "refuses a request to /v1/completions: logprobs is too large"),
        (500, '{"error": {"message": "EngineCore died"}}', r"failed at /v1/completions \(status 500\): EngineCore died"),
    ],
)
def test_answers_that_are_none(gateway, clients, golden, status, text, message, monkeypatch):
    there = clients(gateway.url)
    assert there.config.forces
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    gateway.before = lambda number, path: (status, text) if path == COMPLETIONS else None
    with pytest.raises(ParityError, match=message) as caught:
        check_golden(golden, there)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "text", "message"),
    [
        (200, "<html>Welcome</html>", "answers /v1/models with something that is no JSON"),
        (401, "no", "wants another key"),
        (404, "no", r"has no /v1/models \(status 404"),
        (200, "[]", "names no model at /v1/models"),
        (200, '{"data": [{"id": "gpt-5", "root": "/models/gpt-5"}]}',
         r"serves 'gpt-5' \(root '/models/gpt-5'\), the test asks for '.*tiny-arith'; .* say served_model='gpt-5'"),
    ],
)  # fmt: skip
def test_what_is_no_server_of_this_model_is_told_before_anything_is_asked(gateway, clients, golden, status, text, message):
    gateway.hidden = ("/logprob_parity", "/server_info")
    gateway.before = lambda number, path: (status, text)
    with pytest.raises(ParityError, match=message) as caught:
        check_golden(golden, clients(gateway.url))
    assert "\n" not in str(caught.value)


@pytest.fixture
def told():
    """A server that tells of itself what `told(changes)` says, and answers nothing else; gives its address."""
    made = []

    def serve(changes, hidden=(), models=None, info=None):
        about = {
            "logprob_parity": "0.0.9", "version": "0.32.0", "cpu": True, "served": MODEL, "refused": "", "unverified": [],
            "model": {"name": MODEL, "digests": {}}, "values": {"dtype": "float32"}, "forcing": "sampler", **changes,
        }  # fmt: skip
        entry = {"id": MODEL, "root": MODEL, "max_model_len": 512}
        answers = {
            "/logprob_parity/config": {key: value for key, value in about.items() if value != "gone"},
            "/v1/models": {"data": [{**entry, **m} if isinstance(m, dict) else m for m in models or [{}]]},
            "/version": {"version": "0.32.0"},
        } | ({} if info is None else {"/server_info": {"vllm_config": info}})
        made.append(Gateway("http://127.0.0.1:9"))
        made[-1].before = lambda number, path: (200, json.dumps(answers[path])) if path in answers else (404, "{}")
        made[-1].hidden = hidden
        return made[-1].url

    yield serve
    for gateway in made:
        gateway.close()


def test_what_our_route_need_not_tell_is_not_told(told, clients):
    for changes in ({}, {"hardware": None, "libraries": None}, {"model": {"name": MODEL}}, {"more": "of a later version"}):
        config = clients(told(changes)).config
        assert (config.forcing, config.hardware, config.libraries) == ("sampler", {}, {})


@pytest.mark.parametrize(
    "name", ["version", "cpu", "served", "model", "values", "forcing", "unverified", "refused", "hardware", "libraries",
             "vocabulary"],
)  # fmt: skip
def test_another_version_of_our_route_is_a_line_with_both_versions(told, clients, name):
    optional = name in ("hardware", "libraries", "vocabulary")
    misfit = "unverified[1] is 1" if name == "unverified" else f"{name} is a list of 2 items"
    missing = [] if optional else [("gone", f"{name} is missing"), (None, f"{name} is null")]
    for value, actual in ((["x", 1], misfit), *missing):
        url = told({name: value})
        with pytest.raises(EngineError) as caught:
            _ = clients(url).config
        line = str(caught.value)
        where = f"the server at {url} tells something else at /logprob_parity/config than is read here: "
        assert line.startswith(f"{where}{actual}, expected ")
        assert "; pytest-logprob-parity is 0.0.9 there, " in line
        assert line.endswith(" here: install the same version on both sides")


def test_a_length_that_is_none_and_a_table_that_lacks_its_parts(told, clients):
    with pytest.raises(EngineError, match=r'values\.max_model_len is "many", expected a whole number'):
        _ = clients(told({"values": {"max_model_len": "many"}})).config
    with pytest.raises(EngineError, match=r"model\.name is missing, expected a string"):
        _ = clients(told({"model": {"digests": {}}})).config


@pytest.mark.parametrize("info", [None, "ModelConfig(...)", {}, {"device_config": {"device_type": "cpu"}, "model_config": {}}])
def test_a_development_mode_that_tells_nothing_readable_is_a_plain_server(told, clients, info):
    config = clients(told({}, hidden=("/logprob_parity",), info=info)).config
    assert {"dtype", "enable_prefix_caching", "logprobs_mode"} < set(config.unverified)
    assert (config.forces, config.max_model_len) == (False, 512)


def test_entries_of_a_model_list_that_are_none_are_not_read(told, clients):
    config = clients(told({}, hidden=("/logprob_parity",), models=["x", {"max_model_len": "abc"}, None])).config
    assert config.max_model_len is None


def test_a_server_of_another_model_names_both(server, clients, tmp_path):
    """The digests differ: by the marker's folder, which has another configuration."""
    other = tmp_path / "other-model"
    other.mkdir()
    for file in (ROOT / "models" / "tiny-arith").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 12345.0}))
    with pytest.raises(IncomparableError, match=rf"has another model: {MODEL} \(\w+\), the test asks for {other} \(\w+\)"):
        _ = clients(server, model=str(other)).config


def test_another_checkpoint_of_one_run_is_told_by_its_name(server, clients):
    """Digests are of configuration, shapes and index: those of the next step are the same."""
    with pytest.raises(
        IncomparableError, match=rf"has the model '{MODEL}', the test asks for '{MODEL}-step2'; if that is anot"
    ):
        _ = clients(server, model=f"{MODEL}-step2").config
    assert clients(server, model=f"{MODEL}-step2", served_model=MODEL).config.forces  # whoever says so knows


def test_the_option_goes_with_settings_of_a_server(pytester, run_inner):
    pytester.makepyfile(
        test_it=TEST.replace('dtype="float32"', 'dtype="float32", engine="vllm-server", timeout=1.5, retries=0')
    )
    result = run_inner("--update-golden", "--parity-server=http://127.0.0.1:1")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*no server answers at http://127.0.0.1:1: connection refused; start one: *"])


def test_a_server_that_is_down_is_one_line_with_the_command_that_starts_one(
    clients, golden, pytester, run_inner, monkeypatch
):  # fmt: skip
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("pytest_logprob_parity.engines.server.client.asyncio.sleep", sleep)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with pytest.raises(EngineError) as caught:
            check_golden(golden, clients(url, max_num_seqs=8))
        assert waits == []  # nobody waits for one that is not there
        assert str(caught.value) == (
            f"no server answers at {url}: connection refused; start one: logprob-parity serve {MODEL} max_num_seqs=8 "
            f"--dtype float32 --port {port}"
        )
        pytester.makepyfile(TEST + TEST.replace("test_rollouts", "test_second"))
        result = run_inner("--update-golden", f"--parity-server={url}")
        result.assert_outcomes(failed=2)
        result.stdout.fnmatch_lines(["E  *pytest_logprob_parity.EngineError: no server answers at *"])
        assert not list(pytester.path.glob("golden/**/*.safetensors"))


def test_no_tls_and_no_such_host_are_not_called_a_refusal(gateway, clients):
    for url, told in (
        (gateway.url.replace("http:", "https:"), "no TLS there, or a certificate that is not trusted (*wrong version number*)"),
        ("http://no-such-host.invalid:8000", "no such host (*)"),
    ):
        with pytest.raises(EngineError) as caught:
            _ = clients(url, retries=0).config
        assert fnmatch.fnmatch(str(caught.value), f"* at {url}: {told}*"), caught.value


def test_a_slow_server_is_given_up_and_told(gateway, clients, golden):
    there = clients(gateway.url, timeout=0.3)
    assert there.config.forces
    gateway.delay = 1.5
    with pytest.raises(EngineError, match=r"no answer within 0.3 s after 2 tries in \d\.\d s; timeout=SECONDS allows more"):
        check_golden(golden, there)


@pytest.fixture
def pieces():
    """A server that answers with pieces of bytes, one every 0.1 s, whatever it is asked; `pieces(...)` gives its address."""
    made = []

    def serve(*parts):
        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                self.request.recv(65536)
                with contextlib.suppress(OSError):
                    for part in parts:
                        self.request.sendall(part)
                        time.sleep(0.1)

        made.append(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
        made[-1].daemon_threads = True
        threading.Thread(target=made[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{made[-1].server_address[1]}"

    yield serve
    for server in made:
        server.shutdown()
        server.server_close()


def posted(url, timeout):
    client = Client(url)
    try:
        return client.post_all(
            [(COMPLETIONS, {})], lambda _, content: content, ServerSettings(url=url, timeout=timeout, retries=0)
        )
    finally:
        client.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def test_an_answer_that_comes_by_drops_has_no_more_time_than_another(pieces):
    url = pieces(HEAD + b"Content-Length: 40\r\n\r\n", *[b" "] * 40)  # all of it would be no JSON
    with pytest.raises(EngineError, match=r"no answer within 0.5 s; timeout=SECONDS allows more$"):
        posted(url, 0.5)
    assert posted(pieces(HEAD + b"Content-Length: 4\r\n\r\n", b"tr", b"ue"), 5) == [True]


def test_a_body_that_cannot_be_read_is_a_line(pieces):
    url = pieces(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\ntrue")
    with pytest.raises(
        EngineError, match=rf"^the server at {url} answers /v1/completions with a body that cannot be read \(.*"
    ):
        posted(url, 5)
    deep = b"[" * 100_000
    with pytest.raises(EngineError, match="with JSON that is nested too deeply"):
        posted(pieces(HEAD + b"Content-Length: %d\r\n\r\n" % len(deep) + deep), 5)


def test_numbers_out_of_range_are_no_completion(told, clients):
    """As no engine writes them; the gateway before the engine may."""
    there = clients(told({}))
    backend, request = there._backend(), Request(prompt_token_ids=[9], sampling=Sampling(), forced_token_ids=[5])
    logprobs = {"token_logprobs": [-1.0], "top_logprobs": [{"token_id:5": -1.0}]}
    choice = {"index": 0, "token_ids": [2**40], "finish_reason": "length", "logprobs": logprobs}
    backend._client.post_all = lambda posts, read, settings, largest: [read(0, {"choices": [choice]})]
    with pytest.raises(
        EngineError,
        match=r"^vllm 0.32.0 at .*: the server's answer is no completion as vLLM writes them: token_ids\[0\] is 1099",
    ):
        backend.run([request])
    choice["token_ids"] = [5]
    assert backend.run([request])[0].token_ids == [5]


def test_what_vllm_refuses_comes_with_the_values_that_it_takes():
    """Its configurations are pydantic's: the field in one line, what is wrong with it in the next."""
    import pydantic  # vLLM's own need

    def check(cls, value):
        raise ValueError("this goes with nothing") if value.mode == "b" else value

    model = pydantic.create_model(
        "Config", mode=(Literal["a", "b"], ...), __validators__={"check": pydantic.model_validator(mode="after")(check)}
    )
    for mode, told in (("c", "mode: Input should be 'a' or 'b'"), ("b", "Value error, this goes with nothing")):
        with pytest.raises(pydantic.ValidationError) as caught:
            model(mode=mode)
        assert reason_of(caught.value) == f"ValidationError: {told}"


@pytest.mark.parametrize("update", [False, True])
def test_a_server_that_dies_in_the_middle_leaves_the_golden(gateway, clients, golden, update):
    before = golden.read_bytes()
    there = clients(gateway.url, retries=1)
    gateway.before = lambda number, path: "drop" if path == COMPLETIONS and number > 5 else None
    with pytest.raises(EngineError, match=r"connection lost \(.*\) after 2 tries"):
        check_golden(golden, there, prompts=PROMPTS, sampling=SAMPLING, update=update)
    assert golden.read_bytes() == before


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://a b", "http://host/?x=1", "", "://"]
)
def test_a_wrong_address_is_told_as_one(url, pytester):
    with pytest.raises(UsageError, match=r"^url: .* is no address of a server.*; give one such as http://127.0.0.1:8000$"):
        spec_at(url)
    result = pytester.runpytest_inprocess(f"--parity-server={url}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --parity-server: * is no address of a server*"])


def test_a_password_in_an_address_is_not_printed():
    with pytest.raises(UsageError, match="a user or a password in an address would be printed; VLLM_API_KEY holds") as error:
        spec_at("http://me:secret@127.0.0.1:8000")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"concurrency": 0}, "concurrency=0: must be a whole number, 1 or m"), ({"timeout": -1}, "timeout=-1: must be a number"),
     ({"retries": True}, "retries=True: must be a whole number"), ({"adapter": "x"}, "adapter='x'.*: not over a server"),
     ({"served_model": 3}, "served_model=3: must be a string"), ({"url": None}, "url: None is no address")],
)  # fmt: skip
def test_settings_out_of_range(settings, message):
    with pytest.raises(UsageError, match=message):
        spec_at(**{"url": "http://localhost:1", **settings})


def test_a_server_needs_an_address_and_known_settings(clients):
    with pytest.raises(UsageError, match=r"engine='vllm-server' needs url='http://HOST:PORT', or the option --parity-server"):
        EngineSpec(MODEL, engine="vllm-server")
    with pytest.raises(UsageError, match=r"'max_num_seq' is neither .* did you mean 'max_num_seqs'"):
        _ = clients("http://127.0.0.1:1", max_num_seq=1).config


def test_what_does_not_go_over_a_server_is_refused(server, clients):
    there = clients(server)
    for refused in (there.sleep, there.wake_up):
        with pytest.raises(UsageError, match=rf"^sleep: not over a server \({server}\); take engine='vllm', in this process$"):
            refused()


def test_serve_refuses_in_one_line(capsys, server):
    from reporting import one_line

    port = server.rpartition(":")[2]
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in one_line(capsys, "serve", MODEL, "--port", port)
    assert "no such folder" in one_line(capsys, "serve", "models/none", "--port", "0")
    assert "did you mean 'max_num_seqs'" in one_line(capsys, "serve", MODEL, "max_num_seq=1", "--port", "0")
    assert "'y' is not KEY=VALUE" in one_line(capsys, "serve", MODEL, "--port", "0", "seed=1", "y")
    assert "engine='transformers' is nothing to serve" in one_line(capsys, "serve", MODEL, "engine=transformers")
    assert "profile 'own' is nothing to serve" in one_line(capsys, "serve", MODEL, "--profile", "own")
    assert "'x' is not KEY=VALUE" in one_line(capsys, "serve", MODEL, "--set", "x")


def test_a_client_closes_and_opens_again(server):
    client = Client(server)
    for _ in range(2):
        assert client.ask("GET", "/version").content == {"version": "0.32.0"}
        client.close()
    client.close()
