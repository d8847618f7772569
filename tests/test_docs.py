"""The documentation: every example runs and shows what comes, the reference leaves nothing out, the site builds strictly."""

import ast
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys

import pytest
from docs_story import Story, blocks_of, masked

import pytest_logprob_parity
from conftest import MODEL, ROOT
from pytest_logprob_parity import EngineSpec, Golden, Tolerance
from pytest_logprob_parity.cli import make_parser, verbs_of
from pytest_logprob_parity.comparison.objectives import OBJECTIVES
from pytest_logprob_parity.comparison.result import CAUSES
from pytest_logprob_parity.comparison.tolerance import LIMITS
from pytest_logprob_parity.plugin.fixtures import FIXTURES
from pytest_logprob_parity.plugin.golden_checks import GoldenTrace
from pytest_logprob_parity.spec import PROFILES
from pytest_logprob_parity.trace import COLUMNS

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
import from_code  # noqa: E402

#: First of all, in this order: one goes on from the other's repo or engine, and an engine that comes back takes half a minute.
TOGETHER = ("tutorial.md", "ci.md", "read-a-failure.md", "report.md", "upgrade-vllm.md", "api.md")
PAGES = sorted(
    [ROOT / "README.md", *DOCS.rglob("*.md")],
    key=lambda page: (TOGETHER.index(page.name) if page.name in TOGETHER else len(TOGETHER), page),
)
#: What pages name, and where it is.
LENT = {
    "checkpoints/policy": MODEL,
    "checkpoints/policy-next": f"{MODEL}-step2",
    "path/to/your/model": MODEL,
    "path/to/your/model-step2": f"{MODEL}-step2",
    "models": ROOT / "models",
}
#: How many blocks may be left to their word, each with its reason. Fenced ones are few; indented ones are measurements.
NOT_RUN = {"fenced": 5, "indented": 32}
V0 = ROOT / "examples" / "v0-to-v1" / "golden"


def name_of(page):
    return page.relative_to(ROOT).as_posix()


# -- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished():
    """Folders of pages that others go on from, by name: copied when they have been run to the end."""
    return {}


@pytest.fixture
def tell(pytester, run_inner, monkeypatch, pool, finished, tmp_path_factory):
    """`tell(page)`: run the blocks of a page in this test's folder, in which `checkpoints/` and `models/` are."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(str(pytester.path))
    for name in [name for name in sys.modules if name.startswith("test_")]:  # a page's tests may be called like ours
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("pytest_logprob_parity.engines.pool.open_engine", lambda spec: Borrowed(pool.engine(spec)))
    monkeypatch.delitem(vars(pytest_logprob_parity), "open_engine", raising=False)
    monkeypatch.setattr(pool, "notify", None)

    def given(name):
        if name == "v0-golden":
            (pytester.path / "golden").mkdir()
            for golden in V0.glob("*T-0.7*"):
                shutil.copy(golden, pytester.path / "golden")
        elif name not in finished:
            run(DOCS / f"{name}.md")
        else:
            shutil.copytree(finished[name], pytester.path, dirs_exist_ok=True)

    def run(page):
        furnish(pytester.path)
        story = Story(pytester.path, run_inner, given)
        for block in blocks_of(page):
            if not block.how and not block.language.startswith("{"):
                story.tell(block)
        story.end()
        if page.stem == "tutorial":
            finished["tutorial"] = tmp_path_factory.mktemp("tutorial") / "repo"
            shutil.copytree(
                pytester.path, finished["tutorial"], ignore=shutil.ignore_patterns(*(name.partition("/")[0] for name in LENT))
            )

    yield run
    vars(pytest_logprob_parity).pop("open_engine", None)


class Borrowed:
    """`with open_engine(...)` on an engine of the whole run."""

    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        return self.engine

    def __exit__(self, *error):
        pass


def furnish(folder):
    """Put what pages name into a folder."""
    for name, target in LENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).symlink_to(target)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_runs_from_top_to_bottom(page, tell):
    tell(page)


def test_few_examples_are_not_run_and_each_says_why():
    left = {"fenced": [], "indented": []}
    for page in PAGES:
        for block in blocks_of(page):
            if block.how == "not run":
                assert len(block.reason.split()) >= 3, f"{block}: that is no reason"
                left["indented" if block.language == "indented" else "fenced"].append(block)
            elif block.how == "run by":
                file, _, test = block.reason.partition("::")
                assert f"\ndef {test}(" in (ROOT / file).read_text(), f"{block}: no {test} in {file}"
    assert {kind: len(blocks) <= NOT_RUN[kind] for kind, blocks in left.items()} == dict.fromkeys(left, True), left


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```console\n$ echo one\ntwo\n```", "echo one: this did not come:\ntwo"),
        ("```console\n$ echo one; echo two\none\n```", "the page does not show:\ntwo"),
        ("```console\n$ false\n```", "false: status 1"),
        ("```sh\nfalse\n```", "false: status 1"),
        ("```python\nprint(1 + 1)\n```\n\n```text\ntwo\n```", "this did not come:\ntwo"),
        ("```python\n# tests/test_x.py\ndef test(): assert False\n```", "its test fails"),
        ("```python\n# rl/rollouts.py\n```", "nothing reads the file"),
        ("```console\n$ logprob-parity show none\n...: there is a file\n```", "this did not come"),
        ("```console\n$ pip install pytest-logprob-parity[gpus]\n```", "gpus"),
        ("    indented\n", "nobody runs indented"),
        ("<!-- not rn: because -->\n\n```sh\nfalse\n```", "not a mark that tests know"),
        ("<!-- not run: because of that -->\n\ntext", "a mark stands before a block"),
    ],
)
def test_a_page_that_does_not_hold_fails(page, complaint, tell, tmp_path):
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError) as error:
        tell(tmp_path / "page.md")
    assert complaint in str(error.value)


def test_masks_leave_the_words():
    assert masked(["  RMS 0.0031 of 1,024 (2)", "", "RMS  1e-06 of 7 (1)", "mean 2"]) == ["RMS 0 of 0 (0)", "mean 0"]
    assert masked(["  8  12  -2.4 (2)  'five' after '...We count: '"]) == ["0 0 0 (0) TOKEN"]


# -- the reference ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """The pages of the reference, with what is written from the code."""
    return {page.stem: from_code.fill(page.read_text()) for page in (DOCS / "reference").glob("*.md")}


def rows(page, column=0):
    """The code in a column of all tables of a page: what it has rows for."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines() if line.startswith("|")]
    return {name for cell in cells if len(cell) > column for name in re.findall(r"`([^`]+)`", cell[column])}


def test_every_option_and_ini_key_is_in_the_reference(reference, pytestconfig):
    names = {row.partition("=")[0] for row in rows(reference["pytest"])}
    options = {
        name for group in pytestconfig._parser._groups for option in group.options for name in option.names()
        if name.startswith("--parity") or name == "--update-golden"
    }  # fmt: skip
    assert len(options) >= 6
    assert options <= names | {"--update-golden"}
    assert "`--update-golden`" in reference["pytest"]
    keys = {name for name in pytestconfig._parser._inidict if name.startswith("parity_")}
    assert len(keys) >= 7
    assert keys <= names


def test_every_marker_keyword_fixture_and_profile_is_in_the_reference(reference):
    page = reference["pytest"]
    assert set(EngineSpec.field_names()) <= rows(page)
    assert set(PROFILES) <= rows(page)
    for name in FIXTURES:
        assert re.search(rf"^`{name}` \(\w+ scope\)\n: \w", page, re.MULTILINE), name
    assert set(inspect.signature(GoldenTrace.check).parameters) - {"self"} <= rows(page)


def test_every_command_and_flag_is_in_the_reference(reference):
    page = reference["commands"]
    verbs = verbs_of(make_parser())
    assert {"show", "diff", "accept", "report", "diagnose", "bisect", "matrix", "selftest"} <= set(verbs)
    for name, verb in verbs.items():
        section = re.search(rf"^### {name}$(.*?)(^### |\Z)", page, re.MULTILINE | re.DOTALL)[1]
        told = {row.split()[0] for row in rows(section)}
        for action in verb._actions:
            assert {action.option_strings[-1] if action.option_strings else action.metavar or action.dest} <= told | {"--help"}


def test_every_name_of_the_face_is_in_the_reference(reference):
    entries = re.findall(r"^### (\w+)$", reference["api"], re.MULTILINE)
    assert len(entries) == len(set(entries))
    assert set(pytest_logprob_parity.__all__) <= set(entries)
    for name in pytest_logprob_parity.__all__:
        thing = getattr(pytest_logprob_parity, name)
        assert inspect.getdoc(thing), name
        for member, label, _ in from_code.members(thing) if inspect.isclass(thing) else ():
            assert f"`{label}`\n: " in reference["api"], f"{name}.{member}"


def test_every_public_method_says_what_it_does():
    for name in pytest_logprob_parity.__all__:
        thing = getattr(pytest_logprob_parity, name)
        for member, _, text in from_code.members(thing) if inspect.isclass(thing) else ():
            assert text, f"{name}.{member} has no docstring"


def test_every_column_and_key_of_the_file_is_in_the_reference(reference):
    page = reference["golden-file"]
    table = {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in
             (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| `"))}  # fmt: skip
    axes = {
        "prompt tokens": "P",
        "groups + 1": "G + 1",
        "tokens": "N",
        "sequences + 1": "S + 1",
        "sequences": "S",
        "kept tokens": "M",
    }
    for name, (dtype, axis, needed) in COLUMNS.items():
        shape = axes[axis] + (", K" if name.startswith("top_") else {"routed_experts": ", L, E"}.get(name, ""))
        shape += ", L" if name.startswith("router_") else ""
        assert table[f"`{name}`"][:2] == [dtype, shape], name
        assert ("optional" in table[f"`{name}`"][2]) is not needed, name
    assert table["`floor_logprobs`"][:2] == ["float32", "R, N"]
    assert table["`reference_logprobs`"][:2] == ["float32", "N"]
    for path in [*(ROOT / "golden").rglob("*.safetensors"), *(ROOT / "examples" / "quickstart").rglob("*.safetensors")]:
        metadata = header(path)
        keys = {f"{part}.{key}" for part in ("trace", "golden") for key in metadata[part]} | {*metadata} - {"trace", "golden"}
        assert keys <= rows(page)
        assert set(metadata["golden"]["fingerprint"]) <= rows(page)
        assert set(metadata["golden"]["floor"] or {}) <= rows(page, 1)
        assert set(metadata["golden"].get("reference") or {}) <= rows(page, 1)
        assert set(Golden.load(path).fingerprint["hardware"]) <= rows(page, 1) | rows(page)
    assert f"| `schema` | {metadata['schema']};" in page


def header(path):
    """The metadata of a golden, as any reader of safetensors sees it."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["logprob_parity"])


def test_every_limit_metric_and_cause_is_in_the_reference(reference):
    page = reference["verdicts"]
    assert {*LIMITS, *OBJECTIVES} <= rows(page)
    for field in dataclasses.fields(Tolerance):
        assert f"`{field.name}`" in page, field.name
    trace = Golden.load(next((ROOT / "golden").rglob("*.safetensors"))).trace
    metrics = pytest_logprob_parity.compare(expected=trace, actual=trace).metrics
    assert len(metrics) > 20
    assert set(metrics) <= rows(page)
    table = re.findall(r"^\| (\w+) \| `(\w+)` \| \w", page, re.MULTILINE)
    assert table == [(layer, cause) for layer, causes in CAUSES.items() for cause in causes]


# -- what pages name exists -------------------------------------------------------------------------------------------


def test_pages_name_options_and_keys_that_exist(pytestconfig):
    options = set(from_code.Registered().options)
    keys = set(from_code.Registered().ini) | set(FIXTURES)
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"--parity-[a-z-]+", text)) <= options, page.name
        assert set(re.findall(r"\bparity_[a-z_]+", text)) <= keys, page.name


def test_commands_that_are_not_run_are_spelt_right(capsys):
    """Every `logprob-parity VERB --flags` in a block that is not run has a verb and flags that exist."""
    parser = make_parser()
    verbs = verbs_of(parser)
    seen = 0
    for block in (block for page in PAGES for block in blocks_of(page) if block.how):
        for command in re.findall(r"^[$ ]*logprob-parity (.*(?:\\\n.*)*)", block.text, re.MULTILINE):
            verb, *words = command.split()
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            known = set((parser if verb.startswith("-") else verbs[verb])._option_string_actions)
            assert flags | ({verb} if verb.startswith("-") else set()) <= known or verb == "serve", (
                f"{block}: {command}"
            )  # serve hands what it does not know to vLLM
            seen += 1
    assert seen > 5


def test_calls_that_are_not_run_have_arguments_that_exist():
    """In blocks that are not run, too, a call of a public function or of an engine names arguments that it has."""
    known = {name: getattr(pytest_logprob_parity, name) for name in pytest_logprob_parity.__all__}
    known |= {
        f"engine.{name}": member for name, member in vars(pytest_logprob_parity.Engine).items() if inspect.isfunction(member)
    }
    known["golden_trace.check"] = GoldenTrace.check
    seen = 0
    for block in (block for page in PAGES for block in blocks_of(page) if block.how):
        for line in block.text.splitlines():
            for call in calls_of(line):
                if (thing := known.get(ast.unparse(call.func))) is None:
                    continue
                parameters = inspect.signature(thing).parameters
                if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                    assert {keyword.arg for keyword in call.keywords} <= set(parameters), f"{block}: {line}"
                    seen += 1
    assert seen > 3


def calls_of(line):
    try:
        tree = ast.parse(line.strip())
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_code_names_pages_that_exist():
    for file in [ROOT / "README.md", *(ROOT / "pytest_logprob_parity").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for path in re.findall(r"\bdocs/[\w/-]+\.(?:md|txt|svg|png)", file.read_text()):
            assert (ROOT / path).is_file(), f"{file.name} names {path}"


# -- the site ---------------------------------------------------------------------------------------------------------


def build(source, out):
    """Build the site as `make docs` does; gives the finished process."""
    options = ["-q", "-n", "-W", "--keep-going", "-d", str(out / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(out / "html")]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("sphinx", "sphinx_copybutton"):
        pytest.importorskip(name, reason="`make docs` and `make test` install it (requirements/docs.txt)")
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file()
    loading = re.compile(
        r"<(?:link|script|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//|@import|url\([\"']?(?:https?:)?//"
    )
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert not loading.search(file.read_text()), file.name


def test_a_broken_link_a_missing_anchor_and_an_unlisted_page_are_errors(site, tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    shutil.copytree(DOCS, repo / "docs")
    for name in ("examples", "pytest_logprob_parity"):
        (repo / name).symlink_to(ROOT / name)
    for page in (repo / "docs").rglob("*.md"):
        if page.name != "index.md":
            page.unlink()
    (repo / "docs" / "index.md").write_text(
        "# Top\n\n[a](gone.md) [b](#nowhere) [c](other.md#nowhere)\n\n```{toctree}\nother\n```\n"
    )
    (repo / "docs" / "other.md").write_text("# Other\n")
    (repo / "docs" / "lonely.md").write_text("# Lonely\n")
    done = build(repo / "docs", tmp_path)
    assert done.returncode != 0
    for what in (
        "index.md:3: WARNING: 'myst' cross-reference target not found: 'gone.md'",
        "index.md:3: WARNING: 'myst' cross-reference target not found: 'nowhere'",
        "index.md:3: WARNING: local id not found in doc 'other': 'nowhere'",
        "lonely.md: WARNING: document isn't included in any toctree",
    ):
        assert what in done.stderr
