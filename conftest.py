"""The repo's own tests: pytester, and one pool of real engines that inner pytest runs share with the outer one."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import setuptools  # noqa: F401 - its distutils comes before any other, which torch would find
from _pytest.pytester import SysModulesSnapshot

from pytest_logprob_parity.engines.wait_policy import let_threads_sleep
from pytest_logprob_parity.plugin import options
from pytest_logprob_parity.plugin.stash import POOL, pool_of

ROOT = Path(__file__).resolve().parent
MODEL = str(ROOT / "models" / "tiny-arith")

pytest_plugins = ["pytester"]
# pytester gives each test a home of its own: without this vLLM would look into each model class anew, which takes 7 s.
os.environ.setdefault("VLLM_CACHE_ROOT", str(Path("~/.cache/vllm").expanduser()))
# What the start of an engine sets, and torch and vLLM read at their import: from now on all forks may come from one process.
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
# Each of pytest-xdist's workers computes with its share of the cores: two with all of them wait for each other.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
let_threads_sleep()  # before test modules import torch: two workers' threads that spin take each other's cores
sys.path.insert(0, str(ROOT / "models"))


def keep_installed_modules():
    """Let pytester forget the modules of its test projects only.

    It puts sys.modules back after each run and each test; what an engine imported meanwhile would then be imported a
    second time, and torch does not let operators be registered twice.
    """
    restore = SysModulesSnapshot.restore

    def restore_and_keep(self):
        places = ("site-packages", str(ROOT / "pytest_logprob_parity"))
        kept = {
            n: m for n, m in sys.modules.items()
            if n.startswith("torch._C.") or any(p in str(getattr(m, "__file__", None)) for p in places)
        }  # fmt: skip
        restore(self)
        for name, module in kept.items():
            sys.modules.setdefault(name, module)

    SysModulesSnapshot.restore = restore_and_keep


keep_installed_modules()


class SharedPool:
    """Hands the outer run's engines to a pytest run in this process: a start costs seconds."""

    def __init__(self, pool):
        self._pool = pool

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config):
        config.stash[POOL] = self._pool


#: What takes longest, first: two workers then end together.
SLOW_FIRST = (
    "test_docs.py", "test_server.py", "test_server_weights.py", "test_catalogue.py", "test_diagnosis.py", "test_engine.py",
    "test_weights.py", "test_plugin.py", "test_matrix.py", "test_report.py", "test_trainer.py", "test_in_hand.py",
    "test_frameworks.py", "test_adapters.py", "test_noise_floor.py", "test_rl_run.py", "test_gaps.py", "test_head.py",
    "test_migration.py", "test_selftest.py", "test_signatures.py", "test_accept.py", "test_kept_sets.py",
    "test_expert_routing.py", "test_speculation.py", "test_llama_cpp.py", "test_other_engines.py", "test_async.py",
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--nightly", action="store_true", help="run the tests that take long, and only those")


def pytest_collection_modifyitems(config, items):
    """Slow files first, each in its own order; what takes long on its own."""
    others = [item for item in items if bool(item.get_closest_marker("nightly")) != config.option.nightly]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    place = {name: i for i, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Whole files to a worker, in the order above: their engines are started once. Those of the real server go together."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return super()._split_scope(nodeid).replace("test_server_weights", "test_server")

    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_configure(config):
    """A place for the processes that tests/forked_python.py forks from; they end with this one."""
    if "FORKED_PYTHON_HOME" not in os.environ:
        folder = tempfile.mkdtemp(prefix="forked-python-")
        (Path(folder) / "owner").write_text(str(os.getpid()))
        python = Path(folder) / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{ROOT}/tests/forked_python.py" "$@"\n')
        python.chmod(0o755)
        os.environ["FORKED_PYTHON_HOME"] = folder
        config.add_cleanup(lambda: (os.environ.pop("FORKED_PYTHON_HOME"), shutil.rmtree(folder, ignore_errors=True)))


def forked_python():
    """A Python to start many processes with; see tests/forked_python.py."""
    return str(Path(os.environ["FORKED_PYTHON_HOME"]) / "python")


def forked_code(code, *arguments):
    """`python -c CODE`, but for where its process comes from."""
    return [forked_python(), "-X", "fork", "-c", code, *arguments]


def forked_workers(number):
    """As pytest-xdist's `-n number`, but for where the workers' processes come from."""
    return ("--dist=load", f"--tx={number}*popen//python={forked_python()}")


def pytest_runtest_setup(item):
    """Tests marked `gpu` run where there is one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here")


@pytest.fixture(scope="session")
def pool(request):
    """The engines of this whole run: one here, which stays, and two in processes of their own, of 2 GB each."""
    engines = pool_of(request.config)
    engines.keeps_place = True
    return engines


@pytest.fixture
def in_this_process(pool, monkeypatch):
    """For tests that change vLLM's code, or ask the worker: an engine that starts now takes the place of the one here."""
    monkeypatch.setattr(pool, "keeps_place", False)


@pytest.fixture
def repeats():
    """How often recording replays its tokens in inner runs whose ini does not say: by default five times, which takes long."""
    return "2"


@pytest.fixture
def run_inner(pytester, pool, repeats, monkeypatch):
    """Run pytest in this process on the files that pytester made, with the shared engines."""
    monkeypatch.setitem(options._INI, "parity_repeats", (options._INI["parity_repeats"][0], repeats))

    def run(*arguments):
        pool.notify, notify = None, pool.notify
        try:
            return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments, plugins=[SharedPool(pool)])
        finally:
            pool.notify = notify

    return run


@pytest.fixture
def run_forked(pytester, monkeypatch):
    """`pytester.runpytest_subprocess` in a fork of a process that has imported torch and vLLM."""

    def run(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(pytester, "_getpytestargs", lambda: (forked_python(), "-m", "pytest"), raising=False)
            return pytester.runpytest_subprocess(*arguments, **options)

    return run


@pytest.fixture(scope="session")
def engine(pool):
    """The engine most tests share: tiny-arith in bfloat16, profile rl."""
    from pytest_logprob_parity import EngineSpec

    return pool.engine(EngineSpec(MODEL, dtype="bfloat16"))


@pytest.fixture(scope="session")
def server():
    """The address of a real server of the tiny model in float32, behind a key; in development mode, so that vLLM's own routes
    tell of it, and change its weights.
    """
    from serving import SECRET, serving

    with serving("--weight-updates", "--hf-token", SECRET, "--root-path", "/behind") as url:
        yield url


@pytest.fixture(scope="session")
def questions():
    """Fresh word problems as message lists: `questions(8)`."""
    import arith

    def make(count, seed=7):
        rng = random.Random(seed)
        return [[{"role": "user", "content": arith.make_problem(rng).question}] for _ in range(count)]

    return make


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once("name", folder, make)`: the first time `make()` fills the folder, from then on it is a copy of what that left."""
    kept = tmp_path_factory.mktemp("once")

    def fill(name, folder, make):
        if not (kept / name).exists():
            make()
            shutil.copytree(folder, kept / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copytree(kept / name, folder, dirs_exist_ok=True)

    return fill


@pytest.fixture
def project(pytester, run_inner, once, monkeypatch):
    """A repo with two goldens of its own rollouts; `project("--parity-report=r")` runs its tests, one of which fails."""
    from reporting import PROJECT

    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(test_it=PROJECT.format(texts=("4", " 2", "=", "\n")))
    once("project", pytester.path, lambda: run_inner("--update-golden").assert_outcomes(passed=2))
    monkeypatch.setenv("SHIFT", "-0.3")
    monkeypatch.setenv("NOISE", "0.05")
    return run_inner
