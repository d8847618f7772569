"""Compares the verdicts of two checkouts of this project, case by case: a refactoring must not change one.

    python benchmarks/same_verdicts.py BEFORE AFTER [--more FOLDER ...] [--engine transformers vllm]

Each tree reads the same cases in a process of its own: goldens against themselves, against each other, and against seeded
changes of their traces (see `changed_traces.py`); traces and scripts of other folders; engines that record and check. A tree is
asked by its public face alone: the package's names, `show --json` and `diff --json`. Keys, verdicts, causes, layers, gates and
numbers must be equal, to the last bit. Sentences may differ, and findings may have new values: both are counted apart. The exit
status is 1 where anything else differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from verdict_cases import all_cases, goldens_below

#: Keys whose texts are for people.
SENTENCES: Final = frozenset({"headline", "text", "evidence", "shows", "lines", "message", "name", "first", "sides"})
#: Where a `name` is one for programs.
_NAMED: Final = ("fingerprint_differences", "show.", "golden.show.")
_SHOWN: Final = 3
HERE: Final = Path(__file__).resolve().parent


class Outcome(NamedTuple):
    """One case in both trees: the keys that differ with both values; apart, new values of findings, and sentences."""

    kind: str
    verdict: str
    case: Mapping[str, Any]
    hard: Sequence[tuple[str, str, str]]
    added: Sequence[tuple[str, str, str]]
    sentences: Sequence[tuple[str, str, str]]


def flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a JSON value by dotted key, as JSON: equal texts are equal to the last bit, NaN is NaN."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from flat(item, f"{key}[{number}]")
    else:
        yield key, json.dumps(value)


def name_of(key: str) -> str:
    """The last name of a dotted key."""
    return key.split(".")[-1].partition("[")[0]


def is_sentence(key: str) -> bool:
    """Whether the text at a dotted key is for people."""
    return name_of(key) in SENTENCES and not key.startswith(_NAMED)


def is_added(key: str, old: str, new: str) -> bool:
    """Whether a finding has a value that it had not: the JSON's schema lets keys be added, and none be removed or changed."""
    inside = re.fullmatch(r"(.*\.)?findings\[\d+\]\.values(\..+)?", key)
    return inside is not None and (old, new)[inside[2] is None] == "-" and (old == "{}" or inside[2] is not None)


def outcome_of(case: Mapping[str, Any], before: Any, after: Any) -> Outcome:
    """What differs between the answers of both trees to one case; of scripts, as far as both trees could run them."""
    verdict = after.get("verdict") or after.get("error") or "read"
    if case["kind"] == "script":  # one that imports what has moved ends there
        shared = min(len(before["comparisons"]), len(after["comparisons"]))
        ends = sorted({before["ended"], after["ended"]})
        verdict = f"{shared} of {len(before['comparisons'])} shared, {', '.join(ends)}"
        before, after = before["comparisons"][:shared], after["comparisons"][:shared]
    old, new = dict(flat(before)), dict(flat(after))
    differ = [(key, old.get(key, "-"), new.get(key, "-")) for key in {**old, **new} if old.get(key) != new.get(key)]
    sentences = [row for row in differ if is_sentence(row[0])]
    added = [row for row in differ if row not in sentences and is_added(*row)]
    hard = [row for row in differ if row not in sentences and row not in added]
    return Outcome(case["kind"], verdict, case, hard, added, sentences)


def kept_answers(tree: Path, cases: Sequence[Mapping[str, Any]], keep: Path | None) -> list[Any]:
    """The answers of a tree: those that `keep` has of the same commit and cases, or new ones, which are then kept there."""
    if keep is None:
        return answers(tree, cases)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=tree, capture_output=True, text=True, check=True)
    readers = [path.read_bytes() for path in (HERE / "answer_cases.py", HERE / "changed_traces.py")]
    digest = hashlib.sha256(b"".join([*readers, json.dumps(cases).encode()])).hexdigest()[:12]
    path = keep / f"{commit.stdout.strip()}-{digest}.json"
    if not path.exists() or "dirty" in path.name:
        keep.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answers(tree, cases)))
    found: list[Any] = json.loads(path.read_text())
    return found


def answers(tree: Path, cases: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What a tree answers to each case, read with its package. Raises RuntimeError where its process ends early."""
    with tempfile.TemporaryDirectory() as folder:
        listed, out, log = (Path(folder) / name for name in ("cases.json", "answers", "log"))
        listed.write_text(json.dumps(cases))
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(HERE / "answer_cases.py"), str(listed), folder]
        with out.open("w") as stdout, log.open("w") as stderr:
            status = subprocess.run(command, cwd=tree, env=environment, stdout=stdout, stderr=stderr, check=False).returncode
        told = [line.removeprefix("answer ") for line in out.read_text().splitlines() if line.startswith("answer ")]
        if status or len(told) != len(cases):
            raise RuntimeError(f"{tree}: {len(told)} of {len(cases)} answers, exit status {status}\n{log.read_text()[-2000:]}")
        return [json.loads(line) for line in told]


def named(case: Mapping[str, Any]) -> str:
    """A case in one line."""
    return ", ".join(f"{name} {value}" for name, value in case.items() if value not in (None, [], ""))


def report(outcomes: Sequence[Outcome]) -> int:
    """Print what differs, and the counts. Gives how many cases differ other than in sentences."""
    wrong = [outcome for outcome in outcomes if outcome.hard]
    places: dict[str, list[Outcome]] = {}
    for outcome in wrong:
        for place in {re.sub(r"\d+", "", key) for key, _, _ in outcome.hard}:
            places.setdefault(place, []).append(outcome)
    for place, found in sorted(places.items()):
        print(f"DIFFERS in {len(found):,} cases: {place}")
        for outcome in found[:_SHOWN]:
            key, old, new = next(row for row in outcome.hard if re.sub(r"\d+", "", row[0]) == place)
            print(f"  {key}: {old:.160} -> {new:.160}\n    {named(outcome.case)}")
    for (kind, verdict), count in sorted(Counter((outcome.kind, outcome.verdict) for outcome in outcomes).items()):
        print(f"  {kind:<26}{verdict:<40}{count:>7,}")
    texts = {name_of(row[0]): row for outcome in outcomes for row in outcome.sentences}
    counts = Counter(name_of(row[0]) for outcome in outcomes for row in outcome.sentences)
    for name, count in counts.most_common():
        print(f"  {count:,} other sentences under {name}, such as {texts[name][1]:.110} -> {texts[name][2]:.110}")
    fresh = Counter(name_of(key) for outcome in outcomes for key, old, _ in outcome.added if old == "-")
    print("  new values of findings:", ", ".join(f"{name} {count:,}" for name, count in fresh.most_common()) or "none")
    in_sentences = sum(bool(outcome.sentences) for outcome in outcomes)
    print(f"{len(outcomes):,} cases: {len(wrong):,} differ; {in_sentences:,} have other sentences")
    return len(wrong)


def main() -> int:
    """0 where no verdict, key or number differs, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="the checkout that is to give the same verdicts")
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="folders with further goldens, traces and scripts")
    parser.add_argument("--engine", nargs="*", default=[], help="engine kinds that record a golden and check it")
    parser.add_argument("--every", type=int, default=1, help="take every n-th of the cases of changed traces; 0: none")
    parser.add_argument("--keep", type=Path, help="a folder: keeps the answers of each commit, and reads them again")
    given = parser.parse_args()
    trees = [given.before.resolve(), given.after.resolve()]
    same = [path for path in goldens_below(trees[0]) if (trees[1] / path).exists()]
    gone = sorted({*goldens_below(trees[0])} ^ {*goldens_below(trees[1])})
    print(f"{len(same)} goldens and traces in both trees" + (f"; in one alone: {gone}" if gone else ""))
    cases = all_cases(same, [folder.resolve() for folder in given.more], given.engine, given.every)
    before, after = (kept_answers(tree, cases, given.keep) for tree in trees)
    return 1 if report([outcome_of(*row) for row in zip(cases, before, after, strict=True)]) else 0


if __name__ == "__main__":
    raise SystemExit(main())
