"""results.json: what a run found, in one versioned file from which everything else is rendered. Only the standard library.

The file is ASCII. It is safe to read one that others have edited: the file, and each list in it, has a largest size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .._version import __version__
from ..bounded import parse_json, read_text
from ..errors import UsageError
from ..json_shape import check_shape
from .consistency import inconsistencies
from .finite_json import finite, to_text
from .outcomes import worst_first
from .results_schema import FORMAT, RESULTS, SCHEMA

NAME: Final = "results.json"
#: Bytes that are read, and written: 700 checks that fail with every plot, 30,000 that pass. Parsing takes ten times the memory.
LARGEST: Final = 64 * 2**20
_AGAIN: Final = "write it again: pytest --parity-report=DIR"


def make_results(
    checks: Sequence[Mapping[str, Any]], *, created: str, project: str, prefix: str = "", unused: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of results.json, worst check first, every number in it finite or None."""
    about = {"format": FORMAT, "schema": SCHEMA, "version": __version__, "created": created, "project": project}
    content = {**about, "prefix": prefix, "checks": worst_first(checks), "unused": sorted(unused)}
    return dict(finite(content))


def fitting(content: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The content with as many checks without plots and tokens, the best ones, as make its file small enough to be read again.

    Gives their number too. Raises UsageError where the file would be too large even so.
    """
    checks = list(content["checks"])
    sizes = [len(to_text(check)) + 1 for check in checks]
    spare = LARGEST - len(to_text({**content, "checks": []})) - sum(sizes)
    bare = 0
    for index in reversed(range(len(checks))):
        if spare >= 0:
            break
        checks[index] = {**checks[index], "plots": None, "sequences": [], "token_texts": {}}
        spare += sizes[index] - len(to_text(checks[index])) - 1
        bare += 1
    if spare < 0:
        raise UsageError(
            f"{NAME} of {len(checks)} checks would be larger than {LARGEST / 2**20:g} MiB: report fewer tests at once"
        )
    return {**content, "checks": checks}, bare


def read_results(path: Path) -> dict[str, Any]:
    """Read a results.json. Raises UsageError, in one line, for what is none, is no regular file or is larger than `LARGEST`."""
    try:
        content = parse_json(read_text(path, LARGEST))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file; pytest --parity-report=DIR writes it") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: cut short, or no results.json ({error}); {_AGAIN}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path}: no results.json of pytest-logprob-parity; give one that pytest --parity-report=DIR wrote")
    if content.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: schema {content.get('schema')!r:.20}, this version of pytest-logprob-parity reads {SCHEMA}: render it "
            f"with the version that wrote it ({content.get('version')!r:.20})"
        )
    check_shape(content, RESULTS, path, advice=_AGAIN)
    for inconsistency in inconsistencies(content):
        raise UsageError(f"{inconsistency}; {_AGAIN}", path)
    return dict(content)
