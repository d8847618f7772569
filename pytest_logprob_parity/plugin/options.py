"""The command line and the ini file: every option and every key, in two tables."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Final

import pytest

from ..comparison.vocabulary import LEVELS
from ..trainer.frameworks import FRAMEWORKS

UPDATES: Final = ("all", "missing", "failed")
#: Those of comparison/objectives.py and check/reference_pass.py, which are not imported here.
OBJECTIVES: Final = ("token", "sequence", "truncated", "unclipped")
REFERENCES: Final = ("auto", "transformers", "engine", "none")

#: Option -> arguments of `addoption`.
_OPTIONS: Final[Mapping[str, Mapping[str, Any]]] = {
    "--parity-update": {
        "choices": UPDATES,
        "default": None,
        "help": "record goldens: all, those that are missing, or those whose check fails; --update-golden means all",
    },
    "--parity-set": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "override an engine setting in every test of this run, e.g. logprobs_mode=raw_logprobs",
    },
    "--parity-variant": {
        "default": "",
        "metavar": "NAME",
        "help": "check against, or record, the goldens of this name beside the others: for another kind of machine",
    },
    "--parity-server": {
        "default": None,
        "metavar": "URL",
        "help": "ask a running vLLM server (see `logprob-parity serve`) in place of every vLLM engine of this run",
    },
    "--parity-level": {
        "choices": LEVELS,
        "default": None,
        "help": "what fails: any bit that differs, a difference larger than the noise floor, or (default) what matters for RL",
    },
    "--parity-diagnose": {
        "action": "store_true",
        "default": False,
        "help": "if a check fails, replay its golden with each setting of the golden, and say how much each one explains",
    },
    "--parity-metrics": {
        "choices": FRAMEWORKS,
        "metavar": "FRAMEWORK",  # without it argparse lists the choices, and so reads all installed entry points, at each start
        "default": None,
        "help": "show each check also in the metrics of this training framework (trl, verl, ...): the golden is the rollout, "
        "the engine is the trainer",
    },
    "--parity-report": {
        "default": None,
        "metavar": "DIR",
        "help": "write a report of all checks there: index.html, results.json, summary.md",
    },
}

#: Key -> (help, default); a key with a list has a line for each of its values.
_INI: Final[Mapping[str, tuple[str, str | list[str]]]] = {
    "parity_level": ("what fails: bitwise, noise or rl", "rl"),
    "parity_objective": ("what matters to an update: token, sequence, truncated or unclipped ratios", "token"),
    "parity_unchecked": (
        "what a test that passes and compared nothing does: error, or warn (default: error where it has a golden, else warn)",
        "",
    ),
    "parity_unverified": ("what an unverified check does: fail, or warn in the summary", "fail"),
    "parity_reference": ("who computes the reference in float32 at recording: auto, transformers, engine, none", "auto"),
    "parity_repeats": ("how often recording replays its tokens, for the noise floor; 0: none", "5"),
    "parity_obtained": (
        "what a failing check leaves: golden (its trace, and a golden to accept, recorded there and then), or trace",
        "golden",
    ),
    "parity_golden_dir": ("folder of the goldens, relative to the root", "golden"),
    "parity_engine": ("engine settings for all tests, KEY=VALUE a line", []),
    "parity_tolerance": ("limits, [dtype.[path.]]limit = number a line", []),
    "parity_history": ("a file that each run adds a line to: a few numbers of each check, to see them drift", ""),
    "parity_max_golden_mb": ("refuse to record a golden larger than this, in MB", "20"),
    "parity_start_timeout": ("how long an engine may take to start, in seconds; 0: no limit", "1800"),
    "parity_call_timeout": ("how long one call of an engine may take, in seconds; 0: no limit", "3600"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("logprob-parity", "golden traces of inference engines")
    for name, arguments in _OPTIONS.items():
        group.addoption(name, **arguments)
    for name, (help_, default) in _INI.items():
        if isinstance(default, list):
            parser.addini(name, help_, type="linelist", default=default)
        else:
            parser.addini(name, help_, default=default)


@pytest.hookimpl(wrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser, args: list[str]) -> Generator[None, object, object]:
    """Register --update-golden, but only where it was given and no conftest has taken the name for itself."""
    result = yield
    if "--update-golden" in parser.parse_known_and_unknown_args(args)[1]:
        parser.getgroup("logprob-parity").addoption("--update-golden", action="store_true", default=False)
    return result
