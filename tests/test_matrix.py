"""`logprob-parity matrix`: cells of engine version and settings, each in an environment of its own. Here the engine is
transformers, which starts in seconds; tests/test_migration.py has what real versions of vLLM recorded."""

import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT
from pytest_logprob_parity import EngineError, UsageError
from pytest_logprob_parity.cli import main
from pytest_logprob_parity.matrix import environments
from pytest_logprob_parity.matrix.environments import Environment, python_of
from pytest_logprob_parity.matrix.executors import LocalExecutor, RayExecutor
from pytest_logprob_parity.matrix.plan import load_plan

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
python = "{sys.executable}"

[cell."asked for"]
environment = "here"
settings = {{ engine = "transformers" }}
"""
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


def run(path, tmp_path, *options):
    """The rows of a run, and its exit status."""
    status = main(["matrix", str(path), "--out", str(tmp_path / "out"), *options])
    return json.loads((tmp_path / "out" / "matrix.json").read_text()), status


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
    killed.write_text("#!/bin/sh\necho about to die\nkill -9 $$\n")
    killed.chmod(0o755)
    cells = f"""
[environment.missing]
python = "no-such-python"
[environment.killed]
python = "{killed}"
[environment.nowhere]
packages = ["logprob-parity-no-such-thing==9.9.9"]
[cell.missing]
environment = "missing"
[cell.killed]
environment = "killed"
[cell.nowhere]
environment = "nowhere"
[cell.slow]
environment = "here"
minutes = 0.001
[cell.wrong]
environment = "here"
settings = {{ engine = "transformers", logprob_mode = "raw_logprobs" }}
"""
    rows, status = run(plan(cells), tmp_path, "--environments", str(tmp_path / "environments"))
    told = {row["cell"]: row["headline"] for row in rows if row["verdict"] == "not run"}
    assert status == 1
    assert told["missing"] == "environment missing: there is no interpreter no-such-python"
    assert told["killed"] == "its worker was killed (SIGKILL): about to die"
    assert told["nowhere"].startswith("environment nowhere was not made: ")
    assert "logprob-parity-no-such-thing" in told["nowhere"]
    assert told["slow"] == "took longer than 0.001 minutes and was ended"
    assert "did you mean 'logprobs_mode'?" in told["wrong"]
    assert rows[0]["verdict"] == "pass"
    assert "- slow (float32) did not run: took longer" in capsys.readouterr().out
    assert not list((tmp_path / "environments").glob("nowhere*/bin"))


def test_a_reference_that_cannot_run_ends_it(plan, tmp_path, capsys):
    status = main(["matrix", str(plan(base=PLAN.replace(sys.executable, "no-such-python"))), "--out", str(tmp_path / "out")])
    assert status == 2
    assert "the reference asked for (float32) recorded nothing: environment here: there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("[cell.", "[cel."), "unknown key 'cel', did you mean 'cell'?"),
        (('reference = "asked for"', 'reference = "asked"'), "reference 'asked' is no cell"),
        (('environment = "here"', 'environment = "her"'), "no environment 'her', did you mean 'here'?"),
        (('python = "', 'pyton = "'), "unknown key 'pyton', did you mean 'python'?"),
        (("temperature = 0.7", "temprature = 0.7"), "Sampling has no field 'temprature', did you mean 'temperature'?"),
        (("[environment.here]", "[environment.here"), "no TOML"),
        (("dtypes", "# dtypes"), ""),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_plan_that_does_not_fit_says_where(plan, change, told):
    path = plan()
    path.write_text(path.read_text().replace(*change))
    if not told:
        assert load_plan(path).dtypes == ("bfloat16",)
        return
    with pytest.raises(UsageError, match=told.replace("?", r"\?")):
        load_plan(path)


# -- environments ------------------------------------------------------------------------------------------------------


def test_an_environment_is_made_once_whole_or_not_at_all(tmp_path, monkeypatch):
    told = []
    environment = Environment("empty", requirements=("# nothing\n",))
    python = python_of(environment, tmp_path, told.append)
    assert python.exists()
    assert python_of(environment, tmp_path, told.append) == python
    assert len(told) == 1
    assert python_of(Environment("empty", requirements=("# something\n",)), tmp_path, told.append) != python
    (python.parent.parent / "logprob-parity.json").unlink()  # half-made, as far as anybody can know
    (python.parent.parent / "left over").write_text("")
    assert python_of(environment, tmp_path, told.append) == python
    assert not (python.parent.parent / "left over").exists()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(environments, "_run", full)
    with pytest.raises(EngineError, match="environment other was not made: No space left on device") as error:
        python_of(Environment("other", packages=("x",)), tmp_path, told.append)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("other*/"))


def test_the_users_own_environment_is_not_touched(tmp_path):
    python = python_of(Environment("empty", requirements=("",)), tmp_path, lambda _: None)
    assert os.path.commonpath([python, sys.prefix]) != sys.prefix


def test_the_worker_needs_numpy_and_safetensors_and_an_engine():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("scipy", "pytest", "pluggy", "torch", "vllm", "transformers", "ray"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import pytest_logprob_parity.matrix.worker, pytest_logprob_parity.engines.vllm
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


# -- executors ---------------------------------------------------------------------------------------------------------


def test_ray_that_is_not_installed_is_said_in_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="Ray is not installed; pip install ray, or use --executor local"):
        RayExecutor()


def test_cells_as_tasks_of_a_local_ray_cluster(plan, tmp_path, capsys):
    import ray

    try:
        rows, _ = run(plan(RAW), tmp_path, "--executor", "ray")
    finally:
        ray.shutdown()
    assert [(row["cell"], row["verdict"]) for row in rows] == [("asked for", "pass"), ("raw", "fail")]
    assert "check-raw-float32: answered" in capsys.readouterr().err


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
