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

from pytest_logprob_parity import Golden, GoldenError, MismatchError, Trace, check_golden
from pytest_logprob_parity.golden import golden_path, unused_goldens
from pytest_logprob_parity.golden.noise_floor import NoiseFloor
from pytest_logprob_parity.trace.batch_composition import BatchCompositions

SCHEMA_1 = Path(__file__).parent / "data" / "schema-1.safetensors"  # recorded by commit e505dbf on vLLM 0.32.0, bfloat16


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
    Golden(make_trace(), fingerprint={"name": "m"}, prompts_digest="abc", node_id="test_a.py::test_b").save(path)
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


def test_older_schema_is_read_and_has_no_noise_floor(golden_file):
    assert SCHEMA_1.read_bytes().count(rb"\"schema\":1") == 1
    golden = Golden.load(SCHEMA_1)
    assert (golden.floor, golden.tolerance) == (None, {})
    assert (golden.trace.num_sequences, golden.trace.num_tokens, golden.trace.dtype) == (9, 54, "bfloat16")
    assert golden.fingerprint["engine"] == {"kind": "vllm", "version": "0.32.0"}
    golden.save(golden_file)  # and what is written is of today's schema
    assert golden_file.read_bytes().count(rb"\"schema\":2") == 1
    np.testing.assert_array_equal(Golden.load(golden_file).trace.logprobs, golden.trace.logprobs)


def test_without_a_noise_floor_only_level_noise_shows_nothing():
    trace = Trace.load(SCHEMA_1)
    assert check_golden(SCHEMA_1, trace, level="noise").headline == "54 logprobs agree bit for bit"
    near = trace.with_(logprobs=trace.logprobs - np.float32(1e-4))
    result = check_golden(SCHEMA_1, near)
    assert result.headline == "54 logprobs agree within tolerance (no noise floor)"
    assert "no_floor" in [note.key for note in result.notes]
    with pytest.raises(MismatchError, match=r"unverified: Inconclusive: .* the golden has no noise floor"):
        check_golden(SCHEMA_1, near, level="noise")


def test_repeats_and_what_is_said_of_them_come_together(golden_file):
    """A file that has one and not the other was not written by us."""
    from pytest_logprob_parity.trace import file_format

    trace = make_trace()
    floor = NoiseFloor(np.stack([trace.logprobs] * 2), BatchCompositions(), reproduces=True)
    Golden(trace=trace, floor=floor).save(golden_file)
    columns, metadata = file_format.read(golden_file)
    assert columns["floor_logprobs"].shape == (2, 50)
    header = {"trace": metadata["trace"], "golden": metadata["golden"]}
    file_format.write(golden_file, {k: v for k, v in columns.items() if k != "floor_logprobs"}, header)
    assert "parts are missing" in one_line(golden_file)
    file_format.write(golden_file, columns, header | {"golden": metadata["golden"] | {"floor": None}})
    assert "parts are missing" in one_line(golden_file)
    wrong = metadata["golden"]["floor"] | {"shapes": {"blocks": 0}}
    file_format.write(golden_file, columns, header | {"golden": metadata["golden"] | {"floor": wrong}})
    assert "damaged: its golden header does not hold what it should" in one_line(golden_file)


def test_git_lfs_pointer(golden_file):
    golden_file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    assert "run `git lfs pull`" in one_line(golden_file)


def test_a_directory_in_its_place(golden_file):
    golden_file.unlink()
    golden_file.mkdir()
    assert "a directory stands where the golden should be" in one_line(golden_file)
    with pytest.raises(GoldenError, match="a directory stands"):
        Golden(trace=make_trace()).save(golden_file)


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
        Golden(trace=make_trace(100_000)).save(golden_file, max_megabytes=1)
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
        Golden(trace=make_trace(20_000, seed)).save(path)


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
        Golden(trace=make_trace(), node_id=node_id).save(golden_path(tmp_path, node_id))
    assert unused_goldens(tmp_path, ["t.py"], ["t.py::test_kept"]) == [golden_path(tmp_path, "t.py::test_gone")]
