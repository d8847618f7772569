"""The repo's own tests: pytester, and one pool of real engines that inner pytest runs share with the outer one."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from pytest_logprob_parity.plugin import POOL, pool_of

ROOT = Path(__file__).resolve().parent
MODEL = str(ROOT / "models" / "tiny-arith")

pytest_plugins = ["pytester"]
sys.path.insert(0, str(ROOT / "models"))


class SharedPool:
    """Hands the outer run's engines to a pytest run in this process: a start costs seconds."""

    def __init__(self, pool):
        self._pool = pool

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config):
        config.stash[POOL] = self._pool


@pytest.fixture(scope="session")
def pool(request):
    """The engines of this whole run."""
    import transformers  # noqa: F401 - before pytester puts sys.modules back to what it was
    import vllm  # noqa: F401

    return pool_of(request.config)


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
