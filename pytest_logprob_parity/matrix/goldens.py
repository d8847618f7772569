"""Whether a golden that is there is the plan's own: of its model, its prompts, its sampling, its reference's settings."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path, PurePath
from typing import Any, Final

from ..check.compatibility import another_part
from ..checkpoint.digests import find_model, find_tokenizer, model_digests
from ..errors import IncomparableError, UsageError
from ..golden import Golden
from ..spec import Sampling
from ..trace import file_format
from .plan import Cell, Matrix

#: Where a golden's file keeps what `asked_of` says.
ASKED: Final = "matrix"


def asked_of(reference: Cell) -> dict[str, Any]:
    """What of a plan a golden alone does not tell: the settings of the reference, as they were given."""
    return dict(reference.settings)


def check_is_of_plan(place: Path, matrix: Matrix, reference: Cell, sampling: str, prompts: list[list[int]]) -> None:
    """Raise IncomparableError where the golden at `place` was recorded by another plan, GoldenError for a damaged one.

    A golden that was recorded elsewhere, or before plans were remembered, does not tell its settings: they are not held
    against the plan's.
    """
    golden = Golden.load(place)
    if golden.fingerprint and (part := _another_part(golden, matrix, reference)):
        name = golden.fingerprint.get("name")
        raise _another(place, f"with another {part.replace('_', ' ')}, that of {name}", f"has {matrix.model}")
    trace = golden.trace
    then = [trace.prompt_token_ids[a:b].tolist() for a, b in itertools.pairwise(trace.prompt_offsets.tolist())]
    if len(then) != len(prompts):
        raise _another(place, f"with other prompts, {len(then)} of them", f"has {len(prompts)}")
    if differ := [number for number, (one, other) in enumerate(zip(then, prompts, strict=True)) if one != other]:
        text = "".join(trace.text(token) for token in then[differ[0]])
        raise _another(place, f"with other prompts, {text!r:.60} one of them", f"has {matrix.prompts[differ[0]]!r:.60} there")
    if (asked := matrix.samplings[sampling].as_run_by(trace.engine)) != trace.sampling:
        raise _another(place, *_apart(trace.sampling, asked))
    kept = file_format.read_metadata(place).get(ASKED)
    if kept is not None and kept != asked_of(reference):
        raise _another(place, f"with the settings {kept}", f"has {asked_of(reference)} for {reference.name}")


def _another(place: Path, recorded: str, now: str) -> IncomparableError:
    return IncomparableError(f"{place} was recorded {recorded}, the plan now {now}; record it again: --update-golden")


def _another_part(golden: Golden, matrix: Matrix, reference: Cell) -> str:
    """`model`, `tokenizer` or `chat_template` where the golden's is another one, else "". Checkpoints go by their names: the
    digests of two steps of one run are equal.
    """
    if PurePath(str(golden.fingerprint.get("name"))).name != PurePath(matrix.model).name:
        return "model"
    try:
        model = find_model(matrix.model, matrix.root)
        tokenizer = find_tokenizer(find_model(str(reference.settings.get("tokenizer") or matrix.model), matrix.root))
    except UsageError:  # it is where the engines are
        return ""
    return another_part(golden.fingerprint, model_digests(model, tokenizer))


def _apart(then: Sampling, now: Sampling) -> tuple[str, str]:
    name = next(f.name for f in dataclasses.fields(Sampling) if getattr(then, f.name) != getattr(now, f.name))
    return f"with {name}={getattr(then, name)!r}", f"samples with {name}={getattr(now, name)!r}"
