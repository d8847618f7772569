"""Accepting what a failing run left: shown first, whole or not at all, and never what is not known to be comparable."""

import json
import shutil

import pytest
from reporting import MOVED, command, one_line

from conftest import MODEL
from pytest_logprob_parity import Golden, Sampling, atomic
from pytest_logprob_parity.report.results_file import read_results
from pytest_logprob_parity.trace import file_format

ENGINE_TEST = f"""
import pytest

@pytest.mark.logprob_parity(model={MODEL!r}, dtype="bfloat16")
def test_rollouts(parity_engine, golden_trace):
    golden_trace.check(
        parity_engine, prompts=["Ada has 12 apples and buys 30 more. ", "Dan had 40 nuts and lost 7. "],
        sampling=dict(temperature=0.7, top_p=0.9, max_tokens=16, n=4, seed=1),
    )
"""
STEP2 = ("--parity-set", f"model={MODEL}-step2")


@pytest.fixture
def failed(project, pytester, once):
    """A run in which one of two checks failed; gives its golden, the obtained trace and the candidate."""
    once("failed", pytester.path, lambda: project().assert_outcomes(passed=1, failed=1))
    (golden,) = pytester.path.glob(MOVED)
    obtained = pytester.path / "parity-obtained" / golden.relative_to(pytester.path / "golden")
    return golden, obtained, obtained.with_name(obtained.name.replace(".safetensors", ".golden.safetensors"))


@pytest.fixture
def accept(pytester, capsys):
    """`accept("--yes")` in the repo of the failing run: exit status and output, or the one line of trouble."""

    def run(*arguments):
        status, out, err = command(capsys, "accept", "--root", pytester.path, *arguments)
        return status, out + err

    return run


# -- what is left, and what becomes of it -----------------------------------------------------------------------------


def test_a_failing_check_leaves_its_trace_and_a_golden_to_accept(failed, pytester):
    golden, obtained, candidate = failed
    left = set((pytester.path / "parity-obtained").rglob("*.safetensors"))
    assert left == {obtained, candidate}  # nothing of the check that passed
    told = file_format.read_metadata(obtained)["obtained"]
    assert told["golden"] == str(golden.relative_to(pytester.path))
    assert told["golden_digest"] == file_format.read_metadata(golden)["digest"] == Golden.load(golden).digest
    assert told["candidate"] == Golden.load(candidate).digest
    assert (told["node_id"], told["verdict"], told["refusal"]) == ("test_it.py::test_moves", "fail", "")


def test_diff_says_accept_and_never_to_copy_the_trace(failed, capsys):
    from pytest_logprob_parity.cli import main

    golden, trace, candidate = failed
    assert main(["diff", str(golden), str(trace)]) == 1
    shown = capsys.readouterr().out
    assert f"to accept    (only if the change is intended) logprob-parity accept {trace}" in shown
    main(["diff", str(golden), str(candidate)])
    assert "to accept" not in capsys.readouterr().out


def test_accepting_shows_the_difference_asks_and_writes(failed, project, accept, monkeypatch):
    golden, _, candidate = failed
    before = golden.read_bytes()
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "n")
    status, out = accept()
    assert (status, len(asked), golden.read_bytes()) == (1, 1, before)
    assert out.splitlines()[-1] == "0 accepted, 1 left"
    block = out.splitlines()[:7]
    assert [line[:13] for line in block] == [
        "test_it.py::t", "  golden     ", "  fail       ", "  cause      ", "  measured   ", "  tokens     ", "  floor      ",
    ]  # fmt: skip
    assert "360 tokens: mean d -0.305, RMS 0.309, max |d| 0.436 nats" in block[4]
    monkeypatch.setattr("builtins.input", lambda text: "y")
    status, out = accept()
    assert (status, out.splitlines()[-1]) == (0, "1 accepted; commit the goldens")
    assert golden.read_bytes() == candidate.read_bytes()
    assert accept("--yes")[1].splitlines()[-1] == "0 accepted, 1 before"  # twice is once
    project().assert_outcomes(passed=2)


def test_nobody_there_to_ask_is_a_no(failed, accept, monkeypatch):
    golden, before = failed[0], failed[0].read_bytes()

    def nobody(text):
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    assert accept()[0] == 1
    assert golden.read_bytes() == before


def test_from_a_downloaded_artifact_to_an_accepted_golden_in_two_commands(failed, pytester, accept, tmp_path, monkeypatch):
    """The other machine has the repo and the artifact; no engine and no run of its own."""
    golden, _, candidate = failed
    wanted = candidate.read_bytes()
    shutil.move(pytester.path / "parity-obtained", tmp_path / "artifact")  # what `gh run download` gives
    status, out = accept(tmp_path / "artifact", "--yes")
    assert (status, golden.read_bytes()) == (0, wanted)
    assert out.splitlines()[-1] == "1 accepted; commit the goldens"


def test_of_two_traces_for_one_golden_none_is_taken_until_one_is_named(failed, pytester, accept):
    golden, obtained, candidate = failed
    before, wanted = golden.read_bytes(), candidate.read_bytes()
    other = pytester.path / "artifact" / obtained.name
    shutil.copytree(obtained.parent, other.parent)
    status, out = accept(obtained, other, "--yes")
    assert (status, golden.read_bytes()) == (2, before)
    assert f"{obtained} and {other} would both become this golden; name one of them" in out.splitlines()[-1]
    status, out = accept(other, other, "--yes")
    assert (status, out.splitlines()[-1], golden.read_bytes()) == (0, "1 accepted; commit the goldens", wanted)


@pytest.mark.parametrize(
    ("name", "fits"),
    [("moves", True), ("test_it.py::test_moves", True), ("golden/test_it/*", True), ("*stays*", False), ("nothing", False)],
)
def test_by_name(failed, accept, name, fits):
    golden, before = failed[0], failed[0].read_bytes()
    status, out = accept("--yes", "--name", name)
    assert status == (0 if fits else 2)
    assert (golden.read_bytes() != before) is fits
    assert fits or "no obtained trace fits --name" in out


def test_a_check_that_passes_again_leaves_nothing_to_accept(failed, project, accept, monkeypatch):
    monkeypatch.setenv("SHIFT", "0")
    monkeypatch.setenv("NOISE", "0")
    project().assert_outcomes(passed=2)
    assert not failed[1].exists()
    assert not failed[2].exists()
    status, out = accept("--yes")
    assert status == 2
    assert "no obtained traces in it" in out


def test_only_the_trace_is_kept_where_the_ini_file_says_so(project, pytester, accept):
    pytester.makeini("[pytest]\nparity_obtained = trace")
    project().assert_outcomes(passed=1, failed=1)
    status, out = accept("--yes")
    assert (status, out.splitlines()[-1]) == (1, "0 accepted, 1 refused")
    assert "refused    parity_obtained = trace: only the trace was kept; record it where the engine is: pytest" in out
    pytester.makeini("[pytest]\nparity_obtained = all")
    assert "ERROR: parity_obtained: 'all' is not one of golden, trace" in project().stderr.str()


def causes(out):
    """The cause that a block of `accept` names."""
    return next(line.split()[1] for line in out.splitlines() if line.startswith("  cause "))


@pytest.mark.parametrize(
    ("ini", "options", "note"),
    [("parity_tolerance = bfloat16.mean_diff = 0.00001", (), "mean_diff 1e-05 (usually 0.002)"),
     ("", ("--parity-level=bitwise",), "level bitwise")],
)  # fmt: skip
def test_accept_and_diff_judge_as_the_run_did(project, pytester, accept, capsys, monkeypatch, ini, options, note):
    monkeypatch.setenv("SHIFT", "-0.0005")
    monkeypatch.setenv("NOISE", "0")
    pytester.makeini(f"[pytest]\n{ini}")
    result = project(*options)
    result.assert_outcomes(passed=1, failed=1)
    (golden,) = pytester.path.glob(MOVED)
    obtained = pytester.path / "parity-obtained" / golden.relative_to(pytester.path / "golden")
    status, out, _ = command(capsys, "diff", golden, obtained)
    assert (status, out.splitlines()[0]) == (1, f"fail: {file_format.read_metadata(obtained)['obtained']['headline']}")
    assert f"as in the run that left it: {note}" in out
    assert (causes(accept()[1]) == "noise:") is ("numerical_noise" in result.stdout.str())
    # Without what the run was judged by, as earlier versions left it: by the defaults the two are the same.
    columns, metadata = file_format.read(obtained)
    metadata["obtained"] |= {"level": "rl"}
    del metadata["obtained"]["limits"]
    file_format.write(obtained, columns, metadata)
    status, out, _ = command(capsys, "diff", golden, obtained)
    assert (status, out.splitlines()[0][:5], "as in the run" in out) == (0, "pass:", False)
    assert causes(accept()[1]) == "noise:"  # and so accept contradicted the run


def test_diff_says_nothing_of_a_run_by_the_defaults_and_takes_the_level_that_is_given(failed, capsys):
    golden, obtained, _ = failed
    assert "as in the run" not in command(capsys, "diff", golden, obtained)[1]
    assert "level        bitwise: " in command(capsys, "diff", golden, obtained, "--level", "bitwise")[1]


# -- what is never accepted -------------------------------------------------------------------------------------------


def refused(accept, golden):
    """Why an obtained trace is refused; the golden stays as it was."""
    before = golden.read_bytes() if golden.exists() else None
    status, out = accept("--yes")
    assert status == 1
    assert (golden.read_bytes() if golden.exists() else None) == before
    return next(line for line in out.splitlines() if line.startswith("  refused    "))


def test_a_golden_that_is_no_longer_the_one_it_was_compared_with(failed, project, accept, monkeypatch):
    monkeypatch.setenv("SHIFT", "-0.1")
    project("--parity-update=failed", "-k", "none")  # nothing ran
    golden = Golden.load(failed[0])
    golden.save(failed[0], also={"note": "recorded again meanwhile"})
    assert "the golden is no longer the one that the run compared with" in refused(accept, failed[0])


def rewrite(candidate, obtained, **changes):
    """Another candidate in place of the run's own, which the obtained trace vouches for."""
    import dataclasses

    dataclasses.replace(Golden.load(candidate), **changes).save(candidate)
    columns, metadata = file_format.read(obtained)
    metadata["obtained"]["candidate"] = Golden.load(candidate).digest
    file_format.write(obtained, columns, metadata)


@pytest.mark.parametrize("part", ["model", "tokenizer", "chat_template"])
def test_another_model_is_incomparable(failed, accept, part):
    golden, obtained, candidate = failed
    prints = {"model": "a", "tokenizer": "b", "chat_template": "c"}
    rewrite(golden, obtained, fingerprint=prints)
    columns, metadata = file_format.read(obtained)
    metadata["obtained"]["golden_digest"] = Golden.load(golden).digest
    file_format.write(obtained, columns, metadata)
    rewrite(candidate, obtained, fingerprint={**prints, part: "other"})
    assert f"incomparable: the candidate is of another {part.replace('_', ' ')}" in refused(accept, golden)


def test_another_sampling_other_prompts_and_another_test_are_incomparable(failed, accept):
    golden, obtained, candidate = failed
    trace, own = Golden.load(candidate).trace, candidate.read_bytes()
    changes = {
        "was sampled in another way": {"trace": trace.with_(sampling=Sampling(temperature=0.5))},
        "is of other prompts": {"trace": trace.with_(prompt_token_ids=trace.prompt_token_ids + 1)},
        "belongs to test_other.py::test_it": {"node_id": "test_other.py::test_it"},
    }
    for told, change in changes.items():
        rewrite(candidate, obtained, **change)
        assert f"incomparable: the candidate {told}" in refused(accept, golden)
        candidate.write_bytes(own)


def test_a_check_that_compared_nothing(failed, accept):
    golden, obtained, _ = failed
    columns, metadata = file_format.read(obtained)
    metadata["obtained"] |= {"candidate": "", "refusal": "nothing was compared", "verdict": "unverified"}
    file_format.write(obtained, columns, metadata)
    assert "refused    nothing was compared; record it where the engine is" in refused(accept, golden)


def test_a_run_that_compares_nothing_leaves_no_candidate(pytester, run_inner):
    source = "from pytest_logprob_parity import Trace\ndef test_it(golden_trace):\n    golden_trace.check(" \
             "Trace.from_sequences([dict(prompt_token_ids=[1], token_ids=[%s, 4], logprobs=[-0.1, -0.2])]))"  # fmt: skip
    pytester.makepyfile(test_it=source % 3)
    run_inner("--update-golden").assert_outcomes(passed=1)
    pytester.makepyfile(test_it=source % 50)
    run_inner().stdout.fnmatch_lines(["E*unverified: Nothing was compared*"])
    (obtained,) = (pytester.path / "parity-obtained").rglob("*.safetensors")
    told = file_format.read_metadata(obtained)["obtained"]
    assert (told["candidate"], told["refusal"]) == ("", "nothing was compared")


def test_numbers_that_recording_would_refuse(project, pytester, accept, monkeypatch):
    monkeypatch.setenv("SHIFT", "nan")
    project().assert_outcomes(passed=1, failed=1)
    (golden,) = pytester.path.glob(MOVED)
    assert "refused    a candidate golden: not recorded: it could never pass" in refused(accept, golden)


@pytest.mark.parametrize("place", ["/etc/x.safetensors", "../x.safetensors", "golden/../../x.safetensors", "setup.py", ""])
def test_a_path_that_leads_out_of_the_repo(failed, accept, place):
    golden, obtained, _ = failed
    columns, metadata = file_format.read(obtained)
    metadata["obtained"]["golden"] = place
    file_format.write(obtained, columns, metadata)
    assert f"its golden {place!r} is not inside this folder" in refused(accept, golden)


def test_an_artifact_of_another_repo(failed, accept):
    golden, before = failed[0], failed[0].read_bytes()
    golden.unlink()
    assert "there is no golden/test_it/" in refused(accept, golden)
    golden.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    assert "a Git LFS pointer, not the file itself; run `git lfs pull`" in refused(accept, golden)
    golden.write_bytes(before[:-1])
    assert "damaged" in refused(accept, golden)


def test_a_candidate_that_is_damaged_missing_or_not_this_runs(failed, accept):
    golden, _, candidate = failed
    own = candidate.read_bytes()
    candidate.write_bytes(own[:-1])
    assert "damaged" in refused(accept, golden)
    candidate.write_bytes(golden.read_bytes())
    assert "is not the candidate of this run" in refused(accept, golden)
    candidate.unlink()
    assert "there is no such file" in refused(accept, golden)


def test_one_that_cannot_be_written_costs_no_golden(failed, pytester, run_inner, accept, monkeypatch):
    """Both goldens are staged before either is replaced."""
    source = pytester.path / "test_it.py"
    source.write_text(source.read_text().replace("rollouts(seed=1)", "rollouts(SHIFT, seed=1)"))
    run_inner().assert_outcomes(failed=2)
    goldens = {path: path.read_bytes() for path in pytester.path.glob("golden/test_it/*")}
    real, calls = atomic.os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(atomic.os, "fsync", full)
    status, out = accept("--yes")
    assert (status, len(calls)) == (2, 2)
    assert "not written (No space left on device); all goldens are as they were" in out
    assert {path: path.read_bytes() for path in pytester.path.glob("golden/test_it/*")} == goldens
    assert not list(pytester.path.rglob("*.part"))
    assert accept("--yes")[0] == 0
    run_inner().assert_outcomes(passed=2)


def test_what_is_no_obtained_trace(failed, capsys, tmp_path):
    assert f"{tmp_path}: no obtained traces in it" in one_line(capsys, "accept", tmp_path)
    assert f"{tmp_path}/none: there is no such folder" in one_line(capsys, "accept", tmp_path / "none")
    assert "none that a failing check left in parity-obtained/" in one_line(capsys, "accept", failed[0])
    columns, metadata = file_format.read(failed[1])
    for key, value in (("more", "of a later version"), ("limits", {"mean_diff": 1, "more": 2}), ("limits", ["x"])):
        file_format.write(failed[1], columns, {**metadata, "obtained": {**metadata["obtained"], key: value}})
        assert "another version of pytest-logprob-parity left it" in one_line(capsys, "accept", failed[1])


# -- --parity-update --------------------------------------------------------------------------------------------------


def test_update_failed_records_what_fails_and_nothing_else(failed, project, pytester):
    goldens = {path: path.read_bytes() for path in pytester.path.glob("golden/test_it/*")}
    project("--parity-update=failed").stdout.fnmatch_lines(["logprob-parity: 1 recorded, 1 checked"])
    changed = [path for path, before in goldens.items() if path.read_bytes() != before]
    assert changed == [failed[0]]
    assert not failed[1].exists()  # it has been recorded: nothing is left to accept
    project().assert_outcomes(passed=2)


def test_update_failed_leaves_what_is_unverified_and_says_so(pytester, run_inner, accept):
    """Two sequences are too few to say anything of another engine: nothing failed, and nothing is known to be wrong."""
    source = """
        import os
        from pytest_logprob_parity import Trace

        SHIFT = float(os.environ.get("SHIFT", 0))

        def test_it(golden_trace):
            golden_trace.check(Trace.from_sequences(
                [dict(prompt_token_ids=[n], token_ids=[3, 4], logprobs=[-0.1 + SHIFT, -0.2]) for n in range(2)]
            ))
    """
    pytester.makepyfile(test_it=source)
    run_inner("--update-golden").assert_outcomes(passed=1)
    (golden,) = pytester.path.glob("golden/*/*.safetensors")
    before = golden.read_bytes()
    for shift, recorded in (("1e-5", False), ("-3", True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SHIFT", shift)
            run_inner().assert_outcomes(failed=1)
            result = run_inner("--parity-update=failed")
        result.assert_outcomes(**{"passed" if recorded else "failed": 1})
        assert (golden.read_bytes() != before) is recorded
        told = "--parity-update=failed left this golden: nothing failed; --update-golden records it again"
        assert (told in result.stdout.str()) is not recorded


def test_an_incomparable_run_leaves_nothing_to_accept(failed, pytester, project, accept):
    source = pytester.path / "test_it.py"
    source.write_text(
        source.read_text().replace("rollouts(SHIFT, NOISE))", "rollouts(SHIFT, NOISE), sampling={'temperature': 0.5})")
    )
    project().stdout.fnmatch_lines(["E*IncomparableError: *was recorded with temperature=0.7*"])
    assert not failed[1].exists()
    assert not failed[2].exists()
    assert accept("--yes")[0] == 2


def test_update_missing_records_what_has_no_golden_and_leaves_what_fails(failed, project, pytester):
    golden, before = failed[0], failed[0].read_bytes()
    (other,) = set(pytester.path.glob("golden/test_it/*")) - {golden}
    content = other.read_bytes()
    other.unlink()
    result = project("--parity-update=missing")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["logprob-parity: 1 recorded, 1 checked, 1 failed"])
    assert (other.read_bytes(), golden.read_bytes()) == (content, before)


# -- on a real engine -------------------------------------------------------------------------------------------------


def test_what_is_accepted_is_what_recording_would_have_written_and_passes_there(pytester, run_inner, accept, capsys):
    pytester.makeini("[pytest]\nparity_repeats = 2")
    pytester.makepyfile(test_it=ENGINE_TEST)
    run_inner("--update-golden").assert_outcomes(passed=1)
    (golden,) = pytester.path.glob("golden/test_it/*.safetensors")
    before = golden.read_bytes()
    run_inner("--parity-report=report", *STEP2).assert_outcomes(failed=1)
    check = read_results(pytester.path / "report" / "results.json")["checks"][0]
    obtained = pytester.path / "parity-obtained" / golden.relative_to(pytester.path / "golden")
    told = json.loads(command(capsys, "diff", golden, obtained, "--json")[1])
    assert check["policy_metrics"]
    for name in ("verdict", "headline", "setup", "metrics", "policy_metrics", "gates", "findings", "fingerprint_differences"):
        assert check[name] == told[name], name  # an engine's check, its report and diff are one
    status, out = accept("--yes")
    assert status == 0
    if check["findings"]:  # two prompts need not be enough for a failure
        assert f"  cause      {check['findings'][0]['layer']}: " in out
    assert "completions have other tokens" in out  # other weights write other tokens: the golden holds theirs
    assert "noise floor of 2 repeats" in out
    accepted = golden.read_bytes()
    assert Golden.load(golden).floor is not None
    run_inner(*STEP2).assert_outcomes(passed=1)  # the free run too: every token comes back
    run_inner("--update-golden", *STEP2).assert_outcomes(passed=1)
    assert golden.read_bytes() == accepted
    golden.write_bytes(accepted)
    run_inner().assert_outcomes(failed=1)  # and the engine of before fails it
    assert accepted != before
