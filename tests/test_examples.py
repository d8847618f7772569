"""The quickstart is a downstream repo in miniature, and the README quotes what it prints today."""

import re
import shutil
import subprocess

import numpy as np

from conftest import MODEL, ROOT, forked_python
from pytest_logprob_parity.comparison.free_generation.result import FreeRun
from pytest_logprob_parity.golden.noise_floor import NoiseFloor
from pytest_logprob_parity.trace.batch_composition import BatchCompositions


def test_the_quickstart_checks_its_committed_golden(tmp_path):
    """As a newcomer runs it, but for the imports: in a folder and a process of its own."""
    shutil.copytree(ROOT / "examples" / "quickstart", tmp_path / "examples" / "quickstart")
    (tmp_path / "models").symlink_to(ROOT / "models")
    done = subprocess.run(
        [forked_python(), "-m", "pytest"], cwd=tmp_path / "examples" / "quickstart", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "logprob-parity: 1 checked" in done.stdout
    printed = {_shape(line) for line in done.stdout.splitlines()}
    quoted = (ROOT / "README.md").read_text().partition("    logprob-parity: 1 checked\n")[2].partition("\n\n")[0].splitlines()
    assert len(quoted) == 5
    if "(same setup" not in done.stdout:  # another processor than the golden's: judged by statistics
        assert "(compatible setup, level rl," in done.stdout
        quoted = []
    for line in quoted:
        assert _shape(line) in printed, line


def test_the_readme_quotes_a_message_of_today(run_inner, pytester):
    """The failure in the README is what the quickstart prints; other machines round other digits. It records no candidate."""
    here = pytester.path / "examples" / "quickstart"
    shutil.copytree(ROOT / "examples" / "quickstart", here)
    (pytester.path / "models").symlink_to(ROOT / "models")
    result = run_inner(
        "--rootdir",
        str(here),
        "-o",
        "parity_obtained=trace",
        f"--parity-set=model={MODEL}",
        "--parity-set=logprobs_mode=raw_logprobs",
        str(here),
    )
    printed = {_shape(line) for line in result.outlines if line.startswith("E ")}
    quoted = [line[4:] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    E   ")]
    assert len(quoted) > 10
    for line in quoted:
        if not line.endswith("...") and "AMD" not in line and "to accept" not in line and " after " not in line:
            assert _shape(line) in printed, line


def test_pages_quote_what_free_generation_and_noise_floors_print_today():
    """Which sentence comes hangs on the processor: each quoted one is one of those that there are, whatever its numbers."""
    floors = [NoiseFloor(np.float32([[0, 0], [0, by]]), BatchCompositions(), reproduces=True) for by in (0, 0.5)]
    shapes = {
        "generation": {_shape(str(FreeRun(turns=9, diverged=n, stops_changed=0, divergences=()))) for n in (0, 1)},
        "noise floor of": {_shape(floor.describe().partition(": ")[2]) for floor in floors},
    }
    seen = dict.fromkeys(shapes, 0)
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for what, text in re.findall(r"^[ E]+(generation|noise floor of)(?:   | \d+ repeats: )(\S.*)$", page.read_text(), re.M):
            if text != "...":
                seen[what] += 1
                assert _shape(text).partition("; first at")[0] in shapes[what], f"{page.name}: {text}"
    assert min(seen.values()) >= 2, seen


def _shape(line):
    line = re.sub(r"(E +generation ).*$", r"\1", line)  # hangs on the processor: the test above compares it
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "0", " ".join(line.split()))
