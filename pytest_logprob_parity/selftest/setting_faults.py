"""Faults by settings: the same model in an engine that is started another way. What the engine refuses is not possible here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from .engine_under_test import NotPossibleError
from .fault import Fault
from .weight_faults import noised_matrices

if TYPE_CHECKING:
    from ..check.ask import Answers
    from .engine_under_test import EngineUnderTest

#: The dtype that stands in for each dtype of the model.
_OTHER_DTYPE: Final[Mapping[str, str]] = {"float32": "bfloat16", "bfloat16": "float16", "float16": "bfloat16"}
#: How far the update of a stale cache has moved the weights, in their standard deviations.
_UPDATE: Final = 0.3
_OTHER_MODE: Final[Mapping[str, str]] = {
    "processed_logprobs": "raw_logprobs", "raw_logprobs": "processed_logprobs",
}  # fmt: skip


def setting_faults(config: Mapping[str, Any], *, raw_is_processed: bool) -> list[Fault]:
    """The faults for an engine of this resolved configuration. `raw_is_processed`: raw and processed logprobs are the same."""
    mode, dtype = str(config.get("logprobs_mode")), str(config.get("dtype"))
    eager, caching = bool(config.get("enforce_eager")), bool(config.get("enable_prefix_caching"))
    return [
        _logprobs_mode(mode, raw_is_processed),
        _started("KV cache of another dtype", "fp8 e5m2", kv_cache_dtype="fp8_e5m2"),
        _started("KV cache of another dtype", "fp8 e4m3", kv_cache_dtype="fp8_e4m3"),
        _started("dtype of the model", f"{dtype} -> {_OTHER_DTYPE.get(dtype)}", dtype=_OTHER_DTYPE.get(dtype, "bfloat16")),
        _started("other kernels", "compiled" if eager else "eager", enforce_eager=not eager),
        _started("prefix caching", "off" if caching else "on", enable_prefix_caching=not caching),
        _stale_prefix_cache(),
    ]


def _logprobs_mode(mode: str, raw_is_processed: bool) -> Fault:
    other = _OTHER_MODE.get(mode)
    size = f"{mode} -> {other}".replace("_logprobs", "")
    if other is None:
        return _impossible("raw and processed logprobs", mode, f"logprobs_mode={mode} has no counterpart")
    if raw_is_processed:
        return _impossible("raw and processed logprobs", size, "under the golden's sampling they are the same numbers")
    return _started("raw and processed logprobs", size, logprobs_mode=other)


def _started(name: str, size: str, **settings: Any) -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        with under_test.started(**settings) as engine:
            yield under_test.ask_started(engine)

    return Fault(name=name, size=size, kind="setting", plant=plant, recomputes=True)


def _stale_prefix_cache() -> Fault:
    """Prefix caching is on, and its blocks were computed by the weights from before an update."""

    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        if not under_test.takes_weights():
            raise NotPossibleError("this engine does not take weights faithfully while it runs")
        before = {**under_test.checkpoint.tensors, **noised_matrices(under_test.checkpoint, _UPDATE)}
        with under_test.started(enable_prefix_caching=True) as engine:
            engine.update_weights(before, clear_cache=True)
            engine.replay(under_test.golden.trace)
            engine.update_weights(engine.folder)
            yield under_test.ask_started(engine)

    size = "of weights from before an update"
    return Fault(name="stale prefix cache", size=size, kind="setting", plant=plant, recomputes=True)


def _impossible(name: str, size: str, reason: str) -> Fault:
    @contextlib.contextmanager
    def plant(under_test: EngineUnderTest) -> Iterator[Answers]:
        raise NotPossibleError(reason)
        yield  # a generator, so that it can be a context

    return Fault(name=name, size=size, kind="setting", plant=plant)
