"""`logprob-parity matrix`: cells of engine version and settings, each in an environment of its own. Here the engine is
transformers, which starts in seconds; tests/test_migration.py has what real versions of vLLM recorded."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_up import make_trace

from conftest import ROOT, forked_python
from pytest_logprob_parity import EngineError, Golden, ParityError, Sampling, UsageError
from pytest_logprob_parity.checkpoint.digests import model_digests
from pytest_logprob_parity.cli import main
from pytest_logprob_parity.engines.backend import ResolvedConfig
from pytest_logprob_parity.errors import IncomparableError
from pytest_logprob_parity.matrix import environments, worker
from pytest_logprob_parity.matrix.environments import Environment, python_of
from pytest_logprob_parity.matrix.executors import LocalExecutor, RayExecutor, today
from pytest_logprob_parity.matrix.goldens import check_is_of_plan
from pytest_logprob_parity.matrix.install_failure import why_it_failed
from pytest_logprob_parity.matrix.installer import DiskFullError, run_command
from pytest_logprob_parity.matrix.plan import load_plan
from pytest_logprob_parity.matrix.run import run_matrix

PLAN = f"""
model = "{ROOT / "models" / "tiny-arith"}"
prompts = ["12 + 30 =", "7 * 8 =", "71 - 26 ="]
dtypes = ["float32"]
reference = "asked for"
repeats = 0

[sampling."T=0.7"]
temperature = 0.7
max_tokens = 12
n = 4

[environment.here]
python = "{forked_python()}"

[cell."asked for"]
environment = "here"
settings = {{ engine = "transformers" }}
"""
PROMPTS = 'prompts = ["12 + 30 =", "7 * 8 =", "71 - 26 ="]'
RAW = """
[cell.raw]
environment = "here"
settings = { engine = "transformers", logprobs_mode = "raw_logprobs" }
"""


@pytest.fixture
def plan(tmp_path):
    """Writes a matrix.toml; `plan(more text)` gives its path."""

    def write(text="", base=PLAN):
        path = tmp_path / "matrix.toml"
        path.write_text(base + text, "utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the plan and the golden that it recorded."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "matrix.toml").write_text(PLAN, "utf-8")
    assert main(["matrix", str(folder / "matrix.toml"), "--out", str(tmp_path_factory.mktemp("out"))]) == 0
    return folder


def run(path, tmp_path, *options):
    """The rows of a run, and its exit status."""
    status = main(["matrix", str(path), "--out", str(tmp_path / "out"), *options])
    return json.loads((tmp_path / "out" / "matrix.json").read_text())["rows"], status


def test_a_golden_recorded_in_one_cell_is_checked_in_all(plan, tmp_path, capsys):
    rows, status = run(plan(RAW), tmp_path)
    assert [(row["cell"], row["verdict"]) for row in rows] == [("asked for", "pass"), ("raw", "fail")]
    assert rows[1]["findings"][0]["cause"] == "raw_vs_processed"
    assert rows[1]["distribution"] == "raw"
    assert status == 1
    printed = capsys.readouterr().out
    assert "| raw | float32 | **fail** semantic: raw_vs_processed (temperature) |" in printed
    assert (tmp_path / "out" / "matrix.md").read_text() == printed
    assert len(list((tmp_path / "golden").glob("*.safetensors"))) == 1


def test_an_interrupted_run_goes_on_where_it_was(plan, tmp_path, capsys):
    run(plan(), tmp_path)
    capsys.readouterr()
    rows, _ = run(plan(RAW), tmp_path)
    told = capsys.readouterr().err
    assert "check-asked-for-float32: answered in an earlier run" in told
    assert "check-raw-float32: answered\n" in told
    (tmp_path / "out" / "check-raw-float32" / "done.json").unlink()  # as a kill would leave it
    again, _ = run(plan(RAW), tmp_path)
    assert again == rows
    assert "check-raw-float32: answered\n" in capsys.readouterr().err


def test_a_cell_that_cannot_run_is_a_row_with_its_reason(plan, tmp_path, capsys):
    killed = tmp_path / "killed"
    killed.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} "$@"\necho about to die\nkill -9 $$\n')
    killed.chmod(0o755)
    cells = f"""
[environment.missing]
python = "no-such-python"
[environment.killed]
python = "{killed}"
[environment.noPython]
python = "/bin/ls"
[environment.nowhere]
packages = ["logprob-parity-no-such-thing==9.9.9"]
[cell.missing]
environment = "missing"
[cell.killed]
environment = "killed"
[cell.noPython]
environment = "noPython"
[cell.nowhere]
environment = "nowhere"
[cell.slow]
environment = "here"
minutes = 0.001
[cell.wrong]
environment = "here"
settings = {{ engine = "transformers", max_num_batched_tokens = 64 }}
"""
    rows, status = run(plan(cells), tmp_path, "--environments", str(tmp_path / "environments"))
    told = {row["cell"]: row["headline"] for row in rows if row["verdict"] == "not run"}
    assert status == 1
    assert told["missing"] == "environment missing: there is no interpreter no-such-python"
    assert told["noPython"] == "environment noPython: /bin/ls is not a Python interpreter"
    assert told["killed"] == "its worker was killed (SIGKILL): about to die"
    assert told["nowhere"].startswith(
        "environment nowhere was not made: the configured package index has no logprob-parity-no-such-thing==9.9.9 for Python "
    )
    assert told["slow"] == "took longer than 0.001 minutes and was stopped"
    assert "'max_num_batched_tokens'" in told["wrong"]  # an engine argument, and none of this engine
    assert rows[0]["verdict"] == "pass"
    assert "- slow (float32) did not run: took longer" in capsys.readouterr().out
    assert not list((tmp_path / "environments").glob("nowhere*/bin"))


def test_a_reference_that_cannot_run_ends_it(plan, tmp_path, capsys):
    status = main(["matrix", str(plan(base=PLAN.replace(forked_python(), "no-such-python"))), "--out", str(tmp_path / "out")])
    assert status == 2
    assert "the reference asked for (float32) recorded nothing: environment here: there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            ("[cell.", "[cel."),
            "matrix.toml: its content has the key .cel., expected no other keys than model, .*; did you mean 'cell'?",
        ),
        (('reference = "asked for"', 'reference = "asked"'), "reference 'asked' is not a cell"),
        (('environment = "here"', 'environment = "her"'), "no environment 'her', did you mean 'here'?"),
        (
            ('python = "', 'pyton = "'),
            "environment.here has the key .pyton., expected no other keys than .*; did you mean 'python'?",
        ),
        (("temperature = 0.7", "temprature = 0.7"), "Sampling has no field 'temprature', did you mean 'temperature'?"),
        (("[environment.here]", "[environment.here"), "not valid TOML"),
        (
            (PROMPTS, 'prompts = "nowhere.json"'),
            "prompts: there is no .*nowhere.json",
        ),
        ((PROMPTS, 'prompts = "matrix.toml"'), "prompts: .*matrix.toml is not valid JSON"),
        (("model = ", "model = 3 #"), "model is 3, expected a string that is not empty"),
        (("model = ", "# model = "), "model is missing, expected a string that is not empty"),
        (
            ("repeats = 0", 'repeats = "x"'),
            "repeats is .x., expected 0 for no noise floor, or a whole number, 2 or more",
        ),
        (("repeats = 0", "repeats = 1"), "repeats is 1, expected 0 for no noise floor, or a whole number, 2 or more"),
        (("settings = {", 'settings = { model = "x", '), "settings has model, which all cells share: set model at the top"),
        (("settings = {", 'settings = { dtype = "float32", '), "settings has dtype, which all cells share: set dtypes at the"),
        (("settings = {", "settings = { max_modl_len = 3, "), "'asked for': settings: 'max_modl_len' .* mean 'max_model_len'?"),
        (
            ("settings = {", 'settings = { profile = "nope", '),
            "'asked for': settings: EngineSpec.profile='nope'.: known are rl",
        ),
        (('dtypes = ["float32"]', "dtypes = []"), "dtypes has 0 items, expected at least 1"),
        (('dtypes = ["float32"]', 'dtypes = "float32"'), "dtypes is .float32., expected a list"),
        (('dtypes = ["float32"]', 'dtypes = ["flot32"]'), r"dtypes\[0\] is .flot32., expected one of auto, float64"),
        (('python = "', 'python = 3 # "'), "environment.here.python is 3, expected a string that is not empty"),
        (('python = "', 'packages = ["x"]\npython = "'), "environment 'here' has both python and packages"),
        (('python = "', 'after_install = ["x.py"]\npython = "'), "environment 'here' has both python and after_install"),
        (('python = "', 'packages = ["x"]\nafter_install = ["no.py"] # "'), "environment 'here': there is no .*no.py"),
        (
            ('python = "', 'after_install = ["x.py"] # "'),
            "environment 'here' needs one of requirements, packages, resolved, release, python",
        ),
        (('python = "', 'release = "latest" # "'), "environment 'here': release: 'latest' is not a release, such as"),
        (('python = "', 'release = "0.25.1"\npython = "'), "environment 'here' has both python and release"),
        (('python = "', 'packages = "x" # "'), "environment.here.packages is .x., expected a list"),
        (('python = "', 'variables = { A = 1 }\npython = "'), "environment.here.variables.A is 1, expected a string"),
        (("settings = {", 'settings = "raw" # {'), r"cell\[.asked for.\].settings is .raw., expected a mapping"),
        (("settings = {", 'cpus = "two" # {'), r"cell\[.asked for.\].cpus is .two., expected a whole number, 1 or more"),
        (("settings = {", "cpus = -1 # {"), r"cell\[.asked for.\].cpus is -1, expected a whole number, 1 or more"),
        (("settings = {", "cpus = 1.5 # {"), r"cell\[.asked for.\].cpus is 1.5, expected a whole number, 1 or more"),
        (("settings = {", 'minutes = "x" # {'), r"cell\[.asked for.\].minutes is .x., expected a number above 0"),
        (
            (PLAN[PLAN.index("[sampling") : PLAN.index("[environment")], "sampling = {}\n"),
            "sampling: the plan needs one or more",
        ),
        (("repeats = 0", "repeats = true"), "repeats is true, expected 0 for no noise floor"),
        (('environment = "here"', ""), r"cell\[.asked for.\].environment is missing, expected a string that is not empty"),
        (
            ("[environment.here]", "[sampling.'T 0.7']\n[environment.here]"),
            "'T 0.7' .*its files would have the names of those of 'T=0.7'",
        ),
        (
            ("[environment.here]", "[cell.'asked-for']\nenvironment = 'here'\n[environment.here]"),
            "cell 'asked for' needs another name: its files",
        ),
        (("dtypes", "# dtypes"), ""),
        (("settings = {", "settings = { num_scheduler_steps = 8, disable_log_requests = true, "), ""),  # of older releases
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_plan_that_does_not_fit_says_where(plan, change, told):
    path = plan()
    path.write_text(path.read_text().replace(*change))
    if not told:
        assert load_plan(path).cells
        return
    with pytest.raises(UsageError, match=told.replace("?", r"\?")):
        load_plan(path)


def test_a_plan_that_is_no_text_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "matrix.toml").write_bytes(b"model = '\xff'")
    assert main(["matrix", str(tmp_path / "matrix.toml")]) == 2
    assert "matrix.toml: not valid TOML: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("12 + 30 =", "13 + 30 ="), "with other prompts, '12 + 30 =' one of them, the plan now has '13 + 30 =' there"),
        ((', "71 - 26 ="', ""), "with other prompts, 3 of them, the plan now has 2"),
        (("max_tokens = 12", "max_tokens = 9"), "with max_tokens=12, the plan now samples with max_tokens=9"),
        (("tiny-arith", "tiny-arith-step2"), "with another model, that of tiny-arith, the plan now has /"),
        (('"transformers"', '"transformers", logprobs_mode = "raw_logprobs"'),
         "with the settings {'engine': 'transformers'}, the plan now has {'engine': 'transformers', 'logprobs_mode': 'raw_log"),
    ],
)  # fmt: skip
def test_a_golden_of_another_plan_is_never_taken_for_its_own(recorded, tmp_path, capsys, change, told):
    path = shutil.copytree(recorded, tmp_path / "repo") / "matrix.toml"
    (golden,) = (path.parent / "golden").iterdir()
    before = golden.read_bytes()
    path.write_text(path.read_text().replace(*change))
    assert main(["matrix", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"logprob-parity: {golden} was recorded {told}" in (err := capsys.readouterr().err)
    assert err.endswith("; record it again: --update-golden\n")
    assert err.count("\n") == 1  # no engine was started for it
    assert golden.read_bytes() == before


def test_a_golden_of_a_model_that_changed_is_another_one(recorded, tmp_path, capsys):
    """In the same folder, with another configuration."""
    repo = Path(shutil.copytree(recorded, tmp_path / "repo"))
    shutil.copytree(ROOT / "models" / "tiny-arith", tmp_path / "tiny-arith")
    plan = repo / "matrix.toml"
    plan.write_text(plan.read_text().replace(str(ROOT / "models" / "tiny-arith"), str(tmp_path / "tiny-arith")))
    matrix = load_plan(plan)
    (golden,) = (repo / "golden").iterdir()
    tokens = [Golden.load(golden).trace.prompt(i) for i in range(0, 12, 4)]
    check_is_of_plan(golden, matrix, matrix.cells[0], "T=0.7", tokens)
    config = tmp_path / "tiny-arith" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 12345.0}))
    model_digests.cache_clear()
    with pytest.raises(IncomparableError, match="was recorded with another model, that of tiny-arith"):
        check_is_of_plan(golden, matrix, matrix.cells[0], "T=0.7", tokens)


def test_a_row_that_nothing_was_found_for_says_why_in_the_page():
    from pytest_logprob_parity.comparison.result import Finding
    from pytest_logprob_parity.matrix.run import Row
    from pytest_logprob_parity.matrix.table import page

    rows = [
        Row(cell="a", dtype="float32", sampling="s", verdict="unverified", headline="12 sequences are too few"),
        Row(
            cell="b",
            dtype="float32",
            sampling="s",
            verdict="fail",
            headline="too far",
            findings=(Finding(layer="path", cause="engine_build", evidence="it is another"),),
        ),
    ]
    lines = page(rows, "a")
    assert "| a | float32 | **unverified** |" in lines
    assert "| b | float32 | **fail** path: engine_build |" in lines
    assert lines[-1] == "- a (float32), s, unverified: 12 sequences are too few"


# -- what recording refuses --------------------------------------------------------------------------------------------


class MadeUpEngine:
    """Answers with a trace, and in place of each replay with that trace's logprobs changed by `change`."""

    def __init__(self, trace, change):
        self._trace, self._change = trace, change
        self.config = ResolvedConfig(
            engine="transformers", version="1", dtype="float32", values={"logprobs_mode": "processed_logprobs"}
        )

    def generate(self, prompts, sampling):
        return self._trace

    def fingerprint(self):
        return {}

    def replay(self, trace):
        return trace

    def replay_all(self, trace, paths):
        return {path: trace.with_(replay=path) for path in paths}

    def replay_in_batch_compositions(self, trace, shapes, number):
        return (trace.logprobs + self._change).astype(np.float32)

    def remarks(self):
        return ()


class InThisProcess:
    """An executor whose worker runs in this process, and has `engine`."""

    def __init__(self, engine, monkeypatch):
        pool = SimpleNamespace(engine=lambda spec: engine)
        monkeypatch.setattr(worker, "Pool", lambda *_: contextlib.nullcontext(pool))

    def run(self, jobs, out, home, notify):
        for job in jobs:
            (out / job.name).mkdir(parents=True)
            for name, data in job.files.items():
                (out / job.name / name).write_bytes(data)
            try:
                worker.work(out / job.name)
            except ParityError as error:
                yield job, str(error)
            else:
                yield job, ""


TRACE = make_trace(24, 20, dtype="float32", engine="transformers", sampling=Sampling(temperature=0.7, max_tokens=20))
REFUSED = {
    "NaN": ({"logprobs": np.where(np.arange(480) == 7, np.nan, TRACE.logprobs)}, 0, "1 of 480 logprobs of this engine is NaN"),
    "NaN in other batches": ({}, np.where(np.arange(480) == 7, np.nan, 0), "repeat 1 of 3: 1 of 480 logprobs are NaN or +inf"),
    "another number in other batches": (
        {},
        0.3,
        "this engine does not agree with itself beyond what float32",
    ),
    "all excluded": ({"logprobs": np.full(480, -np.inf)}, 0, "it could never pass: Nothing was compared"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_reference_records_nothing_that_recording_refuses(plan, tmp_path, monkeypatch, what):
    columns, change, told = REFUSED[what]
    engine = MadeUpEngine(TRACE.with_(**{k: v.astype(np.float32) for k, v in columns.items()}), change)
    matrix = load_plan(plan(base=PLAN.replace("repeats = 0", "repeats = 3")))
    with pytest.raises(ParityError, match=r"the reference asked for \(float32\) recorded nothing: .*not recorded: ") as error:
        run_matrix(matrix, InThisProcess(engine, monkeypatch), tmp_path / "out", tmp_path, lambda _: None)
    assert told in str(error.value)
    assert not list((tmp_path / "golden").glob("*"))


def test_the_reference_records_an_engine_that_agrees_with_itself(plan, tmp_path, monkeypatch):
    matrix = load_plan(plan(base=PLAN.replace("repeats = 0", "repeats = 3")))
    engine = MadeUpEngine(TRACE, np.random.default_rng(0).normal(0, 1e-6, 480))
    (row,) = run_matrix(matrix, InThisProcess(engine, monkeypatch), tmp_path / "out", tmp_path, lambda _: None)
    assert row.verdict == "pass"
    (golden,) = (tmp_path / "golden").glob("*")
    assert Golden.load(golden).floor.repeats == 3


# -- answers of earlier runs -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A model folder of the test's own."""
    return Path(shutil.copytree(ROOT / "models" / "tiny-arith", tmp_path / "model"))


def test_another_model_in_the_folder_is_another_question(plan, folder, tmp_path, capsys):
    path = plan(base=PLAN.replace(str(ROOT / "models" / "tiny-arith"), str(folder)))
    run(path, tmp_path)
    run(path, tmp_path)
    assert "check-asked-for-float32: answered in an earlier run" in capsys.readouterr().err
    weights = "model.safetensors"
    (folder / weights).unlink()
    shutil.copy(ROOT / "models" / "tiny-arith-step2" / weights, folder / weights)
    rows, _ = run(path, tmp_path)
    assert rows[0]["verdict"] == "fail"
    assert "earlier run" not in capsys.readouterr().err


def test_an_interpreter_with_other_distributions_is_another_question(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = Environment(name="mine", python=str(python))
    before = today({"model": "m"}, tmp_path, environment)
    assert today({"model": "m"}, tmp_path, environment) == before
    (tmp_path / "thing-1.0.dist-info").mkdir()
    (tmp_path / "thing-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
    assert today({"model": "m"}, tmp_path, environment)["installed"] not in ("", before["installed"])
    assert today({"model": "m"}, tmp_path, Environment(name="none", python="no-such-python"))["installed"] == ""


def test_another_tokenizer_is_another_question(tmp_path):
    spec = {"model": str(ROOT / "models" / "tiny-arith"), "tokenizer": str(tmp_path)}
    (tmp_path / "config.json").write_text("{}")
    before = today(spec, tmp_path, Environment(name="here"))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert today(spec, tmp_path, Environment(name="here")) != before


def test_answers_that_cannot_be_read_are_asked_for_again(plan, tmp_path, capsys):
    rows, _ = run(plan(), tmp_path)
    answers = sorted((tmp_path / "out" / "check-asked-for-float32").glob("T-0.7.*.safetensors"))
    decode = next(file for file in answers if file.name == "T-0.7.decode.safetensors")
    for damage in (decode.unlink, lambda: decode.write_bytes(decode.read_bytes()[:-9])):
        damage()
        capsys.readouterr()
        assert run(plan(), tmp_path)[0] == rows
        assert "check-asked-for-float32: answered\n" in capsys.readouterr().err


# -- environments ------------------------------------------------------------------------------------------------------


def test_an_environment_is_made_once_whole_or_not_at_all_and_the_users_own_is_not_touched(tmp_path, monkeypatch):
    told, at_hand = [], ["numpy"]
    monkeypatch.setattr(environments, "_imports", lambda folder: list(at_hand))
    environment = Environment(name="empty", requirements=("# nothing\n",))
    for _ in range(2):
        python = python_of(environment, tmp_path, told.append)
        assert python.exists()
        assert os.path.commonpath([python, sys.prefix]) != sys.prefix
        assert len(told) == 1
    (python.parent.parent / "left over").write_text("")
    at_hand.clear()  # it lost what the worker needs
    assert python_of(environment, tmp_path, told.append) == python
    assert len(told) == 2
    assert not (python.parent.parent / "left over").exists()
    (python.parent.parent / "logprob-parity.json").unlink()  # half-made, as far as anybody can know

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(environments, "run_command", full)
    for other in (
        Environment(name="other", packages=("x",)),
        Environment(name="empty", requirements=("# something",)),
        environment,
    ):
        with pytest.raises(EngineError, match=f"environment {other.name} was not made: No space left on device") as error:
            python_of(other, tmp_path, told.append)
        assert "\n" not in str(error.value)
    assert len(set(told)) == 3  # other requirements are another environment
    assert not list(tmp_path.glob("*/"))
    monkeypatch.undo()
    assert environments._imports(Path(sys.prefix)) == ["numpy", "safetensors"]


def test_what_comes_after_an_install_is_run_by_the_new_environments_own_python(plan, tmp_path, monkeypatch):
    (tmp_path / "first.py").write_text("import sys\nprint('first in', sys.prefix)")
    (tmp_path / "second.py").write_text("print('second')")
    (tmp_path / "none.txt").write_text("")
    here = '[environment.made]\nrequirements = ["none.txt"]\nafter_install = ["first.py", "second.py"]\n'
    path = plan(base=PLAN.replace("[environment.here]", f"{here}[environment.here]"))
    path.write_text(path.read_text().replace('environment = "here"', 'environment = "made"'))
    environment = load_plan(path).cells[0].environment
    folder = python_of(environment, tmp_path, lambda _: None).parent.parent
    assert json.loads((folder / "logprob-parity.json").read_text())["after_install"] == [f"first in {folder}", "second"]
    before = environment.digest
    (tmp_path / "second.py").write_text("print('another')")
    assert load_plan(path).cells[0].environment.digest != before
    failing = dataclasses.replace(environment, requirements=(), after_install={"bad.py": "raise ValueError('no such build')"})

    def copied(command, to, stop):  # to make one takes seconds
        return (
            shutil.copytree(folder, to, symlinks=True, dirs_exist_ok=True)
            if "venv" in command
            else run_command(command, to, stop)
        )

    monkeypatch.setattr(environments, "run_command", copied)
    with pytest.raises(EngineError, match=r"environment made was not made: after_install bad\.py: ValueError: no such build"):
        python_of(failing, tmp_path, lambda _: None)


def test_a_full_disk_is_called_that_whatever_ended(tmp_path, monkeypatch):
    assert why_it_failed("OSError: [Errno 28] No space left on device\nERROR: x").endswith("left on device")
    failed = [sys.executable, "-c", "raise SystemExit('Error: ensurepip returned non-zero exit status 1.')"]
    with pytest.raises(EngineError, match=r"^Error: ensurepip returned"):
        run_command(failed, tmp_path, threading.Event())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(DiskFullError, match=r"^No space left on device"):
        run_command(failed, tmp_path, threading.Event())


def test_what_installs_ends_with_the_run(tmp_path):
    stop, begun = threading.Event(), tmp_path / "begun"
    code = f"import os, pathlib, time; pathlib.Path({str(begun)!r}).write_text(str(os.getpid())); time.sleep(600)"

    def interrupt():
        while not (begun.exists() and begun.read_text()):
            time.sleep(0.05)
        stop.set()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(EngineError, match="the run was interrupted"):
        run_command([sys.executable, "-c", code], tmp_path, stop)
    assert not Path("/proc", begun.read_text()).exists()
    with pytest.raises(EngineError, match="environment x was not made: the run was interrupted"):
        python_of(Environment(name="x", requirements=("",)), tmp_path, lambda _: None, stop)


def test_answers_that_cannot_be_written_are_a_line(plan, tmp_path, capsys):
    (tmp_path / "out").write_text("a file stands where the folder should be")
    assert main(["matrix", str(plan()), "--out", str(tmp_path / "out")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("# ")]
    assert len(told) == 1


def test_the_worker_needs_numpy_and_safetensors_and_an_engine():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("scipy", "packaging", "pytest", "pluggy", "torch", "vllm", "transformers", "ray"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import pytest_logprob_parity.matrix.worker, pytest_logprob_parity.engines.vllm.backend
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# -- executors ---------------------------------------------------------------------------------------------------------


def test_ray_that_is_not_installed_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="Ray is not installed; pip install ray, or use --executor local"):
        RayExecutor()


def test_a_cluster_where_nobody_listens_is_said_at_once(plan, tmp_path, capsys):
    pytest.importorskip("ray")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        status = main(["matrix", str(plan()), "--out", str(tmp_path), "--executor", "ray", "--ray-address", address])
    assert status == 2
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err


def test_cells_as_tasks_of_a_local_ray_cluster_which_does_not_wait_for_what_no_node_has(plan, tmp_path, capsys):
    import ray

    cells = """
[cell.wide]
environment = "here"
cpus = 9999
settings = { engine = "transformers" }
[cell.gpus]
environment = "here"
gpus = 999
"""
    try:
        rows, _ = run(plan(RAW + cells), tmp_path, "--executor", "ray")
    finally:
        ray.shutdown()
    assert [(row["cell"], row["verdict"]) for row in rows] == [
        ("asked for", "pass"), ("raw", "fail"), ("wide", "pass"), ("gpus", "not run"),
    ]  # fmt: skip
    assert "check-raw-float32: answered" in capsys.readouterr().err
    assert rows[3]["headline"].startswith("needs 999 GPUs; no node of the cluster has more than ")


def test_an_interruption_ends_the_workers_and_starts_no_more(plan, tmp_path):
    slow, started = tmp_path / "slow", tmp_path / "started"
    slow.write_text(f'#!/bin/sh\ntest "$1" = -c && exec {sys.executable} "$@"\necho $$ >> {started}\nexec sleep 60\n')
    slow.chmod(0o755)
    cells = f'[environment.slow]\npython = "{slow}"\n' + "".join(f'[cell.slow{n}]\nenvironment = "slow"\n' for n in range(4))
    run(plan(), tmp_path)
    command = [forked_python(), "-m", "pytest_logprob_parity.cli", "matrix", str(plan(cells)), "--cores", "1"]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([*command, "--out", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        deadline = time.monotonic() + 60
        while not (started.exists() and started.read_text().endswith("\n")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
        assert process.returncode == 130
        assert "Traceback" not in told
        assert told.splitlines()[-1] == f"logprob-parity: interrupted; answers so far are kept in {tmp_path / 'out'}"
        (worker,) = started.read_text().split()
        assert not Path("/proc", worker).exists()
        assert (tmp_path / "out" / "check-asked-for-float32" / "done.json").exists()
        started.unlink()


def test_cells_run_side_by_side_as_far_as_cores_allow(plan, tmp_path, monkeypatch):
    import threading

    running, most, lock = [0], [0], threading.Lock()

    def watched(job, *_):
        with lock:
            running[0] += job.cpus
            most[0] = max(most[0], running[0])
        threading.Event().wait(0.05)
        with lock:
            running[0] -= job.cpus
        return ""

    monkeypatch.setattr("pytest_logprob_parity.matrix.executors.run_job", watched)
    jobs = [type("Job", (), {"name": str(n), "cpus": 1 + n % 2})() for n in range(8)]
    ended = list(LocalExecutor(cores=2).run(jobs, tmp_path, tmp_path, lambda _: None))
    assert len(ended) == 8
    assert most[0] == 2
