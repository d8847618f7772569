"""The command line: `show`, `diff`, `report` and `accept` need no engine, `selftest` plants faults in a real one."""

from __future__ import annotations

from .command import main, make_parser, verbs_of

__all__ = ["main", "make_parser", "verbs_of"]
