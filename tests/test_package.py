"""The package's face: light to import, complete, and honest to type checkers."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_logprob_parity

HEAVY = ("torch", "vllm", "transformers", "numpy", "safetensors", "jinja2", "matplotlib")


def test_the_plugin_loads_nothing_heavy():
    code = f"import sys, pytest_logprob_parity.plugin; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_run_that_uses_no_fixture_loads_nothing_heavy(pytester):
    pytester.makepyfile(f"import sys\ndef test(): assert not [m for m in {HEAVY} if m in sys.modules]")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_every_name_of_the_face_is_there():
    for name in pytest_logprob_parity.__all__:
        assert getattr(pytest_logprob_parity, name).__name__ == name
    assert set(pytest_logprob_parity.__all__) <= set(dir(pytest_logprob_parity))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(pytest_logprob_parity.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name))
    seen = [alias.name for node in block.body for alias in node.names]
    assert sorted(seen) == pytest_logprob_parity.__all__


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Traces'"):
        pytest_logprob_parity.Traces  # noqa: B018
