"""One check as results.json has it, from what the check saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..check.context import Checked
from ..checkpoint.digests import find_model
from ..comparison.message import side
from ..comparison.result import Comparison
from ..errors import ParityError
from ..golden import describe
from .chart_numbers import plots_of, short
from .finite_json import finite
from .history.run_record import made_by
from .outcomes import Outcome
from .worst_sequences import texts_of, worst_sequences

_JUDGED: Final = ("verdict", "level", "objective", "setup", "difference", "shown", "free_run", "logged")
_LISTS: Final = ("findings", "gates", "shows", "notes")
_NUMBERS: Final = ("metrics", "policy_metrics")


def make_entry(
    about: Mapping[str, Any],
    outcome: Outcome,
    headline: str,
    comparison: Comparison | None,
    checked: Checked | None,
    root: Path,
) -> dict[str, Any]:
    """The check `about` (node_id, name, file, line, golden, message, obtained, refusal, commands) as results.json has it.

    `comparison` is None where nothing was judged, `checked` where there is no golden that something was held against; `root`
    is where the model may lie, whose tokenizer gives the texts.
    """
    entry: dict[str, Any] = {
        **about,
        "outcome": outcome,
        "headline": headline,
        "now": "",
        "golden": {"path": about["golden"], "digest": "", "about": []},
        **dict.fromkeys(_JUDGED),
        **{name: [] for name in _LISTS},
        **{name: {} for name in _NUMBERS},
        "fingerprint_differences": [],
        "plots": None,
        "sequences": [],
        "token_texts": {},
        "outlier": None,
        "made_by": made_by(comparison, checked),
    }
    if comparison is not None:
        told = comparison.to_json()
        entry |= {name: told[name] for name in (*_JUDGED, *_LISTS, *_NUMBERS)}
    if checked is not None:
        entry |= _numbers(checked, root)
        entry["golden"] |= {"digest": checked.golden.digest, "about": list(describe(checked.golden))}
    return dict(finite(entry))


def _numbers(checked: Checked, root: Path) -> dict[str, Any]:
    comparison = checked.comparison
    sequences = worst_sequences(comparison)
    return {
        "now": side(comparison.actual),
        "fingerprint_differences": differences_to_json(checked.differences),
        "plots": plots_of(comparison, checked.golden.floor),
        "sequences": sequences,
        "token_texts": texts_of(sequences, comparison.expected, _model_folder(checked, root)),
        "outlier": _outlier(comparison),
    }


def differences_to_json(differences: Sequence[tuple[str, Any, Any]]) -> list[dict[str, Any]]:
    """Fingerprint differences as results.json and `diff --json` have them."""
    return [{"name": name, "expected": expected, "actual": actual} for name, expected, actual in differences]


def _outlier(comparison: Comparison) -> float | None:
    """The |d| that counts as an outlier token, as its gate names it."""
    marked = [gate.threshold for gate in comparison.gates if gate.key == "outlier_tokens"]
    return short(marked[0]) if marked and np.isfinite(marked[0]) else None


def _model_folder(checked: Checked, root: Path) -> Path | None:
    for prints in (checked.fingerprint, checked.golden.fingerprint):
        try:
            return find_model(str(prints["name"]), root)
        except (ParityError, KeyError):
            continue
    return None
