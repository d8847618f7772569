"""The command line itself: help, slips, versions of what it prints as JSON, completion, exit statuses."""

import builtins
import contextlib
import dataclasses
import io
import json
import math
import os
import pty
import re
import subprocess
import sys

import pytest
from reporting import MOVED, command
from test_history import reading, run_of

import pytest_logprob_parity
from conftest import ROOT
from pytest_logprob_parity import Finding, Golden, compare, progress
from pytest_logprob_parity.cli import main, make_parser, verbs_of
from pytest_logprob_parity.cli.json_output import SCHEMAS, to_text
from pytest_logprob_parity.cli.verb import tell
from pytest_logprob_parity.comparison.result import LEVELS, Errors
from pytest_logprob_parity.matrix import run as matrix
from pytest_logprob_parity.report.history.drift import series_of
from pytest_logprob_parity.selftest import table
from pytest_logprob_parity.selftest.fault import Row

VERBS = verbs_of(make_parser())


def refusal(capsys, *arguments):
    """The last line of a usage error, which ends with status 2."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_it_says_its_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"pytest-logprob-parity {pytest_logprob_parity.__version__}\n"


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_and_argument_has_a_help_and_every_verb_its_exit_statuses(name):
    verb = VERBS[name]
    assert verb.description.endswith(".")
    assert re.search(r"Exit status: 0 .*; 2 trouble, .*; 130 interrupted\.$", verb.epilog)
    assert all(action.help for action in verb._actions)
    assert f"{name} " in verb.format_help()


def test_a_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "pytest_logprob_parity.cli", "show", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: logprob-parity show ")
    assert done.stderr == ""


# -- slips ------------------------------------------------------------------------------------------------------------


def test_a_misspelt_verb_gets_the_nearest_one(capsys):
    assert refusal(capsys, "shwo", "x").endswith("error: there is no verb 'shwo', did you mean 'show'?")
    assert refusal(capsys, "xyz").endswith(f"error: there is no verb 'xyz'; there are {', '.join(VERBS)}")


def test_a_misspelt_option_gets_the_nearest_one_of_its_verb(capsys):
    told = refusal(capsys, "show", "x", "--jsn")
    assert told == "logprob-parity show: error: unrecognized arguments: --jsn, did you mean '--json'?"
    assert refusal(capsys, "show", "x", "--quiet").endswith("unrecognized arguments: --quiet")


def test_a_level_is_one_of_all_levels_and_an_unknown_one_says_which_there_are(capsys):
    (level,) = (action for action in VERBS["diff"]._actions if action.dest == "level")
    assert level.choices == LEVELS
    told = refusal(capsys, "diff", "a", "b", "--level", "loose")
    assert all(level in told for level in LEVELS)


@pytest.mark.parametrize("level", LEVELS)
def test_diff_judges_at_each_level(level, capsys):
    golden = ROOT / "examples" / "v0-to-v1" / "golden" / "0.8.5-V0-float32-greedy.safetensors"
    status, out, _ = command(capsys, "diff", golden, golden, "--level", level, "--json")
    assert (status, json.loads(out)["level"]) == (0, level)


# -- JSON -------------------------------------------------------------------------------------------------------------

#: Objects whose keys are names: of metrics and limits, settings, parts of a fingerprint. Other pages and tests have them.
BY_NAME = {"metrics", "policy_metrics", "tolerance", "trace", "fingerprint", "values", "quantities", "bands"}
GOLDENS = ROOT / "examples" / "v0-to-v1" / "golden"


def keys_of(value, path=""):
    """The dotted keys of a JSON value, as docs/reference/json.md writes them."""
    if isinstance(value, list):
        return set().union(*(keys_of(item, f"{path}[]") for item in value))
    if not isinstance(value, dict) or path.rpartition(".")[2] in BY_NAME:
        return set()
    return {(f"{path}." if path else "") + key for key in value} | set().union(
        *(keys_of(item, f"{path}.{key}" if path else key) for key, item in value.items())
    )


def printed(capsys, *arguments):
    return json.loads(command(capsys, *arguments, "--json")[1])


def show_json(capsys):
    return [printed(capsys, "show", GOLDENS / "0.8.5-V0-bfloat16-greedy.safetensors")]


def diff_json(capsys):
    """With all that a comparison of files may have: other settings, findings, gates with and without a reference."""
    plain, other = (GOLDENS / f"0.8.5-V0-{dtype}-T-0.7.safetensors" for dtype in ("bfloat16", "float32"))
    result = printed(capsys, "diff", plain, other)
    comparison = compare(expected=Golden.load(plain).trace, actual=Golden.load(other).trace)
    errors = Errors(expected=0.1, actual=0.1, limit=0.2, fail_limit=0.3, low=0.1, high=0.1)
    made = dataclasses.replace(
        comparison,
        gates=tuple(dataclasses.replace(gate, errors=errors) for gate in comparison.gates),
        findings=(Finding(layer="path", cause="engine_build", evidence="it is another"),),
    )
    return [result, json.loads(to_text("diff", made.to_json()))]


def matrix_json(capsys):
    row = matrix.Row(
        cell="a",
        dtype="float32",
        sampling="s",
        verdict="fail",
        headline="too far",
        findings=(Finding(layer="path", cause="engine_build", evidence="it is another"),),
    )
    return [json.loads(to_text("matrix", {"rows": [row.to_json()]}))]


def selftest_json(capsys):
    row = Row(fault="f", size="s", kind="report", outcome="fail", rms=0.1, multiple=3.0, quantity="k3", said="too far")
    return [json.loads(to_text("selftest", {"model": "m", "objective": "token", **table.to_json([row], "token")}))]


def history_json(capsys):
    runs = [run_of(reading(0.001 + 0.0001 * (day % 3)), day=day) for day in range(1, 11)]
    checks = [series.to_json() for series in series_of(runs)]
    return [json.loads(to_text("history", {"checks": checks, "skipped": ["a line"]}))]


def documented(verb):
    """The keys in the section of a verb."""
    page = (ROOT / "docs" / "reference" / "json.md").read_text()
    section = re.search(rf"^## `{verb}.*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[1]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


@pytest.mark.parametrize(
    ("verb", "make"),
    [
        ("show", show_json),
        ("diff", diff_json),
        ("matrix", matrix_json),
        ("selftest", selftest_json),
        ("history", history_json),
    ],
)
def test_json_names_its_schema_and_the_reference_has_every_key(verb, make, capsys):
    contents = make(capsys)
    assert {content["schema"] for content in contents} == {f"logprob-parity {verb} {SCHEMAS[verb]}"}
    keys = set().union(*map(keys_of, contents))
    # the findings of a row are those of `diff --json`
    keys = {key for key in keys if not key.startswith("rows[].findings[].")}
    assert keys == documented(verb)


def test_a_key_that_the_page_lacks_is_seen(capsys):
    (content,) = show_json(capsys)
    assert keys_of({**content, "floor": {**content["floor"], "new": 1}}) - documented("show") == {"floor.new"}
    assert documented("show") - keys_of({**content, "floor": None}) > {"floor.rms"}


def test_json_has_null_for_what_is_no_number():
    assert json.loads(to_text("show", {"a": math.nan, "b": [math.inf, 1.5]})) == {
        "schema": "logprob-parity show 1", "a": None, "b": [None, 1.5],
    }  # fmt: skip


# -- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_every_verb(shell, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", shell])
    assert end.value.code == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)
    assert "--update-golden" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_completion_without_shtab_names_what_to_install(capsys, monkeypatch):
    def missing(name, *rest, real=builtins.__import__):
        if name == "shtab":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    told = refusal(capsys, "--print-completion", "bash")
    assert told.endswith("--print-completion needs shtab: pip install 'pytest-logprob-parity[completion]'")


# -- answers to accept's question -------------------------------------------------------------------------------------


@pytest.fixture
def three_failed(project, pytester, once, monkeypatch):
    """Three checks that fail, each with a golden that could be accepted; their goldens."""

    def fail():
        source = (pytester.path / "test_it.py").read_text()
        more = "".join(f"\ndef test_{n}(golden_trace):\n    golden_trace.check(rollouts(SHIFT, NOISE))\n" for n in ("b", "c"))
        (pytester.path / "test_it.py").write_text(source + more)
        with monkeypatch.context() as unmoved:
            unmoved.delenv("SHIFT")
            unmoved.delenv("NOISE")
            project("--parity-update=missing").assert_outcomes(passed=4)
        project().assert_outcomes(passed=1, failed=3)

    once("three failed", pytester.path, fail)
    return sorted(path for path in pytester.path.glob("golden/test_it/*") if "stays" not in path.name)


@pytest.mark.parametrize(
    ("answers", "accepted", "asked"),
    [
        (["all"], 3, 1),
        (["y", "all"], 3, 2),
        (["", "a"], 2, 2),
        (["y", "quit"], 1, 2),
        (["skip", "yes", "s"], 1, 3),
        (["view", "y", "n", "Q"], 1, 4),
        (["what?", "y", "N"], 1, 3),
    ],
)
def test_a_question_takes_all_skip_view_and_quit(answers, accepted, asked, three_failed, pytester, capsys, monkeypatch):
    before = {path: path.read_bytes() for path in three_failed}
    given = iter(answers)
    questions = []
    monkeypatch.setattr("builtins.input", lambda text: questions.append(text) or next(given))
    status, out, _ = command(capsys, "accept", "--root", pytester.path)
    assert (status, len(questions)) == (int(accepted < 3), asked)
    assert set(questions) == {"  accept? [y/N/all/skip/view/quit] "}
    assert out.splitlines()[-1].startswith(f"{accepted} accepted")
    assert sum(path.read_bytes() != content for path, content in before.items()) == accepted
    assert ("sequence position " in out) == ("view" in answers)


def test_view_shows_what_diff_prints(project, pytester, capsys, monkeypatch):
    project().assert_outcomes(passed=1, failed=1)
    (golden,) = pytester.path.glob(MOVED)
    (obtained,) = (p for p in pytester.path.glob("parity-obtained/test_it/*") if not p.name.endswith(".golden.safetensors"))
    given = iter(["view", "no"])
    monkeypatch.setattr("builtins.input", lambda text: next(given))
    _, out, _ = command(capsys, "accept", "--root", pytester.path)
    _, shown, _ = command(capsys, "diff", golden, obtained)
    assert shown in out


# -- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, outside of CI."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return Terminal()


@pytest.fixture
def at_work(monkeypatch):
    """`at_work(stderr, "--json")`: `logprob-parity show` with work of three steps, and a message in the first."""

    def run(given):
        for number in progress.each("step", range(3), 3):
            if number == 0:
                tell("the first")
        return 0

    monkeypatch.setattr("pytest_logprob_parity.cli.show.run", run)

    def show(stderr, *arguments):
        with contextlib.redirect_stderr(stderr):
            assert main(["show", "x", *arguments]) == 0
        return stderr.getvalue()

    return show


def test_a_terminal_shows_what_is_being_done_until_it_is(terminal, at_work):
    written = at_work(terminal)
    assert [part.partition(" (")[0] for part in written.split(progress.ERASE) if part] == [
        "step 1 of 3", "# the first\n", "step 2 of 3", "step 3 of 3",
    ]  # fmt: skip
    assert written.endswith(progress.ERASE)


@pytest.mark.parametrize("quiet", [("CI", "true"), ("TERM", "dumb"), "--json", "pipe"])
def test_ci_dumb_terminals_pipes_and_json_get_none_of_it(quiet, terminal, at_work, monkeypatch):
    if isinstance(quiet, tuple):
        monkeypatch.setenv(*quiet)
    written = at_work(io.StringIO() if quiet == "pipe" else terminal, *([quiet] if quiet == "--json" else []))
    assert "step" not in written
    assert "# the first\n" in written


def test_work_within_work_and_a_narrow_terminal(terminal):
    with progress.shown_on(terminal.write), progress.doing("outer"):
        with progress.doing("inner " + "x" * 40):
            pass
        assert next(progress.each("empty", [], 1), None) is None
    shown = [part for part in terminal.getvalue().split(progress.ERASE) if part]
    assert [len(part) < 40 for part in shown] == [True] * len(shown)
    assert [part[:12] for part in shown] == ["outer (0 s)", "outer: inner", "outer (0 s)", "outer: empty", "outer (0 s)"]


def test_an_error_takes_the_line_away(terminal):
    with pytest.raises(ZeroDivisionError), progress.shown_on(terminal.write), progress.doing("work"):
        _ = 1 / 0
    assert terminal.getvalue().endswith(progress.ERASE)
    with progress.doing("work without a terminal"):
        assert terminal.getvalue().endswith(progress.ERASE)


WORK = """
from pytest_logprob_parity import progress

def test_it(golden_trace):
    with progress.doing("recording"):
        print("captured")
"""


@pytest.mark.parametrize("watched", [True, False])
def test_pytest_shows_it_past_the_capturing_on_a_terminal_only(watched, pytester, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    pytester.makepyfile(WORK)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    if watched:
        output = []
        assert pty.spawn(command, lambda file: output.append(os.read(file, 4096)) or output[-1], lambda file: b"") == 0
        written = b"".join(output).decode()
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        written = done.stdout + done.stderr
    assert (f"{progress.ERASE}recording (0 s){progress.ERASE}" in written) is watched
    assert ("recording" in written) is watched
    assert "captured" not in written
    assert "1 passed" in written
