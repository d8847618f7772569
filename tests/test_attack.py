"""Under attack: goldens, artifacts and texts that somebody made to hide, to hang or to be obeyed."""

import dataclasses
import json
import os

import attack
import numpy as np
import pytest
from made_up import make_trace, moved, noise, reference_of
from reporting import command
from safetensors import deserialize

from pytest_logprob_parity import Golden, GoldenError, Sampling, atomic
from pytest_logprob_parity.check.obtained import Obtained, candidate_path
from pytest_logprob_parity.golden.noise_floor import NoiseFloor
from pytest_logprob_parity.trace import file_format
from pytest_logprob_parity.trace.batch_composition import BatchCompositions

PRINTS = {
    "name": "m", "model": "a", "tokenizer": "b", "chat_template": "c", "engine": {"kind": "vllm", "version": "0.32.0"},
    "dtype": "bfloat16", "config": {"seed": 0}, "hardware": {"device": "cpu"}, "libraries": {},
}  # fmt: skip
PLACE = "golden/test_it/it-00000000.safetensors"


def make_golden(change=0.0, **changes):
    """A golden as recording makes it: with noise floor, reference and fingerprint."""
    trace = moved(make_trace(), change)
    rows = np.stack([trace.logprobs + noise(trace, 0.002, seed) for seed in range(5)]).astype(np.float32)
    golden = Golden(
        trace, fingerprint=PRINTS, prompts_digest="prompts", node_id="test_it.py::test_it",
        floor=NoiseFloor(rows, BatchCompositions(), True), reference=reference_of(trace, noise(trace, 0.005, 9)),
    )  # fmt: skip
    return dataclasses.replace(golden, **changes)


def refusal_of(path):
    """Why a golden is not read; None where it is."""
    try:
        Golden.load(path)
    except GoldenError as error:
        return str(error)


# -- goldens ----------------------------------------------------------------------------------------------------------


def test_every_mutated_golden_is_refused_in_one_line_or_read_and_shown(tmp_path, capsys):
    """benchmarks/attack_goldens.py is the same with 10,000."""
    path, original = tmp_path / "mutated.safetensors", tmp_path / "original.safetensors"
    make_golden().save(original)
    read = 0
    for name, data, repaired in attack.mutations(original.read_bytes(), 150):
        path.write_bytes(data)
        if (refusal := refusal_of(path)) is not None:
            assert "\n" not in refusal, name
            assert len(refusal) < 1000, name
            continue
        assert repaired, f"{name}: altered, and read"
        read += 1
        for verb in (["show", path], ["diff", original, path], ["diff", "--json", path, original]):
            command(capsys, *verb)
    assert read > 20  # the negative control: not everything is refused


def test_what_safetensors_refuses_is_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    make_golden().save(path)
    data, agreed = path.read_bytes(), 0
    for name, mutated, _ in attack.mutations(data, 200, seed=1):
        try:
            deserialize(mutated)
        except Exception:
            path.write_bytes(mutated)
            with pytest.raises(GoldenError):
                file_format.read(path)
            agreed += 1
        else:
            assert name
    assert agreed > 40


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"data_offsets": [0, 2**63]}, "has no shape or no place"), ({"shape": ["595"]}, "has no shape or no place"),
        ({"shape": [595.9]}, "has no shape or no place"), ({"shape": [-1]}, "has no shape or no place"),
        ({"data_offsets": [0, 4]}, "its shape asks for others"), ({"dtype": "BF16"}, "is of dtype 'BF16'"),
        ({"shape": [True]}, "has no shape or no place"), ({"more": 1}, "is no column"),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, entry, told):
    path = tmp_path / "g.safetensors"
    make_golden().save(path)
    _, metadata, columns = attack.parts_of(path.read_bytes())

    def change(header):
        header["logprobs"] |= entry
        return header

    path.write_bytes(attack.built(metadata, columns, change))
    with pytest.raises(GoldenError, match=told):
        Golden.load(path)
    path.write_bytes(attack.built(metadata, columns))
    assert Golden.load(path).trace.num_tokens == 2000


@pytest.mark.parametrize("kind", ["fifo", "device", "endless", "large"])
def test_what_is_no_regular_file_of_a_bounded_size_is_never_read(tmp_path, capsys, kind):
    path = tmp_path / "g.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "large":
        with path.open("wb") as file:
            file.truncate(file_format.MOST_BYTES + 1)
    else:
        path.symlink_to("/dev/null" if kind == "device" else "/dev/zero")
    for verb in (["show", path], ["diff", path, path], ["accept", path]):
        status, _, err = command(capsys, *verb)
        assert (status, err.count("\n")) == (2, 1), err
        assert ("2 GiB" if kind == "large" else "no regular file") in err


def test_a_killed_update_leaves_a_part_that_the_next_one_clears(tmp_path):
    path = tmp_path / "g.safetensors"
    stale, fresh = tmp_path / ".g.safetensors.abc.part", tmp_path / ".other.safetensors.abc.part"
    for part in (stale, fresh):
        part.write_bytes(b"half")
    os.utime(stale, (0, 0))
    make_golden().save(path)
    assert (path.exists(), stale.exists(), fresh.exists()) == (True, False, True)  # a fresh one may be somebody's


# -- artifacts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, capsys):
    """A repo with a golden and what a failing run left: `tree(candidate=...)` accepts it; gives status, output, written?"""
    golden, left = make_golden(), make_golden(-0.3, floor=None, reference=None)

    def accept(*arguments, held=None, candidate=None, told=(), **changes):
        path = tmp_path / PLACE
        (held or golden).save(path)
        before = path.read_bytes()
        place = tmp_path / "parity-obtained" / "test_it" / path.name
        made = candidate or make_golden(-0.3)
        made.save(candidate_path(place))
        obtained = Obtained(
            golden=PLACE, golden_digest=file_format.read_metadata(path)["digest"], node_id=golden.node_id,
            name="", verdict="fail", headline="off", level="rl", setup="compatible",
            candidate=file_format.read_metadata(candidate_path(place))["digest"],
        )  # fmt: skip
        obtained = dataclasses.replace(obtained, **dict(told))
        dataclasses.replace(left, **changes).save(place, also={"obtained": dataclasses.asdict(obtained)})
        status, out, err = command(capsys, "accept", "--root", tmp_path, *arguments)
        return status, out + err, path.read_bytes() != before

    accept.left, accept.golden, accept.root = left, golden, tmp_path
    return accept


def test_an_honest_tree_is_written_and_shows_the_candidates_own_numbers(tree):
    status, out, written = tree("--yes")
    assert (status, written) == (0, True)
    assert "  candidate  2,000 tokens in common with the golden: mean d -0.3, RMS 0.3, max |d| 0.3 nats" in out


TRACE = make_trace()
MOVED = moved(TRACE, -0.3)
ONE = np.arange(TRACE.num_tokens) == 0


def _floor(rms):
    rows = np.stack([MOVED.logprobs + noise(MOVED, rms, seed) for seed in range(5)]).astype(np.float32)
    return NoiseFloor(rows, BatchCompositions(), True)


def _still(trace):
    return NoiseFloor(np.stack([trace.logprobs] * 5), BatchCompositions(), True)


#: What somebody puts in place of the candidate, and what its refusal, or the line that keeps --yes from it, says.
CANDIDATES = {
    "all NaN": ({"trace": MOVED.with_(logprobs=np.full(2000, np.nan, np.float32))}, "2000 of 2000 logprobs"),
    "one NaN": ({"trace": MOVED.with_(logprobs=np.where(ONE, np.float32(np.nan), MOVED.logprobs))}, "1 of 2000 logprobs"),
    "+inf": ({"trace": MOVED.with_(logprobs=np.where(ONE, np.float32(np.inf), MOVED.logprobs))}, "1 of 2000 logprobs"),
    "all -inf": ({"trace": MOVED.with_(logprobs=np.full(2000, -np.inf, np.float32))}, "refused"),
    "all masked but one": ({"trace": MOVED.with_(mask=ONE)}, "compares 1 token in place of 2,000"),
    "some masked": ({"trace": MOVED.with_(mask=~ONE)}, "masks 1 of its 2,000 tokens; the golden 0 of 2,000"),
    "all masked": ({"trace": MOVED.with_(mask=ONE & False)}, "refused"),
    "limits of 1e9": ({"tolerance": {"k3": 1e9, "mean_diff": 1e9}}, "limit k3: 1e+09"),
    "one limit": ({"tolerance": {"outlier": 100.0}}, "limit outlier: 100"),
    "an infinite limit": ({"tolerance": {"outlier": float("inf")}}, "limit outlier: inf"),
    "a limit that is no number": ({"tolerance": {"outlier": float("nan")}}, "outlier is NaN, expected a number, 0 or more"),
    "no fingerprint": ({"fingerprint": {}}, "does not say which engine made it"),
    "half a fingerprint": ({"fingerprint": {k: v for k, v in PRINTS.items() if k != "config"}}, "of another engine"),
    "another engine": ({"fingerprint": {**PRINTS, "engine": {"kind": "vllm", "version": "9"}}}, "of another engine"),
    "another model": ({"fingerprint": {**PRINTS, "model": "z"}}, "incomparable"),
    "another tokenizer": ({"fingerprint": {**PRINTS, "tokenizer": "z"}}, "incomparable"),
    "no floor": ({"floor": None}, "it has no noise floor"),
    "a floor of 3 nats": ({"floor": _floor(3.0)}, "does not agree with itself"),
    "a floor of a tenth": ({"floor": _floor(0.02)}, "its noise floor has an RMS of 0.02"),
    "no reference": ({"reference": None}, "it has a reference for 0 tokens"),
    "a reference far away": ({"reference": reference_of(MOVED, noise(MOVED, 3.0))}, "further from the model's own in float32"),
    "other sampling": ({"trace": MOVED.with_(sampling=Sampling(temperature=0.5))}, "incomparable"),
    "other prompts": ({"trace": MOVED.with_(prompt_token_ids=MOVED.prompt_token_ids + 1)}, "incomparable"),
    "another test": ({"node_id": "test_it.py::other"}, "incomparable"),
    "another name": ({"name": "other"}, "incomparable"),
    "one sequence": ({"trace": make_trace(1), "floor": None, "reference": None}, "incomparable"),
    "twice the sequences": ({"trace": make_trace(100, prompts=50), "floor": None, "reference": None}, "incomparable"),
    "shorter sequences": ({"trace": make_trace(50, 4), "floor": None, "reference": None}, "not those of the trace"),
    "numbers of its own": ({"trace": moved(TRACE, 3.0), "floor": None, "reference": None}, "refused"),
    "moved more than was shown": ({"trace": moved(TRACE, -2.0), "floor": None, "reference": None}, "not those of the trace"),
    "not moved at all": ({"trace": TRACE, "floor": None, "reference": None}, "not those of the trace"),
    "another label": (
        {"trace": moved(TRACE, -2.0).with_(logprobs_mode="raw_logprobs"), "floor": None, "reference": None},
        "not those of the trace",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_malicious_candidate_is_not_written_unseen(tree, name):
    changes, told = CANDIDATES[name]
    status, out, written = tree("--yes", candidate=make_golden(-0.3, **changes))
    assert not written, out
    assert status == 1
    assert told in out


HALF = np.arange(2000) % 40 < 36
#: A golden that is not like the others, what somebody puts in its place, and the line that keeps --yes from it.
HELD = {
    "strict limits are dropped": ({"tolerance": {"k3": 1e-4}}, {}, "the golden asks for 0.0001 as it is"),
    "half of what is left is masked": (
        {"trace": TRACE.with_(mask=HALF)}, {"trace": MOVED.with_(mask=HALF & (np.arange(2000) % 40 < 20))},
        "compares 1,000 tokens in place of 1,800",
    ),
    "a little more is masked": (
        {"trace": TRACE.with_(mask=HALF)}, {"trace": MOVED.with_(mask=HALF & (np.arange(2000) % 40 < 34))}, "masks 300 of its",
    ),
    "a floor where none moved a bit": ({"floor": _still(TRACE)}, {}, "nats, the golden's of 0"),
    "a reference that is far": ({}, {"reference": reference_of(MOVED, noise(MOVED, 0.1))}, "its distance to its reference"),
    "a reference of nothing": ({}, {"reference": reference_of(MOVED, noise(MOVED, 0.005), 0.0)}, "a reference for 0 tokens"),
    "a floor that does not reproduce": (
        {}, {"floor": dataclasses.replace(_floor(0.002), reproduces=False)}, "a replay in its own batches is not bit-identical",
    ),
    "other tokens": ({}, {"trace": MOVED.with_(token_ids=MOVED.token_ids + 1), "reference": None}, "none of its own numbers"),
    "no reason to end": ({"trace": TRACE.with_(finish_reasons=np.ones(50, np.uint8))}, {}, "reasons to end: known of 0.0%"),
    "another dtype": ({}, {"trace": MOVED.with_(dtype="float16")}, "dtype 'float16' in place of 'bfloat16'"),
    "no seeds": ({"trace": TRACE.with_(seeds=np.arange(50))}, {}, "it does not know its seeds"),
    "no ranks": ({"trace": TRACE.with_(ranks=np.ones(2000, np.int32))}, {}, "ranks: known of 0.0% of them"),
    "an asked limit is the default now": ({"tolerance": {"outlier": 0.5}}, {}, "limit outlier: what noise explains is allowed"),
    "forty more are masked": (
        {"trace": TRACE.with_(mask=~ONE)}, {"trace": MOVED.with_(mask=~ONE & (np.arange(2000) > 40))}, "masks 41 of its 2,000",
    ),
    "a reference where none was": ({"reference": None}, {}, "it has a reference, whose errors are excused"),
    "another mode": ({}, {"trace": MOVED.with_(logprobs_mode="raw_logprobs")}, "logprobs_mode 'raw_logprobs' in place of"),
    "other offsets of the prompts": ({}, {"trace": MOVED.with_(group=MOVED.group[::-1].copy())}, "incomparable"),
    "limits below 0": ({}, {"tolerance": {"k3": -1.0}}, "tolerance.k3 is -1.0, expected a number, 0 or more"),
    "limits of another name": ({}, {"tolerance": {"zzz": 1.0}}, "zzz"),
    "above 0": ({}, {"trace": moved(TRACE, 9.0), "floor": None, "reference": None}, "above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_a_golden_with_limits_masks_or_a_still_floor_is_not_loosened_unseen(tree, name):
    held, changes, told = HELD[name]
    status, out, written = tree("--yes", held=make_golden(**held), candidate=make_golden(-0.3, **changes))
    assert (status, written) == (1, False), out
    assert told in out


def test_what_somebody_made_up_does_not_push_the_machine_out_of_sight(tree):
    prints = {**PRINTS, **{f"a{n:02}": n for n in range(20)}, "hardware": {"device": "gpu"}, "name": "m" + " " * 3000 + "x"}
    _, out, _ = tree(candidate=make_golden(-0.3, fingerprint=prints), fingerprint=prints)
    assert "hardware.device: 'cpu' in the golden, 'gpu' in the candidate" in out
    assert "'m⟨3000 blanks⟩x' in the candidate" in out
    _, out, _ = tree(told={"headline": "off" + " " * 150 + "  measured   0" + "x" * 10_000})
    assert max(map(len, out.splitlines())) < 500


def test_an_honest_candidate_of_another_build_is_accepted(tree):
    """Other noise of the same size, and a reference as far away: nothing is looser."""
    for seed in range(20, 26):
        trace = moved(TRACE, -0.3)
        rows = np.stack([trace.logprobs + noise(trace, 0.0025, seed + n) for n in range(5)]).astype(np.float32)
        made = make_golden(
            -0.3, floor=NoiseFloor(rows, BatchCompositions(), True), reference=reference_of(trace, noise(trace, 0.006, seed))
        )
        assert tree("--yes", candidate=made)[::2] == (0, True)


def test_one_file_that_is_junk_does_not_end_the_review_of_the_others(tree):
    (tree.root / "parity-obtained").mkdir()
    (tree.root / "parity-obtained" / "a.safetensors").write_bytes(b"junk")
    status, out, written = tree("--yes")
    assert (status, written) == (1, True)
    assert "1 accepted, 1 refused; commit the goldens" in out.splitlines()


def test_goldens_that_cannot_all_be_written_are_all_put_back(tmp_path, monkeypatch):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "new", tmp_path / "c"]
    for path in paths[:2]:
        path.write_bytes(b"old")
    real = os.replace
    monkeypatch.setattr(atomic.os, "replace", lambda name, path: 1 / 0 if path == paths[3] else real(name, path))
    with pytest.raises(ZeroDivisionError):
        atomic.replace_all(dict.fromkeys(paths, b"new"))
    assert [path.read_bytes() for path in paths[:2]] == [b"old", b"old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("told", "refusal"),
    [
        ({"golden": "../x.safetensors"}, "not inside this folder"), ({"golden": "/etc/x.safetensors"}, "not inside"),
        ({"golden": "link/x.safetensors"}, "not inside"), ({"golden": ".git/x.safetensors"}, "not inside"),
        ({"golden": "golden/x\0.safetensors"}, "not inside"), ({"golden": "conftest.py"}, "not inside"),
        ({"golden_digest": "0" * 64}, "no longer the one"), ({"candidate": "0" * 64}, "not the candidate of this run"),
        ({"candidate": "", "refusal": "\x1b[2Jnone"}, "␛[2Jnone"), ({"node_id": "test_it.py::other"}, "belongs to"),
    ],
)  # fmt: skip
def test_a_malicious_obtained_trace_is_not_written(tree, told, refusal):
    (tree.root / "link").symlink_to("/tmp")
    status, out, written = tree("--yes", told=told)
    assert (status, written) == (1, False)
    assert refusal in out


def test_a_folder_of_goldens_that_is_a_link_out_of_the_repo(tree, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (tree.root / "golden").symlink_to(outside, target_is_directory=True)
    status, out, written = tree("--yes")
    assert (status, written) == (1, False)
    assert "not inside this folder" in out


def test_a_golden_that_changes_while_somebody_thinks_is_not_overwritten(tree, monkeypatch):
    other = make_golden(0.1)

    def think(text):
        other.save(tree.root / PLACE)
        return "y"

    monkeypatch.setattr("builtins.input", think)
    status, out, _ = tree()
    assert status == 2
    assert "changed since it was shown; nothing was written" in out
    assert Golden.load(tree.root / PLACE).trace.logprobs[0] == other.trace.logprobs[0]


def test_what_loosens_a_golden_is_accepted_by_who_answers_for_it(tree, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda text: "y")
    status, out, written = tree(candidate=make_golden(-0.3, tolerance={"k3": 1.0}))
    assert (status, written) == (0, True)
    assert "  loosened   limit k3: 1 in place of 0.0005" in out


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_goldens_that_cannot_be_looked_at_is_an_error_of_its_checks(pytester, run_inner):
    pytester.makeini(f"[pytest]\nparity_golden_dir = {'x' * 300}")
    pytester.makepyfile(
        test_it="from pytest_logprob_parity import Trace\ndef test_it(golden_trace):\n    golden_trace.check("
        "Trace.from_sequences([dict(prompt_token_ids=[1], token_ids=[3], logprobs=[-0.1])]))\ndef test_other(): pass"
    )
    for option in ((), ("--parity-update=missing",)):
        result = run_inner(*option)
        result.assert_outcomes(passed=1, failed=1)
        result.stdout.fnmatch_lines(["E*GoldenError: *: cannot be read: File name too long"])
        result.stdout.no_fnmatch_line("*INTERNALERROR*")


def test_unfinished_files_are_no_business_of_git(pytester, run_inner):
    pytester.makepyfile(
        test_it="from pytest_logprob_parity import Trace\ndef test_it(golden_trace):\n    golden_trace.check("
        "Trace.from_sequences([dict(prompt_token_ids=[1], token_ids=[3], logprobs=[-0.1])]))"
    )
    run_inner("--update-golden").assert_outcomes(passed=1)
    assert (pytester.path / "golden" / ".gitignore").read_text() == ".*.part\n"


# -- what others wrote ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"floor": {"shapes": {"blocks": 10**9}}}, {"floor": {"shapes": {"blocks": 2.5}}}, {"floor": {"shapes": {"seed": -1}}},
        {"tolerance": {"k3": 10**400}}, {"tolerance": {"k3": False}}, {"tolerance": {"k3": "x"}},
        {"fingerprint": {"libraries": 5}}, {"fingerprint": {"deep": json.loads("[" * 300 + "]" * 300)}},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_end_in_a_traceback_later_is_damaged_now(tmp_path, change):
    path = tmp_path / "g.safetensors"
    make_golden().save(path)
    _, metadata, columns = attack.parts_of(path.read_bytes())
    for part, value in change.items():
        about = metadata["golden"]
        for key, new in value.items():
            (about[part][key].update(new) if isinstance(new, dict) else about[part].update({key: new}))
    path.write_bytes(attack.built(metadata, columns))
    with pytest.raises(GoldenError, match="damaged"):
        Golden.load(path)


def test_a_golden_that_names_a_test_of_5000_letters_ends_no_run(pytester, run_inner):
    golden = pytester.path / "golden" / "gone" / "z-01234567.safetensors"
    make_golden(node_id="a" * 5000 + ".py::t").save(golden)
    pytester.makepyfile(test_it="def test_it(): pass")
    run_inner().assert_outcomes(passed=1)


def test_prune_removes_goldens_and_nothing_else(pytester, capsys):
    pytester.makepyfile(test_it="def test_it(): pass")
    victim = pytester.path / "victim.txt"
    victim.write_text("mine")
    cache = pytester.path / ".pytest_cache" / "v" / "logprob-parity"
    cache.mkdir(parents=True)
    for content in (json.dumps(["victim.txt", str(victim), "../victim.txt", "test_it.py", 5]), "5", '"x"'):
        (cache / "uncompared").write_text(content)
        assert command(capsys, "prune", "--yes")[0] == 0
        pytester.runpytest_inprocess().assert_outcomes(passed=1)
    assert victim.exists()
    assert (pytester.path / "test_it.py").exists()


def test_a_link_in_place_of_a_gitignore_is_not_written_through(pytester, run_inner, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for folder in ("golden", "parity-obtained"):
        (pytester.path / folder).mkdir()
        (pytester.path / folder / ".gitignore").symlink_to(precious)
    source = "from pytest_logprob_parity import Trace\ndef test_it(golden_trace):\n    golden_trace.check(" \
             "Trace.from_sequences([dict(prompt_token_ids=[1], token_ids=[3], logprobs=[%s])]))"  # fmt: skip
    pytester.makepyfile(test_it=source % "-0.1")
    run_inner("--update-golden").assert_outcomes(passed=1)
    pytester.makepyfile(test_it=source % "-9.1")
    run_inner().assert_outcomes(failed=1)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("text", ["[", "[]", "5", "[" * 10_000])
def test_a_model_folder_with_a_configuration_that_is_none(tmp_path, text):
    from pytest_logprob_parity import UsageError
    from pytest_logprob_parity.checkpoint.digests import model_digests

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=r"config\.json"):
        model_digests(tmp_path, tmp_path)


def test_a_plan_that_has_no_end(tmp_path, capsys):
    (tmp_path / "matrix.toml").symlink_to("/dev/zero")
    status, _, err = command(capsys, "matrix", tmp_path / "matrix.toml")
    assert (status, err.count("\n")) == (2, 1)


def test_a_plain_trace_is_not_moved(tmp_path, capsys):
    make_trace().save(tmp_path / "golden" / "t.safetensors")
    status, _, err = command(capsys, "move", "--root", tmp_path, "golden/t.safetensors", "test_it.py::test_it")
    assert (status, err.count("\n")) == (2, 1)
    assert "is no golden that can be read" in err
