"""The catalogue of faults, planted in a real engine: each verdict against the fault's effect in a float64 reference.

Takes hours; --only, --sequences and --dtype make it shorter. Exit status: 0 where no material fault passed, 95 % of them or
more failed, and no immaterial one failed; 1 otherwise.

python benchmarks/bench_catalogue.py [--model FOLDER ...] [--dtype bfloat16] [--only TEXT,TEXT] [--json FILE] [--runs FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from catalogue import table
from catalogue.plan import Plan
from catalogue.run import run_models

from pytest_logprob_parity.errors import ParityError
from pytest_logprob_parity.selftest.truth import OBJECTIVES

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-arith"


def tell(text: str) -> None:
    """Print a line of progress to stderr."""
    print(f"# {text}", file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = argparse.ArgumentParser(description="Plant the catalogue of faults and hold each verdict against float64.")
    parser.add_argument("--model", action="append", help=f"model folder; may be given again (default: {MODEL.name})")
    parser.add_argument("--other-step", type=Path, help="a later checkpoint of it (default: MODEL-step2 where there is one)")
    parser.add_argument("--objective", default="token", choices=OBJECTIVES,
                        help="the update that decides what is material (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float32"),
                        help="of the model; may be given again (default: both)")  # fmt: skip
    parser.add_argument("--sequences", type=int, default=200, help="size of the goldens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--only", default="", help="faults whose name contains this text; several by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as JSON")
    parser.add_argument("--runs", type=Path, metavar="FOLDER",
                        help="keep there what engine and reference answered; the next run judges these answers")  # fmt: skip
    return parser


def main() -> int:
    """Print the table. Returns the exit status."""
    given = make_parser().parse_args()
    plan = Plan(
        other_step=given.other_step,
        sequences=given.sequences,
        tokens=given.tokens,
        objective=given.objective,
        dtypes=tuple(given.dtype or ("bfloat16", "float32")),
        only=tuple(part.strip() for part in given.only.split(",") if part.strip()),
        runs=given.runs,
    )
    print(table.header(), flush=True)
    rows = []
    try:
        for row in run_models(given.model or [str(MODEL)], plan, tell, table.show):
            rows.append(row)
            if given.json is not None:  # hours of runs: what is known so far is kept
                given.json.write_text(json.dumps({"rows": table.to_json(rows)}, indent=1), "utf-8")
    except ParityError as error:
        print(f"bench_catalogue: {error}", file=sys.stderr)
        return 2
    print("\n".join(table.summary(rows, given.objective)))
    return 0 if rows and table.reached(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
