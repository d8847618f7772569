"""Nothing is green that checked nothing: every way to compare nothing, or to swallow a failure, is told and ends in red."""

import gc
import json
from xml.etree import ElementTree as ET

import pytest

from conftest import MODEL, forked_workers
from pytest_logprob_parity.golden import golden_path

HEAD = f"""
import contextlib, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
from pytest_logprob_parity import MismatchError, ParityError, Trace, assert_logprobs_close

parity = pytest.mark.logprob_parity(model={MODEL!r})
SHIFT = __SHIFT__

def moved():
    return rollouts(SHIFT)

def rollouts(shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return Trace.from_arrays(
        prompt_token_ids=np.arange(30), prompt_offsets=np.arange(31), token_ids=rng.integers(0, 50, 600),
        sequence_offsets=20 * np.arange(31), logprobs=-1 - rng.exponential(0.5, 600) + shift, dtype="bfloat16",
    )
"""
CHECKS = "def test_it(golden_trace):\n    golden_trace.check(moved())\n"

#: What a test becomes after its golden was recorded, and compares nothing.
NOTHING = {
    "an empty body": "def test_it(golden_trace):\n    pass",
    "without the fixture": "def test_it():\n    pass",
    "with the marker": "@parity\ndef test_it(parity_engine, golden_trace):\n    pass",
    "with the marker alone": "@parity\ndef test_it():\n    pass",
    "a loop over nothing": "def test_it(golden_trace):\n    for trace in []:\n        golden_trace.check(trace)",
    "an early return": "def test_it(golden_trace):\n    if SHIFT == SHIFT:\n        return\n    golden_trace.check(rollouts())",
    "under a condition": "def test_it(golden_trace):\n    if SHIFT > 100:\n        golden_trace.check(rollouts())",
    "the call without brackets": "def test_it(golden_trace):\n    golden_trace.check",
    "the path alone": "def test_it(golden_trace):\n    assert golden_trace.path().exists()",
    "a function that nobody calls": "def test_it(golden_trace):\n    lambda: golden_trace.check(rollouts())",
    "a generator that nobody drains": "def test_it(golden_trace):\n    (golden_trace.check(t) for t in [rollouts()])",
    "map that nobody drains": "def test_it(golden_trace):\n    map(golden_trace.check, [rollouts()])",
    "another handle of it": "def test_it(golden_trace):\n    check = golden_trace.check\n    assert check",
    "short circuit": "def test_it(golden_trace):\n    False and golden_trace.check(rollouts())",
    "a class": "class TestIt:\n    pass\ndef test_it(golden_trace):\n    TestIt()",
    "break before it": "def test_it(golden_trace):\n    while True:\n        break\n        golden_trace.check(rollouts())",
    "an autouse fixture in its place": (
        "@pytest.fixture(autouse=True)\ndef nothing(golden_trace):\n    yield\ndef test_it():\n    pass"
    ),
}
#: What swallows a failure of a check; SHIFT makes it fail.
SWALLOWED = {
    "try": "def test_it(golden_trace):\n    try:\n        golden_trace.check(moved())\n    except Exception:\n        pass",
    "try with our own": (
        "def test_it(golden_trace):\n    try:\n        golden_trace.check(moved())\n    except ParityError:\n        pass"
    ),
    "finally and return": (
        "def test_it(golden_trace):\n    try:\n        golden_trace.check(moved())\n    finally:\n        return"
    ),
    "suppress": (
        "def test_it(golden_trace):\n    with contextlib.suppress(MismatchError):\n        golden_trace.check(moved())"
    ),
    "raises AssertionError": (
        "def test_it(golden_trace):\n    with pytest.raises(AssertionError):\n        golden_trace.check(moved())"
    ),
    "raises Exception": ("def test_it(golden_trace):\n    with pytest.raises(Exception):\n        golden_trace.check(moved())"),
    "raises ours or another": (
        "def test_it(golden_trace):\n    with pytest.raises((MismatchError, ValueError)):\n        golden_trace.check(moved())"
    ),
    "raises another of ours within": (
        "def test_it(golden_trace):\n    with pytest.raises(ZeroDivisionError):\n        try:\n"
        "            golden_trace.check(moved())\n        except MismatchError:\n            1 / 0"
    ),
    "a thread": (
        "@pytest.mark.filterwarnings('ignore')\ndef test_it(golden_trace):\n"
        "    thread = threading.Thread(target=lambda: golden_trace.check(moved()))\n    thread.start()\n    thread.join()"
    ),
    "a bad argument": (
        "def test_it(golden_trace):\n    with contextlib.suppress(Exception):\n"
        "        golden_trace.check(rollouts(), replay='none')"
    ),
    "a fixture": (
        "@pytest.fixture\ndef checked(golden_trace):\n    with contextlib.suppress(Exception):\n"
        "        golden_trace.check(moved())\ndef test_it(checked):\n    pass"
    ),
    "an assertion on what is left": (
        "def test_it(golden_trace):\n    try:\n        golden_trace.check(moved())\n    except MismatchError as error:\n"
        "        assert error.comparison.verdict == 'fail'"
    ),
    "a golden that is gone": (
        "def test_it(golden_trace):\n    with contextlib.suppress(Exception):\n"
        "        golden_trace.check(rollouts(), name='none')"
    ),
    "one of two": (
        "def test_it(golden_trace):\n    golden_trace.check(rollouts())\n    with contextlib.suppress(Exception):\n"
        "        golden_trace.check(rollouts(), name='none')"
    ),
}


@pytest.fixture
def write(pytester, run_inner, once):
    """`write(body, shift)`: a repo with this test, whose golden was recorded by one that checks."""
    pytester.makepyfile(test_it=HEAD.replace("__SHIFT__", "0.0") + CHECKS)
    once("checks", pytester.path, lambda: run_inner("--update-golden").assert_outcomes(passed=1))

    def make(body, shift=-0.3):
        pytester.makepyfile(test_it=HEAD.replace("__SHIFT__", str(shift)) + body + "\n")

    return make


def records(pytester, run, *arguments):
    """The outcomes of the records that a run leaves in junitxml, and the run's result."""
    result = run(f"--junitxml={pytester.path}/junit.xml", *arguments)
    found = ET.parse(pytester.path / "junit.xml").iter("property")
    return [json.loads(e.get("value"))["outcome"] for e in found if e.get("name") == "logprob_parity"], result


@pytest.mark.parametrize("way", NOTHING)
def test_a_test_that_compares_nothing_is_an_error_where_its_golden_exists(pytester, run_inner, write, way):
    write(NOTHING[way])
    result = run_inner()
    result.assert_outcomes(passed=1, errors=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "E*UsageError: unchecked: the test passes and has compared nothing: nobody looked at golden/test_it/test_it-*",
            "logprob-parity: 1 test that compared nothing",
        ]
    )


@pytest.mark.parametrize("way", SWALLOWED)
def test_a_failure_that_the_test_swallows_is_an_error(pytester, run_inner, write, way):
    write(SWALLOWED[way])
    result = run_inner()
    result.assert_outcomes(passed=1, errors=1)
    assert result.ret == 1
    assert "swallowed by its test" in result.stdout.str()
    assert "failed as expected" not in result.stdout.str()


@pytest.mark.parametrize(
    "body",
    [
        "    with golden_trace.expect_failure() as expected:\n        golden_trace.check(moved())\n"
        "    assert expected.comparison.verdict == 'fail'",
        "    golden_trace.expect_failure()\n    with contextlib.suppress(MismatchError):\n        golden_trace.check(moved())",
        "    with pytest.raises(MismatchError):\n        golden_trace.check(moved())",
        "    with pytest.raises(ParityError) as info:\n        golden_trace.check(moved())\n    assert info",
        "    pytest.raises(MismatchError, golden_trace.check, rollouts(SHIFT))",
        "    with pytest.raises(MismatchError), ThreadPoolExecutor() as threads:\n"
        "        threads.submit(golden_trace.check, moved()).result()",
    ],
)
def test_a_failure_that_the_test_says_it_waits_for_is_expected(pytester, run_inner, write, body):
    write(f"def test_it(golden_trace):\n{body}")
    outcomes, result = records(pytester, run_inner)
    result.assert_outcomes(passed=1)
    assert outcomes == ["failed"]
    assert "logprob-parity: 1 checked, 1 failed as expected" in result.outlines
    write(f"def test_it(golden_trace):\n{body}", shift=0.0)
    assert run_inner().ret == 1  # and where the check passes, the test does not


def test_what_fails_after_the_failure_that_was_waited_for_is_swallowed(pytester, run_inner, write):
    write(
        "def test_it(golden_trace):\n    with golden_trace.expect_failure():\n        golden_trace.check(moved())\n"
        "    with contextlib.suppress(Exception):\n        golden_trace.check(rollouts(), name='none')"
    )
    result = run_inner()
    result.assert_outcomes(passed=1, errors=1)
    assert "logprob-parity: 2 checked, 1 failed and swallowed by its test, 1 failed as expected" in result.outlines


SKIPS = {
    "in the test": "def test_it(golden_trace):\n    try:\n        golden_trace.check(moved())\n"
    "    except AssertionError:\n        pytest.skip('flaky')",
    "in a fixture": "@pytest.fixture\ndef checked(golden_trace):\n    try:\n        golden_trace.check(moved())\n"
    "    except Exception as error:\n        pytest.skip(f'engine: {error}')\ndef test_it(checked):\n    pass",
}


@pytest.mark.parametrize("way", SKIPS)
def test_a_failure_that_becomes_a_skip_is_swallowed(pytester, run_inner, write, way):
    write(SKIPS[way])
    result = run_inner()
    result.assert_outcomes(skipped=1, errors=1)
    assert "logprob-parity: 1 checked, 1 failed and swallowed by its test" in result.outlines


NO_FAILURES = {
    "no golden": "golden_trace.check(rollouts(), name='none')",
    "a slip": "golden_trace.check(rollouts(), level='nois')",
    "nothing in common": "golden_trace.check(Trace.from_sequences([dict(prompt_token_ids=[99], token_ids=[3], "
    "logprobs=[-1.0])]))",
}


@pytest.mark.parametrize("wait", ["golden_trace.expect_failure()", "pytest.raises(ParityError)"])
@pytest.mark.parametrize("what", NO_FAILURES)
def test_what_compared_nothing_is_not_the_failure_that_is_waited_for(pytester, run_inner, write, wait, what):
    write(f"def test_it(golden_trace):\n    golden_trace.path()\n    with {wait}:\n        {NO_FAILURES[what]}", 0.0)
    result = run_inner()
    assert result.ret == 1
    assert "failed as expected" not in result.stdout.str()


def test_nothing_is_recorded_while_a_failure_is_waited_for(pytester, run_inner):
    body = (
        "def test_it(golden_trace):\n    golden_trace.check(rollouts())\n    with golden_trace.expect_failure() as expected:\n"
        "        golden_trace.check(moved())\n    assert expected.comparison.verdict == 'fail'\n"
    )
    pytester.makepyfile(test_it=HEAD.replace("__SHIFT__", "-0.3") + body)
    run_inner("--update-golden").assert_outcomes(passed=1)
    run_inner().assert_outcomes(passed=1)


def test_a_raises_that_is_over_waits_for_nothing(pytester, run_inner, write):
    """Whatever the garbage collector has not collected yet."""
    write(
        "import gc\ngc.disable()\ndef test_it(golden_trace):\n    with pytest.raises(MismatchError):\n"
        "        golden_trace.check(moved())\n"
        "def test_other(golden_trace):\n    with contextlib.suppress(MismatchError):\n        golden_trace.check(moved())"
    )
    golden = golden_path(pytester.path / "golden", "test_it.py::test_it")
    golden_path(pytester.path / "golden", "test_it.py::test_other").write_bytes(golden.read_bytes())
    try:
        result = run_inner()
    finally:
        gc.enable()
    result.assert_outcomes(passed=2, errors=1)
    assert "logprob-parity: 2 checked, 1 failed and swallowed by its test, 1 failed as expected" in result.outlines


def test_a_golden_that_cannot_be_read_is_its_tests_all_the_same(pytester, run_inner, write):
    write(NOTHING["an empty body"])
    (golden,) = pytester.path.glob("golden/test_it/*.safetensors")
    golden.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    run_inner().assert_outcomes(passed=1, errors=1)


def test_an_open_raises_of_another_test_waits_for_nothing(pytester, run_inner, write):
    write("OPEN = pytest.raises(ParityError)\nOPEN.__enter__()\n" + SWALLOWED["suppress"])
    assert "swallowed by its test" in run_inner().stdout.str()


def test_a_failing_subtest_tells_of_itself(pytester, run_inner, write):
    write("def test_it(golden_trace, subtests):\n    with subtests.test('one'):\n        golden_trace.check(moved())")
    if "fixture 'subtests' not found" in (result := run_inner()).stdout.str():
        pytest.skip("pytest 9 has subtests")
    assert "swallowed" not in result.stdout.str()
    assert result.ret == 1


def test_a_golden_held_against_itself_is_refused(pytester, run_inner, write):
    write("def test_it(golden_trace):\n    golden_trace.check(Trace.load(golden_trace.path()).with_(engine='other'))", 0.0)
    result = run_inner()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*UsageError: the trace was read from the golden's own file: nothing would be compared*"])
    write("def test_it(golden_trace):\n    t = Trace.load(golden_trace.path())\n"
          "    golden_trace.check(t.with_(logprobs=t.logprobs - np.float32(1e-6)))", 0.0)  # fmt: skip
    run_inner().assert_outcomes(passed=1)


def test_nothing_compared_is_red_where_what_is_unverified_only_warns(pytester, run_inner, write):
    write(f"def test_it(golden_trace):\n    {NO_FAILURES['nothing in common']}")
    pytester.makeini("[pytest]\nparity_unverified = warn")
    run_inner().assert_outcomes(failed=1)


def test_an_unchecked_test_is_in_the_report(pytester, run_inner, write):
    write(NOTHING["an empty body"])
    run_inner("--parity-report=report")
    (check,) = json.loads((pytester.path / "report" / "results.json").read_text())["checks"]
    assert (check["outcome"], check["node_id"]) == ("usage", "test_it.py::test_it")


def test_an_xfail_is_expected(pytester, run_inner, write):
    write("@pytest.mark.xfail\n" + CHECKS)
    result = run_inner()
    result.assert_outcomes(xfailed=1)
    assert "logprob-parity: 1 checked, 1 failed as expected" in result.outlines


def test_what_has_no_golden_is_warned_of(pytester, run_inner, write):
    write(CHECKS + "def test_new(golden_trace):\n    pass\n@parity\ndef test_marked(parity_engine):\n    pass\n", 0.0)
    outcomes, result = records(pytester, run_inner)
    result.assert_outcomes(passed=3)
    assert outcomes == ["passed", "unchecked", "unchecked"]
    assert "logprob-parity: 1 checked, 2 tests that compared nothing" in result.outlines
    assert "  test_it.py::test_marked: nothing was compared, and there is no golden" in result.outlines
    pytester.makeini("[pytest]\nparity_unchecked = error")
    run_inner().assert_outcomes(passed=3, errors=2)


def test_what_has_a_golden_is_warned_of_where_the_ini_file_says_so(pytester, run_inner, write):
    write(NOTHING["an empty body"])
    pytester.makeini("[pytest]\nparity_unchecked = warn")
    result = run_inner()
    result.assert_outcomes(passed=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["  test_it.py::test_it: nothing was compared, with golden/test_it/test_it-*.safetensors"])


@pytest.mark.parametrize(
    "body",
    [
        "@parity\ndef test_it(parity_engine):\n    assert_logprobs_close(actual=rollouts(), expected=rollouts())",
        "@pytest.fixture\ndef checks(golden_trace):\n    yield\n    golden_trace.check(rollouts())\n"
        "def test_it(checks):\n    pass",
        "def test_it(golden_trace):\n    pytest.skip('not here')",
        "def test_it(golden_trace):\n    assert False",
    ],
)
def test_what_compares_in_another_way_or_does_not_pass_is_left_alone(pytester, run_inner, write, body):
    write(body, 0.0)
    assert "compared nothing" not in run_inner().stdout.str()


def test_a_golden_that_no_check_of_its_test_asks_for_is_named(pytester, run_inner, write):
    write(CHECKS + "    golden_trace.check(rollouts(seed=1), name='other')", 0.0)
    run_inner("--parity-update=missing").assert_outcomes(passed=1)
    write(CHECKS, 0.0)
    for workers in ((), forked_workers(1)):
        result = run_inner(*workers)
        assert result.ret == 0
        assert "logprob-parity: 1 checked, 1 unused golden" in result.outlines
        result.stdout.fnmatch_lines(["  unused, no check of its test asked for it: golden/test_it/test_it-other-*.safetensors"])


def test_the_records_cross_workers(pytester, run_inner, write):
    write(NOTHING["an empty body"] + "\n" + SWALLOWED["try"].replace("test_it", "test_other"))
    pytester.makepyfile(test_more=HEAD.replace("__SHIFT__", "0.0") + NOTHING["an empty body"])
    result = run_inner(*forked_workers(2))
    result.assert_outcomes(passed=3, errors=2)
    assert "logprob-parity: 1 checked, 1 failed and swallowed by its test, 2 tests that compared nothing" in result.outlines


# -- updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("addopts", "given"), [("--parity-update=missing", "--update-golden"), ("--parity-update=failed", "--update-golden")]
)
def test_update_golden_records_all_whatever_addopts_says(pytester, run_inner, write, addopts, given):
    write(CHECKS, -0.3)
    pytester.makeini(f"[pytest]\naddopts = {addopts}")
    assert "logprob-parity: 1 recorded" in run_inner(given).outlines
    run_inner("--parity-update=missing").assert_outcomes(passed=1)


def test_two_orders_to_record_that_contradict_each_other_are_refused(pytester, run_inner, write):
    result = run_inner("--update-golden", "--parity-update=missing")
    assert result.ret == 4
    assert "--update-golden records all goldens and --parity-update=missing does not: give one of them" in result.stderr.str()
