"""Pages of Markdown as stories: every code block in order, run in one folder on a real engine, and what a page shows as
output compared with what came.

What a block is, is seen from its language and its first line:

    python, ini, toml, yaml, text   whose first line is a comment with a file name: written to that file
    python                          otherwise: executed, with the names that blocks before it made
    console                         `$ command` and what it prints; a line `...` stands for any lines
    sh                              commands that have to end with status 0
    text                            lines of what the last command printed

A comment before a block says what else becomes of it: `<!-- not run: REASON -->`, or `<!-- run by: FILE::TEST -->` for one that
has a test of its own. `<!-- indented blocks: REASON -->` once in a page is for its indented blocks: results of long runs. What
a page takes as given (the repo of another page, say) is made by `<!-- given: NAME ... -->`.

Output is compared after `mask`: every number is 0, this processor and the pages' processor are one, what a table of tokens
quotes is left out, both marks of a limit are one, and equal lines that follow each other are one.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

#: The processor that wrote the pages' outputs.
PROCESSOR = "AMD EPYC, family 25 model 17"
MARK = re.compile(r"<!-- (not run|run by|indented blocks|given|generated): (.*?) -->\s*\Z", re.DOTALL)
FILE = re.compile(r"# ((?:[\w.-]+/)*[\w.-]*\.[\w]+)\n")
WRITTEN = ("python", "ini", "toml", "yaml", "text")


@dataclass(frozen=True)
class Block:
    """A code block: where it is, what it is, and what its page says becomes of it."""

    page: Path
    line: int
    language: str
    text: str
    how: str = ""
    reason: str = ""
    given: tuple[str, ...] = ()

    def __str__(self):
        return f"{self.page.name}, line {self.line}"

    @property
    def file(self):
        """The file that the block is to be written to, or None."""
        found = FILE.match(self.text) if self.language in WRITTEN else None
        return found and found[1]


def blocks_of(page):
    """The blocks of a page, in order. Raises AssertionError for a mark that is none, or has no block."""
    from markdown_it import MarkdownIt

    blocks, indented, how, given = [], "", ("", ""), ()
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block":
            mark = MARK.match(token.content)
            assert mark, f"{page.name}, line {token.map[0] + 1}: not a mark that tests know: {token.content!r}"
            if mark[1] == "indented blocks":
                indented = mark[2]
            elif mark[1] == "given":
                given = tuple(mark[2].split())
            elif mark[1] != "generated":
                how = (mark[1], " ".join(mark[2].split()))
        elif token.type in ("fence", "code_block"):
            if token.type == "code_block" and not how[0] and indented:
                how = ("not run", indented)
            language = token.info.split()[0] if token.info else "indented" if token.type == "code_block" else ""
            blocks.append(Block(page, token.map[0] + 1, language, token.content, *how, given))
            how, given = ("", ""), ()
        elif how[0]:
            raise AssertionError(f"{page.name}, line {token.map[0] + 1}: a mark stands before a block, not before {token.type}")
    return blocks


def commands_of(text):
    """A console session as (command, lines that it prints)."""
    steps, whole = [], True
    for line in text.splitlines():
        if line.startswith("$ "):
            steps.append((line[2:], []))
        elif not whole:
            steps[-1] = (steps[-1][0] + line, [])
        else:
            assert steps, f"output before any command: {line!r}"
            steps[-1][1].append(line)
        whole = not line.endswith("\\")
        if not whole:
            steps[-1] = (steps[-1][0].removesuffix("\\"), [])
    return steps


class Story:
    """One page in one folder: `tell(block)` runs it and compares."""

    def __init__(self, folder, run_pytest, given):
        self.folder = folder
        self._run_pytest = run_pytest
        self._given = given
        self.names = {"__name__": "__main__"}
        self.printed = []
        self.unread = []

    def tell(self, block):
        """Run a block, or write its file. Raises AssertionError where what came is not what the page shows."""
        for name in block.given:
            self._given(name)
        if block.file:
            self._write(block)
        elif block.language == "python":
            self._execute(compile(block.text, str(block), "exec"))
        elif block.language == "console":
            for command, shown in commands_of(block.text):
                status, self.printed = self._run(command)
                assert shown or status == 0, "\n".join([f"{block}: {command}: status {status}", *self.printed])
                agrees(shown, self.printed, f"{block}: {command}")
        elif block.language == "sh":
            for command, _ in commands_of(re.sub(r"^(?=\S)", "$ ", block.text, flags=re.MULTILINE)):
                status, self.printed = self._run(command)
                assert status == 0, "\n".join([f"{block}: {command}: status {status}", *self.printed])
        elif block.language == "text":
            agrees(["...", *block.text.splitlines(), "..."], self.printed, str(block))
        else:
            raise AssertionError(f"{block}: nobody runs {block.language or 'a block without a language'}; mark it, or name one")

    def end(self):
        """Run tests that no command of the page came after. Raises AssertionError where one fails, and for other such files."""
        tests = [block for block in self.unread if Path(block.file).name.startswith("test_")]
        others = [block for block in self.unread if block not in tests]
        assert not others, f"{others[0]}: nothing reads the file"
        if tests:
            status, printed = self._run(f"pytest {shlex.join(block.file for block in tests)}")
            assert status == 0, "\n".join([f"{tests[0]}: its test fails", *printed])

    def _write(self, block):
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        if block.language == "yaml":
            import yaml

            yaml.safe_load(block.text)
        else:
            self.unread.append(block)

    def _execute(self, code):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, self.names)
        self.printed = out.getvalue().splitlines()

    def _run(self, command):
        """Exit status and printed lines of a command; what this project's are runs in this process."""
        self.unread = []
        words = shlex.split(command, comments=True)
        variables = dict(word.split("=", 1) for word in itertools.takewhile(re.compile(r"\w+=").match, words))
        words = words[len(variables) :]
        if words[0] == "pytest":
            with mock.patch.dict(os.environ, variables):
                result = self._run_pytest(*words[1:])
            return int(result.ret), [*result.outlines, *result.errlines]
        if words[0] == "logprob-parity":
            return self._main(words[1:])
        if words[:2] == ["pip", "install"]:
            return _installs(words[2:])
        if words[:2] == ["pip", "uninstall"]:
            return 0, []
        if words[0] == "python" and words[1].endswith(".py"):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                runpy.run_path(str(self.folder / words[1]), run_name="__main__")
            return 0, out.getvalue().splitlines()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        who = {f"GIT_{role}_{what}": "docs" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env={**os.environ, **who, "PATH": path}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines()

    @staticmethod
    def _main(arguments):
        from pytest_logprob_parity.cli import main

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                status = main(arguments)
            except SystemExit as end:  # --version, --help
                status = end.code
        return status, out.getvalue().splitlines()


def _installs(packages):
    """Nothing is installed; the package has every extra that is named."""
    from pytest_logprob_parity.matrix.plan import tomllib

    pyproject = Path(__file__).resolve().parent.parent / "pyproject.toml"
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    words = iter(packages)
    for package in words:
        if package == "--extra-index-url":
            assert next(words).startswith("https://download.pytorch.org/"), package
            continue
        name, _, wanted = package.partition("[")
        assert name == "pytest-logprob-parity", package
        assert set(filter(None, wanted.rstrip("]").split(","))) <= set(extras), package
    return 0, []


# -- comparing --------------------------------------------------------------------------------------------------------


def mask(line):
    """A line without what another machine, another day or another stream of random numbers may print."""
    from pytest_logprob_parity.machine import hardware

    for processor in (PROCESSOR, hardware()["device"]):
        line = line.replace(processor, "PROCESSOR")
    line = re.sub(r"('.*'|\".*\") after ('.*'|\".*\")$", "TOKEN", line.strip())
    line = re.sub(r"(\(prompt \d+, sample \d+\), position \d+: ).*$", r"\1TOKEN", line)
    line = re.sub(r"<-- (exceeds|inconclusive)$", "<-- MARK", line)
    line = re.sub(r"(noise floor of \d+ repeats: ).*$", r"\1MEASURED", line)  # a processor may have none
    line = re.sub(r"(generation   ).*$", r"\1MEASURED", line)
    line = re.sub(r"( in [\d.]+s) \(\d+:\d\d:\d\d\)", r"\1", line)  # pytest adds this after a minute
    line = re.sub(r"((?<![\w.])[-+])?\d+(,\d{3})*(\.\d+)?(e[-+]?\d+)?", "0", line)
    return " ".join(re.sub("={3,}", "===", line).split())


def masked(lines):
    """Lines masked, blank ones left out, equal neighbours once."""
    kept = [text for line in lines if (text := mask(line))]
    return [text for i, text in enumerate(kept) if not i or text != kept[i - 1]]


def agrees(shown, came, where):
    """Compare what a page shows with what came: `...` alone is any lines, at the end of a line any rest of it.

    Raises AssertionError with the first line that did not come, and all that did.
    """
    lines, place, free = masked(came), 0, False
    for text in masked(shown):
        if text == "...":
            free = True
            continue
        places = range(place, len(lines)) if free else range(place, min(place + 1, len(lines)))
        found = next((i for i in places if _fits(text, lines[i])), None)
        if found is None:
            raise AssertionError("\n".join([f"{where}: this did not come:", text, "", "masked, all that came:", *lines]))
        place, free = found + 1, False
    if shown and not free and place < len(lines):
        raise AssertionError("\n".join([f"{where}: the page does not show:", *lines[place:]]))


def _fits(text, line):
    return line.startswith(text.removesuffix("...").rstrip()) if text.endswith("...") else text == line
