"""A server that answers wrongly, in all ways that we know of: each is one line that says what was wrong. No engine runs."""

import copy
import datetime as dt
import email.utils
import gzip
import itertools
import json
import re
import time

import numpy as np
import pytest
from gateway import COMPLETIONS, RawServer, http_answer

from conftest import MODEL
from pytest_logprob_parity import EngineSpec, ParityError, Sampling
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.pool import Pool
from pytest_logprob_parity.engines.server import answer as answer_module
from pytest_logprob_parity.engines.server import client as client_module
from pytest_logprob_parity.engines.server.client import Client
from pytest_logprob_parity.engines.server.wire import choices_of
from pytest_logprob_parity.errors import EngineError
from pytest_logprob_parity.spec.server_settings import ServerSettings

SAMPLING = Sampling(temperature=0.7, max_tokens=3, logprobs=2)
FORCED = Request(prompt_token_ids=[9, 8], sampling=SAMPLING, forced_token_ids=[5, 6, 7])
SCORED = Request(prompt_token_ids=[9, 8], sampling=SAMPLING, scored_token_ids=[5, 6])
ABOUT = {
    "logprob_parity": "0.1.0", "version": "0.32.0", "cpu": True, "served": MODEL, "refused": "", "unverified": [],
    "model": {"name": MODEL, "digests": {}}, "values": {"dtype": "float32", "max_model_len": 1024}, "vocabulary": 384,
}  # fmt: skip


def table(*pairs):
    return {f"token_id:{token}": value for token, value in pairs}


#: As vLLM answers to FORCED, by the completions route and by the route of native trace replay, and to SCORED.
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
DECODED = {
    "id": "x", "object": "text_completion", "created": 1, "model": MODEL, "usage": USAGE,
    "choices": [{
        "index": 0, "text": "abc", "finish_reason": "length", "stop_reason": None, "token_ids": [5, 6, 7],
        "prompt_token_ids": [9, 8],
        "logprobs": {
            "text_offset": [0, 1, 2], "tokens": ["token_id:5", "token_id:6", "token_id:7"],
            "token_logprobs": [-0.5, -3.0, -9999.0],
            "top_logprobs": [
                table((5, -0.5), (1, -1.5)), table((6, -3.0), (2, -0.2), (3, -2.0)), table((7, -9999.0), (3, -0.1)),
            ],
        },
    }],
}  # fmt: skip
GENERATED = copy.deepcopy(DECODED)
GENERATED["choices"][0]["logprobs"] = {
    "content": [
        {"token_id": 5, "logprob": -0.5, "rank": 1, "top_logprobs": [{"token_id": 5, "logprob": -0.5, "rank": 1}]},
        {"token_id": 6, "logprob": -3.0, "rank": 9, "top_logprobs": [{"token_id": 2, "logprob": -0.2, "rank": 1}]},
        {"token_id": 7, "logprob": -9.0, "rank": 8, "top_logprobs": [{"token_id": 3, "logprob": -0.1, "rank": 1}]},
    ]
}
PREFILLED = copy.deepcopy(DECODED)
PREFILLED["usage"] = {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
PREFILLED["choices"][0] |= {
    "token_ids": [1], "prompt_token_ids": [9, 8, 5, 6],
    "prompt_logprobs": [
        None, {"8": {"logprob": -1.0, "rank": 1}},
        {"5": {"logprob": -2.0, "rank": 3, "decoded_token": "e"}, "1": {"logprob": -0.1, "rank": 1}},
        {"6": {"logprob": -0.2, "rank": 1}},
    ],
}  # fmt: skip
ANSWERS = {
    "decode": (FORCED, DECODED, "sampler"),
    "native": (FORCED, GENERATED, "native"),
    "prefill": (SCORED, PREFILLED, "sampler"),
}


def put(place, value):
    """The edit that sets one place of an answer, such as `usage.total_tokens` or `choices.0.index`; "gone" takes it out."""

    def edit(content):
        *path, last = [int(part) if part.isdecimal() else part for part in place.split("/")]
        for part in path:
            content = content[part]
        if value == "gone":
            content.pop(last)
        else:
            content[last] = value

    return edit


def edited(edit):
    return lambda content: [http_answer(json.loads(_with(content, edit)))]


def _with(content, edit):
    edit(content)
    return json.dumps(content)


def says(*pieces):
    return lambda content: pieces


def forever(piece, first, pause=0.0):
    def answer(content):
        yield first
        while True:
            time.sleep(pause)
            yield piece

    return answer


def choice(part, value):
    return edited(put(f"choices/0/{part}", value))


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
MEGABYTE = b" " * 2**20
NO = "is no completion as vLLM writes them: "
#: Name -> (how a forced decode is answered, what the line says of it).
DECODE_FAULTS = {
    # the connection
    "hangs up": (says(), "connection lost"),
    "hangs up in the head": (says(b"HTTP/1.1 200 OK\r\nContent-"), "connection lost"),
    "hangs up in the body": (says(HEAD + b"Content-Length: 100\r\n\r\n{"), "connection lost"),
    "no HTTP": (says(b"SSH-2.0-OpenSSH_9.6\r\n"), "connection lost"),
    "a chunk without a length": (says(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n"), "connection lost"),
    "a head without end": (forever(b"X-A: " + b"a" * 9000 + b"\r\n", HEAD), "connection lost"),
    "silence": (forever(b"", b"", 5), "COMPLETIONS: no answer within 0.5 s after 2 tries"),
    "a head by drops": (forever(b"X", HEAD, 0.1), "no answer within 0.5 s"),
    "a body by drops": (forever(b" ", HEAD + b"Content-Length: 999\r\n\r\n", 0.1), "no answer within 0.5 s"),
    # its size
    "a body without end": (forever(MEGABYTE, HEAD + b"\r\n"), r"with more than 1,05\d,\d+ bytes: that is no answer"),
    "chunks without end": (
        forever(b"100000\r\n" + MEGABYTE + b"\r\n", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"), "with more than 1,0",
    ),
    "an error without end": (forever(MEGABYTE, b"HTTP/1.1 500 X\r\n\r\n"), "with more than 1,0"),
    "little that unpacks to much": (
        says(http_answer(gzip.compress(MEGABYTE * 64), Content_Encoding="gzip")), "with more than 1,0",
    ),
    "no gzip": (says(http_answer(b"true", Content_Encoding="gzip")), r"cannot be read \(Content-Encoding 'gzip': Err"),
    "another compression": (says(http_answer(b"x", Content_Encoding="zstd")), r"\(Content-Encoding 'zstd': it was"),
    # the status
    "wants a key": (says(http_answer({}, 401)), r"wants another key for COMPLETIONS \(status 401\)"),
    "forbids": (says(http_answer({}, 403)), r"wants another key for COMPLETIONS \(status 403\)"),
    "has no such route": (says(http_answer(b"nothing", 404)), r"has no COMPLETIONS \(status 404: nothing\)"),
    "refuses": (says(http_answer({"error": {"message": "too\nlong"}}, 400)), "refuses a request to COMPLETIONS: too long$"),
    "cannot process": (
        says(http_answer({"detail": [{"loc": ["a"]}]}, 422)),
        r"refuses a request to COMPLETIONS: \[{'loc': \['a'\]}\]",
    ),
    "fails": (says(http_answer({"error": {"message": "dead"}}, 500)), r"failed at COMPLETIONS \(status 500\): dead"),
    "is elsewhere": (says(http_answer(b"", 302, Location="/login")), r"\(status 302\): no reason"),
    "is busy": (
        says(http_answer(b"busy", 503, Retry_After="0.2")),
        r"\(status 503\) after 2 tries in \d\.\d s, 0\.2 s of it waited: busy$",
    ),
    "asks to be asked in an hour": (
        says(http_answer(b"later", 429, Retry_After="3600")),
        r"\(status 429\) after 2 tries in \d\.\d s, 0\.5 s of it waited: later$",
    ),
    "terminal codes": (says(http_answer(b"\x1b[2Jgone\x00", 500)), r"\(status 500\): \ufffd\[2Jgone\ufffd$"),
    # JSON
    "nothing": (says(http_answer(b"", 204)), "with something that is no JSON: ''"),
    "a page": (says(http_answer(b"<html>hi</html>")), "with something that is no JSON: '<html>hi"),
    "half of it": (lambda c: [http_answer(json.dumps(c).encode()[:-9])], "with something that is no JSON"),
    "events": (says(http_answer(b"data: {}\n\ndata: [DONE]")), "with something that is no JSON: 'data: {} data"),
    "no UTF-8": (says(http_answer(b'{"a": "\xff\xfe"}')), "with something that is no JSON"),
    "a number of 5,000 digits": (says(http_answer(b"1" * 5000)), "with something that is no JSON"),
    "100,000 brackets": (says(http_answer(b"[" * 100_000)), "with JSON that is nested too deeply"),
    "300 brackets": (says(http_answer(b"[" * 300 + b"]" * 300)), "with no completion: "),
    "a list": (says(http_answer([1])), r"with no completion: \[1\]"),
    "null": (says(http_answer(b"null")), "with no completion: None"),
    "an error that is called a success": (says(http_answer({"error": "dead"})), "with no completion: {'error': 'dead'}"),
    # choices
    "no choices": (edited(put("choices", "gone")), "with no completion"),
    "choices of null": (edited(put("choices", None)), "with no completion"),
    "an empty list of choices": (edited(put("choices", [])), "with no completion"),
    "choices that are texts": (edited(put("choices", ["x"])), "with no completion"),
    "a choice too many": (edited(lambda c: c["choices"].append({**c["choices"][0], "index": 1})), "2 choices, 1 asked for"),
    "a choice twice": (edited(lambda c: c["choices"].append(c["choices"][0])), "2 choices, 1 asked for"),
    "no index": (choice("index", "gone"), rf"{NO}choices\[0\]\.index is missing"),
    "another index": (choice("index", 1), rf"{NO}choices\[0\]\.index is 1, expected a whole number from 0 to 0"),
    "an index that is true": (choice("index", False), r"choices\[0\]\.index is False"),
    "no finish_reason": (choice("finish_reason", "gone"), r"choices\[0\]\.finish_reason is None, expected a text"),
    "finish_reason is a number": (choice("finish_reason", 7), r"choices\[0\]\.finish_reason is 7"),
    "another model": (edited(put("model", "gpt-5")), rf"with another model than was asked for: 'gpt-5', not '{MODEL}'"),
    "a model that is a list": (edited(put("model", ["a"])), r"with another model than was asked for: \['a'\]"),
    # the prompt, as it was taken
    "another prompt": (choice("prompt_token_ids", [9, 7]), "another prompt than was sent: .* from position 1 on"),
    "a longer prompt": (choice("prompt_token_ids", [0, 9, 8]), "another prompt than was sent: 3 tokens, 2 were sent"),
    "a prompt of texts": (choice("prompt_token_ids", ["9", "8"]), r"prompt_token_ids\[0\] is '9'"),
    # token ids
    "no ids": (choice("token_ids", "gone"), "answers without token ids"),
    "ids are a text": (choice("token_ids", "567"), "token_ids is '567', expected a list"),
    "an id of 1.5": (choice("token_ids/1", 1.5), r"token_ids\[1\] is 1.5, expected a token id from 0 to 383"),
    "an id of 6.0": (choice("token_ids/1", 6.0), r"token_ids\[1\] is 6.0"),
    "an id that is a text": (choice("token_ids/1", "6"), r"token_ids\[1\] is '6'"),
    "an id that is true": (choice("token_ids/1", True), r"token_ids\[1\] is True"),
    "an id that is null": (choice("token_ids/1", None), r"token_ids\[1\] is None"),
    "an id that is a list": (choice("token_ids/1", [6]), r"token_ids\[1\] is \[6\]"),
    "an id below 0": (choice("token_ids/1", -1), r"token_ids\[1\] is -1"),
    "an id beyond the vocabulary": (choice("token_ids/1", 384), r"token_ids\[1\] is 384"),
    "an id beyond int32": (choice("token_ids/1", 2**40), r"token_ids\[1\] is 1099511627776"),
    "a token too few": (choice("token_ids/2", "gone"), "2 tokens and 3 logprobs"),
    "a token too many": (choice("token_ids", [5, 6, 7, 8]), "4 tokens and 3 logprobs"),
    # logprobs
    "no logprobs": (choice("logprobs", "gone"), "answers without logprobs"),
    "logprobs are a list": (choice("logprobs", [-1.0]), "answers without logprobs"),
    "no token_logprobs": (choice("logprobs/token_logprobs", "gone"), "answers without logprobs"),
    "token_logprobs too few": (choice("logprobs/token_logprobs", [-1.0]), "1 token_logprobs and 3 top_logprobs"),
    "a logprob that is a text": (choice("logprobs/token_logprobs/0", "x"), r"token_logprobs\[0\] is 'x', expected a n"),
    "a logprob that is a list": (choice("logprobs/token_logprobs/0", [1]), r"token_logprobs\[0\] is \[1\]"),
    "a logprob that is true": (choice("logprobs/token_logprobs/0", True), r"token_logprobs\[0\] is True"),
    "a logprob above 0": (choice("logprobs/token_logprobs/0", 0.5), r"token_logprobs\[0\] is 0.5, expected a logprob"),
    "a logprob of infinity": (choice("logprobs/token_logprobs/0", np.inf), r"token_logprobs\[0\] is inf"),
    "a logprob of 400 digits": (choice("logprobs/token_logprobs/0", 10**400), r"token_logprobs\[0\] is 1000"),
    "candidates are a list": (choice("logprobs/top_logprobs/0", [1]), r"top_logprobs\[0\] is \[1\], expected a table"),
    "a candidate that is a text": (choice("logprobs/top_logprobs/0", {"abc": -1.0}), "texts in place of token ids in top"),
    "a candidate below 0": (choice("logprobs/top_logprobs/0", {"token_id:-1": -1.0}), "texts in place of token ids in t"),
    "a candidate beyond the vocabulary": (choice("logprobs/top_logprobs/0", {"token_id:384": -1}), "'token_id:384', exp"),
    "a candidate twice": (choice("logprobs/top_logprobs/0", {"token_id:5": -1, "5": -2}), "names a token twice in logpro"),
    "a candidate's logprob above 0": (choice("logprobs/top_logprobs/0", {"token_id:5": 2}), r"\['token_id:5'\] is 2"),
    # usage
    "usage is a list": (edited(put("usage", [1])), r"usage is \[1\], expected a table"),
    "usage counts by halves": (edited(put("usage/total_tokens", 4.5)), r"usage\.total_tokens is 4\.5"),
    "usage of another prompt": (edited(put("usage/prompt_tokens", 9)), r"itself: usage\.prompt_tokens is 9, 2 by the rest"),
    "usage of other tokens": (edited(put("usage/completion_tokens", 4)), r"usage\.completion_tokens is 4, 3 by the rest"),
    "usage that does not add up": (edited(put("usage/total_tokens", 6)), r"usage\.total_tokens is 6, 5 by the rest"),
}  # fmt: skip
PREFILL_FAULTS = {
    "no prompt_logprobs": (choice("prompt_logprobs", "gone"), "answers without prompt_logprobs"),
    "prompt_logprobs too few": (choice("prompt_logprobs/3", "gone"), "3 prompt_logprobs for 4 tokens"),
    "a position that is a text": (choice("prompt_logprobs/2", "x"), r"prompt_logprobs\[2\] is 'x'"),
    "an entry that is a number": (choice("prompt_logprobs/2", {"5": -1}), r"prompt_logprobs\[2\]\['5'\] is -1"),
    "an entry without a logprob": (choice("prompt_logprobs/2", {"5": {"rank": 1}}), r"\['5'\] is {'rank': 1}, expect"),
    "an entry of a text": (choice("prompt_logprobs/2", {"abc": {"logprob": -1}}), "texts in place of token ids in prompt_"),
    "an entry above 0": (choice("prompt_logprobs/2", {"5": {"logprob": 3}}), r"\['5'\]\.logprob is 3, expected a logprob"),
    "a rank that is true": (choice("prompt_logprobs/2", {"5": {"logprob": -1, "rank": True}}), r"\.rank is True"),
    "a rank below 0": (choice("prompt_logprobs/2", {"5": {"logprob": -1, "rank": -4}}), r"\.rank is -4"),
}  # fmt: skip
NATIVE_FAULTS = {
    "a position without candidates": (choice("logprobs/content/1", {"logprob": -1}), r"content\[1\] is {'logprob': -1}"),
    "a candidate without its id": (
        choice("logprobs/content/1/top_logprobs", [{"logprob": -1}]), r"content\[1\]\.top_logprobs\[0\] is {'logprob'",
    ),
    "a position that is null": (choice("logprobs/content/0", None), r"content\[0\] is None"),
    "a rank of 1.5": (choice("logprobs/content/0/rank", 1.5), r"content\[0\]\.rank is 1\.5"),
}  # fmt: skip
FAULTS = [
    (kind, name)
    for kind, faults in (("decode", DECODE_FAULTS), ("prefill", PREFILL_FAULTS), ("native", NATIVE_FAULTS))
    for name in faults
]


@pytest.fixture
def backends(monkeypatch):
    """`backends(kind, answer, timeout=..., retries=...)`: the client of a server that answers every completion by `answer`."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    opened = []

    def make(kind, answer, timeout=5.0, retries=0, about=None):
        def reply(path, body):
            if path != "/logprob_parity/config":
                return answer(copy.deepcopy(ANSWERS[kind][1]))
            return [http_answer({**ABOUT, "forcing": ANSWERS[kind][2], **(about or {})})]

        opened.append(RawServer(reply))
        opened.append(Pool())
        spec = EngineSpec(
            MODEL, engine="vllm-server", dtype="float32", url=opened[-2].url, timeout=timeout, retries=retries
        )  # fmt: skip
        return opened[-1].engine(spec)._backend()

    yield make
    for thing in reversed(opened):
        thing.close()


@pytest.mark.parametrize(("kind", "name"), FAULTS)
def test_every_fault_is_one_line_that_says_what_was_wrong(kind, name, backends, monkeypatch):
    answer, told = {"decode": DECODE_FAULTS, "prefill": PREFILL_FAULTS, "native": NATIVE_FAULTS}[kind][name]
    monkeypatch.setattr(answer_module, "_MOST_WAITED", 0.5)
    slow = "no answer" in told
    backend = backends(kind, answer, timeout=0.5 if slow else 5.0, retries=1 if slow or "tries" in told else 0)
    with pytest.raises(ParityError) as caught:
        backend.run([ANSWERS[kind][0]])
    line = str(caught.value)
    assert re.search(told.replace("COMPLETIONS", COMPLETIONS), line), line
    assert backend._client.url in line
    assert "request 1 of 1" in line or COMPLETIONS in line
    assert "\n" not in line
    assert len(line) < 500


def test_there_are_as_many_faults_as_that():
    assert len(FAULTS) >= 49


def shuffled(content):
    """The same answer with every table in the reverse order."""
    if isinstance(content, dict):
        return {name: shuffled(value) for name, value in reversed(content.items())}
    return [shuffled(item) for item in content] if isinstance(content, list) else content


def more(content):
    """The same answer with fields of a later version in every table of names; a table of tokens has tokens alone."""
    if isinstance(content, dict):
        of_tokens = all(key.removeprefix("token_id:").isdecimal() for key in content)
        return {name: more(value) for name, value in content.items()} | (
            {} if of_tokens else {"of_a_later_version": [{"x": None}]}
        )
    return [more(item) for item in content] if isinstance(content, list) else content


def chunked(content):
    body = json.dumps(content).encode()
    pieces = [body[i : i + 50] for i in range(0, len(body), 50)]
    return [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces), b"0\r\n\r\n"
    ]  # fmt: skip


RIGHT = {
    "in another order": lambda content: [http_answer(shuffled(content))],
    "with more fields": lambda content: [http_answer(more(content))],
    "without what is not asked for": lambda c: [http_answer({"choices": c["choices"]})],
    "in chunks": chunked,
    "compressed all the same": lambda c: [http_answer(gzip.compress(json.dumps(c).encode()), Content_Encoding="gzip")],
    "without a length": lambda c: [http_answer(c, Content_Length=None)],
    "as text": lambda c: [http_answer(c, Content_Type="text/plain; charset=latin-1")],
    "in UTF-16": lambda c: [http_answer(json.dumps(c).encode("utf-16"))],
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_is_taken_however_it_is_written(kind, name, backends):
    request = ANSWERS[kind][0]
    (plain,) = backends(kind, lambda content: [http_answer(content)]).run([request])
    (completion,) = backends(kind, RIGHT[name]).run([request])
    assert completion.token_ids.tolist() == list(request.forced_token_ids or request.scored_token_ids)
    for column in ("token_ids", "logprobs", "ranks", "top_token_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(completion, column), getattr(plain, column), column)


def test_choices_are_told_apart_by_their_index():
    first, second = {"index": 0, "text": "a"}, {"index": 1, "text": "b"}
    assert choices_of({"choices": [second, first]}, 2) == [first, second]
    for choices, told in (
        ([first, first], "two choices of index 0"),
        ([first], "1 choices, 2 asked for"),
        ([first, second, {"index": 2}], "3 choices, 2 asked for"),
        ([first, {"text": "b"}], r"choices\[1\].index is missing"),
        ([first, {"index": 2}], r"choices\[1\].index is 2, expected a whole number from 0 to 1"),
    ):
        with pytest.raises(EngineError, match=told):
            choices_of({"choices": choices}, 2)


def test_the_names_of_one_model_are_all_right_and_another_model_is_not(backends):
    """vLLM answers with the first name of its model (or with an adapter's), whichever it was asked by."""
    alias = {"served": "policy"}
    answer = edited(put("model", "policy"))
    assert backends("decode", answer, about=alias).run([FORCED])[0].token_ids.tolist() == [5, 6, 7]
    with pytest.raises(EngineError, match=f"another model than was asked for: '{MODEL}', not 'policy'"):
        backends("decode", lambda content: [http_answer(content)], about=alias).run([FORCED])


def test_a_server_that_says_when_is_asked_then(backends, monkeypatch):
    """The seconds that were waited, and the tries, are in the note of a check; a header that says nothing is not followed."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(client_module.asyncio, "sleep", sleep)
    in_20_s = email.utils.format_datetime(dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=20))
    answers = itertools.chain(
        [[http_answer(b"", 503, Retry_After=told)] for told in ("7", in_20_s, "100000", "-5", "soon", "Mon, 99 Foo")],
        itertools.repeat(None),
    )

    def answer(content):
        return next(answers) or [http_answer(content)]

    backend = backends("decode", answer, retries=9, timeout=600)
    backend.run([FORCED])
    assert waits[0] == 7
    assert 15 < waits[1] <= 20
    assert waits[2] == 60
    assert waits[3:] == [0.8, 1.6, 3.2]
    (note,) = backend.remarks()
    total = f"{sum(waits):.1f}"
    assert str(note) == f"requests sent again: 6 for status 503; {total} s waited before them ({backend._client.url})"


def test_retry_after_waits_no_longer_than_an_answer_may_take(backends):
    answers = itertools.chain([[http_answer(b"", 429, Retry_After="50")]], itertools.repeat(None))
    backend = backends("decode", lambda content: next(answers) or [http_answer(content)], retries=1, timeout=0.4)
    backend.run([FORCED])
    assert "1 for status 429; 0.4 s waited" in str(backend.remarks()[0])


def test_the_bound_of_an_answer_is_by_what_was_asked(backends):
    """Megabytes of an answer to a request for three tokens are no answer; to one for thousands they may be."""
    padded = edited(lambda content: content.update(text="x" * 3 * 2**20))
    with pytest.raises(EngineError, match="with more than 1,"):
        backends("decode", padded).run([FORCED])
    many = Request(prompt_token_ids=[9, 8], sampling=Sampling(max_tokens=1000, logprobs=5))
    stopped = edited(lambda content: (content.update(text="x" * 3 * 2**20), put("choices/0/finish_reason", "stop")(content)))
    assert len(backends("decode", stopped).run([many])[0].token_ids) == 3


def test_a_key_that_cannot_be_sent_is_not_printed(backends, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame\n")
    with pytest.raises(ParityError, match=r"^VLLM_API_KEY holds what cannot be sent as a key") as caught:
        Client("http://127.0.0.1:9").ask("GET", "/version")
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("vocabulary", [True, 0, -3, 1.5, "384"])
def test_a_vocabulary_that_is_none(backends, vocabulary):
    with pytest.raises(EngineError, match=r"vocabulary is .*, expected a whole number, 1 or more; "):
        backends("decode", says(), about={"vocabulary": vocabulary})


def test_without_a_vocabulary_ids_are_held_to_what_a_trace_can_hold(backends):
    def answer(content):
        put("choices/0/token_ids/1", 2**31 - 1)(content)
        return [http_answer(content)]

    backend = backends("decode", answer, about={"vocabulary": None})
    assert backend.run([FORCED])[0].token_ids.tolist() == [5, 2**31 - 1, 7]
    client = Client(backend._client.url)
    try:
        settings = ServerSettings(url=client.url, retries=0)
        assert client.post_all([(COMPLETIONS, {})], lambda number, content: number, settings) == [0]
    finally:
        client.close()
