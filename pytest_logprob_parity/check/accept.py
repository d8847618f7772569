"""Make goldens of what a failing run left, each shown before it is written; no engine is needed."""

from __future__ import annotations

import fnmatch
import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from ..atomic import replace_all
from ..comparison.result import Comparison
from ..comparison.tolerance import default_tolerance, make_tolerance
from ..errors import GoldenError, ParityError, UsageError
from ..golden import SUFFIX, Golden, is_place_of, variant_path
from ..golden.fingerprint import differences
from ..grammar import counted
from ..trace import Trace, file_format
from ..visible_text import visible, visible_line
from .compatibility import another_part
from .loosened import cut, loosened_by
from .obtained import OBTAINED, Obtained, candidate_path, find, headline_of
from .record import check_recorded
from .two_files import compare_goldens
from .variants import name_of, of_other_kinds

#: Differences of fingerprints that are shown, the parts that a fingerprint of ours has, and how wide a value may be.
_SHOWN: Final = 12
_FINGERPRINT: Final = ("engine", "hardware", "dtype", "name", "adapter", "experts", "end_tokens", "libraries", "config")
_HEADLINE: Final = 300
#: Rounding puts the logprob of a sure token so far above 0 (nats), at most.
_ABOVE: Final = 1e-2

#: What one may answer, in full or by its first letters. `skip` is a no, `quit` one for all that follow.
Answer: TypeAlias = Literal["yes", "no", "all", "skip", "view", "quit"]
_ANSWERS: Final[tuple[Answer, ...]] = get_args(Answer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One obtained trace, at `path`, held against the golden that is there today.

    `refusal` says why it cannot be accepted, "" where it can; `done` that it has been. `target` is the golden's path, `data`
    the bytes that would be written there (those that were compared), `lines` the difference in a short block. `loosened` says
    what the new golden would let pass or leave out that today's does not; `before` is the digest of what stands at `target`.
    """

    path: Path
    obtained: Obtained
    lines: tuple[str, ...]
    target: Path
    data: bytes = b""
    refusal: str = ""
    done: bool = False
    loosened: tuple[str, ...] = ()
    before: str = ""


def propose(path: Path, obtained: Obtained, root: Path) -> Proposal:
    """What accepting an obtained trace would mean in the repo at `root`; nothing is written."""
    head = headline_of(obtained)
    target = root / obtained.golden
    told = " ".join(obtained.headline.split())[:_HEADLINE]
    block = [visible_line(line) for line in (head, f"  golden     {obtained.golden}", f"  {obtained.verdict:<10} {told}")]
    try:
        target = _inside(root, obtained.golden)
        if not target.exists():
            raise GoldenError(
                f"there is no {obtained.golden} below {root.absolute()}: --root names the repo, git brings goldens"
            )
        golden = Golden.load(target)
        if not _is_of(obtained.node_id, obtained.name, golden, target):
            raise GoldenError(f"incomparable: the golden belongs to {golden.node_id or 'no test'}")
        if golden.digest == obtained.candidate:
            block.append("  accepted   the golden is this candidate already")
            return Proposal(path=path, obtained=obtained, lines=tuple(block), target=target, done=True)
        if golden.digest != obtained.golden_digest:
            raise GoldenError(
                f"the golden is no longer the one that the run compared with ({obtained.golden_digest[:12]} then, "
                f"{golden.digest[:12]} now): run the test again, or fetch the artifact of this commit"
            )
        if not obtained.candidate:
            told = f"pytest {shlex.quote(obtained.node_id)} --update-golden"
            raise GoldenError(f"{obtained.refusal}; record it where the engine is: {told}")
        candidate, data = _load_candidate(candidate_path(path), obtained)
        left = Golden.load(path)
        if not _is_of(candidate.node_id, candidate.name, golden, target):
            raise GoldenError(f"incomparable: the candidate belongs to {candidate.node_id or 'no test'}")
        _check_comparable(golden, candidate)
        comparison = compare_goldens(golden, left, obtained.level, obtained.limits).comparison
        if not comparison.metrics["n_tokens"]:
            raise GoldenError("nothing was compared, so nothing is known of what would be accepted")
        if of_other_kinds(golden.fingerprint, candidate.fingerprint):  # as --update-golden would have done there
            target = variant_path(target, name_of(candidate.fingerprint))
            block[1] = visible_line(f"  golden     {target.relative_to(root.resolve())}, beside {obtained.golden}")
            if target.exists():
                raise GoldenError("a golden of that machine is there already: run the check again")
        make_tolerance(default_tolerance(candidate.trace.dtype), candidate.tolerance)
        check_recorded(candidate, golden.tolerance, "the candidate")
        _check_same_engine(left, candidate)
    except ParityError as error:
        text = visible_line(error.reason_beside(target, path))
        return Proposal(path=path, obtained=obtained, lines=(*block, f"  refused    {text}"), target=target, refusal=text)
    loosened, before = loosened_by(golden, candidate), golden.digest if target.exists() else ""
    lines = [*_difference(comparison, golden, candidate), *_changes(golden, candidate, loosened)]
    return Proposal(
        path=path,
        obtained=obtained,
        lines=(*block, *map(visible_line, lines)),
        target=target,
        data=data,
        loosened=loosened,
        before=before,
    )


def accept(proposals: Sequence[Proposal]) -> None:
    """Write the goldens of these proposals, all of them or none. Raises GoldenError; old goldens then stay."""
    for proposal in proposals:  # somebody took time to answer
        now = file_format.read_metadata(proposal.target)["digest"] if proposal.target.exists() else ""
        if now != proposal.before or proposal.target.resolve() != proposal.target:
            raise GoldenError("changed since it was shown; nothing was written: accept again", proposal.target)
    try:
        replace_all({proposal.target: proposal.data for proposal in proposals})
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
    junk: list[GoldenError] = []
    found = {path: obtained for path, obtained in find(places or [root / OBTAINED], junk) if matches(obtained, names)}
    for error in junk:
        print(f"refused    {visible_line(error)}\n")
    if not found and not junk:
        raise UsageError(f"no obtained trace fits --name {' '.join(names)}; without it all are shown")
    proposals = [propose(path, obtained, root) for path, obtained in found.items()]
    agreed: list[Proposal] = []
    answer: Answer = "no" if ask else "all"
    for proposal in proposals:
        print("\n".join(proposal.lines))
        if ask is None and proposal.loosened:
            print("  left       --yes does not accept what loosens a golden: answer for it (without --yes), or record it again")
        elif not proposal.refusal and not proposal.done:
            if ask and answer != "quit" and (answer != "all" or proposal.loosened):
                answer = _answer(ask, functools.partial(view, proposal))
            if answer in ("yes", "all"):
                agreed.append(proposal)
        print()
    _check_once(agreed)
    if agreed:
        accept(agreed)
    done, refused = sum(p.done for p in proposals), sum(bool(p.refusal) for p in proposals)
    left = len(proposals) - len(agreed) - done - refused
    refused += len(junk)
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


def _inside(root: Path, golden: str) -> Path:
    """Where a golden lies below `root`. Its path comes out of a file that may have been downloaded. Raises GoldenError."""
    parts = PurePosixPath(golden).parts
    try:
        place = (root / golden).resolve()  # a link of the repo may lead out of it
    except (OSError, RuntimeError, ValueError):  # a NUL, a lone surrogate, a ring of links
        place = root
    outside = not golden or golden.startswith("/") or "\\" in golden or not place.is_relative_to(root.resolve())
    if outside or {"..", ".git"} & set(parts) or not golden.endswith(SUFFIX) or place.suffix != SUFFIX:
        raise GoldenError(f"its golden {golden!r} is not inside this folder; copy the candidate there by hand")
    return place


def _load_candidate(path: Path, obtained: Obtained) -> tuple[Golden, bytes]:
    """The candidate and its bytes: what was compared is what will be written."""
    data = file_format.read_bytes(path)
    candidate = Golden.parse(data, path)
    if candidate.digest != obtained.candidate:
        raise GoldenError(
            f"{path.name} is not the candidate of this run ({candidate.digest[:12]}, not {obtained.candidate[:12]})"
        )
    return candidate, data


def _is_of(node_id: str, name: str, golden: Golden, target: Path) -> bool:
    """Whether a check has this golden: it says so, or lies where the check has it (after a `git mv`, say)."""
    return (node_id, name) == (golden.node_id, golden.name) or is_place_of(target, node_id, name)


def _check_comparable(golden: Golden, candidate: Golden) -> None:
    """Raise GoldenError where the candidate is about something else than the golden."""
    both = golden.fingerprint and candidate.fingerprint
    if both and (part := another_part(golden.fingerprint, candidate.fingerprint)):
        raise GoldenError(f"incomparable: the candidate is of another {part.replace('_', ' ')} than the golden")
    if golden.trace.sampling != candidate.trace.sampling:
        raise GoldenError("incomparable: the candidate was sampled in another way than the golden")
    if any(
        not np.array_equal(getattr(golden.trace, name), getattr(candidate.trace, name))
        for name in ("prompt_token_ids", "prompt_offsets", "group")
    ):
        raise GoldenError("incomparable: the candidate is of other prompts than the golden")
    if golden.trace.num_sequences != candidate.trace.num_sequences:
        then, now = golden.trace.num_sequences, candidate.trace.num_sequences
        raise GoldenError(f"incomparable: the candidate has {now} sequences, the golden {then}")
    if golden.fingerprint and not candidate.fingerprint:
        raise GoldenError("the candidate does not say which engine made it, and the golden does: record it where the engine is")


def _check_same_engine(left: Golden, candidate: Golden) -> None:
    """Raise GoldenError where the trace that was compared and the candidate are not of one engine."""
    if apart := differences(left.fingerprint, candidate.fingerprint):
        raise GoldenError(
            f"the candidate is of another engine than the trace that was compared: {apart[0][0]} is {apart[0][2]!r:.60}, "
            f"not {apart[0][1]!r:.60}"
        )
    if np.any(candidate.trace.logprobs[candidate.trace.mask] > _ABOVE) and not np.any(left.trace.logprobs > _ABOVE):
        raise GoldenError("the candidate has logprobs above 0, and the trace that was compared has none")
    if left.trace.means_as(candidate.trace):
        comparison = compare_goldens(left, candidate).comparison
        if comparison.verdict == "fail":
            raise GoldenError(f"the candidate's numbers are not those of the trace that was compared: {comparison.headline}")


def _difference(comparison: Comparison, golden: Golden, candidate: Golden) -> list[str]:
    numbers, found = comparison.metrics, [str(finding) for finding in comparison.findings] or ["none was found"]
    tokens = counted(int(numbers["n_tokens"]), "tokens")
    if np.isfinite(numbers["mean_diff"]):
        measured = f"{tokens}: {_numbers(comparison)}, {numbers['share_outside_clip']:.2%} of ratios outside 1 +- 0.2"
    else:
        measured = f"{tokens}, {int(numbers['n_changed']):,} with other numbers; the two mean different things"
    other = _other_completions(golden.trace, candidate.trace)
    floor = (
        "none was measured: the defaults of its dtype will stand in" if candidate.floor is None else candidate.floor.describe()
    )
    return [
        *(f"  {'cause' if number == 0 else '':<11}{text}" for number, text in enumerate(found)),
        f"  measured   {measured}",
        f"  tokens     {'the same' if not other else f'{other} of {golden.trace.num_sequences} completions have other tokens'}",
        f"  floor      {floor}",
    ]


def _numbers(comparison: Comparison) -> str:
    numbers = comparison.metrics
    return f"mean d {numbers['mean_diff']:+.3g}, RMS {numbers['rms_diff']:.3g}, max |d| {numbers['max_abs_diff']:.3g} nats"


def _changes(golden: Golden, candidate: Golden, loosened: Sequence[str]) -> list[str]:
    """What the candidate itself is: its numbers where it has the golden's tokens, and everything else that is not as it was."""
    own = compare_goldens(golden, candidate).comparison
    if not (common := int(own.metrics["n_tokens"])):
        told = "it has no token in common with the golden: its own numbers cannot be compared"
    elif not np.isfinite(own.metrics["mean_diff"]):
        told = f"{counted(common, 'tokens')} in common with the golden; the two mean different things"
    else:
        told = f"{counted(common, 'tokens')} in common with the golden: {_numbers(own)}"
    lines = [f"  candidate  {told}"]
    then, now = (f"{int(trace.mask.sum()):,} of {trace.num_tokens:,}" for trace in (golden.trace, candidate.trace))
    lines += (
        [f"  compares   {now} tokens, {then} in the golden"] if golden.trace.num_tokens != candidate.trace.num_tokens else []
    )
    if golden.floor is not None:
        lines.append(f"  floor was  {golden.floor.describe()}")
    before, after = (None if g.reference is None else g.reference.describe(g.trace.logprobs) for g in (golden, candidate))
    lines += [f"  reference  {after or 'none'}; in the golden: {before or 'none'}"] if before != after else []
    apart = sorted(differences(golden.fingerprint, candidate.fingerprint), key=_importance)
    labels = [
        (name, getattr(golden.trace, name), getattr(candidate.trace, name))
        for name in ("logprobs_mode", "path", "engine", "engine_version", "dtype")
        if getattr(golden.trace, name) != getattr(candidate.trace, name)
    ]
    for number, (name, then, now) in enumerate([*labels, *apart][:_SHOWN]):
        lines.append(f"  {'' if number else 'differs':<10} {name}: {cut(then)} in the golden, {cut(now)} in the candidate")
    lines += [f"  {'':<10} and {len(apart) - _SHOWN} more"] if len(apart) > _SHOWN else []
    return lines + [f"  {'' if number else 'loosened':<10} {text}" for number, text in enumerate(loosened)]


def _importance(difference: tuple[str, Any, Any]) -> tuple[int, str]:
    """What a fingerprint of ours has comes first: what somebody made up would push it out of sight."""
    part = difference[0].partition(".")[0]
    return _FINGERPRINT.index(part) if part in _FINGERPRINT else len(_FINGERPRINT), difference[0]


def _other_completions(golden: Trace, candidate: Trace) -> int:
    pairs = range(min(golden.num_sequences, candidate.num_sequences))
    differ = sum(golden.completion(i) != candidate.completion(i) for i in pairs)
    return differ + max(golden.num_sequences - candidate.num_sequences, 0)
