"""Where tests lie and where pytest is called: outside of the root, under -c, from a folder below. No engine needed."""

import shlex

import pytest
from reporting import PROJECT, command

from pytest_logprob_parity.golden import golden_path
from pytest_logprob_parity.report.results_file import read_results


@pytest.fixture
def make_tests(pytester, monkeypatch):
    """`make_tests("x/tests/test_o.py", shift=0.1)`: one test of a made up rollout."""
    for name in ("SHIFT", "NOISE", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)

    def make(path, shift=0.0):
        file = pytester.path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        source = PROJECT.format(texts=("x",)).partition("def test_moves")[0]
        file.write_text(f"{source}def test_o(golden_trace): golden_trace.check(rollouts(SHIFT or {shift}))\n")
        return file

    return make


@pytest.fixture
def configured_elsewhere(pytester, make_tests):
    """A repo whose root is `configs`, beside its tests."""
    pytester.mkdir("configs").joinpath("ci.ini").write_text("[pytest]")
    make_tests("tests/test_o.py")
    return "-c", "configs/ci.ini"


def test_a_run_that_does_not_use_the_plugin_is_left_alone(pytester, run_inner, configured_elsewhere):
    pytester.path.joinpath("tests", "test_z.py").write_text("def test_z(): pass")
    pytester.path.joinpath("configs", "golden").mkdir()
    run_inner(*configured_elsewhere, "tests/test_z.py").assert_outcomes(passed=1)


@pytest.mark.parametrize("argument", ["tests/test_o.py", "tests", "tests/../tests/test_o.py::test_o"])
def test_a_golden_does_not_depend_on_the_argument(pytester, run_inner, configured_elsewhere, argument):
    run_inner(*configured_elsewhere, "tests", "--update-golden").assert_outcomes(passed=1)
    (golden,) = pytester.path.glob("configs/golden/**/*.safetensors")
    run_inner(*configured_elsewhere, argument).assert_outcomes(passed=1)
    golden.unlink()
    result = run_inner(*configured_elsewhere, argument)
    result.stdout.fnmatch_lines(["E *no golden at golden/tests/test_o/*; record it: pytest *tests/test_o.py::test_o *"])


def test_what_lies_outside_the_root_is_annotated_where_it_is(pytester, run_inner, configured_elsewhere, monkeypatch):
    pytester.mkdir(".git")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    result = run_inner(*configured_elsewhere, "tests", "--parity-report=report")
    result.stdout.fnmatch_lines(["::error file=tests/test_o.py,line=*"])


def test_files_of_one_name_beside_the_root_have_goldens_of_their_own(pytester, run_inner, make_tests, monkeypatch):
    main = pytester.mkdir("main")
    (main / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\ntestpaths = ../x/tests ../y/tests")
    make_tests("x/tests/test_o.py")
    moved = make_tests("y/tests/test_o.py", shift=0.2)
    monkeypatch.chdir(main)
    run_inner("--update-golden").assert_outcomes(passed=2)
    assert len(list(main.glob("golden/*/tests/test_o/*.safetensors"))) == 2
    run_inner().assert_outcomes(passed=2)
    make_tests(moved.relative_to(pytester.path), shift=0.4)
    run_inner().assert_outcomes(passed=1, failed=1)


def test_two_tests_of_one_node_id_are_told_apart_by_an_error(pytester, run_inner, make_tests):
    for name in ("test_a", "test_b"):
        make_tests(f"{name}.py")
    pytester.makeconftest(
        """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item):
    item.__class__ = type("Other", (type(item),), {"nodeid": "test_one.py::test_o"})
"""
    )
    result = run_inner("--update-golden")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["E*UsageError: *test_a.py and *test_b.py both have a test test_one.py::test_o, which *"])


@pytest.mark.parametrize("node_id", ["", "::test", ".::test", "/::test", "\udcff/test_it.py::test"])
def test_any_node_id_has_a_place_below_the_folder(tmp_path, node_id):
    assert golden_path(tmp_path, node_id).is_relative_to(tmp_path)


# -- commands ---------------------------------------------------------------------------------------------------------


def test_commands_are_from_where_pytest_was_called(pytester, run_inner, make_tests, capsys, monkeypatch):
    pytester.path.joinpath("ci.ini").write_text("[pytest]")
    make_tests("tests/test_o.py")
    monkeypatch.chdir(pytester.path / "tests")
    run_inner("-c", "../ci.ini", "--update-golden").assert_outcomes(passed=1)
    monkeypatch.setenv("SHIFT", "-0.3")
    run_inner("-c", "../ci.ini", "--parity-report=../report").assert_outcomes(failed=1)
    (check,) = read_results(pytester.path / "report" / "results.json")["checks"]
    told = {c["what"]: shlex.split(c["command"]) for c in check["commands"]}
    assert told["record again"] == ["pytest", "test_o.py::test_o", "--update-golden", "-c", "../ci.ini"]
    assert told["diagnose"] == ["pytest", "test_o.py::test_o", "--parity-diagnose", "-c", "../ci.ini"]
    assert command(capsys, *told["look closer"][1:])[0] == 1
    assert command(capsys, *told["accept"][1:], "--yes")[1].endswith("1 accepted; commit the goldens\n")
    run_inner(*told["diagnose"][1:]).assert_outcomes(passed=1)


def test_commands_called_from_the_root_are_short(pytester, run_inner, make_tests, monkeypatch):
    make_tests("tests/test_o.py")
    run_inner("--update-golden").assert_outcomes(passed=1)
    monkeypatch.setenv("SHIFT", "-0.3")
    run_inner("--parity-report=report").assert_outcomes(failed=1)
    (check,) = read_results(pytester.path / "report" / "results.json")["checks"]
    accept, again, *_ = (c["command"] for c in check["commands"])
    assert accept == f"logprob-parity accept {check['obtained']}"
    assert again == "pytest tests/test_o.py::test_o --update-golden"
