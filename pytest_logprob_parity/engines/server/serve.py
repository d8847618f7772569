"""`logprob-parity serve`: vLLM's own OpenAI server, with a spec's pins, tokens that can be forced, and a route that tells."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from packaging.version import InvalidVersion, Version

from ...checkpoint import digests
from ...errors import EngineError, UsageError
from ...reasons import mixed_builds, reason_of
from ...spec import EngineSpec
from ...spec.engine_arguments import is_secret, vllm_engine_arguments
from ...spec.settings import make_spec
from ..vllm.config import before_its_time
from ..vllm.start import can_replay_traces, version
from ..wait_policy import let_threads_sleep
from .guard import is_loopback
from .middleware import ASKED_VARIABLE, ParityMiddleware
from .readback import EXTENSION, MIDDLEWARE

_ENV_DEFAULTS: Final = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

#: How long requests that run may take to end, once the server is told to: without a bound they keep it up for ever.
_GRACE_SECONDS: Final = 5
#: vLLM's "uni", by a name that its CPU platform does not turn into "mp"; and the first release in which this has been tried.
_WITH_THE_CORE: Final = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
_TRIED: Final = Version("0.32.0")


def serve(
    settings: Mapping[str, Any], host: str, port: int, flags: Sequence[str], *, weight_updates: bool = False
) -> int:  # fmt: skip
    """Serve the engine that `settings` describe, at `host` and `port`, until it is ended; `flags` are vLLM's own, which win.

    `weight_updates`: with vLLM's development mode, whose routes change the engine, on an address of this machine alone.

    Exit status 0 where it was ended, 2 where it did not start. Raises UsageError for settings and flags that do not exist,
    EngineError where vLLM is missing or did not start.
    """
    from pathlib import Path

    for name, value in _ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)
    let_threads_sleep()
    if weight_updates:
        _open_weight_api(host)
    spec = make_spec(settings)
    assert spec is not None
    if spec.engine != "vllm" or spec.profile == "own":
        what = f"engine={spec.engine!r}" if spec.engine != "vllm" else "profile 'own'"
        raise UsageError(f"serve: {what} is nothing to serve: it starts vLLM with a profile's pins")
    if spec.adapter is not None:
        raise UsageError("serve: adapters over a server are not supported; merge it into the model")
    digests.find_model(spec.model, Path.cwd())
    port = _free_port(host, port)
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise EngineError(f"vLLM cannot be imported ({error}); install pytest-logprob-parity[vllm] or [cpu]") from None
    cpu = bool(current_platform.is_cpu())
    try:
        arguments, given = _parse(spec.model, flags)
    except (OSError, RuntimeError) as error:  # of what vLLM's parser imports
        if fix := mixed_builds(str(error)):
            raise EngineError(f"vLLM cannot be imported ({error}){fix}") from None
        raise
    asked = spec.pins(cpu=cpu) | given
    _pin(arguments, spec, {name: value for name, value in asked.items() if name not in before_its_time(asked)})
    arguments.host, arguments.port = host, port
    arguments.worker_extension_cls = EXTENSION
    arguments.disable_uvicorn_access_log = True  # a line for each request, of which a check sends thousands
    arguments.middleware = [*arguments.middleware, MIDDLEWARE]
    os.environ[ASKED_VARIABLE] = json.dumps({k: v for k, v in asked.items() if not is_secret(k)}, default=str)
    if cpu:
        _prepare_cpu(arguments)
    _prepare_forcing(arguments)
    if weight_updates or getattr(arguments, "enable_trace_replay", False):
        arguments.enable_scale_out = True  # the generate route: it replays traces, and says which weights wrote a token
    print(f"logprob-parity: {spec} starts; it will listen at http://{host}:{port}", flush=True)
    _run(arguments)
    if ParityMiddleware.problems:
        print(f"logprob-parity: {ParityMiddleware.problems[-1]}", file=sys.stderr, flush=True)
        return 2
    return 0


def _open_weight_api(host: str) -> None:
    """Have vLLM open its development mode. Raises UsageError for an address that other machines can reach."""
    if not is_loopback(host):
        raise UsageError(
            f"serve: --weight-updates with --host {host}: its routes change the engine and read its memory, so it listens "
            "on this machine only; leave --host out, and reach it through a tunnel"
        )
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"


def _parse(model: str, flags: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """vLLM's own reading of its flags, and those of them that are engine arguments."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
    parser = make_arg_parser(FlexibleArgumentParser(prog="logprob-parity serve", add_help=False))
    arguments = parser.parse_args(["--model", model, *flags])
    if getattr(arguments, "model_tag", None):
        raise UsageError(f"serve: {arguments.model_tag!r} is no option; engine arguments are --set KEY=VALUE, or vLLM's flags")
    validate_parsed_serve_args(arguments)
    written = {flag.partition("=")[0].replace("_", "-") for flag in flags if flag.startswith("-")}
    named = {action.dest for action in parser._actions if written & set(action.option_strings)}
    return arguments, {name: getattr(arguments, name) for name in sorted(named & vllm_engine_arguments())}


def _pin(arguments: Any, spec: EngineSpec, asked: Mapping[str, Any]) -> None:
    """Set what is asked for as values: a flag as text may be dropped without a word."""
    for name, value in asked.items():
        setattr(arguments, name, value)
    for name in ("tokenizer", "revision"):
        if (value := getattr(spec, name)) is not None:
            setattr(arguments, name, value)


def _prepare_cpu(arguments: Any) -> None:
    """As many threads as an engine in this process has: sums over another number of them have other last digits.

    A lone worker lives in the engine core's process, as on a GPU. vLLM gives it one of its own on CPUs, in which to set its
    threads: a third import of torch and vLLM, and two processes that spin for a second after each step.
    """
    import torch

    if "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        return
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    is_alone = all(getattr(arguments, name, 1) == 1 for name in sizes)
    if is_alone and getattr(arguments, "distributed_executor_backend", None) is None and _is_tried():
        arguments.distributed_executor_backend = _WITH_THE_CORE


def _is_tried() -> bool:
    with contextlib.suppress(InvalidVersion):
        return Version(version()) >= _TRIED
    return False


def _prepare_forcing(arguments: Any) -> None:
    """Model Runner V2 replays traces itself from 0.29 on, on any device; before that Model Runner V1 takes its place."""
    if not can_replay_traces():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        return
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments.enable_trace_replay = True
    try:
        AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    except ValueError as error:
        if "trace replay requires" not in str(error):
            raise EngineError(f"vLLM refuses these settings: {reason_of(error)}") from error
        arguments.enable_trace_replay = False


def _run(arguments: Any) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from vllm.entrypoints.openai.api_server import run_server
    import asyncio

    try:
        import uvloop

        run = uvloop.run
    except ImportError:
        run = asyncio.run
    try:
        with contextlib.suppress(KeyboardInterrupt):
            run(run_server(arguments, timeout_graceful_shutdown=_GRACE_SECONDS))
    except (Exception, SystemExit) as error:
        if not ParityMiddleware.problems:
            raise EngineError(f"the server did not start: {reason_of(error)}") from error


def _free_port(host: str, port: int) -> int:
    """`port`, or for 0 one that is free. Raises UsageError where it is taken, or where there is no such host here."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"serve: cannot listen at {host} port {port}: {getattr(error, 'strerror', None) or error}"
            ) from None
        return int(probe.getsockname()[1])
