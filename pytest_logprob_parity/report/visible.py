"""Texts that were written by a model, or by whoever made a file: every character shown, none obeyed."""

from __future__ import annotations

import unicodedata
from typing import Final

_LONGEST: Final = 400
_PICTURES: Final = 0x2400  # U+2400 to U+2421 draw the control characters
_OBEYED: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """`text` with each character that would be obeyed and not drawn replaced by a symbol or its code.

    Control characters, bidi marks and overrides, zero-width ones, lone surrogates, private and unassigned ones; newlines and
    tabs stay. Markup is for the template engine to escape.
    """
    return "".join(char if char in "\n\t" else _symbol(char) for char in text)


def visible_token(text: str) -> str:
    """`visible` for the text of one token: newlines and tabs too, and a mark that would sit on the token before."""
    shown = text[:_LONGEST].replace("\n", "\u23ce").replace("\t", "\u21e5")
    base = "\u25cc" if shown and unicodedata.combining(shown[0]) else ""
    return base + visible(shown) + ("\u2026" if len(text) > _LONGEST else "")


def _symbol(char: str) -> str:
    if unicodedata.category(char) not in _OBEYED:
        return char
    code = ord(char)
    if code < 0x20:
        return chr(_PICTURES + code)
    return "\u2421" if code == 0x7F else f"\u27e8U+{code:04X}\u27e9"
