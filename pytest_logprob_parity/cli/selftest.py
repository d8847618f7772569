"""`logprob-parity selftest`: which faults a check catches on the user's own engine and model."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..spec.engine_spec import DTYPES
from .json_output import to_text
from .verb import Verbs, add_verb, check_model, say, say_line, tell

if TYPE_CHECKING:
    from ..selftest.run import Plan


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "selftest",
        "plant faults in your engine and see which of them a check catches",
        "Takes any decoder model that the installed engine runs. Records a golden, plants faults in settings, sampler, report "
        "and weights, and judges each as a check of an engine of another version does. Minutes for a small model.",
        run=run,
        status={0: "every fault that matters is caught, and no control fails", 1: "otherwise"},
    )
    verb.add_argument("--model", help="model folder or hub id (default: the golden's)")
    verb.add_argument("--dtype", default=None, choices=DTYPES, help="of the model (default: the golden's, or auto)")
    verb.add_argument("--set", action="append", default=[], dest="set_lines", metavar="KEY=VALUE",
                      help="an engine setting; may be given again")  # fmt: skip
    verb.add_argument("--golden", type=Path, metavar="FILE", help="a golden of yours (default: records one)")
    verb.add_argument("--objective", default="token", choices=("token", "sequence", "truncated", "unclipped"),
                      help="the update that decides what matters (default: %(default)s)")  # fmt: skip
    verb.add_argument("--prompts", type=int, default=24, help="prompts of the recorded golden (default: %(default)s)")
    verb.add_argument("--sampling", action="append", default=[], metavar="KEY=VALUE",
                      help="of the recorded golden; may be given again (default: temperature=0.7 top_p=0.9 max_tokens=32 n=2)"
                      )  # fmt: skip
    verb.add_argument("--only", default="", metavar="TEXT",
                      help="faults of this kind (control, sampler, report, weights, setting), or whose name contains this "
                      "text; several by commas")  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print JSON (see docs/reference/json.md)")


def run(given: argparse.Namespace) -> int:
    """Print the table and the summary. Gives the exit status."""
    from ..engines.pool import Pool
    from ..selftest import table
    from ..selftest.run import run_selftest

    plan = make_plan(given)
    rows = []
    if not given.json:
        say(table.header())
    with Pool(notify=tell) as pool:
        for row in run_selftest(pool, plan, tell):
            rows.append(row)
            if not given.json:
                say_line(table.line(row))
    if given.json:
        say(to_text("selftest", {"model": plan.spec.model, "objective": plan.objective, **table.to_json(rows, plan.objective)}))
    else:
        say("\n".join(["", *table.summary(rows, plan.objective)]))
    return table.exit_status(rows)


def make_plan(given: argparse.Namespace) -> Plan:
    """The plan that the arguments describe. Raises UsageError for arguments that do not fit together."""
    from ..golden import Golden
    from ..selftest.run import SAMPLING, Plan
    from ..spec import Sampling
    from ..spec.settings import make_spec, parse_settings

    if given.model is None and given.golden is None:
        raise UsageError("selftest: give --model, or --golden")
    if given.prompts < 1:
        raise UsageError(f"selftest: --prompts {given.prompts}: 1 or more")
    if given.golden is not None and given.sampling:
        raise UsageError("selftest: --sampling is for a recorded golden, and --golden has its own")
    prints = {} if given.golden is None else Golden.load(given.golden).fingerprint
    recorded = {"model": prints.get("name"), "dtype": prints.get("dtype")} if prints else {}
    chosen = {"model": given.model, "dtype": given.dtype}
    spec = make_spec({
        **recorded, **{name: value for name, value in chosen.items() if value is not None},
        **parse_settings(given.set_lines, "selftest --set"),
    })  # fmt: skip
    if spec is None:
        raise UsageError("selftest: the golden does not know its model: give --model")
    check_model(spec.model, recorded.get("model"))
    sampling = Sampling.of({**dataclasses.asdict(SAMPLING), **parse_settings(given.sampling, "selftest --sampling")})
    return Plan(
        spec=spec, golden=given.golden, objective=given.objective, prompts=given.prompts, sampling=sampling,
        only=tuple(part.strip() for part in given.only.split(",") if part.strip()),
    )  # fmt: skip
