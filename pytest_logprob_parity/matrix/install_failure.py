"""Why an installer failed, in plain words, from what pip or uv printed."""

from __future__ import annotations

import re
import sys
from typing import Final

#: What a full disk is called, here and in what installers and workers print.
FULL: Final = "No space left on device"
#: How many facts of a conflict a message names, and how many characters of a line.
_FACTS, _WIDTH = 5, 300


def why_it_failed(printed: str) -> str:
    """One line: requirements that conflict, a version that the index does not have, or the line that says most."""
    if FULL in printed:
        return _last_error([line for line in printed.splitlines() if FULL in line])
    if missing := _missing(printed):
        python = ".".join(map(str, sys.version_info[:2]))
        return f"the configured package index has no {missing} for Python {python}: look at its name and version"
    if facts := [*_conflict_of_pip(printed), *_conflict_of_uv(printed)]:
        more = "; ..." if len(facts) > _FACTS else ""
        return f"its requirements conflict: {'; '.join(facts[:_FACTS])}{more}. Change one of these requirements"
    return _last_error(printed.splitlines())


def _missing(printed: str) -> str:
    """The requirement of the user's that no release on the index meets; empty where that is not the reason."""
    if found := re.search(r"^ERROR: No matching distribution found for (.+)$", printed, re.MULTILINE):
        return found.group(1).strip()
    facts = _conflict_of_uv(printed)
    wanted = [fact.removeprefix("you require ") for fact in facts if fact.startswith("you require ")]
    absent = [
        fact
        for fact in facts
        if fact.startswith("there is no version of ") or fact.endswith(" was not found in the package registry")
    ]
    return wanted[0] if len(facts) == 2 and len(wanted) == len(absent) == 1 else ""


def _conflict_of_pip(printed: str) -> list[str]:
    """What pip's resolver says that a conflict is caused by, a fact each, without markers of platforms."""
    block = re.search(r"^The conflict is caused by:\n((?: +\S.*\n?)+)", printed, re.MULTILINE)
    lines = block.group(1).splitlines() if block else []
    facts = [line.partition(";")[0].strip() for line in lines]
    facts = [re.sub(r"^The user requested \(constraint\) ", "a constraint in pip's configuration is ", fact) for fact in facts]
    return [re.sub(r"^The user requested ", "you require ", fact) for fact in facts]


def _conflict_of_uv(printed: str) -> list[str]:
    """What uv's resolver concludes a conflict from, a fact each, without markers of platforms and what hints follow."""
    _, found, text = printed.partition("No solution found")
    if not found:
        return []
    text = " ".join(re.sub(r"[│╰╭├─▶×]", " ", text.partition("hint:")[0]).split())
    text = re.sub(r"\{[^{}]*\}", "", text)
    reasons = re.findall(r"[Bb]ecause (.*?), we can conclude", text)
    facts = [fact.strip() for reason in reasons for fact in re.split(r",? and (?!because)", reason)]
    return list(dict.fromkeys(facts))


def _last_error(lines: list[str]) -> str:
    """The last line that speaks of an error, else the last one."""
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error") or "Error" in line]
    text = (errors or lines or ["the installer printed nothing"])[-1]
    return re.sub(r"^(ERROR|error):\s*", "", text)[:_WIDTH]
