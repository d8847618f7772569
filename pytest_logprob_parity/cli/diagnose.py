"""`logprob-parity diagnose`: which engine settings account for a mismatch."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UsageError
from ..progress import doing
from .verb import Verbs, add_verb, check_model, say, tell


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "diagnose",
        "which engine settings account for a mismatch with a golden",
        "Starts the failing engine, then the same engine with each setting that differs moved to the golden's value.",
        run=run,
        status={0: "the golden passes", 1: "it does not; the causes are printed"},
    )
    verb.add_argument("golden", type=Path, help="the golden's file")
    verb.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="the failing engine: EngineSpec fields, engine arguments"
    )
    verb.add_argument(
        "--max-engines", type=int, default=12, help="engines to start at most besides the failing one (default: %(default)s)"
    )
    verb.add_argument("--max-minutes", type=float, default=10, help="minutes to take at most (default: %(default)g)")
    verb.add_argument(
        "--no-reference-evaluation", "--no-reading", action="store_true", help="ask transformers for no reference evaluation"
    )


def run(given: argparse.Namespace) -> int:
    """Exit status 0 where the golden passes, 1 where it does not."""
    from ..check.check import check_golden
    from ..check.context import Context
    from ..comparison.result import MismatchError
    from ..diagnosis.ablation import Budget, ablate
    from ..engines.pool import Pool
    from ..golden import Golden
    from ..spec.settings import make_spec, parse_settings

    budget = Budget(given.max_engines, given.max_minutes)
    golden = Golden.load(given.golden)
    if not golden.fingerprint:
        raise UsageError(f"{given.golden}: a trace of someone's own rollouts: no configuration to move towards")
    known = {"model": golden.fingerprint["name"], "dtype": golden.fingerprint["dtype"]}
    spec = make_spec({**known, **parse_settings(given.settings, "diagnose")})
    assert spec is not None
    check_model(spec.model, known["model"])
    with Pool(notify=tell) as pool:
        try:
            with doing(f"checking {given.golden.name} on {spec}"):
                comparison = check_golden(given.golden, pool.engine(spec), context=Context(accept="pytest --update-golden"))
        except MismatchError as error:
            comparison = error.comparison
        say(f"{comparison.verdict}: {comparison.headline}")
        if comparison.verdict != "fail":
            if not comparison.passed:
                say("no mismatch was shown, so there is none to diagnose")
            return 0 if comparison.passed else 1
        found = ablate(golden, spec, pool, budget, tell, read=not given.no_reference_evaluation)
        say("\n".join([*(f"  {finding}" for finding in found.weigh(comparison.findings)), *found.describe()]))
    return 1
