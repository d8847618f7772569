"""`--parity-diagnose`: where a check failed, which setting accounts for it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ..comparison.result import MismatchError
from ..errors import ParityError
from .records import Records
from .stash import pool_of, tell

if TYPE_CHECKING:
    from ..engines.engine import Engine
    from ..trace import Trace


def diagnosed(
    error: MismatchError, path: Path, engine: Engine | Trace, config: pytest.Config, records: Records
) -> MismatchError:
    """The error with what an ablation found; as it is where there is no engine to ask, or where it cannot be asked."""
    from ..comparison.message import failure_message
    from ..diagnosis.ablation import Budget, ablate
    from ..engines.engine import Engine
    from ..golden import Golden, describe
    from ..golden.fingerprint import differences

    if not isinstance(engine, Engine):
        return error
    comparison, message = error.comparison, str(error)
    if comparison.verdict != "fail":
        found = ["none: no mismatch was shown"]
    else:
        try:
            golden, spec = Golden.load(path), engine.spec
            ablation = ablate(golden, spec, pool_of(config), Budget(), lambda line: tell(config, line))
            comparison = dataclasses.replace(comparison, findings=tuple(ablation.weigh(comparison.findings)))
            message = failure_message(
                comparison,
                golden=records.shown(path),
                about=describe(golden),
                differences=differences(golden.fingerprint, engine.fingerprint()) if golden.fingerprint else [],
                accept=records.command("--update-golden"),
            )
            found = ablation.describe()
        except ParityError as problem:
            found = [f"not possible: {str(problem).splitlines()[0]}"]
    lines = [f"{'diagnosis' if n == 0 else '':<13}{line}" for n, line in enumerate(found)]
    return MismatchError("\n".join([message, "", *lines]), comparison)
