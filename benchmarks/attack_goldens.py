"""Mutates goldens, with and without a digest that fits, and looks what becomes of each: refused in one line, or read and shown.

    python benchmarks/attack_goldens.py [COUNT] [GOLDEN ...]

A traceback, a look that takes more than 5 s, or a file that is read though its digest no longer fits is counted and named.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from attack import mutations  # noqa: E402

from pytest_logprob_parity.cli import main  # noqa: E402
from pytest_logprob_parity.errors import ParityError  # noqa: E402
from pytest_logprob_parity.golden import Golden  # noqa: E402

_SLOW = 5.0


def look(path: Path, original: Path) -> str:
    """What becomes of a file that is looked at in every way that needs no engine."""
    try:
        Golden.load(path)
    except ParityError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"more than a line: {error!s:.80}"
    outputs = []
    for arguments in (["show", path], ["show", "--json", path], ["diff", original, path], ["diff", "--json", path, original]):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            main([str(argument) for argument in arguments])
        outputs.append(out.getvalue() + err.getvalue())
    raw = [c for text in outputs for c in text if (ord(c) < 32 and c not in "\n\t") or c in "\x7f\u202e\u200b\x9b"]
    return "raw characters" if raw else "read"


def run(count: int, goldens: list[Path]) -> int:
    """Prints a table of what became of `count` files; gives how many of them were trouble."""
    found: Counter[tuple[str, str]] = Counter()
    trouble: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.safetensors"
        for number, original in enumerate(goldens):
            data = original.read_bytes()
            for name, mutated, repaired in mutations(data, count // len(goldens), seed=number):
                path.write_bytes(mutated)
                began = time.monotonic()
                try:
                    outcome = look(path, original)
                except Exception as error:
                    outcome = f"{type(error).__name__}: {error!s:.100}"
                if outcome == "read" and not repaired and mutated != data:
                    outcome = "altered, and read"
                if time.monotonic() - began > _SLOW:
                    outcome = f"slow: {time.monotonic() - began:.1f} s"
                kind = f"{name.partition(':')[0]}, digest {'repaired' if repaired else 'as it was'}"
                good = outcome in ("refused", "read")
                found[kind, outcome if good else "TROUBLE"] += 1
                if not good:
                    trouble.append(f"{original.name}: {name}: {outcome}")
    for (kind, outcome), times in sorted(found.items()):
        print(f"{kind:<32}{outcome:<12}{times:>7,}")
    print("\n".join(trouble[:60]))
    print(f"{sum(found.values()):,} files: {len(trouble)} trouble")
    return len(trouble)


if __name__ == "__main__":
    given = [Path(text) for text in sys.argv[2:]] or sorted(
        ROOT.glob("golden/**/*.safetensors"), key=lambda p: p.stat().st_size
    )[:4]
    raise SystemExit(1 if run(int((sys.argv[1:] or ["10000"])[0]), given) else 0)
