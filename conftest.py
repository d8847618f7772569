"""The repo's own tests: pytester, and one pool of real engines that inner pytest runs share with the outer one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from _pytest.pytester import SysModulesSnapshot

from pytest_logprob_parity.plugin.stash import POOL, pool_of

ROOT = Path(__file__).resolve().parent
MODEL = str(ROOT / "models" / "tiny-arith")

pytest_plugins = ["pytester"]
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


def pytest_runtest_setup(item):
    """Tests marked `gpu` run where there is one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here")


@pytest.fixture(scope="session")
def pool(request):
    """The engines of this whole run; tests go back and forth between a few of them, each of 2 GB."""
    engines = pool_of(request.config)
    engines.processes = 3
    return engines


@pytest.fixture
def run_inner(pytester, pool):
    """Run pytest in this process on the files that pytester made, with the shared engines."""

    def run(*arguments):
        pool.notify, notify = None, pool.notify
        try:
            return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments, plugins=[SharedPool(pool)])
        finally:
            pool.notify = notify

    return run


@pytest.fixture(scope="session")
def engine(pool):
    """The engine most tests share: tiny-arith in bfloat16, profile rl."""
    from pytest_logprob_parity import EngineSpec

    return pool.engine(EngineSpec(MODEL, dtype="bfloat16"))


@pytest.fixture(scope="session")
def questions():
    """Fresh word problems as message lists: `questions(8)`."""
    import arith

    def make(count, seed=7):
        rng = random.Random(seed)
        return [[{"role": "user", "content": arith.make_problem(rng).question}] for _ in range(count)]

    return make


@pytest.fixture
def project(pytester, run_inner, monkeypatch):
    """A repo with two goldens of its own rollouts; `project("--parity-report=r")` runs its tests, one of which fails."""
    from reporting import PROJECT

    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(test_it=PROJECT.format(texts=("4", " 2", "=", "\n")))
    run_inner("--update-golden").assert_outcomes(passed=2)
    monkeypatch.setenv("SHIFT", "-0.3")
    monkeypatch.setenv("NOISE", "0.05")
    return run_inner
