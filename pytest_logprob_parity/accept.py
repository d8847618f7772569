"""Make goldens of what a failing run left, each shown before it is written; no engine is needed."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal, TypeAlias, get_args

import numpy as np

from . import container
from .belonging import another_part
from .comparison.result import Comparison
from .errors import GoldenError, ParityError, UsageError
from .files import compare_goldens
from .golden import Golden
from .obtained import OBTAINED, Obtained, candidate_path, find, headline_of
from .report.visible import visible
from .trace import Trace

#: What one may answer, in full or by its first letters. `skip` is a no, `quit` one for all that follow.
Answer: TypeAlias = Literal["yes", "no", "all", "skip", "view", "quit"]
_ANSWERS: Final[tuple[Answer, ...]] = get_args(Answer)


@dataclass(frozen=True)
class Proposal:
    """One obtained trace, at `path`, held against the golden that is there today.

    `refusal` says why it cannot be accepted, "" where it can; `done` that it has been. `target` is the golden's path, `data`
    the bytes that would be written there, `lines` the difference in a short block.
    """

    path: Path
    obtained: Obtained
    lines: tuple[str, ...]
    target: Path
    data: bytes = b""
    refusal: str = ""
    done: bool = False


def propose(path: Path, obtained: Obtained, root: Path) -> Proposal:
    """What accepting an obtained trace would mean in the repo at `root`; nothing is written."""
    head = headline_of(obtained)
    target = root / obtained.golden
    block = [head, f"  golden     {obtained.golden}", f"  {obtained.verdict:<10} {obtained.headline}"]
    try:
        _check_inside(obtained.golden)
        if not target.exists():
            raise GoldenError(
                f"there is no {obtained.golden} below {root.absolute()}: --root names the repo, git brings goldens"
            )
        golden = Golden.load(target)
        if (golden.node_id, golden.name) != (obtained.node_id, obtained.name):
            raise GoldenError(f"incomparable: the golden belongs to {golden.node_id or 'no test'}")
        if golden.digest == obtained.candidate:
            return Proposal(path, obtained, (*block, "  accepted   the golden is this candidate already"), target, done=True)
        if golden.digest != obtained.golden_digest:
            raise GoldenError(
                f"the golden is no longer the one that the run compared with ({obtained.golden_digest[:12]} then, "
                f"{golden.digest[:12]} now): run the test again, or fetch the artifact of this commit"
            )
        if not obtained.candidate:
            raise GoldenError(f"{obtained.refusal}; record it where the engine is: pytest {obtained.node_id} --update-golden")
        candidate, data = _load_candidate(candidate_path(path), obtained)
        _check_comparable(golden, candidate)
        comparison = compare_goldens(golden, Golden.load(path), obtained.level, obtained.limits).comparison
        if not comparison.metrics["n_tokens"]:
            raise GoldenError("nothing was compared, so nothing is known of what would be accepted")
    except ParityError as error:
        text = error.reason_beside(target, path)
        return Proposal(path, obtained, (*block, f"  refused    {text}"), target, refusal=text)
    return Proposal(path, obtained, (*block, *_difference(comparison, golden, candidate)), target, data)


def accept(proposals: Sequence[Proposal]) -> None:
    """Write the goldens of these proposals, all of them or none. Raises GoldenError; old goldens then stay."""
    try:
        container.replace_all({proposal.target: proposal.data for proposal in proposals})
    except OSError as error:
        raise GoldenError(
            f"{error.filename or proposals[0].target}: not written ({error.strerror or error}); all goldens are as they were"
        ) from None


def review(
    places: Sequence[Path],
    names: Sequence[str],
    root: Path,
    ask: Callable[[str], str] | None,
    view: Callable[[Proposal], str] = lambda proposal: "",
) -> int:
    """Show each difference, ask (or not), and write what was agreed to: all of it or nothing.

    `view` gives a proposal's difference token by token, for whoever wants to see it before answering. Gives
    0 where nothing is left that could be accepted, 1 where something is: refused, or left by whoever was asked. Raises
    UsageError where nothing was found, GoldenError where nothing could be written.
    """
    found = {path: obtained for path, obtained in find(places or [root / OBTAINED]) if matches(obtained, names)}
    if not found:
        raise UsageError(f"no obtained trace fits --name {' '.join(names)}; without it all are shown")
    proposals = [propose(path, obtained, root) for path, obtained in found.items()]
    agreed: list[Proposal] = []
    answer: Answer = "no" if ask else "all"
    for proposal in proposals:
        print(visible("\n".join(proposal.lines)))
        if not proposal.refusal and not proposal.done:
            if ask and answer not in ("all", "quit"):
                answer = _answer(ask, functools.partial(view, proposal))
            if answer in ("yes", "all"):
                agreed.append(proposal)
        print()
    _check_once(agreed)
    if agreed:
        accept(agreed)
    done, refused = sum(p.done for p in proposals), sum(bool(p.refusal) for p in proposals)
    left = len(proposals) - len(agreed) - done - refused
    counts = {"before": done, "refused": refused, "left": left}
    told = [f"{len(agreed)} accepted", *(f"{count} {what}" for what, count in counts.items() if count)]
    print(f"{', '.join(told)}; commit the goldens" if agreed else ", ".join(told))
    return 1 if refused or left else 0


def _answer(ask: Callable[[str], str], view: Callable[[], str]) -> Answer:
    """What is to become of one proposal: `all` and `quit` answer for those behind it, too. Whatever is no answer is a no."""
    while True:
        try:
            told = ask("  accept? [y/N/all/skip/view/quit] ").strip().lower()
        except EOFError:  # nobody there to ask
            return "no"
        answer: Answer = next((known for known in _ANSWERS if told and known.startswith(told)), "no")
        if answer != "view":
            return "no" if answer == "skip" else answer
        print(visible(view()))


def _check_once(agreed: Sequence[Proposal]) -> None:
    first: dict[Path, Path] = {}
    for proposal in agreed:
        other = first.setdefault(proposal.target, proposal.path)
        if other != proposal.path:
            raise UsageError(f"{proposal.target}: {other} and {proposal.path} would both become this golden; name one of them")


def matches(obtained: Obtained, patterns: Sequence[str]) -> bool:
    """Whether a check is meant: a pattern is a part of its node id, name or golden's path, or a glob of one. None: all are."""
    names = (obtained.node_id, obtained.name, obtained.golden)
    return not patterns or any(
        pattern in name or fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names if name
    )


def _check_inside(golden: str) -> None:
    """The path comes out of a file that may have been downloaded: it must stay in the repo."""
    parts = PurePosixPath(golden).parts
    if not golden or golden.startswith("/") or ".." in parts or "\\" in golden or not golden.endswith(".safetensors"):
        raise GoldenError(f"its golden {golden!r} is not inside this folder; copy the candidate there by hand")


def _load_candidate(path: Path, obtained: Obtained) -> tuple[Golden, bytes]:
    candidate = Golden.load(path)
    if candidate.digest != obtained.candidate:
        raise GoldenError(
            f"{path.name} is not the candidate of this run ({candidate.digest[:12]}, not {obtained.candidate[:12]})"
        )
    return candidate, path.read_bytes()


def _check_comparable(golden: Golden, candidate: Golden) -> None:
    """Raise GoldenError where the candidate is about something else than the golden."""
    both = golden.fingerprint and candidate.fingerprint
    if both and (part := another_part(golden.fingerprint, candidate.fingerprint)):
        raise GoldenError(f"incomparable: the candidate is of another {part.replace('_', ' ')} than the golden")
    if golden.trace.sampling != candidate.trace.sampling:
        raise GoldenError("incomparable: the candidate was sampled in another way than the golden")
    if (golden.node_id, golden.name) != (candidate.node_id, candidate.name):
        raise GoldenError(f"incomparable: the candidate belongs to {candidate.node_id or 'no test'}")
    if not np.array_equal(golden.trace.prompt_token_ids, candidate.trace.prompt_token_ids):
        raise GoldenError("incomparable: the candidate is of other prompts than the golden")


def _difference(comparison: Comparison, golden: Golden, candidate: Golden) -> list[str]:
    numbers, found = comparison.metrics, [str(finding) for finding in comparison.findings] or ["none was found"]
    tokens = f"{int(numbers['n_tokens']):,} tokens"
    if np.isfinite(numbers["mean_diff"]):
        measured = (
            f"{tokens}: mean d {numbers['mean_diff']:+.3g}, RMS {numbers['rms_diff']:.3g}, max |d| "
            f"{numbers['max_abs_diff']:.3g} nats, {numbers['share_outside_clip']:.2%} of ratios outside 1 +- 0.2"
        )
    else:
        measured = f"{tokens}, {int(numbers['n_changed']):,} with other numbers; the two mean different things"
    other = _other_completions(golden.trace, candidate.trace)
    floor = (
        "none was measured: the defaults of its dtype will stand in" if candidate.floor is None else candidate.floor.describe()
    )
    return [
        *(f"  {'cause' if number == 0 else '':<11}{text}" for number, text in enumerate(found)),
        f"  measured   {measured}",
        f"  tokens     {'the same' if not other else f'{other} of {golden.trace.num_sequences} completions are other ones'}",
        f"  floor      {floor}",
    ]


def _other_completions(golden: Trace, candidate: Trace) -> int:
    pairs = range(min(golden.num_sequences, candidate.num_sequences))
    differ = sum(golden.completion(i) != candidate.completion(i) for i in pairs)
    return differ + max(golden.num_sequences - candidate.num_sequences, 0)
