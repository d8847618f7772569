"""What a server answered: its status, its body as JSON, and its own reason where it refuses."""

from __future__ import annotations

import email.utils
import json
import re
import reprlib
import time
from dataclasses import dataclass
from typing import Any, Final

#: How many characters of an answer a message shows.
_SHOWN: Final = 200
#: Seconds before the first retry; doubled for every further one, up to the second number.
BACK_OFF: Final = (0.1, 5.0)
#: A server that says when to ask again (Retry-After) is waited for so long at most, in seconds.
_MOST_WAITED: Final = 60.0

_SHORT: Final = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 8, 8, 100, 60, 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: the status, and its body as JSON; `text` is what it begins with, for messages.

    `problem` says what a body is that is no JSON, `effort` how often it was tried and how long was waited, where that was more
    than once.
    """

    status: int
    content: Any
    text: str
    problem: str = ""
    effort: str = ""

    def reason(self) -> str:
        """The server's own reason, in one line."""
        content = self.content
        for name in ("error", "message", "detail"):
            while isinstance(content, dict) and content.get(name):
                content = content[name]
        if not content or content is self.content:
            return self.text or "no reason"
        return one_line(content[: 4 * _SHOWN] if isinstance(content, str) else shown(content))[:_SHOWN]


def answer_of(status: int, body: bytes | bytearray) -> Answer:
    """An answer from its status and its body, which may be anything."""
    text = one_line(body[: 4 * _SHOWN].decode("utf-8", "replace"))[:_SHOWN]
    try:
        return Answer(status=status, content=json.loads(body), text=text)
    except RecursionError:
        return Answer(status=status, content=None, text=text, problem="JSON that is nested too deeply")
    except ValueError:
        return Answer(status=status, content=None, text=text, problem="something that is no JSON")


def retry_after(told: str | None) -> float | None:
    """The seconds of a Retry-After header, which are a number or a date, within bounds; None where it tells none."""
    if told is None:
        return None
    try:
        if re.fullmatch(r"\s*\d{1,12}(\.\d{1,9})?\s*", told):
            seconds = float(told)
        else:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(seconds, BACK_OFF[0]), _MOST_WAITED)


def one_line(text: str) -> str:
    """A server's text in one line, without what a terminal would act on."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split())


def shown(value: Any) -> str:
    """A value of an answer in words that stay short, however large it is and however deeply it is nested."""
    return one_line(_SHORT.repr(value))[:_SHOWN]
