"""The report: one results.json, and the page, the Markdown and the annotations that are rendered from it. No engine needed."""

import html
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from reporting import MOVED, PROJECT, command, one_line

from conftest import MODEL, ROOT, forked_workers
from pytest_logprob_parity import Trace, UsageError
from pytest_logprob_parity.check.two_files import compare_files
from pytest_logprob_parity.report.merge import from_the_top
from pytest_logprob_parity.report.outcomes import excess
from pytest_logprob_parity.report.results_file import LARGEST, read_results
from pytest_logprob_parity.report.results_schema import PLOTS
from pytest_logprob_parity.report.titles import cause_of
from pytest_logprob_parity.report.worst_sequences import texts_of
from pytest_logprob_parity.visible_text import visible, visible_token

FILES = {"index.html", "results.json", "summary.md", ".gitignore"}
HOSTILE = (
    "<script>window.pwned = 1</script>", '"><img src=x onerror="window.pwned = 1">', "\u202egnp.exe", "\ud800", "\x00\x1b[31m",
    "</script><script>window.pwned = 1</script>", "{{ 7 * 7 }}", "<!--", "a\u2028b", "&lt;", "\u0301", "\nnew\tline", "\u200b",
    "%0A::error::x",
)  # fmt: skip


@pytest.fixture
def failing_as_expected(project, run_inner, pytester, monkeypatch):
    """A repo with a negative control, a known failure, and a check that fails although it should not."""
    project()
    source = pytester.path / "test_it.py"
    text = source.read_text()
    tests = (
        text[: text.index("def test_moves")]
        + """
import pytest
from pytest_logprob_parity import ParityError

def test_control(golden_trace):
    with pytest.raises(ParityError):
        golden_trace.check(rollouts(SHIFT))

@pytest.mark.xfail(reason="known")
def test_known(golden_trace):
    golden_trace.check(rollouts(SHIFT))

def test_moves(golden_trace):
    golden_trace.check(rollouts(SHIFT))
"""
    )
    source.write_text(tests.replace("pytest.raises(ParityError)", "__import__('contextlib').nullcontext()"))
    monkeypatch.setenv("SHIFT", "0")
    run_inner("--update-golden")
    source.write_text(tests)
    monkeypatch.setenv("SHIFT", "-0.3")
    return run_inner


@pytest.fixture
def report(project, pytester, once):
    """The folder of the report of a run in which one of two checks failed."""
    once("report", pytester.path, lambda: project("--parity-report=report").assert_outcomes(passed=1, failed=1))
    return pytester.path / "report"


@pytest.fixture
def rewrite(pytester):
    """Put other tests into the project's file."""

    def put(tests):
        source = pytester.path / "test_it.py"
        source.write_text(source.read_text().partition("def test_moves")[0] + tests)

    return put


def numbers_in(value):
    """Every number in a JSON value."""
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers_in(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) else []


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_page_its_numbers_and_a_summary(project, pytester):
    result = project("--parity-report=report")
    result.stdout.fnmatch_lines(["logprob-parity: 2 checked, 1 failed", "logprob-parity: report in report/index.html"])
    assert {file.name for file in (pytester.path / "report").iterdir()} == FILES
    content = read_results(pytester.path / "report" / "results.json")
    failed, passed = content["checks"]  # worst first
    assert (failed["node_id"], failed["outcome"], failed["verdict"]) == ("test_it.py::test_moves", "failed", "fail")
    assert (failed["file"], failed["line"]) == ("test_it.py", 25)
    assert failed["headline"].startswith("Logprobs are not close: ")
    assert failed["message"].startswith("fail: Logprobs are not close: ")
    assert [c["what"] for c in failed["commands"]] == ["accept", "record again", "diagnose", "look closer"]
    assert (passed["node_id"], passed["outcome"], passed["message"]) == ("test_it.py::test_stays", "passed", "")
    assert (passed["plots"], passed["sequences"]) == (None, [])  # every bit is the same: there is nothing to plot


def test_without_the_option_nothing_is_written(project, pytester):
    project().assert_outcomes(passed=1, failed=1)
    assert {path.name for path in pytester.path.iterdir()} >= {"golden", "parity-obtained"}
    assert not list(pytester.path.rglob("results.json"))


def test_its_numbers_are_those_of_diff(report, pytester, capsys):
    (golden,) = pytester.path.glob(MOVED)
    obtained = pytester.path / "parity-obtained" / golden.relative_to(pytester.path / "golden")
    status, out, _ = command(capsys, "diff", golden, obtained, "--json")
    told, check = json.loads(out), read_results(report / "results.json")["checks"][0]
    assert status == 1
    for name in ("verdict", "headline", "metrics", "policy_metrics", "gates", "findings", "difference", "notes", "shows",
                 "shown", "objective"):  # fmt: skip
        assert check[name] == told[name], name
    assert told["metrics"]["rms_diff"] > 0.2
    status, out, _ = command(capsys, "report", golden, obtained, "--out", pytester.path / "two")  # and of a report of two files
    again = read_results(pytester.path / "two" / "results.json")["checks"][0]
    assert (status, again["metrics"], again["gates"], again["plots"]) == (1, check["metrics"], check["gates"], check["plots"])


def test_the_page_and_the_summary_show_the_numbers_of_results_json(report):
    check = read_results(report / "results.json")["checks"][0]
    page = html.unescape((report / "index.html").read_text())
    for gate in check["gates"]:
        shown = _shown(gate["value"], gate["low"], gate["bound"], gate["limit"])
        numbers = "".join(f'<td class="num">{x}</td>' for x in shown)
        tone = {"fail": "over", "unverified": "unsure", "pass": ""}[gate["outcome"]]
        assert f'<tr class="{tone}"><td>{gate["name"]}</td>{numbers}<td>{gate["unit"]}</td>' in page, gate
    assert {gate["key"] for gate in check["gates"] if gate["outcome"] == "fail"} >= {"mean_diff", "k3", "clip_share"}
    for name, value in check["metrics"].items():
        assert f'<td>{name}</td><td class="num">{value:.4g}</td>' in page, name
    row = next(line for line in (report / "summary.md").read_text().splitlines() if "test&#95;moves" in line)
    shown = [f"{check['metrics'][name]:.3g}" for name in ("mean_diff", "rms_diff", "max_abs_diff")]
    assert " | ".join(["360", *shown]) in row


def _shown(value, low, high, limit):
    return f"{value:.4g}", "" if low is None else f"{low:.4g}", "" if high is None else f"{high:.4g}", f"{limit:.4g}"


def test_plots_and_tokens_are_the_traces_numbers(report, pytester):
    (golden,) = pytester.path.glob(MOVED)
    obtained = pytester.path / "parity-obtained" / golden.relative_to(pytester.path / "golden")
    comparison = compare_files(golden, obtained).comparison
    e, a = comparison.expected, comparison.actual
    d = a.logprobs.astype(np.float64) - e.logprobs
    check = read_results(report / "results.json")["checks"][0]
    plots = check["plots"]
    assert set(plots) == set(PLOTS)
    assert sum(count for _, _, count in plots["scatter"]["cells"]) == sum(plots["histogram"]["counts"]) == 360
    edges, counts = np.array(plots["histogram"]["edges"]), plots["histogram"]["counts"]
    np.testing.assert_array_equal(np.histogram(np.clip(d, edges[0], edges[-1]), edges)[0], counts)
    by_position = np.abs(d).reshape(12, 30)
    np.testing.assert_allclose(plots["by_position"]["max"], by_position.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(plots["by_position"]["median"], np.median(by_position, axis=0), rtol=1e-5)
    ratio = plots["ratio"]
    inside = np.abs(np.array(ratio["edges"]) - 1) < ratio["clip"]
    assert ratio["outside"] == check["metrics"]["share_outside_clip"] == np.mean(np.abs(np.exp(d) - 1) > 0.2)
    assert inside.any()
    assert len(check["sequences"]) == 3
    worst = check["sequences"][0]
    rms = np.sqrt(np.mean(d.reshape(12, 30) ** 2, axis=1))
    assert worst["sequence"] == int(np.argmax(rms))
    rows = slice(*e.bounds(worst["sequence"]))
    np.testing.assert_allclose(worst["golden"], e.logprobs[rows], rtol=1e-5)
    np.testing.assert_allclose(worst["now"], a.logprobs[rows], rtol=1e-5)
    np.testing.assert_allclose(worst["diff"], d[rows], rtol=1e-3)
    assert worst["ids"] == e.token_ids[rows].tolist()
    assert worst["golden_ranks"] == e.ranks[rows].tolist()


@pytest.mark.parametrize("arguments", [forked_workers(2), (*forked_workers(2), "--dist=loadfile"), ("-p", "no:cacheprovider")])
def test_workers_and_one_process_leave_the_same_report(report, pytester, arguments, run_forked):
    run_forked("--parity-report=workers", *arguments).assert_outcomes(passed=1, failed=1)
    alone, workers = (read_results(folder / "results.json") for folder in (report, pytester.path / "workers"))
    assert workers["checks"] == alone["checks"]
    assert {file.name for file in (pytester.path / "workers").iterdir()} == FILES


def test_a_check_without_numbers_is_in_it(project, pytester):
    (golden,) = pytester.path.glob(MOVED)
    golden.unlink()
    pytester.makepyfile(test_usage="def test_usage(golden_trace): golden_trace.check(3)")
    project("--parity-report=report").assert_outcomes(passed=1, failed=2)
    checks = {c["node_id"]: c for c in read_results(pytester.path / "report" / "results.json")["checks"]}
    missing, misused = checks["test_it.py::test_moves"], checks["test_usage.py::test_usage"]
    assert (missing["outcome"], missing["verdict"], missing["metrics"], missing["plots"]) == ("golden", None, {}, None)
    assert missing["headline"].startswith("no golden at golden/test_it/test_moves-")
    assert [c["command"] for c in missing["commands"]] == ["pytest test_it.py::test_moves --update-golden"]
    assert misused["outcome"] == "usage"
    assert "no golden at golden/test_it/" in (pytester.path / "report" / "index.html").read_text()


def test_what_goes_wrong_before_a_check_is_in_it_and_a_tests_own_errors_are_not(pytester, run_inner, capsys, monkeypatch):
    pytester.makepyfile(
        test_it="""
import pytest

@pytest.mark.logprob_parity(max_modl_len=1)
def test_marker(golden_trace): ...

def test_model(parity_engine): ...

@pytest.mark.xfail(reason="it shows what the report says of one")
def test_known(parity_engine): ...

def test_call(parity_engines): parity_engines()

def test_name(golden_trace): golden_trace.check(3, name="\\ud800")

class TestTheirs:
    @pytest.fixture
    def parity_engine(self): raise ValueError("no weights")
    def test_engine(self, parity_engine): ...

@pytest.fixture
def own(): raise ValueError
def test_fixture(own): ...
def test_own(): raise AssertionError
"""
    )
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    result = run_inner("--parity-report=report")
    assert result.parseoutcomes() == {"failed": 3, "errors": 4, "xfailed": 1}
    assert "logprob-parity: 1 checked, 4 misused, 1 engine error, 1 failed as expected" in result.outlines
    assert len([line for line in result.outlines if line.startswith("::error file=test_it.py")]) == 5
    told = {c["node_id"].rpartition("::")[2]: c for c in read_results(pytester.path / "report" / "results.json")["checks"]}
    assert {name: c["outcome"] for name, c in told.items()} == {
        "test_engine": "engine", **dict.fromkeys(("test_marker", "test_model", "test_call", "test_name"), "usage"),
        "test_known": "expected",
    }  # fmt: skip
    assert told["test_engine"]["headline"] == "ValueError: no weights"
    assert "did you mean 'max_model_len'?" in told["test_marker"]["message"]
    assert told["test_name"]["headline"] == "check(name='\\ud800'): must be a string, without lone surrogates"
    assert command(capsys, "report", pytester.path / "report")[0] == 1


RERUN = """
import pytest
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    \"\"\"Run a test up to three times, as pytest-rerunfailures does.\"\"\"
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for attempt in range(3):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        again = attempt < 2 and any(report.failed for report in reports)
        for report in reports:
            if again and report.failed:
                report.outcome = "rerun"
            item.ihook.pytest_runtest_logreport(report=report)
            if report.outcome == "rerun":
                break
        if not again:
            break
        item._initrequest()
    return True
"""


@pytest.mark.parametrize(("passing", "outcomes"), [(2, ["passed", "passed"]), (9, ["failed", "passed"])])
def test_of_a_test_that_is_run_again_the_last_attempt_counts(project, rewrite, pytester, passing, outcomes):
    rewrite(f"""
ATTEMPTS = []
def test_moves(golden_trace):
    ATTEMPTS.append(0)
    golden_trace.check(rollouts() if len(ATTEMPTS) == {passing} else rollouts(SHIFT))

def test_stays(golden_trace): golden_trace.check(rollouts(seed=1))
""")
    pytester.makeconftest(RERUN)
    result = project("--parity-report=report")
    assert f"logprob-parity: 2 checked{', 1 failed' * outcomes.count('failed')}" in result.outlines
    assert read_results(pytester.path / "report" / "results.json")["checks"][0]["node_id"] == "test_it.py::test_moves"
    assert [check["outcome"] for check in read_results(pytester.path / "report" / "results.json")["checks"]] == outcomes


@pytest.mark.parametrize(
    ("end", "workers"),
    [("os._exit(3)", (*forked_workers(1), "--max-worker-restart=0")), ("__import__('pytest').exit('enough')", ())],
    ids=["a worker that dies", "a run that is broken off"],
)
def test_checks_of_a_run_that_is_cut_off_are_in_it(project, rewrite, pytester, end, workers):
    rewrite(f"""
def test_stays(golden_trace): golden_trace.check(rollouts(seed=1))

def test_moves(golden_trace):
    try: golden_trace.check(rollouts(SHIFT))
    finally: {end}
""")
    result = project("--parity-report=report", *workers)
    result.stdout.fnmatch_lines(["logprob-parity: 2 checked, 1 failed", "logprob-parity: report in *"])
    checks = {c["node_id"]: c["outcome"] for c in read_results(pytester.path / "report" / "results.json")["checks"]}
    assert checks == {"test_it.py::test_moves": "failed", "test_it.py::test_stays": "passed"}
    assert not (pytester.path / "report" / ".parts").exists()


def test_a_run_that_checks_nothing_leaves_the_report_as_it_is(report, run_inner):
    before = {file.name: file.read_bytes() for file in report.iterdir()}
    for arguments in ("--collect-only", "--fixtures", "--help", "--markers", "test_typo.py", "-k nothing"):
        run_inner("--parity-report=report", *arguments.split())
        assert {file.name: file.read_bytes() for file in report.iterdir()} == before, arguments


def test_a_first_run_that_checks_nothing_says_so(pytester, run_inner):
    pytester.makepyfile(test_it="def test_it(): ...")
    run_inner("--parity-report=report").stdout.fnmatch_lines(["logprob-parity: report in report/index.html"])
    assert "no checks" in (pytester.path / "report" / "summary.md").read_text()
    result = run_inner("--parity-report=report")
    result.stdout.fnmatch_lines(["logprob-parity: no check ran; the report in report/index.html is an earlier run's"])


def test_every_number_is_finite_or_null(project, pytester, monkeypatch):
    monkeypatch.setenv("SHIFT", "nan")
    project("--parity-report=report").assert_outcomes(passed=1, failed=1)
    text = (pytester.path / "report" / "results.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in results.json"))
    assert np.isfinite(numbers_in(content)).all()
    check = content["checks"][0]
    assert "360 of 360 logprobs are NaN" in check["headline"]
    assert check["metrics"]["rms_diff"] is None
    assert set(check["sequences"][0]["states"].values()) == {"no number"}


def test_nothing_of_the_environment_is_in_it(project, pytester, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret_of_the_environment")
    project("--parity-report=report")
    for file in (pytester.path / "report").iterdir():
        assert "a_secret_of_the_environment" not in file.read_text(), file
        assert str(pytester.path) not in file.read_text(), file


# -- who writes it, and when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("-p", "no:terminal"), ("-p", "no:terminal", *forked_workers(1)), ("-p", "no:terminal", "-p", "no:capture"),
        ("-q", "-q"), ("--maxfail=1",), ("-p", "no:cacheprovider", "--junitxml=junit.xml"),
    ],
    ids=["no terminal", "no terminal, a worker", "no terminal, no capture", "quiet", "the first failure", "no cache, junitxml"],
)  # fmt: skip
def test_it_is_written_whoever_watches(project, pytester, arguments):
    result = project("--parity-report=report", *arguments)
    checks = read_results(pytester.path / "report" / "results.json")["checks"]
    ran = ["failed"] if "--maxfail=1" in arguments else ["failed", "passed"]
    assert [check["outcome"] for check in checks] == ran
    assert {file.name for file in (pytester.path / "report").iterdir()} == FILES
    assert ("logprob-parity: report in report/index.html" in result.outlines) is ("no:terminal" not in arguments)


def test_without_a_terminal_trouble_is_told_and_github_has_its_annotations(project, pytester, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = project("--parity-report=report", "-p", "no:terminal")
    assert [line[:31] for line in result.outlines] == ["::error file=test_it.py,line=25"]
    monkeypatch.setattr(
        "pytest_logprob_parity.report.run_report.write_report", lambda *_: (_ for _ in ()).throw(UsageError("full"))
    )
    result = project("--parity-report=report", "-p", "no:terminal")
    assert [line for line in result.errlines if line.strip()] == ["logprob-parity: no report: full"]


@pytest.mark.parametrize(
    ("hook", "last"),
    [
        ("def pytest_runtest_teardown(item): raise KeyboardInterrupt", "*KeyboardInterrupt*"),
        ("def pytest_runtest_logfinish(nodeid): raise ValueError('a plugin of theirs')", "logprob-parity: report in *"),
    ],
    ids=["Ctrl-C", "an internal error"],
)
def test_it_is_written_of_a_run_that_ends_early(project, pytester, hook, last, run_forked):
    pytester.makeconftest(hook)
    run_forked("--parity-report=report").stdout.fnmatch_lines([last])
    assert [c["outcome"] for c in read_results(pytester.path / "report" / "results.json")["checks"]] == ["failed"]


def test_a_module_that_cannot_be_collected_costs_no_report(project, pytester):
    pytester.makepyfile(test_broken="raise ValueError")
    project("--parity-report=report", "--continue-on-collection-errors")
    assert len(read_results(pytester.path / "report" / "results.json")["checks"]) == 2


def test_a_run_that_never_begins_leaves_nothing_behind(project, pytester, report):
    before = {file.name: file.read_bytes() for file in report.iterdir()}
    pytester.makeconftest("import pytest\ndef pytest_sessionstart(): pytest.exit('not today')")
    project("--parity-report=report")
    assert {file.name: file.read_bytes() for file in report.iterdir()} == before


# -- several runs -----------------------------------------------------------------------------------------------------

#: Tests of a run that says that it is under way, and goes on when it may.
SLOW = """
import time
from pathlib import Path
from test_it import rollouts

def test_slow(golden_trace):
    Path("under-way").touch()
    while not Path("go-on").exists(): time.sleep(0.05)
    golden_trace.check(rollouts())
"""


@pytest.fixture
def slow_run(project, pytester):
    """A run into report/ that is under way; `slow_run.stdin` does nothing, a file `go-on` ends it."""
    pytester.makepyfile(slow=SLOW)
    (pytester.path / "go-on").touch()
    project("--update-golden", "slow.py")
    (pytester.path / "go-on").unlink()
    (pytester.path / "under-way").unlink()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--parity-report=report", "slow.py"]
    process = subprocess.Popen(command, cwd=pytester.path, stdout=subprocess.PIPE, text=True)
    while not (pytester.path / "under-way").exists():
        assert process.poll() is None
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_runs_one_after_the_other_replace_each_others_report(project, pytester):
    """The negative control: they are not merged."""
    for name in ("moves", "stays"):
        project("--parity-report=report", "-k", name)
    assert names_in(pytester.path / "report") == {"test_it.py::test_stays"}


def test_runs_at_the_same_time_share_a_report(project, pytester, slow_run):
    """Whoever ends first and last, nobody's checks are lost; a third that comes between is in it, too."""
    project("--parity-report=report", "-k", "stays").stdout.fnmatch_lines(["logprob-parity: report in report/index.html"])
    assert names_in(pytester.path / "report") == {"test_it.py::test_stays"}
    assert [path for path in (pytester.path / "report").rglob("results.json") if path.parent.name != "report"]
    assert command_status("report", pytester.path / "report") == 0  # what runs left to each other is nobody else's
    result = project("--parity-report=report", "-k", "moves", *forked_workers(1))
    assert "logprob-parity: report in report/index.html, with the checks of 1 other run at the same time" in result.outlines
    (pytester.path / "go-on").touch()
    out, _ = slow_run.communicate(timeout=60)
    assert "logprob-parity: report in report/index.html, with the checks of 2 other runs at the same time" in out
    assert names_in(pytester.path / "report") == {"test_it.py::test_moves", "test_it.py::test_stays", "slow.py::test_slow"}
    assert {file.name for file in (pytester.path / "report").iterdir()} == FILES  # the last one sweeps
    project("--parity-report=report", "-k", "stays")
    assert names_in(pytester.path / "report") == {"test_it.py::test_stays"}


def test_a_run_that_was_killed_is_swept(project, pytester, slow_run):
    slow_run.kill()
    slow_run.wait()
    assert (pytester.path / "report" / ".parts").exists()
    project("--parity-report=report", "-k", "stays")
    assert names_in(pytester.path / "report") == {"test_it.py::test_stays"}
    assert {file.name for file in (pytester.path / "report").iterdir()} == FILES


def test_a_run_that_is_killed_beside_another_one_is_told(project, pytester, rewrite, slow_run):
    (part,) = (pytester.path / "report" / ".parts").iterdir()
    rewrite(f"""
def test_moves(golden_trace):
    import json, os, signal
    from pathlib import Path
    (Path({str(part)!r}) / "a.json").write_text(json.dumps({{"node_id": "x"}}))  # a check that it had ended
    os.kill({slow_run.pid}, signal.SIGKILL)
    golden_trace.check(rollouts(SHIFT))
""")
    result = project("--parity-report=report", "-k", "moves")
    assert any("1 run into the same folder ended without a report" in line for line in result.outlines)
    assert names_in(pytester.path / "report") == {"test_it.py::test_moves"}


def names_in(folder):
    """The node ids in a report."""
    return {check["node_id"] for check in read_results(folder / "results.json")["checks"]}


def command_status(*arguments):
    from pytest_logprob_parity.cli import main

    return main([str(argument) for argument in arguments])


def test_the_folder_ignores_itself_in_git_and_nobody_elses_does(project, pytester, report, capsys):
    def ignored(*paths):
        told = subprocess.run(["git", "check-ignore", *paths], cwd=pytester.path, capture_output=True, text=True, check=False)
        return told.stdout.split()

    subprocess.run(["git", "init", "-q"], cwd=pytester.path, check=True)
    assert (report / ".gitignore").read_text() == "*\n"
    assert ignored("report/index.html", "report/.gitignore", "test_it.py") == ["report/index.html", "report/.gitignore"]
    command(capsys, "report", report, "--out", pytester.path / "again")
    assert ignored("again/results.json") == ["again/results.json"]
    project("--parity-report=.")  # the negative control: a folder that holds anything else
    assert not (pytester.path / ".gitignore").exists()
    (pytester.path / "own").mkdir()
    (pytester.path / "own" / ".gitignore").write_text("summary.md\n")
    project("--parity-report=own")
    assert (pytester.path / "own" / ".gitignore").read_text() == "summary.md\n"


# -- from results to results ------------------------------------------------------------------------------------------


def test_rendering_again_gives_the_same_report(report, capsys):
    before = {file.name: file.read_bytes() for file in report.iterdir()}
    status, out, _ = command(capsys, "report", report)
    assert (status, out) == (1, f"{report}/index.html: 1 failed, 1 passed\n")
    assert {file.name: file.read_bytes() for file in report.iterdir()} == before


def test_shards_are_merged_and_nothing_is_lost(project, pytester, capsys):
    project("--parity-report=shards/a", "-k", "moves")
    project("--parity-report=shards/b", "-k", "stays")
    status, out, _ = command(capsys, "report", pytester.path / "shards", "--out", pytester.path / "all")
    assert (status, out) == (1, f"{pytester.path}/all/index.html: 1 failed, 1 passed\n")
    project("--parity-report=whole")
    merged, whole = (read_results(pytester.path / name / "results.json") for name in ("all", "whole"))
    assert merged["checks"] == whole["checks"]
    assert command(capsys, "report", pytester.path / "shards" / "b", "--out", pytester.path / "b")[0] == 0  # all passed there


def test_candidates_are_never_shown_as_the_cause():
    def finding(layer, cause, *candidates):
        return {"layer": layer, "cause": cause, "candidates": candidates}

    several = [finding("path", None, "engine_build"), finding("weights", None, "weights_differ")]
    assert cause_of({"findings": several}) == "one of engine_build, weights_differ"
    assert cause_of({"findings": [*several, finding("semantic", "temperature")]}) == "semantic: temperature"
    assert cause_of({"findings": []}) == ""


def test_bars_tell_a_little_beyond_a_limit_from_far_beyond_it():
    from pytest_logprob_parity.report.page import _gate

    def bar(value, limit=1.0):
        gate = _gate({"value": value, "limit": limit, "errors": None, "outcome": "fail"})
        return float(gate["width"]), gate["share_text"]

    assert [bar(value) for value in (0, 0.5, 1)] == [(0, "0%"), (25, "50%"), (50, "100%")]  # the limit is at the half
    assert [bar(value)[1] for value in (1.03, 4, 400)] == ["1.03 ×", "4 ×", "400 ×"]
    near, far, further, beyond = (bar(value)[0] for value in (1.03, 4, 40, 400))
    assert 50 < near < 51 < 60 < far < further < beyond == 100
    assert bar(1, 0) == (100, "limit 0")
    assert bar(None) == bar(0, 0) == (0, "0%")


def test_worst_first():
    def check(*gates, findings=()):
        of = [dict(zip(("value", "limit", "errors"), (*gate, None)[:3], strict=True)) for gate in gates]
        return {"gates": of, "findings": findings}

    assert excess(check((1, 2), (3, 1))) == 3
    assert excess(check((0, 0))) == 0
    assert excess(check((9, 1, {"actual": 2, "limit": 4}))) == 0.5  # by how far it is from the reference, where that is known
    assert excess(check((0, 1, {"actual": None, "limit": 4}))) == np.inf
    assert excess(check((1, 0))) == excess(check((None, 1))) == excess(check(findings=["raw_vs_processed"])) == np.inf


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 漢 🙂", "plain ü 漢 🙂"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("\ud800", "⟨U+D800⟩"),
        ("\x00\x1b[31m\x7f", "␀␛[31m␡"),
        ("a\u2028\u200b\u2066\ufeff\x85", "a⟨U+2028⟩⟨U+200B⟩⟨U+2066⟩⟨U+FEFF⟩⟨U+0085⟩"),
        ("two\nlines\t", "two\nlines\t"),
    ],
)
def test_what_would_be_obeyed_is_shown(text, shown):
    assert visible(text) == shown
    visible(text).encode()  # what could not be written as UTF-8 is gone


def test_the_text_of_a_token_stays_on_its_line_and_on_its_own_letter():
    assert visible_token("\n\tx") == "⏎⇥x"
    assert visible_token("\u0301") == "◌\u0301"
    assert len(visible_token("x" * 10_000)) == 401


def test_hostile_texts_are_escaped_everywhere(pytester, run_inner, monkeypatch):
    pytester.makepyfile(test_it=PROJECT.format(texts=HOSTILE) + "\ndef test_name(golden_trace):\n"
                        "    golden_trace.check(rollouts(SHIFT), name='</script><b onclick=x>|`\\n::error::x')")  # fmt: skip
    run_inner("--update-golden").assert_outcomes(passed=3)
    monkeypatch.setenv("SHIFT", "-0.3")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary"))
    result = run_inner("--parity-report=report")
    content = read_results(pytester.path / "report" / "results.json")
    texts = set(content["checks"][0]["token_texts"].values())
    assert texts == set(HOSTILE)  # results.json keeps them as they are
    page = (pytester.path / "report" / "index.html").read_text("utf-8")
    assert page.count("<script") == page.count("</script>") == 1 + sum(bool(c["sequences"]) for c in content["checks"])
    assert "<img" not in page
    assert "<b onclick" not in page
    assert not set(page) & set("\u202e\u2028\u200b\x00\x1b")
    assert "&lt;script&gt;window.pwned = 1&lt;/script&gt;" in page
    assert "⟨U+202E⟩gnp.exe" in page
    assert "{{ 7 * 7 }}" in page
    summary = (pytester.path / "summary").read_text("utf-8")
    assert not re.search(r"<(script|b|img)", summary)
    table = [line for line in summary.splitlines() if line.startswith("| ❌")]
    assert len(table) == 2
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 10 for line in table)
    commands = [line for line in result.outlines if line.startswith("::")]
    assert len(commands) == 2  # none that a text smuggled in
    assert all(line.startswith("::error file=test_it.py,line=") for line in commands)


def test_texts_come_from_the_trace_else_from_the_models_tokenizer_else_they_are_ids(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sequences = [{"ids": [20, 21, 10**6], "prompt": [22], "golden_top": [[23, -1.0]], "now_top": [[]]}]
    trace = Trace.from_sequences([{"prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0]}], token_texts={20: "mine"})
    told = {str(i): tokenizer.decode([i]) for i in (21, 22, 23)}
    assert texts_of(sequences, trace, tmp_path.joinpath(MODEL)) == {"20": "mine", **told}
    assert texts_of(sequences, trace, tmp_path) == texts_of(sequences, trace, None) == {"20": "mine"}


# -- GitHub -----------------------------------------------------------------------------------------------------------


def test_on_github_the_failing_test_is_annotated_and_the_step_has_a_summary(project, pytester, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "step"))
    assert "::error" not in project("--parity-report=report").stdout.str()  # the variable alone is not GitHub
    assert not (pytester.path / "step").exists()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_REPOSITORY", "us/rollouts")
    (pytester.path / "step").write_text("what was there\n")
    result = project("--parity-report=report")
    (line,) = [line for line in result.outlines if line.startswith("::")]
    title = "test_it.py%3A%3Atest_moves%3A fail"
    assert line.startswith(f"::error file=test_it.py,line=25,title={title}::Logprobs are not close: ")
    assert "%0Aaccept: logprob-parity accept parity-obtained/test_it/test_moves-" in line
    step = (pytester.path / "step").read_text()
    assert step.startswith("what was there\n### Logprob parity: 1 fail, 1 pass\n")
    assert step.endswith((pytester.path / "report" / "summary.md").read_text())
    assert read_results(pytester.path / "report" / "results.json")["project"] == "us/rollouts"


def test_a_step_summary_that_cannot_be_written_costs_nothing_else(project, pytester, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "none" / "step"))
    told = f"logprob-parity: no step summary: {pytester.path}/none/step cannot be written: No such file or directory"
    result = project("--parity-report=report")
    assert told in result.outlines
    assert "logprob-parity: report in report/index.html" in result.outlines
    assert any(line.startswith("::error file=test_it.py,line=25,") for line in result.outlines)
    status, out, _ = command(capsys, "report", pytester.path / "report", "--github")
    assert (status, out.splitlines()[1]) == (1, told)
    assert out.startswith("::error file=test_it.py,line=25,")


def test_what_a_test_expects_is_told_and_fails_nobodys_run(failing_as_expected, pytester, capsys, monkeypatch):
    """A negative control, a known failure: neither is annotated, both are in the report."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "step"))
    for workers in ((), forked_workers(2)):
        result = failing_as_expected("--parity-report=report", *workers)
        assert result.parseoutcomes() == {"passed": 1, "xfailed": 1, "failed": 1}
        assert "logprob-parity: 3 checked, 1 failed, 2 failed as expected, 1 unused golden" in result.outlines
        assert [line[:35] for line in result.outlines if line.startswith("::")] == ["::error file=test_it.py,line=37,tit"]
        checks = read_results(pytester.path / "report" / "results.json")["checks"]
        assert [check["outcome"] for check in checks] == ["failed", "expected", "expected"]
        assert (pytester.path / "report" / "summary.md").read_text().startswith(
            "### Logprob parity: 1 fail, 2 expected to fail\n"
        )  # fmt: skip


def test_a_repo_below_the_repositorys_root_is_annotated_where_it_is(pytester, run_inner, monkeypatch):
    (pytester.path / ".git").mkdir()
    below = pytester.mkdir("trainer")
    (below / "pytest.ini").write_text("[pytest]")
    (below / "test_it.py").write_text("def test_it(golden_trace): golden_trace.check(3)")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    result = run_inner("--rootdir", below, "--parity-report=report", below)
    result.stdout.fnmatch_lines(["::error file=trainer/test_it.py,line=1,title=*"])


def test_packages_of_one_repository_are_merged_from_its_top(pytester, run_inner, capsys, monkeypatch):
    """The same file name in two of them is no conflict, and each check is annotated below its own root."""
    pytester.mkdir(".git")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    for package, shift in (("a", "-0.3"), ("b", "-0.4")):
        root = pytester.path / "packages" / package
        root.mkdir(parents=True)
        (root / "pytest.ini").write_text("[pytest]")
        (root / "test_it.py").write_text(PROJECT.format(texts=(package,)))
        monkeypatch.chdir(root)
        monkeypatch.setenv("SHIFT", str(float(shift) / 10**6))  # no two revisions of one golden
        run_inner("--update-golden").assert_outcomes(passed=2)
        monkeypatch.setenv("SHIFT", shift)
        monkeypatch.setenv("GITHUB_REPOSITORY", "us/rollouts")
        monkeypatch.setenv("GITHUB_ACTIONS", "true")
        run_inner("--parity-report=report").assert_outcomes(passed=1, failed=1)
    monkeypatch.chdir(pytester.path)
    status, out, _ = command(capsys, "report", "packages/a/report", "packages/b/report", "--out", "all", "--github")
    annotated = re.findall("^::error file=(.*?),.*%0Aaccept: (.*?) parity-obtained", out, re.MULTILINE)
    assert status == 1
    assert sorted(annotated) == [
        (f"packages/{package}/test_it.py", f"(cd packages/{package} && logprob-parity accept") for package in "ab"
    ]
    checks = read_results(pytester.path / "all" / "results.json")["checks"]
    assert sorted(check["node_id"] for check in checks if check["outcome"] == "failed") == [
        "packages/a/test_it.py::test_moves", "packages/b/test_it.py::test_moves",
    ]  # fmt: skip
    assert all((pytester.path / check["golden"]["path"]).is_file() for check in checks)
    summary = (pytester.path / "all" / "summary.md").read_text()
    assert all(f"(cd packages/{package} && logprob-parity accept)\n" in summary for package in "ab")
    assert command(capsys, "report", "all", "packages/a/report", "--out", "again")[0] == 1  # once more, and nothing is twice
    assert read_results(pytester.path / "again" / "results.json")["checks"] == checks


def test_the_command_renders_for_github_what_shards_have_found(report, pytester, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "step"))
    status, out, _ = command(capsys, "report", report, "--github")
    assert status == 1
    assert out.startswith("::error file=test_it.py,line=25,title=")
    assert (pytester.path / "step").read_text() == (report / "summary.md").read_text()
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert "GITHUB_STEP_SUMMARY is not set" in command(capsys, "report", report, "--github")[1]


def test_the_workflow_to_copy_is_one_and_asks_for_what_there_is(report, capsys):
    """It is YAML, each command in it is one of ours, and what it uploads is what a run leaves."""
    import shlex

    import yaml

    text = (ROOT / "examples" / "ci" / "logprob-parity.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert set(jobs) == {"cpu", "gpu", "report"}
    steps = [step for job in jobs.values() for step in job["steps"]]
    ours = [step["run"] for step in steps if "logprob-parity report" in step.get("run", "")]
    (line,) = ours
    _, *arguments = shlex.split(line)
    arguments[arguments.index("shards")] = report
    assert command(capsys, *arguments[:2], "--out", report)[0] == 1  # it is understood, and renders
    assert sum("--parity-report=parity-report" in step.get("run", "") for step in steps) == 2
    uploads = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    assert sum("parity-obtained/**/*.safetensors" in path and "parity-report/" in path for path in uploads) == 2
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    wanted = {name for group in re.findall(r"pytest-logprob-parity\[([\w,]+)\]", text) for name in group.split(",")}
    assert wanted == {"cpu", "vllm", "report"} <= set(extras)


# -- bad input --------------------------------------------------------------------------------------------------------


def edit(report, change):
    """Change results.json's content in place."""
    content = json.loads((report / "results.json").read_text())
    change(content)
    (report / "results.json").write_text(json.dumps(content))


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_results_cut_short(report, capsys, length):
    file = report / "results.json"
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file}: cut short, or no results.json (" in one_line(capsys, "report", report)


BAD = {
    "schema 1, this version of pytest-logprob-parity reads 2: render it with": lambda c: c.update(schema=1),
    "no results.json of pytest-logprob-parity": lambda c: c.pop("format"),
    "results.json: checks is missing, expected a list; write it again: pytest --parity-report=DIR": lambda c: c.pop("checks"),
    'checks[0].metrics is "none", expected a mapping; write it again': lambda c: c["checks"][0].update(metrics="none"),
    "checks[1].line is true, expected a whole number from 0 to 2**53": lambda c: c["checks"][1].update(line=True),
    'checks[0].gates[2].value is "0", expected a number or null': lambda c: c["checks"][0]["gates"][2].update(value="0"),
    "checks[0].gates[2].outcome is missing, expected a string": lambda c: c["checks"][0]["gates"][2].pop("outcome"),
    'checks[0].outcome is "fine", expected one of failed, engine, golden, ': lambda c: c["checks"][0].update(outcome="fine"),
    "1e+308 in place of a number": lambda c: c["checks"][0]["gates"][0].update(value=1e308),
    "1000000000000000000000000000000000000000 in place of a number": lambda c: c["checks"][0].update(line=10**400),
    "checks[0].sequences[0] has columns of lengths": lambda c: c["checks"][0]["sequences"][0]["golden"].pop(),
    "NaN in place of a number": lambda c: c["checks"][0]["metrics"].update(rms_diff=float("nan")),
    "checks[0].plots.histogram.edges do not rise, expected 2 or more edges that do; write it again": lambda c: plot_of(
        c, "histogram"
    ).update(edges=[]),
    "checks[0].plots.ratio has columns of different lengths: {'counts': 60}, expected one length, 61 for 62 edges": lambda c: (
        plot_of(c, "ratio")["counts"].pop()
    ),
    "plots.scatter.edges has 16,384 items, expected at most 257": lambda c: plot_of(c, "scatter").update(
        edges=list(range(16384))
    ),
    "plots.by_position.positions has 2,000 items, expected 1 to 1024": lambda c: plot_of(c, "by_position").update(
        positions=list(range(2000))
    ),
    "has 2 items, expected 3": lambda c: plot_of(c, "scatter")["cells"].append([1, 1]),
    "cells[0][2] is -5, expected a whole number from 0 to 2**53": lambda c: plot_of(c, "scatter").update(cells=[[0, 0, -5]]),
    "sequences[0].ids has 9,999 items, expected at most 4096": lambda c: c["checks"][0]["sequences"][0].update(ids=[1] * 9999),
    'free_run.turns is "9", expected a whole number from 0 to 2**53': lambda c: c["checks"][0].update(
        free_run={"turns": "9", "first": []}
    ),
    "commands[0].for_all is a list of 0 items, expected a string": lambda c: c["checks"][0]["commands"][0].update(for_all=[]),
    "the tokens have texts of": lambda c: c["checks"][0]["token_texts"].update(dict.fromkeys(map(str, range(50)), "x" * 10**6)),
    "more than 32 lists and mappings inside one another": lambda c: c["checks"][0]["findings"][0]["values"].update(v=nest(50)),
}


def plot_of(content, name):
    return content["checks"][0]["plots"][name]


def nest(levels):
    """A list in a list in a list ..."""
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("told", BAD)
def test_results_that_are_none_of_ours(report, capsys, told):
    edit(report, BAD[told])
    assert told in one_line(capsys, "report", report)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '{"format":"logprob-parity results","format":"logprob-parity results"}',
            "the key 'format' stands twice in one mapping",
        ),
        ("[" * 900 + "]" * 900, "more than 32 lists and mappings inside one another"),
        ("[" * 10**6, "more than 32 lists and mappings inside one another"),
        ('{"schema":Infinity}', "Infinity in place of a number"),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
    ],
    ids=["double", "deep", "deeper", "infinite", "bytes"],
)
def test_texts_that_are_no_json_of_ours(tmp_path, capsys, text, told):
    (tmp_path / "results.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert told in one_line(capsys, "report", tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a device", "too large"])
def test_files_that_are_no_files_or_too_large_are_refused_without_reading_them(tmp_path, capsys, kind):
    place = tmp_path / "results.json"
    if kind == "pipe":
        os.mkfifo(place)  # a reader that opens it waits for ever
    elif kind == "too large":
        with place.open("wb") as file:
            file.truncate(LARGEST + 1)
    elif kind == "link to a device":
        place.symlink_to("/dev/zero")
    told = one_line(capsys, "report", "/dev/zero" if kind == "device" else place, "--out", tmp_path / "out")
    assert ("larger than 64 MiB" if kind == "too large" else "not a regular file (a folder, a pipe or a device)") in told
    if kind in ("pipe", "link to a device"):  # nor is it written over
        assert "exists, and no report wrote it" in one_line(capsys, "report", *_two_traces(tmp_path), "--out", tmp_path)


def _two_traces(folder):
    from made_up import make_trace

    paths = [folder / "a.safetensors", folder / "b.safetensors"]
    for path in paths:
        make_trace(2, 2).save(path)
    return paths


#: What somebody may put in place of any value.
WRONG = (None, True, -1, 10**99, "\ud800\x00\n", [], [[]], {}, [1] * 3000)


def test_whatever_stands_in_results_they_are_rendered_or_refused_in_one_line(report, tmp_path):
    """Each value of a check in turn is replaced by each kind of wrong one: there is a page, or one line; never a traceback."""
    from pytest_logprob_parity.report.charts import charts_of
    from pytest_logprob_parity.report.github import workflow_commands
    from pytest_logprob_parity.report.markdown import render_markdown
    from pytest_logprob_parity.report.page import _environment, render_page

    svg = _environment().get_template("charts.svg.jinja").module.svg
    content = json.loads((report / "results.json").read_text())
    check = content["checks"][0]
    check |= {"free_run": {"turns": 2, "diverged": 1, "stops_changed": 0, "first": ["a"]}}
    check["sequences"] = [{name: v[:2] if isinstance(v, list) else v for name, v in check["sequences"][0].items()}]
    columns = {name: ["2026-01-01T00:00:00Z", "x"] for name in ("created", "engine", "digest")}
    bands = {"k3": {"runs": 8, "median": 0.1, "low": 0.0, "high": 0.2}}
    check["history"] = {**columns, "values": {"k3": [0.1, 0.3]}, "bands": bands, "outside": ["k3"]}
    plots, bare = check["plots"], {**check, "plots": None}
    file, refused, rendered = tmp_path / "results.json", [], []

    def attempt(changed, render):
        file.write_text(json.dumps({**content, "checks": [changed]}))
        try:
            rendered.append(render(read_results(file)))
        except UsageError as error:
            refused.append(str(error))

    def everything(read):
        return render_page(read), render_markdown(read), list(workflow_commands(read)), from_the_top({**read, "prefix": "a/"})

    for place in places_in(bare):
        for wrong in WRONG:
            attempt(replaced(bare, place, wrong), everything)
    for place in places_in(plots):
        for wrong in (None, -1, 0, 10**99, 1e-300, [], [1] * 3000):
            attempt(
                {**bare, "plots": replaced(plots, place, wrong)},
                lambda read, name=place[0]: [
                    svg(chart) for chart in charts_of({**ONE_PLOT, name: read["checks"][0]["plots"][name]}, "x")
                ],
            )
    assert len(refused) > len(rendered) > 100  # the negative control: both happen
    assert not any("\n" in told for told in refused)


ONE_PLOT = {**dict.fromkeys(PLOTS), "subtracted": True}


def places_in(value, place=()):
    """The place of each value in a JSON value: of a list its first item, of a column none (they are checked as one)."""
    if place:
        yield place
    if isinstance(value, dict):
        for key, item in (
            list(value.items())[:3] if place and place[-1] in ("metrics", "policy_metrics", "token_texts") else value.items()
        ):
            yield from places_in(item, (*place, key))
    elif isinstance(value, list) and value:
        yield from places_in(value[0], (*place, 0))


def replaced(value, place, new):
    """A copy of a JSON value with another one at a place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


def test_a_report_that_would_be_too_large_to_read_keeps_the_numbers_and_leaves_plots_of_the_best_out(report, monkeypatch):
    from pytest_logprob_parity.report import results_file as results
    from pytest_logprob_parity.report.finite_json import to_text

    content = read_results(report / "results.json")
    assert results.fitting(content) == (content, 0)
    failed, passed = content["checks"]
    most = len(to_text(content)) + len(to_text({**failed, "plots": None}))
    monkeypatch.setattr(results, "LARGEST", most)
    fitted, bare = results.fitting({**content, "checks": [failed, passed, failed]})
    assert len(to_text(fitted)) <= most
    assert (bare, [check["plots"] is None for check in fitted["checks"]]) == (1, [False, True, True])
    assert fitted["checks"][2]["metrics"] == failed["metrics"]
    monkeypatch.setattr(results, "LARGEST", 1000)
    with pytest.raises(UsageError, match="of 2 checks would be larger than"):
        results.fitting(content)


def test_a_number_that_is_too_large_for_any_is_none(report, capsys):
    file = report / "results.json"
    file.write_text(re.sub(r'"line":\d+', '"line":1e999', file.read_text(), count=1))
    assert f"{file}: cut short, or no results.json (1e999 in place of a number)" in one_line(capsys, "report", report)


def test_artifacts_of_another_repo_or_revision_are_not_merged(project, pytester, capsys, monkeypatch):
    report = pytester.path / "report"
    project("--parity-report=report")
    project("--parity-report=other")
    edit(pytester.path / "other", lambda c: c.update(project="theirs"))
    told = one_line(capsys, "report", report, pytester.path / "other", "--out", pytester.path / "out")
    assert "is of project 'theirs'" in told
    assert "report each of them alone" in told
    project("--update-golden")
    monkeypatch.setenv("SHIFT", "0.5")
    project("--parity-report=revision")
    told = one_line(capsys, "report", report, pytester.path / "revision", "--out", pytester.path / "out")
    assert re.search(
        r"golden/test_it/test_moves-.* differs between .* and .*: they are of two revisions; report each of them alone", told
    )
    assert not (pytester.path / "out").exists()


def test_places_without_results(tmp_path, capsys):
    assert f"{tmp_path}/none: there is no such file" in one_line(capsys, "report", tmp_path / "none")
    assert f"{tmp_path}: no results.json in it" in one_line(capsys, "report", tmp_path)
    assert "takes two of them: GOLDEN OBTAINED" in one_line(capsys, "report", tmp_path / "a.safetensors")


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(project, pytester, report, capsys):
    (pytester.path / "file").write_text("somebody's")
    for folder in ("file", "file/below", "file" * 100):
        result = project(f"--parity-report={folder}")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        (line,) = [line for line in result.errlines if line.strip()]
        assert re.fullmatch(r"ERROR: the report's folder .*file.* cannot be written: .*; name another one", line)
        assert "cannot be written: " in one_line(capsys, "report", report, "--out", pytester.path / folder)
    assert (pytester.path / "file").read_text() == "somebody's"


def test_files_that_no_report_wrote_are_left_alone(project, pytester):
    site = pytester.path / "public"
    site.mkdir()
    (site / "index.html").write_text("my homepage")
    result = project("--parity-report=public")
    result.stderr.fnmatch_lines(["*public/index.html exists, and no report wrote it: name another folder"])
    assert [file.name for file in site.iterdir()] == ["index.html"]
    assert (site / "index.html").read_text() == "my homepage"
    project("--parity-report=").stderr.fnmatch_lines(["*--parity-report: name a folder"])


def test_a_disk_that_fills_during_the_run_costs_the_report_and_no_verdict(project, pytester, report, monkeypatch):
    from pytest_logprob_parity import atomic

    before = {file.name: file.read_bytes() for file in report.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "replace_all", full)
    result = project("--parity-report=report", "-k", "stays")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["logprob-parity: no report: the report's folder * cannot be written: No space left on device*"]
    )
    assert {file.name: file.read_bytes() for file in report.iterdir() if file.is_file()} == before


def test_libraries_that_are_missing_are_named_before_anything_runs(project, report, capsys, monkeypatch):
    monkeypatch.setattr("pytest_logprob_parity.report.folder.find_spec", lambda name: None)
    told = "a report needs Jinja2: pip install 'pytest-logprob-parity[report]'"
    result = project("--parity-report=report")
    assert [line for line in result.errlines if line.strip()] == [f"ERROR: {told}"]
    assert told in one_line(capsys, "report", report)


def test_entries_stay_small_whatever_the_size_of_a_trace(tmp_path):
    from pytest_logprob_parity.check.context import Checked
    from pytest_logprob_parity.comparison.compare import compare
    from pytest_logprob_parity.golden import Golden
    from pytest_logprob_parity.report.check_entry import make_entry
    from pytest_logprob_parity.report.finite_json import to_text

    scope = {}
    exec(PROJECT.format(texts=("x",)), scope)
    sizes = []
    for sequences, length in ((200, 64), (20, 5000)):
        golden = scope["rollouts"](sequences=sequences, length=length)
        checked = Checked(
            golden=Golden(trace=golden),
            comparison=compare(expected=golden, actual=golden.with_(logprobs=golden.logprobs - 0.3)),
        )
        about = dict.fromkeys(("node_id", "name", "file", "message", "obtained", "refusal"), "")
        about |= {"golden": "g", "line": 0, "commands": []}
        sizes.append(len(to_text(make_entry(about, "failed", "", checked.comparison, checked, tmp_path))))
    assert max(sizes) < 90_000
