"""What a failing check leaves behind: the trace that it obtained, and the golden that recording would have made of it.

    parity-obtained/<as below golden/>/<name>.safetensors          what the engine said of the golden's tokens
    parity-obtained/<as below golden/>/<name>.golden.safetensors   the candidate: what `--update-golden` would have written

The first is what `logprob-parity diff` and reports look at; it carries the digest of the golden it was compared with, and the
candidate's. The second is what `logprob-parity accept` makes the golden, byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from ..atomic import write_new
from ..comparison.tolerance import Tolerance
from ..comparison.vocabulary import LEVELS, Level, Verdict
from ..errors import GoldenError, ParityError, UsageError
from ..golden import SUFFIX, Golden
from ..golden.setup import Setup
from ..trace import file_format
from ..visible_text import visible_line
from .context import Checked

#: The folder, below the root.
OBTAINED: Final = "parity-obtained"
_CANDIDATE: Final = f".golden{SUFFIX}"
_KEY: Final = "obtained"
_TEXTS: Final = ("golden", "golden_digest", "node_id", "name", "verdict", "headline", "level", "setup", "candidate", "refusal")
#: Those of them that are keys.
_KNOWN: Final = {"verdict": get_args(Verdict), "level": LEVELS, "setup": get_args(Setup)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Obtained:
    """A failing check, as its obtained trace remembers it.

    `golden` is the golden's path below the root, `golden_digest` the digest it had; `candidate` is the digest of the candidate
    golden, or "" where there is none and `refusal` says why. `limits` are the run's; None where an older version left it.
    """

    golden: str
    golden_digest: str
    node_id: str
    name: str
    verdict: Verdict
    headline: str
    level: Level
    setup: Setup
    candidate: str = ""
    refusal: str = ""
    limits: Tolerance | None = None


def candidate_path(path: Path) -> Path:
    """Where the candidate golden of an obtained trace lies."""
    return path.with_name(path.name.removesuffix(SUFFIX) + _CANDIDATE)


def keep(
    path: Path, checked: Checked, golden: str, check: tuple[str, str], record: Callable[[Path], object] | None
) -> Obtained:
    """Write the obtained trace of a failing check to `path`, and beside it the candidate that `record` makes of it.

    `golden` is the golden's path, `check` the node id and the name of the check that asked for it.

    Raises OSError and GoldenError where that cannot be written. What keeps `record` from making a golden does not.
    """
    comparison, told = checked.comparison, checked.golden
    forget(path)
    candidate, refusal = "", "nothing was compared"
    if comparison.metrics["n_tokens"] or comparison.metrics["n_nan"]:
        candidate, refusal = _candidate(candidate_path(path), record)
    node_id, name = check
    obtained = Obtained(
        golden=golden,
        golden_digest=told.digest,
        node_id=node_id,
        name=name,
        verdict=comparison.verdict,
        headline=comparison.headline,
        level=comparison.level,
        setup=comparison.setup,
        candidate=candidate,
        refusal=refusal,
        limits=checked.limits,
    )
    trace = comparison.actual.with_(untruncated_logprobs=checked.policy_logprobs)
    kept = Golden(trace=trace, fingerprint=checked.fingerprint, prompts_digest=told.prompts_digest, node_id=node_id, name=name)
    limits = None if obtained.limits is None else obtained.limits.to_json()
    kept.save(path, also={_KEY: {**dataclasses.asdict(obtained), "limits": limits}})
    return obtained


def forget(path: Path) -> None:
    """Remove what an earlier run left: a check that passes now has nothing to accept."""
    for stale in (path, candidate_path(path)):
        with contextlib.suppress(OSError):
            stale.unlink()


def _candidate(path: Path, record: Callable[[Path], object] | None) -> tuple[str, str]:
    """The candidate's digest, or why there is none."""
    if record is None:
        return "", "parity_obtained = trace: only the trace was kept"
    try:
        record(path)
        return str(file_format.read_metadata(path)["digest"]), ""
    except ParityError as error:
        return "", error.reason_beside(path).splitlines()[0]


def read(path: Path) -> Obtained:
    """What an obtained trace says of its check. Raises GoldenError for a file that is none."""
    about = file_format.read_metadata(path).get(_KEY)
    if about is None:
        raise GoldenError(f"a trace or golden, but none that a failing check left in {OBTAINED}/", path)
    try:
        texts = dict(about)
        limits = texts.pop("limits", None)
        if set(texts) != set(_TEXTS) or not all(isinstance(text, str) for text in texts.values()):
            raise TypeError
        if any(texts[name] not in known for name, known in _KNOWN.items()):
            raise ValueError
        return Obtained(**texts, limits=None if limits is None else Tolerance.from_json(limits))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, UsageError):
        raise GoldenError(
            "another version of pytest-logprob-parity left it; accept it with that one, or run again", path
        ) from None


def find(places: Sequence[Path], junk: list[GoldenError]) -> Iterator[tuple[Path, Obtained]]:
    """The obtained traces in folders (at any depth) and files, in order; `junk` gets what is wrong with files in folders.

    Raises UsageError for a place that does not exist or a folder without any, GoldenError for a file that is none.
    """
    for place in places:
        if not place.exists():
            raise UsageError(f"{place}: there is no such folder; failing checks leave {OBTAINED}/ in the root of their run")
        files = sorted(place.rglob(f"*{SUFFIX}")) if place.is_dir() else [place]
        found = []
        for file in files:
            if not file.name.endswith(_CANDIDATE):
                try:
                    found.append((file, read(file)))
                except GoldenError as error:
                    if not place.is_dir():
                        raise
                    junk.append(error)
        if not found and not junk:
            raise UsageError(f"{place}: no obtained traces in it; failing checks leave them in {OBTAINED}/")
        yield from found


def is_obtained(path: Path) -> bool:
    """Whether a readable file is an obtained trace. Raises GoldenError for one whose head is damaged."""
    return _KEY in file_format.read_metadata(path)


def folder_for(root: Path) -> Path:
    """The folder below `root`, which carries its own .gitignore. Raises OSError."""
    folder = root / OBTAINED
    folder.mkdir(exist_ok=True)
    write_new(folder / ".gitignore", "*\n")
    return folder


def headline_of(obtained: Obtained) -> str:
    """Which check it is: its node id, and its name where it has one."""
    return visible_line(obtained.node_id + (f", check {obtained.name!r}" if obtained.name else "") or obtained.golden)
