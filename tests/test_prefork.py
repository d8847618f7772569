"""Engines in processes forked from one that has imported vLLM: the same bits, and every way for one of the processes to end."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest

from conftest import MODEL, forked_code, forked_python
from pytest_logprob_parity import EngineError, EngineSpec, Sampling
from pytest_logprob_parity.engines import prefork
from pytest_logprob_parity.engines.backend import Request
from pytest_logprob_parity.engines.process import ProcessBackend
from pytest_logprob_parity.reasons import RemoteError


@pytest.fixture
def fork():
    """`fork()`: the far end of a forked process that no engine was started in yet."""
    children = []

    def make():
        ours, theirs = Pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the backend closes it
        children.append(ProcessBackend(prefork.fork(theirs.fileno(), log.fileno()), ours, log, "the engine"))
        theirs.close()
        return children[-1]

    yield make
    for backend in children:
        backend.close()


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """A vLLM that cannot be imported, and a preloaded process of these tests' own: it is there at once, and forks nothing."""
    (tmp_path / "vllm.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(prefork, "_preloaded", [])
    yield
    prefork._forget()


def parent_of(backend):
    """The parent of a process that has begun."""
    backend._process._read(None, until=prefork._BEGUN)
    return int(Path(f"/proc/{backend._process.pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_forked_engine_gives_the_bits_of_a_new_process(pool):
    spec = EngineSpec(MODEL, dtype="bfloat16")
    requests = [
        Request(prompt_token_ids=[10, 11, 12], sampling=Sampling(max_tokens=8, seed=3)),
        Request(prompt_token_ids=[5], sampling=Sampling(max_tokens=8, seed=4)),
    ]
    answers, configs = [], []
    for forked in (True, False):
        backend = ProcessBackend.start(spec, *pool.folders(spec), forked=forked)
        assert isinstance(backend._process, prefork.Forked) is forked
        answers.append(backend.run(requests))
        configs.append(backend.config)
        backend.close()
    for one, other in zip(*answers, strict=True):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert np.array_equal(one.logprobs, other.logprobs)
    assert configs[0] == configs[1]


def test_children_come_from_one_process_and_one_that_is_killed_says_so(fork):
    one, other = fork(), fork()
    assert parent_of(one) == parent_of(other) == prefork._preloaded[-1].process.pid
    other._process.kill()
    with pytest.raises(EngineError, match=r"the engine's process died \(exit status -9\)"):
        other.run([])
    one.close()
    assert one._process.returncode == 0


def test_a_stopped_one_is_closed_in_order(fork):
    backend = fork()
    parent_of(backend)
    os.kill(backend._process.pid, signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        backend._process.wait(0.01)
    backend.close()
    assert backend._process.returncode == 0


@pytest.mark.usefixtures("broken")
def test_another_environment_needs_another_import(fork, monkeypatch, tmp_path):
    before = parent_of(fork())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parent_of(fork()) == before
    monkeypatch.setenv("VLLM_SOMETHING", "1")
    assert parent_of(fork()) != before


@pytest.mark.usefixtures("broken")
def test_children_outlive_the_process_that_they_came_from(fork):
    backend = fork()
    preloaded = prefork._preloaded[-1].process
    assert parent_of(backend) == preloaded.pid
    preloaded.kill()
    preloaded.wait()
    with pytest.raises(RemoteError):  # it answers: it has no engine
        backend.run([])
    assert parent_of(fork()) != preloaded.pid


@pytest.mark.usefixtures("broken")
def test_where_vllm_cannot_be_imported_the_engines_own_process_says_why(pool):
    spec = EngineSpec(MODEL, dtype="bfloat16")
    with pytest.raises(EngineError, match=r"vLLM cannot be imported \(built for another torch\)"):
        ProcessBackend.start(spec, *pool.folders(spec), forked=True)


# -- the tests' own: tests/forked_python.py -------------------------------------------------------------------------------


def test_a_forked_python_runs_in_its_folder_and_environment_and_ends_as_a_new_one_does(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import os\ndef test_it():\n    print(os.getcwd(), os.environ['HERE'])\n    assert 0")
    monkeypatch.setenv("HERE", "over here")
    told = [
        subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True)
        for python in (forked_python(), sys.executable)
    ]
    assert f"{tmp_path} over here" in told[0].stdout
    assert told[0].returncode == told[1].returncode == 1
    assert [without_times(run.stdout) for run in told[:1]] == [without_times(run.stdout) for run in told[1:]]
    code = "import sys; sys.exit(int(sys.argv[1]) + ('torch' in sys.modules))"
    ends = [subprocess.run(command).returncode for command in ([forked_python(), "-c", code, "7"], forked_code(code, "7"))]
    assert ends == [7, 8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_forked_python_ends_with_whoever_started_it(tmp_path, number):
    (tmp_path / "test_it.py").write_text(
        "import os, pathlib, time\ndef test_it():\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(600)"
    )
    process = subprocess.Popen([forked_python(), "-m", "pytest", "-q"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(number)
    assert process.wait(60) == -number
    wait_for(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists())


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("that did not come")


def without_times(text):
    return re.sub(r"[\d.]+s\b", "", text)
