"""The golden's file: what is wrong with it is one clear line, and nothing that fails costs the old one."""

import json
import multiprocessing
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from pytest_logprob_parity import Golden, GoldenError, Trace
from pytest_logprob_parity.golden import golden_path, unused_goldens


def make_trace(tokens=50, seed=0):
    rng = np.random.default_rng(seed)
    return Trace.from_arrays(
        prompt_token_ids=[1, 2, 3],
        prompt_offsets=[0, 3],
        token_ids=rng.integers(0, 100, tokens),
        sequence_offsets=[0, tokens],
        logprobs=-rng.random(tokens),
    )


@pytest.fixture
def golden_file(tmp_path):
    path = tmp_path / "golden" / "g.safetensors"
    Golden(make_trace(), {"name": "m"}, "abc", "test_a.py::test_b").save(path)
    return path


def one_line(path):
    with pytest.raises(GoldenError) as error:
        Golden.load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_golden_comes_back_whole(golden_file):
    golden = Golden.load(golden_file)
    assert (golden.node_id, golden.prompts_digest, golden.fingerprint) == ("test_a.py::test_b", "abc", {"name": "m"})
    np.testing.assert_array_equal(golden.trace.logprobs, make_trace().logprobs)


def test_missing(tmp_path):
    assert "there is no such file" in one_line(tmp_path / "none.safetensors")


@pytest.mark.parametrize("length", [0, 7, 8, 100, 1000, -1])
def test_cut_short(golden_file, length):
    golden_file.write_bytes(golden_file.read_bytes()[:length])
    assert "damaged" in one_line(golden_file)


def test_any_flipped_bit_is_found(golden_file):
    data = golden_file.read_bytes()
    for place in range(0, len(data), 97):
        golden_file.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        one_line(golden_file)
    golden_file.write_bytes(data)
    Golden.load(golden_file)


def test_newer_schema(golden_file):
    data = golden_file.read_bytes()
    assert data.count(rb"\"schema\":2") == 1
    golden_file.write_bytes(data.replace(rb"\"schema\":2", rb"\"schema\":7"))
    assert "written in schema 7, this version of pytest-logprob-parity reads up to 2; upgrade it" in one_line(golden_file)


def test_git_lfs_pointer(golden_file):
    golden_file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    assert "run `git lfs pull`" in one_line(golden_file)


def test_a_directory_in_its_place(golden_file):
    golden_file.unlink()
    golden_file.mkdir()
    assert "a directory stands where the golden should be" in one_line(golden_file)
    with pytest.raises(GoldenError, match="a directory stands"):
        Golden(make_trace()).save(golden_file)


def test_unreadable(golden_file):
    golden_file.unlink()
    golden_file.symlink_to(golden_file.name)  # unreadable for root too, who may read everything else
    assert "cannot be read: Too many levels of symbolic links" in one_line(golden_file)


def test_another_safetensors_file(golden_file):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, golden_file)
    assert "no readable logprob-parity header" in one_line(golden_file)


def test_a_header_is_data_and_nothing_else(golden_file):
    header = json.dumps({"__metadata__": {"logprob_parity": "__import__('os').abort()"}}).encode()
    golden_file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "no readable logprob-parity header" in one_line(golden_file)


def test_too_large_is_refused_and_says_what_would_fit(golden_file):
    before = golden_file.read_bytes()
    with pytest.raises(GoldenError, match=r"parity_max_golden_mb is 1\b.*would fit: sample fewer prompts"):
        Golden(make_trace(100_000)).save(golden_file, max_megabytes=1)
    assert golden_file.read_bytes() == before


def test_a_full_disk_leaves_the_old_golden(golden_file):
    before = golden_file.read_bytes()
    code = textwrap.dedent(f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_golden_file import Golden, GoldenError, make_trace
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            Golden(make_trace(100_000)).save(Path({str(golden_file)!r}))
        except GoldenError as error:
            print(error)
    """)
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "not written (File too large); the old golden is as it was" in told
    assert golden_file.read_bytes() == before
    assert [p.name for p in golden_file.parent.iterdir()] == [golden_file.name]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def _save_many(path, seed):
    for _ in range(60):
        Golden(make_trace(20_000, seed)).save(path)


def test_of_two_updates_at_once_the_last_one_wins_whole(golden_file):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_save_many, args=(golden_file, seed)) for seed in (1, 2)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(w.is_alive() for w in writers):
        Golden.load(golden_file)  # raises where it is not whole
        seen += 1
    assert [w.exitcode for w in writers] == [0, 0]
    assert seen > 1
    last = Golden.load(golden_file).trace.logprobs
    assert any(np.array_equal(last, make_trace(20_000, seed).logprobs) for seed in (1, 2))
    assert [p.name for p in golden_file.parent.iterdir()] == [golden_file.name]


def test_names_never_collide(tmp_path):
    ids = ["t.py::test[a/b]", "t.py::test[ab]", "t.py::test[a:b]", "t.py::test[a b]", "sub/t.py::test[ab]"]
    paths = {golden_path(tmp_path, node_id) for node_id in ids} | {golden_path(tmp_path, ids[0], "x")}
    assert len(paths) == len(ids) + 1
    assert all(p.is_relative_to(tmp_path) for p in paths)


def test_goldens_whose_test_is_gone_are_unused(tmp_path):
    for node_id in ("t.py::test_kept", "t.py::test_gone", "other.py::test_x"):
        Golden(make_trace(), node_id=node_id).save(golden_path(tmp_path, node_id))
    assert unused_goldens(tmp_path, ["t.py"], ["t.py::test_kept"]) == [golden_path(tmp_path, "t.py::test_gone")]
