"""Record the repo's own goldens, then check them in new processes: every logprob has to come back bit for bit.

python benchmarks/bench_exact.py [RUNS]        # 20 where not said otherwise
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

REPO = Path(__file__).resolve().parent.parent


def run_pytest(golden_dir: Path, *arguments: str) -> list[dict[str, object]]:
    """Run the goldens' tests in a new process; the record of each check."""
    report = golden_dir / "out.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_goldens.py", "-p", "no:cacheprovider"]
    options = ["-o", f"parity_golden_dir={golden_dir}", f"--junitxml={report}", *arguments]
    subprocess.run([*command, *options], cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return [json.loads(str(p.get("value"))) for p in ET.parse(report).iter("property") if p.get("name") == "logprob_parity"]


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        recorded = run_pytest(Path(folder), "--update-golden")
        print(f"recorded {len(recorded)} goldens: {[r['outcome'] for r in recorded]}", flush=True)
        exact = 0
        for run in range(1, runs + 1):
            records = run_pytest(Path(folder))
            differences = [r.get("metrics", {}).get("max_abs_diff") for r in records]  # type: ignore[attr-defined]
            exact += len(records) == len(recorded) and all(d == 0 for d in differences)
            print(f"run {run}: max |d| {differences}", flush=True)
    print(f"exact: {exact} of {runs} new processes")
    return 0 if exact == runs else 1


if __name__ == "__main__":
    raise SystemExit(main())
