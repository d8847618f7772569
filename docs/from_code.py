"""Tables and entries of the reference, written from the code: options, commands, names, limits. `fill` puts them into pages."""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import pytest_logprob_parity
from pytest_logprob_parity import plugin
from pytest_logprob_parity.cli import make_parser, verbs_of
from pytest_logprob_parity.comparison import tolerance
from pytest_logprob_parity.comparison.objectives import OBJECTIVES
from pytest_logprob_parity.plugin.fixtures import FIXTURES, GoldenTrace
from pytest_logprob_parity.spec import PROFILES, RL_ON_CPU

_MARK: Final = re.compile(r"^<!-- generated: (\w+)(.*?) -->$", re.MULTILINE | re.DOTALL)


def fill(page: str) -> str:
    """The page with every `<!-- generated: NAME ARGUMENTS -->` replaced. Raises KeyError for a name that is none."""
    return _MARK.sub(lambda mark: "\n".join(PARTS[mark[1]](*mark[2].split())), page)


# -- pytest -----------------------------------------------------------------------------------------------------------


class Registered:
    """A pytest parser that only remembers: `options` and `ini`, name -> keywords."""

    def __init__(self) -> None:
        self.options: dict[str, dict[str, Any]] = {}
        self.ini: dict[str, dict[str, Any]] = {}
        plugin.pytest_addoption(self)  # type: ignore[arg-type]

    def getgroup(self, *_: str) -> Registered:
        """Itself: there is one group."""
        return self

    def addoption(self, name: str, **how: Any) -> None:
        """Remember an option."""
        self.options[name] = how

    def addini(self, name: str, help: str, **how: Any) -> None:
        """Remember an ini key."""
        self.ini[name] = {"help": help, **how}


def options() -> Iterator[str]:
    """A table of the pytest options."""
    yield from ("| option | |", "|---|---|")
    for name, how in Registered().options.items():
        values = "\\|".join(how["choices"]) if how.get("choices") else how.get("metavar", "")
        yield f"| `{name}{'=' + values if values else ''}` | {_cell(how['help'])} |"


def ini_keys() -> Iterator[str]:
    """A table of the ini keys."""
    yield from ("| key | default | |", "|---|---|---|")
    for name, how in Registered().ini.items():
        default = "one a line" if how.get("type") == "linelist" else f"`{how['default']}`"
        yield f"| `{name}` | {default} | {_cell(how['help'])} |"


def fixtures() -> Iterator[str]:
    """The fixtures with their docstrings."""
    for name in FIXTURES:
        definition = getattr(plugin, name)
        function = getattr(definition, "__wrapped__", None) or definition._get_wrapped_function()
        marker = getattr(definition, "_fixture_function_marker", None)
        yield f"`{name}` ({getattr(marker, 'scope', 'function')} scope)"
        yield from _definition(inspect.getdoc(function) or "")


def check() -> Iterator[str]:
    """How golden_trace.check is called."""
    method = GoldenTrace.check
    yield from ("```python", *_wrapped(f"golden_trace.check{short_signature(method, bound=True)}"), "```", "")
    yield inspect.getdoc(method) or ""


def profiles() -> Iterator[str]:
    """What each profile pins."""
    yield from ("| profile | pins |", "|---|---|")
    for name, pins in PROFILES.items():
        yield f"| `{name}` | {', '.join(f'`{key}={value!r}`' for key, value in pins.items()) or 'nothing'} |"
    yield ""
    yield f"On CPUs those that pin something pin {', '.join(f'`{k}={v!r}`' for k, v in RL_ON_CPU.items())} too."


# -- commands ---------------------------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Every verb with its arguments and exit statuses."""
    for name, parser in verbs_of(make_parser()).items():
        usage = textwrap.dedent(f"       {parser.format_usage().removeprefix('usage: ')}").splitlines()
        yield from (f"### {name}", "", parser.description or "", "", "```text", *usage, "```", "")
        yield from _arguments(parser)
        yield from ("", parser.epilog or "", "")


def common() -> Iterator[str]:
    """The arguments of the command line that belong to no verb."""
    yield from _arguments(make_parser())


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table of a parser's arguments."""
    yield from ("| argument | |", "|---|---|")
    for row in parser._actions:
        if row.dest == "help" or isinstance(row, argparse._SubParsersAction):
            continue
        label = row.option_strings[-1] if row.option_strings else str(row.metavar or row.dest)
        taken = row.metavar or (None if row.nargs == 0 else row.dest.upper())
        label += f" {taken}" if row.option_strings and taken else ""
        choices = f" ({', '.join(map(str, row.choices))})" if row.choices else ""
        yield f"| `{label}` | {_cell((row.help or '') % vars(row))}{choices} |"


# -- names ------------------------------------------------------------------------------------------------------------


class _Bare:
    """An annotation that shows as it was written."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(thing: Any) -> str:
    """The signature of a callable as it is written."""
    found = inspect.signature(thing)
    shown = [
        p if p.annotation is p.empty else p.replace(annotation=_Bare(str(p.annotation))) for p in found.parameters.values()
    ]
    told = found.empty if inspect.isclass(thing) else _Bare(str(found.return_annotation))
    return str(found.replace(parameters=shown, return_annotation=told))


def short_signature(method: Any, *, bound: bool) -> str:
    """The parameters of a method without their types, which its docstring tells; `bound` leaves out self or cls."""
    found = inspect.signature(method)
    shown = [p.replace(annotation=p.empty) for p in list(found.parameters.values())[1 if bound else 0 :]]
    return str(found.replace(parameters=shown, return_annotation=_Bare(str(found.return_annotation))))


def name(*names: str) -> Iterator[str]:
    """Entries for names: of the package's face, or `module.Name` below the package."""
    for full in names:
        home, _, short = full.rpartition(".")
        module = importlib.import_module(f"pytest_logprob_parity.{home}") if home else pytest_logprob_parity
        yield from _entry(short, getattr(module, short))


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield from (f"### {name}", "")
    if inspect.isclass(thing) and (issubclass(thing, BaseException) or getattr(thing, "_is_protocol", False)):
        bases = ", ".join(base.__name__ for base in thing.__bases__)
        yield from ("```python", f"class {name}({bases})", "```", "")
    else:
        kind = "class " if inspect.isclass(thing) else ""
        yield from ("```python", *_wrapped(f"{kind}{name}{signature(thing)}"), "```", "")
    yield from (inspect.getdoc(thing) or "").splitlines()
    yield ""
    if inspect.isclass(thing):
        for member, label, text in members(thing):
            yield f"`{label}`"
            yield from _definition(text or f"{member}.")


def members(thing: type) -> Iterator[tuple[str, str, str]]:
    """Public methods and properties that have a docstring: name, signature, docstring."""
    for member, raw in vars(thing).items():
        if member.startswith("_"):
            continue
        if isinstance(raw, property) or type(raw).__name__ == "cached_property":
            function = raw.fget if isinstance(raw, property) else raw.func
            yield member, member, inspect.getdoc(function) or ""
        elif isinstance(raw, (classmethod, staticmethod)) or inspect.isfunction(raw):
            function = raw.__func__ if isinstance(raw, (classmethod, staticmethod)) else raw
            label = f"{member}{short_signature(function, bound=not isinstance(raw, staticmethod))}"
            yield member, label, inspect.getdoc(function) or ""


def _wrapped(line: str) -> list[str]:
    """A signature, one parameter a line where it is long."""
    if len(line) <= 88:
        return [line]
    head, rest = line.split("(", 1)
    depth, parts, current = 0, [], ""
    body, _, tail = rest.rpartition(")")
    for letter in body:
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [f"{head}(", *(f"    {part}," for part in [*parts, current.strip()]), f"){tail}"]


def _definition(text: str) -> list[str]:
    return [": " + textwrap.indent(text, "  ").lstrip(), ""]


# -- limits -----------------------------------------------------------------------------------------------------------


def _limits_told() -> dict[str, str]:
    """What the docstring of Tolerance says of each limit."""
    text = inspect.getdoc(tolerance.Tolerance) or ""
    return dict(re.findall(r"^- `(\w+)`: (.*?)(?=\n- |\n\n|\Z)", text, re.DOTALL | re.MULTILINE))


def _table_of_limits(names: Iterable[str], columns: Mapping[str, tolerance.Tolerance]) -> Iterator[str]:
    """Rows of limits, a column for each set of them; `-` for a limit that bounds nothing."""
    told = _limits_told()
    yield from (f"| limit | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|")
    for name in names:
        values = (getattr(column, name) for column in columns.values())
        shown = " | ".join(f"{value:g}" if math.isfinite(value) else "-" for value in values)
        yield f"| `{name}` | {shown} | {_cell(told[name])} |"


def objectives() -> Iterator[str]:
    """Each objective, what it is for, and the ratio that its update leaves alone."""
    yield from ("| objective | | clip of the ratio | of |", "|---|---|---|---|")
    for objective in OBJECTIVES.values():
        lower, upper = objective.clip
        unit = "a sequence" if objective.by_sequence else "a token"
        yield f"| `{objective.name}` | {objective.title} | {lower:g} to {upper:g} | {unit} |"


def limits() -> Iterator[str]:
    """The limits of what an update feels, by objective."""
    columns = {f"`{name}`": tolerance.default_tolerance("bfloat16", objective=name) for name in OBJECTIVES}
    yield from _table_of_limits(_FELT, columns)


def noise() -> Iterator[str]:
    """The limits of what is noise, by dtype."""
    names = [name for name in tolerance.LIMITS if name not in _FELT]
    yield from _table_of_limits(names, {d: tolerance.default_tolerance(d) for d in ("float32", "float16", "bfloat16")})


#: The limits that go by objective; all others go by dtype.
_FELT: Final = ("mean_diff", "k3", "clip_share", "weight_variance")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PARTS: Final[dict[str, Callable[..., Iterator[str]]]] = {
    part.__name__: part
    for part in (options, ini_keys, fixtures, check, profiles, commands, common, name, objectives, limits, noise)
}
