"""A rename, a test that is gone, a second machine: what the messages say to do is enough."""

import dataclasses
import json
import re
import shlex

import pytest
from reporting import command

from pytest_logprob_parity import Golden
from pytest_logprob_parity.check.obtained import Obtained, candidate_path
from pytest_logprob_parity.check.variants import name_of, to_compare, to_record
from pytest_logprob_parity.golden import golden_path, variant_path
from pytest_logprob_parity.trace import file_format

SOURCE = """
import numpy as np
from pytest_logprob_parity import Sampling, Trace

def rollouts(shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return Trace.from_arrays(
        prompt_token_ids=np.arange(30) + 100 * seed, prompt_offsets=np.arange(31), token_ids=rng.integers(0, 50, 600),
        sequence_offsets=20 * np.arange(31), logprobs=-1 - rng.exponential(0.5, 600) + shift, dtype="bfloat16",
    )
"""
ONE = SOURCE + "def test_one(golden_trace):\n    golden_trace.check(rollouts())\n"


@pytest.fixture
def repo(pytester, run_inner, once):
    """A repo with one golden; gives its path from the root."""
    pytester.makepyfile(test_it=ONE)
    once("one golden", pytester.path, lambda: run_inner("--update-golden").assert_outcomes(passed=1))
    (golden,) = pytester.path.glob("golden/test_it/*.safetensors")
    return golden


def told_to(result, verb):
    """The arguments of the command that a message tells to run."""
    (line,) = {found[1] for line in result.outlines if (found := re.search(rf"logprob-parity ({verb} .+)$", line))}
    return shlex.split(line)


# -- renames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "renamed",
    [
        {"test_it": ONE.replace("test_one", "test_other")},
        {"test_new": ONE},
        {"test_it": ONE.replace("rollouts())", "rollouts(), name='b')")},
        {"test_it": ONE.replace("def test_one(golden_trace)", "class TestAll:\n  def test_one(self, golden_trace)")},
    ],
    ids=["test", "file", "name", "class"],
)
def test_a_renamed_test_is_told_the_command_that_gives_it_its_golden(repo, pytester, run_inner, capsys, renamed):
    (pytester.path / "test_it.py").unlink()
    pytester.makepyfile(**renamed)
    result = run_inner()
    result.assert_outcomes(failed=1)
    status, out, _ = command(capsys, *told_to(result, "move"))
    assert status == 0
    assert out.endswith("1 moved; commit both folders\n")
    result = run_inner()
    result.assert_outcomes(passed=1)
    assert "logprob-parity: 1 checked" in result.outlines  # and nothing is unused
    (golden,) = pytester.path.glob("golden/*/*.safetensors")
    loaded = Golden.load(golden)
    assert golden == golden_path(pytester.path / "golden", loaded.node_id, loaded.name)


def test_of_several_the_golden_of_the_same_name_is_offered(pytester, run_inner, capsys):
    body = SOURCE + "\n".join(
        f"def test_{name}(golden_trace):\n    golden_trace.check(rollouts({number}))" for number, name in enumerate("abc")
    ).replace("rollouts(", "rollouts(-0.1 * ")  # fmt: skip
    pytester.makepyfile(test_it=body)
    run_inner("--update-golden").assert_outcomes(passed=3)
    (pytester.path / "test_it.py").rename(pytester.path / "test_new.py")
    result = run_inner()
    result.assert_outcomes(failed=3)
    told = [
        shlex.split(line.partition("logprob-parity ")[2]) for line in result.outlines if "logprob-parity move golden" in line
    ]
    for arguments in {tuple(a) for a in told if a[-1].count("::")}:
        assert command(capsys, *arguments)[0] == 0
    run_inner().assert_outcomes(passed=3)  # each has its own


def test_a_golden_of_other_prompts_is_not_offered(repo, pytester, run_inner):
    pytester.makepyfile(test_it=ONE.replace("test_one", "test_other").replace("rollouts())", "rollouts(seed=1))"))
    result = run_inner()
    result.assert_outcomes(failed=1)
    assert "logprob-parity move golden" not in result.stdout.str()


def test_a_golden_that_git_moved_with_its_test_is_its_own(repo, pytester, run_inner, capsys, monkeypatch):
    """Identity is the path that the test asks for, whatever stands in the file."""
    target = golden_path(pytester.path / "golden", "test_new.py::test_one")
    target.parent.mkdir()
    repo.rename(target)
    (pytester.path / "test_it.py").unlink()
    pytester.makepyfile(test_new=ONE)
    result = run_inner()
    result.assert_outcomes(passed=1)
    assert "logprob-parity: 1 checked" in result.outlines
    pytester.makepyfile(test_new=ONE.replace("rollouts())", "rollouts(-0.3))"))
    run_inner().assert_outcomes(failed=1)
    assert command(capsys, "accept", "--yes")[0] == 0
    run_inner().assert_outcomes(passed=1)
    assert Golden.load(target).node_id == "test_new.py::test_one"


def test_what_cannot_be_moved(repo, pytester, capsys):
    before = repo.read_bytes()
    for arguments, told in (
        (["test_it.py::none", "test_it.py::b"], "no golden below golden belongs to test_it.py::none"),
        (["golden/none.safetensors", "test_it.py::b"], "is no golden that can be read"),
        ([repo, "test_b.py"], "'test_b.py' is no test"),
        ([repo, "test_it.py::test_one"], "is there already, and stays: nothing was moved"),
    ):
        status, _, err = command(capsys, "move", *arguments)
        assert (status, err.count("\n")) == (2, 1)
        assert told in err
    assert repo.read_bytes() == before


def test_of_several_that_cannot_all_be_read_none_is_moved(repo, pytester, capsys):
    damaged = variant_path(repo, "b200")
    damaged.write_bytes(repo.read_bytes()[:-1] + b"x")
    for _ in range(2):
        status, _, err = command(capsys, "move", "test_it.py::test_one", "test_it.py::test_two")
        assert (status, err.count("\n")) == (2, 1)
        assert sorted(pytester.path.glob("golden/*/*.safetensors")) == sorted([repo, damaged])


def test_a_whole_file_is_moved(pytester, run_inner, capsys):
    pytester.makepyfile(test_it=ONE + "    golden_trace.check(rollouts(), name='b')\ndef test_two(golden_trace):\n"
                        "    golden_trace.check(rollouts())\n")  # fmt: skip
    run_inner("--update-golden").assert_outcomes(passed=2)
    (pytester.path / "test_it.py").rename(pytester.path / "test_new.py")
    assert command(capsys, "move", "test_it.py", "test_new.py")[1].endswith("3 moved; commit both folders\n")
    run_inner().assert_outcomes(passed=2)
    assert not (pytester.path / "golden" / "test_it").exists()


# -- what nobody asks for ---------------------------------------------------------------------------------------------


def test_prune_lists_and_removes_what_no_test_asks_for(pytester, run_inner, capsys):
    body = (
        ONE + "    golden_trace.check(rollouts(), name='b')\ndef test_two(golden_trace):\n    golden_trace.check(rollouts())\n"
    )
    pytester.makepyfile(test_it=body, test_gone=ONE)
    pytester.runpytest_inprocess("--update-golden").assert_outcomes(passed=3)
    (pytester.path / "test_gone.py").unlink()
    pytester.makepyfile(test_it=ONE)
    result = pytester.runpytest_inprocess()
    assert "logprob-parity: 1 checked, 3 unused goldens" in result.outlines
    status, out, _ = command(capsys, "prune")
    assert status == 1
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        "its test is gone", "its test is gone", "no check of its test asked for it", "3 unused; --yes removes them",
    ]  # fmt: skip
    assert command(capsys, "prune", "--yes")[1].endswith("3 removed\n")
    assert command(capsys, "prune")[:2] == (0, "0 unused\n")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    assert len(list(pytester.path.glob("golden/*/*.safetensors"))) == 1


def test_where_not_all_can_be_collected_nothing_is_pruned(repo, pytester, capsys):
    pytester.makepyfile(test_it="", test_broken="import none_such")
    status, out, err = command(capsys, "prune", "--yes")
    assert (status, out) == (2, "")
    assert "not all tests could be collected, so nothing is known" in err
    assert repo.exists()


def test_a_partial_run_says_nothing_of_what_it_did_not_collect(repo, pytester, run_inner):
    pytester.makepyfile(test_it=ONE.replace("test_one", "test_two"), test_other="def test_it(): pass")
    assert "unused" not in run_inner("test_other.py").stdout.str()
    assert "unused" not in run_inner("test_it.py::test_two").stdout.str()
    assert "unused, its test is gone" in run_inner("--update-golden").stdout.str()


# -- a golden for each machine ----------------------------------------------------------------------------------------

CPU = {"hardware": {"device": "AMD EPYC", "capability": "AVX2"}, "engine": {"kind": "vllm", "version": "0.32.0"}}
GPU = {"hardware": {"device": "NVIDIA H200", "cuda": "13.0"}, "engine": {"kind": "vllm", "version": "0.32.0"}}


class Machine:
    """An engine's fingerprint, where nothing else of it is asked."""

    def __init__(self, prints):
        from pytest_logprob_parity import EngineSpec

        self.spec, self.fingerprint = EngineSpec("m", profile="own"), lambda: prints


@pytest.fixture
def recorded(repo):
    """`recorded(prints, ...)`: a golden of each of these fingerprints, the first without a variant."""

    def make(*prints):
        columns, metadata = file_format.read(repo)
        for number, known in enumerate(prints):
            path = repo if number == 0 else variant_path(repo, name_of(known))
            file_format.write(path, columns, {**metadata, "golden": {**metadata["golden"], "fingerprint": known}})
        return repo

    return make


def test_of_several_goldens_the_one_of_this_machine_is_compared_with(recorded):
    path = recorded(CPU, GPU)
    assert to_compare(path, Machine(GPU)).name.endswith("@nvidia-h200.safetensors")
    assert to_compare(path, Machine(CPU)) == path
    newer = {**GPU, "engine": {"kind": "vllm", "version": "0.33.0"}}
    assert to_compare(path, Machine(newer)).name.endswith("@nvidia-h200.safetensors")
    unknown = {**GPU, "hardware": {"device": "NVIDIA B300", "cuda": "13.0"}}
    assert to_compare(recorded(CPU), Machine(unknown)) in (path, variant_path(path, "nvidia-h200"))


def test_another_kind_of_machine_records_a_golden_of_its_own(recorded):
    path = recorded(CPU)
    assert to_record(path, Machine(GPU)) == variant_path(path, "nvidia-h200")
    assert to_record(path, Machine({**CPU, "hardware": {"device": "Intel Xeon"}})) == path  # clouds mix CPUs
    path = recorded(CPU, GPU)
    assert to_record(path, Machine(GPU)) == variant_path(path, "nvidia-h200")
    assert to_record(path, Machine(CPU)) == path


def test_accepting_on_another_kind_of_machine_writes_beside_the_golden(pytester, run_inner, capsys, recorded):
    """As --update-golden would have done there."""
    path = recorded({**CPU, "model": "m"})
    before = path.read_bytes()
    left = pytester.path / "parity-obtained" / "test_it" / path.name
    golden = Golden.load(path)
    there = {**GPU, "model": "m"}
    candidate = dataclasses.replace(golden, fingerprint=there)
    candidate.save(candidate_path(left))
    told = Obtained(
        golden=str(path.relative_to(pytester.path)), golden_digest=golden.digest, node_id=golden.node_id,
        name="", verdict="unverified", headline="too few", level="rl", setup="compatible",
        candidate=Golden.load(candidate_path(left)).digest,
    )  # fmt: skip
    candidate.save(left, also={"obtained": dataclasses.asdict(told)})
    status, out, _ = command(capsys, "accept", "--yes")
    assert status == 0
    assert "@nvidia-h200.safetensors, beside golden/" in out
    assert path.read_bytes() == before
    assert variant_path(path, "nvidia-h200").read_bytes() == candidate_path(left).read_bytes()


def test_a_variant_by_name_is_recorded_checked_listed_and_differs(repo, pytester, run_inner, capsys):
    pytester.makepyfile(test_it=ONE.replace("rollouts())", "rollouts(-0.3))"))
    run_inner().assert_outcomes(failed=1)
    result = run_inner("--parity-variant=b200")
    result.assert_outcomes(failed=1)
    assert "--update-golden --parity-variant b200" in result.stdout.str()
    run_inner("--parity-variant=b200", "--update-golden").assert_outcomes(passed=1)
    run_inner("--parity-variant=b200").assert_outcomes(passed=1)
    variant = variant_path(repo, "b200")
    assert variant.exists()
    assert f"  variant    {variant.name}" in command(capsys, "show", repo)[1].splitlines()
    assert json.loads(command(capsys, "show", "--json", repo)[1])["variants"] == [variant.name]
    assert command(capsys, "diff", repo, variant)[0] == 1
    assert "unused" not in run_inner("--parity-variant=b200").stdout.str()


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "@", "x" * 61])
def test_a_variant_that_is_no_part_of_a_file_name(repo, run_inner, name):
    result = run_inner(f"--parity-variant={name}/" if name == ".." else f"--parity-variant={name}")
    assert result.ret == 4
    assert "--parity-variant=" in result.stderr.str()
