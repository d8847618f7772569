"""The pytest side: options, marker, hooks, fixtures. Light: nothing heavy is imported before a fixture is used."""

from .collection import (
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_itemcollected,
    pytest_make_parametrize_id,
)
from .configure import pytest_configure, pytest_report_header, pytest_sessionstart
from .fixtures import golden_trace, parity_engine, parity_engine_factory, parity_engines, trainer_scorer
from .hookspecs import pytest_addhooks
from .options import pytest_addoption, pytest_load_initial_conftests
from .running import (
    pytest_fixture_setup,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_runtest_teardown,
    pytest_sessionfinish,
)

__all__ = [
    "golden_trace",
    "parity_engine",
    "parity_engine_factory",
    "parity_engines",
    "pytest_addhooks",
    "pytest_addoption",
    "pytest_collection_finish",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_fixture_setup",
    "pytest_itemcollected",
    "pytest_load_initial_conftests",
    "pytest_make_parametrize_id",
    "pytest_report_header",
    "pytest_runtest_makereport",
    "pytest_runtest_setup",
    "pytest_runtest_teardown",
    "pytest_sessionfinish",
    "pytest_sessionstart",
    "trainer_scorer",
]  # pytest finds them here
