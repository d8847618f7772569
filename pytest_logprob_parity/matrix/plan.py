"""What a matrix runs: cells of engine version and settings, what they are asked, and which of them is the reference."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import UsageError
from ..spec import Sampling, nearest
from .environments import Environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

_KEYS: Final = ("model", "prompts", "dtypes", "reference", "goldens", "repeats", "sampling", "environment", "cell")
_ENVIRONMENT_KEYS: Final = ("requirements", "packages", "resolved", "python", "variables")
_CELL_KEYS: Final = ("environment", "settings", "variables", "cpus", "gpus", "minutes")


@dataclass(frozen=True)
class Cell:
    """One engine version with its settings. `cpus` and `gpus` are what it needs, `minutes` how long it may take."""

    name: str
    environment: Environment
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    cpus: int = 1
    gpus: int = 0
    minutes: float = 20


@dataclass(frozen=True)
class Matrix:
    """Cells x dtypes x samplings, all on one model, a folder below `root`, and one set of prompts.

    `reference` names the cell whose engines record the goldens; `goldens` is the folder they are kept in.
    """

    root: Path
    model: str
    prompts: tuple[Any, ...]
    dtypes: tuple[str, ...]
    samplings: Mapping[str, Sampling]
    cells: tuple[Cell, ...]
    reference: str
    goldens: Path
    repeats: int = 5


def load_plan(path: Path) -> Matrix:
    """Read a matrix.toml; paths in it are relative to its folder. Raises UsageError naming the key that does not fit."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: no TOML: {error}") from None
    try:
        return _plan(data, path.absolute().parent)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: {error} is missing or of another type") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _plan(data: dict[str, Any], folder: Path) -> Matrix:
    _known(data, _KEYS, "the file")
    environments = {name: _environment(name, values, folder) for name, values in data["environment"].items()}
    cells = tuple(_cell(name, values, environments) for name, values in data["cell"].items())
    reference = data["reference"]
    if reference not in {cell.name for cell in cells}:
        raise UsageError(f"reference {reference!r} is no cell{nearest(reference, [c.name for c in cells])}")
    prompts = data["prompts"]
    if isinstance(prompts, str):
        prompts = json.loads((folder / prompts).read_text("utf-8"))
    return Matrix(
        root=folder,
        model=data["model"],
        prompts=tuple(prompts),
        dtypes=tuple(data.get("dtypes", ["bfloat16"])),
        samplings={name: Sampling.of(values) for name, values in data["sampling"].items()},
        cells=cells,
        reference=reference,
        goldens=folder / data.get("goldens", "golden"),
        repeats=int(data.get("repeats", 5)),
    )


def _environment(name: str, values: Mapping[str, Any], folder: Path) -> Environment:
    _known(values, _ENVIRONMENT_KEYS, f"environment {name!r}")
    if not any(values.get(key) for key in ("requirements", "packages", "resolved", "python")):
        raise UsageError(f"environment {name!r} says neither what to install nor which python to use")
    files = [folder / file for file in values.get("requirements", ())]
    for file in files:
        if not file.is_file():
            raise UsageError(f"environment {name!r}: there is no {file}")
    return Environment(
        name,
        requirements=tuple(file.read_text("utf-8") for file in files),
        packages=tuple(values.get("packages", ())),
        resolved=tuple(values.get("resolved", ())),
        python=values.get("python", ""),
        variables=dict(values.get("variables", {})),
    )


def _cell(name: str, values: Mapping[str, Any], environments: Mapping[str, Environment]) -> Cell:
    _known(values, _CELL_KEYS, f"cell {name!r}")
    where = values["environment"]
    if where not in environments:
        raise UsageError(f"cell {name!r}: no environment {where!r}{nearest(where, environments)}")
    rest = {key: value for key, value in values.items() if key != "environment"}
    return Cell(name, environments[where], **rest)


def _known(values: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in keys:
            raise UsageError(f"{where} has an unknown key {key!r}{nearest(key, keys)}; known are {', '.join(keys)}")
