"""Read a matrix.toml: the cells (engine version and settings), the prompts and samplings, and the reference cell."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..bounded import read_text
from ..checkpoint.prompts import check_prompts
from ..errors import UsageError
from ..json_shape import Closed, Fits, Items, Number, OneOf, OptionalKey, check_shape
from ..spec import DTYPES, EngineSpec, Sampling
from ..spec.settings import check_slips
from ..suggest import nearest
from .environments import Environment
from .releases import release_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest


def _repeats_fit(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0 and value != 1


_TEXT: Final = Fits("a string that is not empty", lambda value: isinstance(value, str) and bool(value))
_TEXTS: Final = OptionalKey([_TEXT])
_VARIABLES: Final = OptionalKey({str: str})
_ENVIRONMENT: Final = Closed(
    {
        "requirements": _TEXTS,
        "packages": _TEXTS,
        "resolved": _TEXTS,
        "release": OptionalKey(_TEXT),
        "after_install": _TEXTS,
        "python": OptionalKey(_TEXT),
        "variables": _VARIABLES,
    }
)
#: What an environment is installed from.
_INSTALLS: Final = ("requirements", "packages", "resolved", "release")
_CELL: Final = Closed(
    {
        "environment": _TEXT,
        "settings": OptionalKey({}),
        "variables": _VARIABLES,
        "cpus": OptionalKey(Number(1, whole=True)),
        "gpus": OptionalKey(Number(0, whole=True)),
        "minutes": OptionalKey(Fits("a number above 0", lambda value: type(value) in (int, float) and value > 0)),
    }
)
_PLAN: Final = Closed(
    {
        "model": _TEXT,
        "prompts": Fits("a list, or the name of a JSON file", lambda value: isinstance(value, list) or _TEXT.test(value)),
        "dtypes": OptionalKey(Items(OneOf(DTYPES), least=1)),
        "reference": _TEXT,
        "goldens": OptionalKey(_TEXT),
        "repeats": OptionalKey(Fits("0 for no noise floor, or a whole number, 2 or more", _repeats_fit)),
        "sampling": {str: {}},
        "environment": {str: _ENVIRONMENT},
        "cell": {str: _CELL},
    }
)


#: Bytes of a plan, at most.
_MOST: Final = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One engine version with its settings. `cpus` and `gpus` are what it needs, `minutes` is its time limit."""

    name: str
    environment: Environment
    settings: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    cpus: int = 1
    gpus: int = 0
    minutes: float = 20


@dataclass(frozen=True, slots=True, kw_only=True)
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
        data = tomllib.loads(read_text(path, _MOST))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    check_shape(data, _PLAN, path)
    try:
        return _plan(data, path.absolute().parent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def slug(name: str) -> str:
    """A name as a part of file names."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")


def _plan(data: dict[str, Any], folder: Path) -> Matrix:
    _check_names("sampling", data["sampling"])
    _check_names("cell", data["cell"])
    environments = {name: _environment(name, values, folder) for name, values in data["environment"].items()}
    cells = tuple(_cell(name, values, environments) for name, values in data["cell"].items())
    reference = data["reference"]
    if reference not in {cell.name for cell in cells}:
        raise UsageError(f"reference {reference!r} is not a cell{nearest(reference, [c.name for c in cells])}")
    return Matrix(
        root=folder,
        model=data["model"],
        prompts=tuple(_prompts(data["prompts"], folder)),
        dtypes=tuple(data.get("dtypes", ["bfloat16"])),
        samplings={name: Sampling.of(values) for name, values in data["sampling"].items()},
        cells=cells,
        reference=reference,
        goldens=folder / data.get("goldens", "golden"),
        repeats=data.get("repeats", 5),
    )


def _prompts(given: Any, folder: Path) -> list[Any]:
    if isinstance(given, str):
        try:
            given = json.loads(_read(folder / given, "prompts"))
        except ValueError as error:
            raise UsageError(f"prompts: {folder / given} is not valid JSON: {error}") from None
    return check_prompts(given)


def _read(file: Path, where: str) -> str:
    try:
        return file.read_text("utf-8")
    except FileNotFoundError:
        raise UsageError(f"{where}: there is no {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: {file} cannot be read: {error}") from None


def _environment(name: str, values: Mapping[str, Any], folder: Path) -> Environment:
    where = f"environment {name!r}"
    if not any(values.get(key) for key in (*_INSTALLS, "python")):
        raise UsageError(f"{where} needs one of {', '.join(_INSTALLS)}, python")
    installs = [key for key in (*_INSTALLS, "after_install") if values.get(key)]
    if values.get("python") and installs:
        raise UsageError(f"{where} has both python and {installs[0]}: nothing is installed into an existing interpreter")
    try:
        release = release_of(values["release"]) if "release" in values else ""
    except UsageError as error:
        raise UsageError(f"{where}: release: {error}") from None
    return Environment(
        name=name,
        release=release,
        requirements=tuple(_read(folder / file, where) for file in values.get("requirements", ())),
        packages=tuple(values.get("packages", ())),
        resolved=tuple(values.get("resolved", ())),
        after_install={file: _read(folder / file, where) for file in values.get("after_install", ())},
        python=values.get("python", ""),
        variables=dict(values.get("variables", {})),
    )


def _cell(name: str, values: Mapping[str, Any], environments: Mapping[str, Environment]) -> Cell:
    where = values["environment"]
    if where not in environments:
        raise UsageError(f"cell {name!r}: no environment {where!r}{nearest(where, environments)}")
    _check_settings(values.get("settings", {}), f"cell {name!r}")
    rest = {key: value for key, value in values.items() if key != "environment"}
    return Cell(name=name, environment=environments[where], **rest)


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raise UsageError for settings that are wrong in every engine: the model and dtype of one cell, and misspelt names."""
    for name, key in (("model", "model"), ("dtype", "dtypes")):
        if name in settings:
            raise UsageError(f"{where}: settings has {name}, which all cells share: set {key} at the top of the file")
    try:
        EngineSpec("any", **settings)
        check_slips(settings)
    except UsageError as error:
        raise UsageError(f"{where}: settings: {error}") from None


def _check_names(kind: str, names: Collection[str]) -> None:
    """Raise UsageError where there is no name, and where two names would give the same file names."""
    if not names:
        raise UsageError(f"{kind}: the plan needs one or more")
    taken: dict[str, str] = {}
    for name in names:
        if not slug(name):
            raise UsageError(f"{kind} {name!r} needs another name: it has no letter or digit")
        other = taken.setdefault(slug(name), name)
        if other != name:
            raise UsageError(f"{kind} {name!r} needs another name: its files would have the names of those of {other!r}")
