"""The fixtures: parity_engine, parity_engines, parity_engine_factory, golden_trace, trainer_scorer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import pytest

from ..errors import UsageError
from ..spec.settings import make_spec
from .golden_checks import GoldenTrace
from .stash import ITEM, SESSION, pool_of, progress_shown

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from ..engines.pool import Pool
    from ..spec import EngineSpec
    from ..trainer.transformers_scorer import TransformersScorer

#: Their names. What a fixture of ours raises is told from any other exception.
FIXTURES: Final = ("golden_trace", "parity_engine", "parity_engine_factory", "parity_engines", "trainer_scorer")


@pytest.fixture(scope="session")
def parity_engine_factory() -> Any:
    """Override it to bring your own engine: a `vllm.LLM`, an `AsyncLLM`, a server's address, or a callable `(spec or None)`
    giving one.
    """
    return None


@pytest.fixture(scope="session")
def parity_engines(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """Lazy handles for wider fixtures and second engines: `parity_engines(spec)`, `parity_engines(model=..., dtype=...)`."""
    pool = _pool(request)

    def engines(spec: EngineSpec | None = None, **settings: Any) -> Engine:
        __tracebackhide__ = True
        session = request.config.stash[SESSION]
        if spec is None:
            made = make_spec(session.point({**session.ini_settings, **settings, **session.set_settings}))
        else:
            made = spec.replace(**session.point({"engine": spec.engine, **settings, **session.set_settings}))
        if made is None:
            raise UsageError("parity_engines(): name a model, or give an EngineSpec")
        return pool.engine(made)

    return engines


@pytest.fixture
def parity_engine(request: pytest.FixtureRequest, parity_engine_factory: Any) -> Engine:
    """The engine of this test's spec: a lazy handle, which starts when it is first asked."""
    __tracebackhide__ = True
    settings = request.node.stash.get(ITEM, None)
    session = request.config.stash[SESSION]
    spec = settings.spec if settings else make_spec(session.point({**session.ini_settings, **session.set_settings}))
    pool = _pool(request)
    if parity_engine_factory is not None and session.server:
        return pool.adopt(session.server, spec)
    if parity_engine_factory is not None:
        return pool.adopt_from(parity_engine_factory, spec)
    if spec is None:
        raise UsageError(
            'no model: mark the test with @pytest.mark.logprob_parity(model="..."), or set model=... under parity_engine'
            " in the ini file"
        )
    return pool.engine(spec)


@pytest.fixture(scope="session")
def trainer_scorer(request: pytest.FixtureRequest) -> Callable[..., TransformersScorer]:
    """Transformers scorers, each loaded once: `trainer_scorer(dtype="bfloat16")`, by default of the running test's model, or
    of the ini file's.
    """
    from ..trainer.transformers_scorer import TransformersScorer

    pool, loaded = _pool(request), {}

    def make(model: str | None = None, **settings: Any) -> TransformersScorer:
        __tracebackhide__ = True
        session = request.config.stash[SESSION]
        model = model or _marked_model(request.session) or {**session.ini_settings, **session.set_settings}.get("model")
        if model is None:
            raise UsageError("trainer_scorer(): name a model, or set model=... under parity_engine in the ini file")
        if settings.get("adapter") is not None:
            settings["adapter"] = pool.absolute(settings["adapter"])
        key = (model, *sorted(settings.items()))
        if key not in loaded:
            loaded[key] = TransformersScorer(pool.absolute(model), **settings)
        return loaded[key]

    return make


def _marked_model(session: pytest.Session) -> str | None:
    """The model of the test that runs, of which pytest tells a fixture of the session in the environment."""
    running = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    item = next((item for item in session.items if item.nodeid == running), None)
    settings = None if item is None else item.stash.get(ITEM, None)
    return None if settings is None or settings.spec is None else settings.spec.model


@pytest.fixture
def golden_trace(request: pytest.FixtureRequest) -> Iterator[GoldenTrace]:
    """The goldens of this test: `golden_trace.check(parity_engine, prompts=..., sampling=...)`."""
    with progress_shown(request.config):
        yield GoldenTrace(request)


def _pool(request: pytest.FixtureRequest) -> Pool:
    return pool_of(request.config)
