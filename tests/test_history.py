"""The history of a repo's checks: a line a run, the drift of each check as a table and a plot, and a band that only warns."""

import json
import multiprocessing
import os
import re

import numpy as np
import pytest
from reporting import command, one_line

from conftest import forked_workers
from pytest_logprob_parity import UsageError
from pytest_logprob_parity.report.history import file as history_file
from pytest_logprob_parity.report.history.drift import FEWEST, band_of, series_of
from pytest_logprob_parity.report.history.file import append, read
from pytest_logprob_parity.report.history.run_record import METRICS, run_record
from pytest_logprob_parity.report.results_file import read_results

TEXTS = ("node_id", "name", "golden", "digest", "outcome", "engine", "dtype", "torch", "hardware")


def reading(rms=0.001, **changes):
    """A check of a run whose numbers are all `rms`."""
    texts = {
        **dict.fromkeys(TEXTS, ""),
        "node_id": "test_it.py::test_it",
        "digest": "d1",
        "engine": "vllm 1",
        "outcome": "passed",
    }
    judged = {"verdict": "pass", "level": "rl", "objective": "token", "metrics": dict.fromkeys(METRICS, rms)}
    return {**texts, **judged, **changes}


def run_of(*readings, day=1, version="0.1.0"):
    """A run, by its day."""
    return run_record(readings, f"2026-01-{day:02}T00:00:00Z", "project", version)


@pytest.fixture
def many():
    """Ten clean runs of one check."""
    return [run_of(reading(0.001 + 0.0001 * (day % 3)), day=day) for day in range(1, 11)]


@pytest.fixture
def kept(tmp_path, many):
    """Their file."""
    for line in many:
        append(tmp_path / "history.jsonl", line)
    return tmp_path / "history.jsonl"


@pytest.fixture
def repo(project, pytester, monkeypatch):
    """A repo with `parity_history`; `repo(shift, ...)` runs its tests."""
    pytester.makeini("[pytest]\nparity_history = kept/history.jsonl")

    def run(shift, *arguments):
        monkeypatch.setenv("SHIFT", str(shift))
        monkeypatch.setenv("NOISE", "0.0001" if shift else "0")
        return project(*arguments)

    return run


def lines_in(pytester):
    return read(pytester.path / "kept" / "history.jsonl")[0]


# -- what a run adds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [(), forked_workers(2), ("-p", "no:terminal"), ("-p", "no:cacheprovider", "--parity-report=r")]
)
def test_each_run_adds_a_line(repo, pytester, arguments):
    repo(0.001, *arguments)
    repo(-0.3, *arguments)
    clean, failed = lines_in(pytester)
    checks = {check["node_id"]: check for check in failed["checks"]}
    assert set(checks) == {"test_it.py::test_moves", "test_it.py::test_stays"}
    moved = checks["test_it.py::test_moves"]
    assert (moved["outcome"], moved["verdict"], moved["level"], moved["objective"]) == ("failed", "fail", "rl", "token")
    assert (moved["engine"], moved["dtype"], moved["name"]) == ("ours 1.0", "bfloat16", "")
    assert re.fullmatch(r"[0-9a-f]{16}", moved["digest"])
    assert moved["metrics"]["mean_diff"] == pytest.approx(-0.3, abs=1e-3)
    assert set(moved["metrics"]) == set(METRICS)
    assert {check["outcome"] for check in clean["checks"]} == {"passed"}
    assert len(json.dumps(failed)) < 1500


def test_without_the_key_nothing_is_added_and_a_run_that_checks_nothing_adds_nothing(repo, project, pytester):
    for arguments in ("--collect-only", "-k nothing", "--help", "test_typo.py"):
        repo(0, *arguments.split())
    assert not (pytester.path / "kept").exists()
    pytester.makeini("[pytest]")
    project()
    assert not (pytester.path / "kept").exists()


def test_the_numbers_are_those_of_the_report(repo, pytester, capsys):
    repo(-0.3, "--parity-report=report")
    (line,) = lines_in(pytester)
    content = read_results(pytester.path / "report" / "results.json")
    assert content["created"] == line["created"]
    by_report = {check["node_id"]: check for check in content["checks"]}
    for check in line["checks"]:
        assert check["metrics"] == {name: by_report[check["node_id"]]["metrics"][name] for name in METRICS}
    status, out, _ = command(capsys, "history", pytester.path, "--json")  # the same run twice counts once
    assert (status, [len(check["runs"]) for check in json.loads(out)["checks"]]) == (0, [1, 1])


def test_a_recording_is_in_it_without_numbers(repo, pytester):
    repo(0, "--update-golden")
    assert {check["outcome"] for check in lines_in(pytester)[0]["checks"]} == {"recorded"}
    assert {(check["verdict"], len(check["metrics"])) for check in lines_in(pytester)[0]["checks"]} == {(None, 0)}


def test_what_has_no_numbers_is_in_it_too(repo, pytester):
    pytester.makepyfile(test_new="def test_new(golden_trace): golden_trace.check(3)")
    repo(0)
    check = {check["node_id"]: check for check in lines_in(pytester)[0]["checks"]}["test_new.py::test_new"]
    assert (check["outcome"], check["verdict"], check["metrics"]) == ("usage", None, {})


@pytest.mark.parametrize("kind", ["pipe", "folder", "somebody's", "below a file"])
def test_a_file_that_cannot_be_a_history_is_told_before_anything_runs(repo, pytester, kind):
    place = pytester.mkdir("kept") / "history.jsonl"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "below a file":
        pytester.makeini("[pytest]\nparity_history = test_it.py/history.jsonl")
    else:
        place.write_text("a diary\n")
    result = repo(0)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line.strip()]
    assert "name another" in line
    assert kind != "somebody's" or place.read_text() == "a diary\n"


def test_a_history_that_cannot_be_written_costs_no_verdict(repo, pytester, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pytest_logprob_parity.report.history.add_run.append", full)
    result = repo(0)
    result.assert_outcomes(passed=2)
    assert "logprob-parity: not in the history: [Errno 28] No space left on device" in result.outlines


# -- the band ---------------------------------------------------------------------------------------------------------


def test_a_band_is_the_median_and_robust_standard_deviations():
    values = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.1, 0.9]
    band = band_of(values)
    deviation = 1.4826 * np.median(np.abs(np.array(values) - 1.0))
    assert (band.runs, band.median) == (8, 1.0)
    assert band.high - 1.0 == pytest.approx(1.0 - band.low) == pytest.approx(3 * (1 + 8 / 5) * deviation)
    assert band_of(values[: FEWEST - 1]) is None
    wild = band_of([*values[:-1], 1000.0])  # one run that went wrong does not widen it
    assert wild.high < 3
    assert band_of([0.0] * 8).high == pytest.approx(0, abs=1e-8)
    assert 0 < band_of([0.0] * 7 + [0.1]).high < 0.5  # most are equal: the mean deviation


def test_few_clean_runs_leave_it():
    """The docstring's share, on 4,000 series of normal numbers; the negative control: three plain deviations have many more."""
    rng = np.random.default_rng(0)
    runs, newest = rng.normal(size=(4000, 8)), rng.normal(size=4000)
    bands = [band_of(row.tolist()) for row in runs]
    left = np.mean([not band.low <= value <= band.high for band, value in zip(bands, newest, strict=True)])
    plain = np.mean([abs(value - b.median) > (b.high - b.median) / (1 + 8 / 5) for b, value in zip(bands, newest, strict=True)])
    assert left < 0.01 < 0.05 < plain


def test_the_newest_run_is_held_against_those_before_it(many):
    (clean,) = series_of([*many, run_of(reading(0.00115), day=20)])
    assert (clean.outside, clean.bands["rms_diff"].runs) == ((), 10)
    (drifted,) = series_of([*many, run_of(reading(0.02), day=20)])
    assert set(drifted.outside) == set(METRICS) - {"n_tokens"}
    assert drifted.warnings()[1].startswith("rms_diff 0.02 is outside its band, ")
    (after,) = series_of([*many, run_of(reading(0.02), day=20), run_of(reading(0.001), day=21)])
    assert after.outside == ()


def test_another_golden_starts_another_band(many):
    (changed,) = series_of([*many, run_of(reading(0.02, digest="d2"), day=20)])
    assert (changed.bands, changed.outside) == ({}, ())
    fewer = [run_of(reading(0.02, digest="d2"), day=day) for day in range(11, 19)]
    (again,) = series_of([*many, *fewer, run_of(reading(0.001, digest="d2"), day=20)])
    assert (again.bands["rms_diff"].runs, again.bands["rms_diff"].median) == (8, 0.02)
    assert "rms_diff" in again.outside


def test_a_run_that_leaves_its_band_is_warned_of_and_passes(repo, pytester, capsys):
    for _ in range(FEWEST):
        repo(0)
    result = repo(0.001, "--parity-report=report")
    result.assert_outcomes(passed=2)
    assert result.ret == 0
    (told,) = [line for line in result.outlines if line.startswith("  warning, not a verdict: ") and "rms_diff" in line]
    assert told.startswith("  warning, not a verdict: test_it.py::test_moves: rms_diff 0.00099")
    checks = {check["node_id"]: check for check in read_results(pytester.path / "report" / "results.json")["checks"]}
    assert "rms_diff" in checks["test_it.py::test_moves"]["history"]["outside"]
    assert checks["test_it.py::test_stays"]["history"]["outside"] == []
    page = (pytester.path / "report" / "index.html").read_text()
    assert page.count(">drifts</span>") == 1
    assert page.count(">mean_diff over 9 runs</title>") == page.count(">rms_diff over 9 runs</title>") == 1
    summary = (pytester.path / "report" / "summary.md").read_text()
    assert (
        "\nOutside their band (a warning, not a verdict): test&#95;it.py&#58;&#58;test&#95;moves &#40;mean&#95;diff, "
        in summary
    )
    before = {file.name: file.read_bytes() for file in (pytester.path / "report").iterdir()}
    assert command(capsys, "report", pytester.path / "report")[0] == 0
    assert {file.name: file.read_bytes() for file in (pytester.path / "report").iterdir()} == before
    assert command(capsys, "history", pytester.path / "kept")[0] == 0


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_table_shows_runs_versions_and_what_left_its_band(kept, capsys):
    append(kept, run_of(reading(0.02, engine="vllm 2", torch="2.9"), day=20, version="0.2.0"))
    status, out, _ = command(capsys, "history", kept, "--last", "3")
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == "test_it.py::test_it (3 of 11 runs)"
    assert lines[1].split() == ["run", "engine", "outcome", *METRICS]
    assert lines[2].split()[:3] == ["2026-01-09T00:00:00Z", "vllm", "1"]
    assert lines[4].endswith("  engine vllm 1 -> vllm 2, torch ? -> 2.9, plugin 0.1.0 -> 0.2.0")
    assert lines[4].split()[4:10] == ["0.02"] * 6
    assert lines[5].startswith("  band, low             10 runs")
    assert any(line.startswith("  warning: rms_diff 0.02 is outside its band, ") for line in lines)
    assert lines[-1] == "11 runs, 1 check, 1 outside its band: a warning, not a verdict"


def test_json_has_all_runs_and_a_schema(kept, many, capsys):
    told = json.loads(command(capsys, "history", kept, "--json", "--last", "1")[1])
    assert (told["schema"], told["skipped"]) == ("logprob-parity history 1", [])
    (check,) = told["checks"]
    assert [run["created"] for run in check["runs"]] == [line["created"] for line in many]
    assert check["bands"]["rms_diff"]["runs"] == 9
    assert check["outside"] == []


def test_places_without_runs_and_odd_numbers(tmp_path, kept, capsys):
    assert "there is no such file" in one_line(capsys, "history", tmp_path / "none.jsonl")
    (tmp_path / "empty").mkdir()
    assert "no results.json in it" in one_line(capsys, "history", tmp_path / "empty")
    assert "must be 1 or more" in one_line(capsys, "history", kept, "--last", "0")


def test_hostile_texts_are_shown_and_never_obeyed(tmp_path, capsys):
    append(tmp_path / "h.jsonl", run_of(reading(node_id="\x1b[31m\n::error::x", engine="\u202evllm")))
    out = command(capsys, "history", tmp_path / "h.jsonl")[1]
    assert not set(out) & set("\x1b\u202e")
    assert not any(line.startswith("::") for line in out.splitlines())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda h: h["values"].update({'"><script>': [1]}), "history.values has the key"),
        (lambda h: h.update(outside=["k9"]), 'history.outside[0] is "k9", expected one of mean_diff, rms_diff, '),
        (lambda h: h["created"].append("x"), "columns of different lengths"),
        (lambda h: h.update(created=["x"] * 2000), "history.created has 2,000 items, expected 1 to 1000"),
        (lambda h: h["bands"].update(k3={}), "history.bands.k3.runs is missing, expected a whole number"),
    ],
)
def test_the_history_in_a_report_is_held_to_its_shape(repo, pytester, capsys, change, told):
    repo(0, "--parity-report=report")
    results = pytester.path / "report" / "results.json"
    content = json.loads(results.read_text())
    change(content["checks"][0]["history"])
    results.write_text(json.dumps(content))
    assert told in one_line(capsys, "report", pytester.path / "report")


# -- the file ---------------------------------------------------------------------------------------------------------


def _append_many(path, who):
    for number in range(20):
        append(path, run_of(reading(name=f"{who}-{number}", golden="x" * 2000)))


def test_runs_at_the_same_time_append_whole_lines(tmp_path):
    path = tmp_path / "history.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, who)) for who in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    lines, skipped = read(path)
    assert skipped == []
    assert {line["checks"][0]["name"] for line in lines} == {f"{who}-{n}" for who in range(4) for n in range(20)}


def test_runs_at_the_same_time_lose_nothing_when_the_file_is_cut(tmp_path, monkeypatch):
    """The file is replaced under whoever waits for it: the next one appends to the new one, and the newest lines stay."""
    monkeypatch.setattr(history_file, "MOST", 20_000)
    test_path = tmp_path / "history.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(test_path, who)) for who in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert test_path.stat().st_size <= 20_000
    lines, skipped = read(test_path)
    assert skipped == []
    for who in range(3):
        numbers = [int(n.partition("-")[2]) for line in lines if (n := line["checks"][0]["name"]).startswith(f"{who}-")]
        assert numbers == list(range(20))[20 - len(numbers) :]  # of each, the newest, none missing
    assert 3 <= len(lines) <= 8


def test_a_torn_line_is_told_and_left_out_and_the_next_run_is_whole(kept, capsys):
    kept.write_bytes(kept.read_bytes()[:-40])
    status, out, _ = command(capsys, "history", kept)
    assert status == 0
    assert f"{kept}: line 10 is cut short, or no JSON: skipped" in out.splitlines()
    append(kept, run_of(reading(), day=20))
    lines, skipped = read(kept)
    assert (len(lines), len(skipped), lines[-1]["created"]) == (10, 1, "2026-01-20T00:00:00Z")


def test_a_full_disk_leaves_the_file_as_it_was(kept, monkeypatch):
    before, write = kept.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        append(kept, run_of(reading()))
    assert kept.read_bytes() == before


def test_a_run_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(history_file, "MOST", 1000)
    with pytest.raises(UsageError, match="a run of 9 checks is too large"):
        append(tmp_path / "h.jsonl", run_of(*[reading()] * 9))
    assert not (tmp_path / "h.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"schema": 2}, "line 11 has schema 2, this version of pytest-logprob-parity reads 1; upgrade it"),
        ({"format": "theirs"}, "line 11 is no run of a history"),
        ({"checks": [{}]}, "line 11: checks[0].node_id is missing, expected a string; delete the line"),
        ({"checks": 3}, "line 11: checks is 3, expected a list"),
    ],
)
def test_lines_that_are_none_of_ours(kept, capsys, line, told):
    with kept.open("a") as file:
        file.write(json.dumps({**run_of(reading()), **line}) + "\n")
    assert told in one_line(capsys, "history", kept)


@pytest.mark.parametrize("kind", ["pipe", "device", "too large", "somebody's"])
def test_files_that_are_none(tmp_path, capsys, kind):
    place = tmp_path / "history.jsonl"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    elif kind == "too large":
        with place.open("wb") as file:
            file.write(b'{"format":"logprob-parity history",')
            file.truncate(history_file.LARGEST + 1)
    else:
        place.write_text("a diary\n")
    line = one_line(capsys, "history", place)
    assert any(told in line for told in ("not a regular file", "larger than 64 MiB", "no results.json")), line
