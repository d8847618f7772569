"""Which `pytest.raises` blocks run now. pytest does not tell, so their entry and their exit are noted."""

from __future__ import annotations

import functools
import sys
from typing import Any, Final

#: What `pytest.raises` gives (up to pytest 8.3, and since), and what is like it, by module.
_KINDS: Final = (
    ("_pytest.python_api", "RaisesContext"),
    ("_pytest.raises", "RaisesExc"),
    ("_pytest.raises", "RaisesGroup"),
    ("unittest.case", "_AssertRaisesContext"),
)
#: Where these keep the exceptions that they name.
_NAMED: Final = ("expected_exceptions", "expected_exception", "expected")

#: Those whose block runs, the innermost last.
_open: list[Any] = []


def note_entries() -> None:
    """From now on in this process, note each block when it is entered and when it is left."""
    for module, name in _KINDS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and not hasattr(kind.__enter__, "__wrapped__"):
            _note(kind)


def _note(kind: Any) -> None:
    enter, leave = kind.__enter__, kind.__exit__

    @functools.wraps(enter)
    def entered(self: Any) -> Any:
        _open.append(self)
        return enter(self)

    @functools.wraps(leave)
    def left(self: Any, *error: Any) -> Any:
        __tracebackhide__ = True
        _open[:] = [raises for raises in _open if raises is not self]
        return leave(self, *error)

    kind.__enter__, kind.__exit__ = entered, left


def count() -> int:
    """How many blocks run."""
    return len(_open)


def named_by_each(since: int) -> list[tuple[type, ...]]:
    """The exceptions that each block names that was entered when `since` others ran."""
    found = []
    for raises in _open[since:]:
        named = next((value for name in _NAMED if (value := getattr(raises, name, None))), ())
        found.append(tuple(one for one in (named if isinstance(named, tuple) else (named,)) if isinstance(one, type)))
    return found
