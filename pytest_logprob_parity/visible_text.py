"""Foreign text made visible: every character of a golden's, a server's or a model's text is shown, none is obeyed.

Every output of ours passes here: the messages of errors, lines on a terminal, pages, Markdown, annotations.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Final

_LONGEST: Final = 400
_PICTURES: Final = 0x2400  # U+2400 to U+2421 draw the control characters
_OBEYED: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
#: Drawn as nothing, whatever their category says: Unicode's Default_Ignorable_Code_Point, and blanks that are no spaces.
_UNSEEN: Final = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
#: What a CI's log obeys: GitHub's `::error::` at the beginning of a line, `##[error]` and Azure's `##vso[...]` anywhere.
_COMMAND: Final = re.compile(r"^(\s*)::|##(?=\w*\[)", re.MULTILINE)
#: One character that is not plain ASCII: what has none is shown as it is.
_OTHER: Final = re.compile(r"[^\n\t\x20-\x7e]")


def visible(text: str) -> str:
    """`text` with each character that would be obeyed and not drawn replaced by a symbol or its code.

    Control characters, bidi marks and overrides, zero-width ones, lone surrogates, private and unassigned ones; newlines and
    tabs stay. What a CI's log would take for a command is put in brackets. Markup is for the template engine to escape.
    Twice is the same as once.
    """
    return _COMMAND.sub(_bracketed, _OTHER.sub(lambda match: _symbol(match[0]), text))


def visible_line(text: object) -> str:
    """`visible` for a text that has to stay on one line: newlines and tabs are shown as symbols too."""
    return visible(str(text).replace("\n", "\u23ce").replace("\t", "\u21e5"))


def visible_token(text: str) -> str:
    """`visible_line` for the text of one token: cut where it is long, and a mark would not sit on the token before."""
    shown = text[:_LONGEST]
    base = "\u25cc" if shown and unicodedata.combining(shown[0]) else ""
    return base + visible_line(shown) + ("\u2026" if len(text) > _LONGEST else "")


def visible_json(value: Any) -> str:
    """JSON in ASCII, indented: nothing in it is obeyed by a terminal, or by the log of a CI."""
    return re.sub(r"##(?=\w*\[)", r"\\u0023#", json.dumps(value, indent=1, sort_keys=True))


def _bracketed(match: re.Match[str]) -> str:
    return "\u27e8##\u27e9" if match[0] == "##" else f"{match[1]}\u27e8::\u27e9"


def _symbol(char: str) -> str:
    if unicodedata.category(char) not in _OBEYED and not _UNSEEN.match(char):
        return char
    code = ord(char)
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"
