"""Check that a stored golden belongs to the plan: its model, prompts, sampling and settings of the reference."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path, PurePath
from typing import Any, Final

from ..check.compatibility import another_part
from ..checkpoint.digests import find_model, model_digests
from ..errors import IncomparableError, UsageError
from ..golden import Golden
from ..spec import Sampling
from ..trace import file_format
from .plan import Cell, Matrix

#: The metadata key under which a golden's file keeps `settings_of` its reference.
SETTINGS: Final = "matrix"


def settings_of(reference: Cell) -> dict[str, Any]:
    """The settings of the reference as the plan has them, which a golden does not otherwise hold."""
    return dict(reference.settings)


def check_is_of_plan(place: Path, matrix: Matrix, reference: Cell, sampling: str, prompts: list[list[int]]) -> None:
    """Raise IncomparableError where the golden at `place` was recorded by another plan, GoldenError for a damaged one.

    A golden that no matrix recorded, or an older one, does not hold these settings: they are then not compared.
    """
    golden = Golden.load(place)
    if golden.fingerprint and (part := _another_part(golden, matrix, reference)):
        name = golden.fingerprint.get("name")
        raise _another(place, f"with another {part.replace('_', ' ')}, that of {name}", f"has {matrix.model}")
    trace = golden.trace
    recorded = [trace.prompt_token_ids[a:b].tolist() for a, b in itertools.pairwise(trace.prompt_offsets.tolist())]
    if len(recorded) != len(prompts):
        raise _another(place, f"with other prompts, {len(recorded)} of them", f"has {len(prompts)}")
    if differ := [number for number, (one, other) in enumerate(zip(recorded, prompts, strict=True)) if one != other]:
        text = "".join(trace.text(token) for token in recorded[differ[0]])
        raise _another(place, f"with other prompts, {text!r:.60} one of them", f"has {matrix.prompts[differ[0]]!r:.60} there")
    if (planned := matrix.samplings[sampling].as_run_by(trace.engine)) != trace.sampling:
        raise _another(place, *_first_difference(trace.sampling, planned))
    kept = file_format.read_metadata(place).get(SETTINGS)
    if kept is not None and kept != settings_of(reference):
        raise _another(place, f"with the settings {kept}", f"has {settings_of(reference)} for {reference.name}")


def _another(place: Path, recorded: str, planned: str) -> IncomparableError:
    return IncomparableError(f"{place} was recorded {recorded}, the plan now {planned}; record it again: --update-golden")


def _another_part(golden: Golden, matrix: Matrix, reference: Cell) -> str:
    """`model`, `tokenizer` or `chat_template` where the golden's is another one, else "".

    Checkpoints are told apart by their names, too: the digests of two steps of one run are equal.
    """
    if PurePath(str(golden.fingerprint.get("name"))).name != PurePath(matrix.model).name:
        return "model"
    try:
        model = find_model(matrix.model, matrix.root)
        tokenizer = find_model(str(reference.settings.get("tokenizer") or matrix.model), matrix.root)
    except UsageError:  # the model is not on this machine, but where the engines run
        return ""
    return another_part(golden.fingerprint, model_digests(model, tokenizer))


def _first_difference(recorded: Sampling, planned: Sampling) -> tuple[str, str]:
    """The first field that differs, as a message tells it for either side."""
    name = next(f.name for f in dataclasses.fields(Sampling) if getattr(recorded, f.name) != getattr(planned, f.name))
    return f"with {name}={getattr(recorded, name)!r}", f"samples with {name}={getattr(planned, name)!r}"
