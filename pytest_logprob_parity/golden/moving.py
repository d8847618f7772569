"""Goldens whose test was renamed: move them to the new name of the test."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..atomic import replace_all
from ..errors import GoldenError, UsageError
from ..trace import file_format
from .folder import Claim, claims_in
from .names import SUFFIX, golden_path, variant_of, variant_path

#: A test's place in a command: `FILE::TEST`.
_COLONS: Final = "::"


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One golden's file, its new path, and the check that it belongs to there."""

    old: Path
    new: Path
    node_id: str
    name: str


def moves(old: str, new: str, name: str | None, root: Path, golden_dir: Path) -> list[Move]:
    """The moves that bring the goldens of `old` to `new`.

    `old` is a golden's file, a test (`FILE::TEST`) or a test file. `new` is a test; for a test file it may be a test file.
    `name` is the new name of the check, where it changes. Variants move with their golden.

    Raises UsageError where `old` has no goldens, where `new` is no test, and where a golden already stands at a new path.
    """
    if old.endswith(SUFFIX):
        path = variant_path(root / old, "")
        found = [claim for claim in claims_in(path.parent) if variant_path(claim.path, "") == path and claim.golden]
        if not found:
            raise UsageError(f"move: {old} is no golden that can be read")
    else:
        found = _claims_of(old, root / golden_dir)
        if not found:
            raise UsageError(f"move: no golden below {golden_dir} belongs to {old}; --golden-dir names another folder")
    if _COLONS not in new and (old.endswith(SUFFIX) or _COLONS in old):
        raise UsageError(f"move: {new!r} is no test; give it as pytest names it: tests/test_it.py::test_it")
    if name is not None and len({claim.name for claim in found}) > 1:
        raise UsageError(f"move: --name goes with one check, and {old} has {len(found)} goldens")
    made = []
    for claim in found:
        node_id = new if _COLONS in new else f"{new}{_COLONS}{claim.node_id.partition(_COLONS)[2]}"
        label = claim.name if name is None else name
        target = variant_path(golden_path(root / golden_dir, node_id, label), variant_of(claim.path))
        if target.exists():
            raise UsageError(f"move: {target} is there already, and stays: nothing was moved")
        made.append(Move(old=claim.path, new=target, node_id=node_id, name=label))
    return made


def _claims_of(old: str, folder: Path) -> list[Claim]:
    """The goldens of a test or a test file: by their paths, else by the test that they name."""
    test = old if _COLONS in old else f"{old}{_COLONS}x"
    found = claims_in(golden_path(folder, test).parent)
    if _COLONS not in old:
        return [claim for claim in found if claim.node_id]
    own = [claim for claim in found if claim.is_of(folder, old)]
    return own or [claim for claim in found if claim.node_id == old]


def move(made: Sequence[Move]) -> None:
    """Write all goldens at their new paths, each with its new test in it, and then remove the old files.

    Raises GoldenError where one cannot be read or written; nothing is moved then.
    """
    files = {}
    for step in made:
        columns, metadata = file_format.read(step.old)
        about = {**metadata["golden"], "node_id": step.node_id, "name": step.name}
        files[step.new] = file_format.packed(columns, {**metadata, "golden": about})
    try:
        replace_all(files)
    except OSError as error:
        raise GoldenError(f"not written ({error.strerror or error}); nothing was moved", error.filename) from None
    for step in made:
        step.old.unlink()
        with contextlib.suppress(OSError):  # other goldens are in it
            step.old.parent.rmdir()
