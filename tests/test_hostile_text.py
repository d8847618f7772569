"""Text of goldens, servers and models in every output: all of it is shown, none is obeyed, and no line can be forged."""

import dataclasses
import re
import unicodedata

import numpy as np
import pytest
from made_up import make_trace, moved
from reporting import command

from pytest_logprob_parity import EngineError, Golden, GoldenError, ParityError, UsageError
from pytest_logprob_parity.check.obtained import Obtained, candidate_path
from pytest_logprob_parity.comparison.result import TALLY
from pytest_logprob_parity.golden import golden_path
from pytest_logprob_parity.golden.reference import Reference
from pytest_logprob_parity.visible_text import visible, visible_json, visible_line

#: Clears the screen, sets its title, rings, turns text round, hides, ends strings, forges lines, orders GitHub and Azure about.
HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2066\u200b\x00\r\x08\x7f\ud800\u2028FORGED\n::error::owned\n::stop-commands::x\n"
    "FORGED\n##[error]owned ##vso[task.setvariable variable=x]owned"
)


def assert_harmless(text, *, ours=()):
    """Nothing in an output is obeyed by a terminal or a CI; `ours` are what our own workflow commands begin with."""
    obeyed = {f"U+{ord(char):04X}" for char in text if char not in "\n\t" and unicodedata.category(char) in _OBEYED}
    assert not obeyed
    lines = [line for line in text.splitlines() if not line.startswith(tuple(ours) or "\0")]
    assert not [line for line in lines if re.match(r"\s*::", line)]
    assert not [line for line in lines if re.search(r"##\w*\[", line)]
    assert not [line for line in text.splitlines() if line.startswith("FORGED")]


_OBEYED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def test_the_check_can_fail():
    for text in ("\x1b[2J", "  ::error::x", "##[error]x", "a\nFORGED", "\u202e"):
        with pytest.raises(AssertionError):
            assert_harmless(text)


def test_visible_shows_everything_once():
    shown = visible_line(HOSTILE)
    assert_harmless(shown)
    assert "\n" not in shown
    assert visible(shown) == shown
    assert visible_line("plain ⏎ text, 漢字, é, 🙂") == "plain ⏎ text, 漢字, é, 🙂"
    assert_harmless(visible_json({"a": HOSTILE.replace("\ud800", "")}))


@pytest.mark.parametrize("kind", [ParityError, UsageError, EngineError, GoldenError])
def test_every_error_is_harmless_whoever_prints_it(kind):
    error = kind(HOSTILE, f"place {HOSTILE}")
    for text in (str(error), error.reason, error.reason_beside("x"), *map(str, error.args)):
        assert_harmless(text.replace("\nFORGED", ""))  # an error may have lines


def golden_of(change=0.0, node_id=HOSTILE, name=HOSTILE, **changes):
    """A golden with hostile text wherever a text can stand."""
    text = HOSTILE.replace("\ud800", "")  # which no file can hold
    trace = moved(make_trace(), change).with_(
        engine=text, engine_version=text, token_texts=dict.fromkeys(range(1000), text), ranks=np.full(2000, 1, np.int32)
    )
    prints = {
        "name": text, "model": text, "tokenizer": text, "chat_template": text, "adapter": text, "dtype": text, text: text,
        "engine": {"kind": text, "version": text}, "config": {text: text, "seed": str(change)}, "hardware": {"device": text},
        "libraries": {"torch": f"{text}{change}"},
    }  # fmt: skip
    reference = Reference((trace.logprobs - np.float32(0.001)), text, trace.num_sequences)
    made = Golden(
        trace, fingerprint=prints, prompts_digest=text, node_id=node_id.replace("\ud800", ""),
        name=name.replace("\ud800", ""), reference=reference,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture
def places(tmp_path):
    """Three goldens with hostile texts: one, one that is off, one that is not."""
    for name, change in (("one", 0.0), ("off", -0.3), ("same", 0.0)):
        golden_of(change).save(tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "one"), ("show", "--json", "one"), ("diff", "one", "off"), ("diff", "one", "same"),
        ("diff", "--json", "one", "off"), ("diff", "--level", "bitwise", "off", "one"), ("report", "one", "off"),
        ("report", "--github", "one", "off"), ("diagnose", "one"), ("bisect", "one", "--good", "0.1", "--bad", "0.2"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_verb_is_harmless(places, capsys, monkeypatch, arguments):
    monkeypatch.chdir(places)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(places / "summary.md"))
    paths = [f"{a}.safetensors" if (places / f"{a}.safetensors").exists() else a for a in arguments]
    _, out, err = command(capsys, *paths)
    assert out + err
    assert_harmless(out + err, ours=["::error title=", "::error file="])


def test_accept_is_harmless(tmp_path, capsys):
    node_id = f"test_it.py::test_it[{HOSTILE}]".replace("\ud800", "").replace("\x00", "")
    place = golden_path(tmp_path / "golden", node_id)
    golden_of(0.0, node_id, "").save(place)
    left = tmp_path / "parity-obtained" / "x.safetensors"
    golden_of(-0.3, node_id, "").save(candidate_path(left))
    text = HOSTILE.replace("\ud800", "")
    for refusal in ("", text):
        obtained = Obtained(
            golden=str(place.relative_to(tmp_path)), golden_digest=Golden.load(place).digest, node_id=node_id,
            name="", verdict="fail", headline=text, level="rl", setup="compatible",
            candidate="" if refusal else Golden.load(candidate_path(left)).digest, refusal=refusal,
        )  # fmt: skip
        golden_of(-0.3, node_id, "").save(left, also={"obtained": dataclasses.asdict(obtained)})
        _, out, err = command(capsys, "accept", "--root", tmp_path, "--yes")
        assert "  candidate  " in out or "  refused    " in out
        assert_harmless(out + err)


def test_a_file_name_forges_no_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x\nFORGED\n1 accepted; commit the goldens\n.safetensors"
    (tmp_path / name).write_bytes(b"junk")
    golden_of().save(tmp_path / f"golden{name}")
    for arguments in (
        ["accept", name],
        ["show", name],
        ["show", f"golden{name}"],
        ["diff", name, name],
        ["report", name, name],
    ):
        _, out, err = command(capsys, *arguments)
        assert_harmless(out + err)
        assert "\n1 accepted" not in out + err


def test_an_engine_among_a_tests_arguments_is_harmless():
    from pytest_logprob_parity import EngineSpec
    from pytest_logprob_parity.engines.pool import Pool

    assert_harmless(repr(Pool().engine(EngineSpec(HOSTILE))))


@pytest.mark.parametrize("code", [0x34F, 0x115F, 0x17B4, 0x180B, 0x2800, 0x3164, 0xFE0F, 0xFFA0, 0xE0100])
def test_what_is_drawn_as_nothing_is_shown_by_its_code(code):
    assert visible(f"a{chr(code)}b") == f"a⟨U+{code:04X}⟩b"


TEST = """
import os
from pytest_logprob_parity import Golden, Trace

def test_it(golden_trace):
    golden_trace.check(Golden.load(os.environ["TRACE"]).trace)
"""


def test_what_pytest_prints_is_harmless(places, pytester, run_inner, monkeypatch):
    """A recording, a pass, a failure, an unused golden, and a test that checks nothing."""
    pytester.makepyfile(test_it=TEST)
    monkeypatch.setenv("TRACE", str(places / "one.safetensors"))
    outputs = [run_inner("-v", "--update-golden"), run_inner("-v")]
    monkeypatch.setenv("TRACE", str(places / "off.safetensors"))
    outputs.append(run_inner("-v", "--parity-report=report"))
    assert [result.ret for result in outputs] == [0, 0, 1]
    monkeypatch.setenv("TRACE", str(places / "one.safetensors"))
    pytester.makepyfile(test_it=TEST.replace("test_it", "test_other"))
    outputs.append(run_inner("-v"))
    pytester.makepyfile(test_it=TEST.replace("golden_trace.check", "str"))
    outputs.append(run_inner("-v"))
    assert "unchecked" in outputs[-1].stdout.str()
    for result in outputs:
        assert_harmless(result.stdout.str())
        assert_harmless(result.stderr.str())
    assert TALLY.made
