"""Build a vLLM `LLM` so that it can be forced, and shut it down so that the next one can start in this process."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ...errors import UsageError
from ...spec import EngineSpec
from ...spec.engine_arguments import vllm_engine_arguments
from ...suggest import nearest
from .config import BY_NATURE

#: Environment variables that decide what a started engine is, and how they are set while it starts.
IN_PROCESS: Final = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_RUNNER: Final = "VLLM_USE_V2_MODEL_RUNNER"
_ENV_DEFAULTS: Final = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def set_defaults() -> None:
    """Set the environment variables that vLLM reads while it is imported, unless the environment says otherwise."""
    for name, value in _ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)


def check_settings(spec: EngineSpec) -> None:
    """Raise UsageError for a setting that the installed vLLM does not have, with the nearest name."""
    known = vllm_engine_arguments()
    for name in spec.claims():
        if known and name not in known and name not in BY_NATURE:
            fields = spec.field_names()
            raise UsageError(
                f"{name!r} is neither a field of EngineSpec nor an engine argument of the installed vLLM"
                f"{nearest(name, [*fields, *known])}"
            )


def build(llm: Any, arguments: dict[str, Any]) -> Any:
    """Build the LLM so that it can be forced, by what it can do and on any device. Model Runner V2 samples out of reach of a
    wrapped sampler: from 0.29 on it replays traces itself, before that Model Runner V1 takes its place.
    """
    gc.collect()
    gc.freeze()  # vLLM collects several times from here on: what was imported need not be looked through each time
    if not can_replay_traces():
        with environment({_RUNNER: "0"}):
            return llm(**arguments)
    try:
        return llm(**{"enable_trace_replay": True, **arguments})
    except ValueError as error:
        if "trace replay requires" not in str(error):
            raise
    return llm(**arguments)  # something in these settings keeps Model Runner V1, whose sampler can be wrapped


def can_replay_traces() -> bool:
    """Whether the installed vLLM has trace replay: the engine argument, and the field of SamplingParams."""
    from vllm import SamplingParams

    fields = getattr(SamplingParams, "__struct_fields__", ())
    return "enable_trace_replay" in vllm_engine_arguments() and "trace_decode_token_ids" in fields


def version() -> str:
    """The version of the installed vLLM."""
    import vllm

    return str(vllm.__version__)


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def shut_down(llm: Any) -> None:
    """Shut an engine down, or clear away what a failed start left, so that the next one can start in this process."""
    engine = getattr(llm, "llm_engine", None)
    core = getattr(engine, "engine_core", None)
    with _one_collection():
        if core is not None:
            core.shutdown()
        del llm, engine, core
        with contextlib.suppress(ImportError):
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


@contextlib.contextmanager
def _one_collection() -> Iterator[None]:
    """Collect garbage once, at the end, however often vLLM asks for it: beside torch each time takes half a second."""
    collect = gc.collect
    gc.collect = lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = collect
        gc.unfreeze()
        gc.collect()
