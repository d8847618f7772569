"""The package: its face (light to import, complete, honest to type checkers), its metadata, and what is installed beside it."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from email import message_from_string
from pathlib import Path

import pytest

import pytest_logprob_parity
from conftest import ROOT
from pytest_logprob_parity import reasons
from pytest_logprob_parity.matrix.plan import tomllib
from pytest_logprob_parity.reasons import reason_of

HEAVY = ("torch", "vllm", "transformers", "numpy", "safetensors", "jinja2")


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


# -- what is installed beside it --------------------------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """`installed(torch="2.13.0+cpu")`: nothing else is."""
    return lambda **versions: monkeypatch.setattr(reasons, "installed_version", versions.get)


def test_a_cuda_build_beside_a_torch_for_cpus_is_named_with_its_fix(installed):
    installed(torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.11.1", torchcodec="0.17.0")
    said = reason_of(RuntimeError("operator torchvision::nms does not exist"))
    assert said.endswith(": pip uninstall torchvision torchaudio torchcodec")
    assert said.removeprefix("RuntimeError: ") in (ROOT / "docs" / "how-to" / "install.md").read_text()
    installed(torch="2.13.0+cpu", torchvision="0.28.0+cpu", torchaudio="2.11.1")
    said = reason_of(OSError("libc10_cuda.so: cannot open shared object file: No such file or directory"))
    assert said.endswith(": pip uninstall torchaudio")


@pytest.mark.parametrize(
    ("versions", "reason"),
    [
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, "max_model_len is too large"),
        ({"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}, "operator torchvision::nms does not exist"),
        ({"torch": "2.13.0", "torchvision": "0.27.0"}, "operator torchvision::nms does not exist"),
        ({"torch": "2.13.0+cpu"}, "libnuma.so.1: cannot open shared object file: No such file or directory"),
        ({}, "libnuma.so.1: cannot open shared object file: No such file or directory"),
    ],
)
def test_other_errors_and_builds_of_one_kind_get_no_such_fix(installed, versions, reason):
    installed(**versions)
    assert reason_of(RuntimeError(reason)) == f"RuntimeError: {reason}"


# -- metadata, and the source distribution ----------------------------------------------------------------------------

#: What a checkout has besides what is in it.
_MADE = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "parity-*")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the source in which setuptools may write; `build(hook, out)` calls a hook of its build backend there."""
    folder = tmp_path_factory.mktemp("copy") / "repo"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_MADE))
    return folder


def build(hook, folder, out):
    out.mkdir(exist_ok=True)
    code = f"import setuptools.build_meta as backend; backend.{hook}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def metadata(folder, out):
    (file,) = build("prepare_metadata_for_build_wheel", folder, out).glob("*.dist-info/METADATA")
    return message_from_string(file.read_text())


def links_of(text):
    return re.findall(r"\]\(([^)]+)\)", text)


def test_metadata_without_an_address_has_no_dead_link(copy, tmp_path):
    told = metadata(copy, tmp_path / "out")
    assert told["Author"]
    assert told["License-Expression"] == "Apache-2.0"
    assert "Framework :: Pytest" in told.get_all("Classifier")
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest-logprob-parity"]["repository"]
    assert bool(told.get_all("Project-URL")) == bool(repository)
    assert all(link.startswith("https://") for link in links_of(told.get_payload()))
    assert told["Description-Content-Type"] == "text/markdown"


def test_an_address_makes_urls_and_absolute_links(copy, tmp_path):
    repo = tmp_path / "repo"
    shutil.copytree(copy, repo, ignore=shutil.ignore_patterns("models", "examples", "docs", *_MADE))
    text = re.sub(
        r'^repository = ".*"', 'repository = "https://host/owner/name/"', (repo / "pyproject.toml").read_text(), flags=re.M
    )
    (repo / "pyproject.toml").write_text(text)
    told = metadata(repo, tmp_path / "out")
    urls = dict(entry.split(", ") for entry in told.get_all("Project-URL"))
    assert urls["Homepage"] == "https://host/owner/name"
    assert set(urls) == {"Homepage", "Documentation", "Changelog", "Issues"}
    links, relative = links_of(told.get_payload()), links_of((ROOT / "README.md").read_text())
    assert len(links) == len(relative) > 5
    assert links[0] == f"https://host/owner/name/blob/main/{relative[0]}"


def test_links_in_a_page_of_another_site_and_anchors_stay():
    readme_for = runpy.run_path(str(ROOT / "setup.py"))["readme_for"]
    text = "[a](https://b.c/d) [e](#f) [`g`](h/i.md)"
    assert readme_for(text, "") == "[a](https://b.c/d) [e](#f) `g`"
    assert readme_for(text, "https://x") == "[a](https://b.c/d) [e](#f) [`g`](https://x/blob/main/h/i.md)"


def test_links_of_the_readme_lead_to_files():
    for link in links_of((ROOT / "README.md").read_text()):
        file, _, heading = link.partition("#")
        assert (ROOT / file).exists(), link
        if heading:
            lines = (ROOT / file).read_text().splitlines()
            headings = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
            assert heading in [re.sub(r"[^\w -]", "", text).replace(" ", "-") for text in headings], link


def test_tests_run_from_the_source_distribution(copy, tmp_path):
    """All that is in git is in it, and nothing else; it is small."""
    (archive,) = build("build_sdist", copy, tmp_path / "dist").glob("*.tar.gz")
    assert archive.stat().st_size < 10e6
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # from 3.11.4 on
    (unpacked,) = tmp_path.glob("pytest_logprob_parity-*")
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in there if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
        assert there - made == {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert {"tests/test_trace.py", "conftest.py", "Makefile", "requirements/tools.txt", "docs/index.md"} <= there
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_trace.py"]
    done = subprocess.run(
        command, cwd=unpacked, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(unpacked)}
    )
    assert done.returncode == 0, done.stdout


def test_the_install_page_has_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "how-to" / "install.md").read_text()
    assert re.findall(r"^\| `\[([\w-]+)\]` \|", page, re.MULTILINE) == list(extras)
