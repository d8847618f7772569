"""What goes wrong, each kind with a name of its own; the message is written for the reader, headline first."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from .visible_text import visible, visible_line

#: What kind of check was not met, as records and reports have it.
Kind: TypeAlias = Literal["failed", "usage", "golden", "incomparable", "engine"]


class ParityError(AssertionError):
    """A check that is not met, for whatever reason. Never a skip."""

    kind: ClassVar[Kind] = "failed"

    def __init__(self, reason: str, place: object = None) -> None:
        """`reason`, at `place`: a file, or a function of ours. The message begins with the place.

        Both may hold the text of a golden or a server: it is made visible here, whoever prints the message later.
        """
        super().__init__(visible(reason) if place is None else f"{visible_line(place)}: {visible(reason)}")
        self.reason, self.place = visible(reason), place

    def reason_beside(self, *places: object) -> str:
        """The message, without its place where that is one of `places`: those that the reader is told of anyway."""
        return self.reason if self.place in places else str(self)


class UsageError(ParityError):
    """The call, the marker or an option asks for something that does not exist or is not supported."""

    kind = "usage"


class GoldenError(ParityError):
    """The golden cannot be used: missing, damaged, unreadable, too large, or of a newer schema."""

    kind = "golden"
    #: Whether recording it again mends it: so for one that is missing or damaged, not for what only looks like one.
    replaceable: bool = False


class IncomparableError(ParityError):
    """The golden belongs to other prompts, another model, tokenizer, chat template or sampling."""

    kind = "incomparable"


class EngineError(ParityError):
    """An engine is not installed, did not start, did not take a setting, refused a request, or died."""

    kind = "engine"


for _error in (ParityError, UsageError, GoldenError, IncomparableError, EngineError):
    _error.__module__ = __package__  # as users import them, and as a report shows them
