"""One results.json of several: of CI's shards, of engines side by side, of runs at the same time."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..visible_text import visible_token
from .finite_json import to_text
from .folder import is_part
from .results_file import NAME, make_results, read_results


def find_results(places: Sequence[Path]) -> list[Path]:
    """The results.json files that are meant: files themselves, folders of reports, folders that hold such at any depth.

    Raises UsageError for a place without any.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            here = (
                [place / NAME]
                if (place / NAME).is_file()
                else sorted(file for file in place.rglob(NAME) if not is_part(file.relative_to(place)))
            )
            if not here:
                raise UsageError(f"{place}: no {NAME} in it; pytest --parity-report=DIR writes one")
            found += here
        else:
            found.append(place)
    return list(dict.fromkeys(path.absolute() for path in found)) if len(found) > 1 else found


def read_all(places: Sequence[Path]) -> dict[str, Any]:
    """One content of all results that are meant. Raises UsageError."""
    results = [(path, read_results(path)) for path in find_results(places)]
    return results[0][1] if len(results) == 1 else merge(results)


def merge(results: Sequence[tuple[Path, Mapping[str, Any]]]) -> dict[str, Any]:
    """One content of several: CI's shards, or engines side by side.

    Raises UsageError for results of different projects, and for results of two revisions, in which one golden differs.
    """
    (first_path, first), *_ = results
    if len({content["prefix"] for _, content in results}) > 1:
        results = [(path, from_the_top(content)) for path, content in results]
    digests: dict[str, tuple[str, Path]] = {}
    for path, content in results:
        if content["project"] != first["project"]:
            raise UsageError(
                f"{path} is of project {content['project']!r}, {first_path} of {first['project']!r}: report each of them alone"
            )
        for check in content["checks"]:
            golden = check["golden"]
            known, where = digests.setdefault(golden["path"], (golden["digest"], path))
            if golden["digest"] and known and golden["digest"] != known:
                raise UsageError(
                    f"{visible_token(golden['path'])} differs between {where} and {path}: they are of two revisions; report "
                    "each of them alone"
                )
    every = [check for _, content in results for check in content["checks"]]
    checks = list({to_text(check): check for check in every}.values())  # one file that was brought along twice
    unused = {name for _, content in results for name in content["unused"]}
    newest = max(content["created"] for _, content in results)
    prefix = results[0][1]["prefix"]
    return make_results(checks, created=newest, project=first["project"], prefix=prefix, unused=sorted(unused))


def from_the_top(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same results with paths, node ids and commands from the top of the repository: roots below it can be told apart."""
    prefix = content["prefix"]
    checks = [
        {
            **check,
            **{name: _below(prefix, check[name]) for name in ("node_id", "file", "obtained")},
            "golden": {**check["golden"], "path": _below(prefix, check["golden"]["path"])},
            "commands": [_called_below(prefix, command) for command in check["commands"]],
        }
        for check in content["checks"]
    ]
    return {**content, "prefix": "", "checks": checks, "unused": [_below(prefix, path) for path in content["unused"]]}


def _called_below(prefix: str, command: Mapping[str, Any]) -> dict[str, Any]:
    """A command, `from` whose folder below the root it is to be called, as one to call from the top."""
    folder = posixpath.normpath(prefix + str(command.get("from", ".")))
    if not prefix or folder == ".":
        return dict(command)
    called = {name: f"(cd {shlex.quote(folder)} && {command[name]})" for name in ("command", "for_all") if name in command}
    return {**command, "from": ".", **called}


def _below(prefix: str, path: str) -> str:
    """A path, or a node id, of a run whose root is at `prefix`; "" and absolute ones stay."""
    file, colons, rest = path.partition("::")
    return posixpath.normpath(prefix + file) + colons + rest if file and not file.startswith("/") else path
