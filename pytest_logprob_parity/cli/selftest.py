"""`logprob-parity selftest`: faults planted in a real engine."""

from __future__ import annotations

import argparse
from pathlib import Path

from .json_output import to_text
from .verb import Verbs, add_verb, say, tell


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "selftest",
        "plant faults in a real engine and see whether the verdicts find them",
        "Holds each verdict against the effect of the fault in a float64 reference. The whole catalogue takes hours; --only "
        "and --sequences make it shorter.",
        run=run,
        status={0: "no material fault passed, 95% of them or more failed, and no immaterial one failed", 1: "otherwise"},
    )
    verb.add_argument(
        "--model", action="append", help="model folder or hub id; may be given again (default: models/tiny-arith)"
    )
    verb.add_argument("--other-step", type=Path, help="a later checkpoint of it (default: MODEL-step2 where there is one)")
    verb.add_argument("--objective", default="token", choices=("token", "sequence", "truncated", "unclipped"),
                          help="the update that decides what is material (default: %(default)s)")  # fmt: skip
    verb.add_argument(
        "--dtype", action="append", choices=("bfloat16", "float32"), help="of the model; may be given again (default: both)"
    )
    verb.add_argument("--sequences", type=int, default=200, help="size of the goldens (default: %(default)s)")
    verb.add_argument("--tokens", type=int, default=64, help="tokens a sequence (default: %(default)s)")
    verb.add_argument("--only", default="", help="faults whose name contains this text; several by commas")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as JSON (see docs/reference/json.md)")
    verb.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="keep there what engine and reference answered; the next run judges these answers without an engine",
    )


def run(given: argparse.Namespace) -> int:
    """Print the table. Gives 0 where no verdict was wrong, 1 where one was."""
    from ..selftest import table
    from ..selftest.run import Plan, run_models

    plan = Plan(
        given.other_step, given.sequences, given.tokens, given.objective, tuple(given.dtype or ("bfloat16", "float32")),
        tuple(part.strip() for part in given.only.split(",") if part.strip()), given.runs,
    )  # fmt: skip
    say(table.header())
    rows = []
    for row in run_models(given.model or ["models/tiny-arith"], plan, tell, table.show):
        rows.append(row)
        if given.json is not None:  # hours of runs: what is known so far is kept
            given.json.write_text(to_text("selftest", {"rows": table.to_json(rows)}), "utf-8")
    say("\n".join(table.summary(rows, given.objective)))
    return 0 if rows and table.reached(rows) else 1
