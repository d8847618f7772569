"""The handle on one engine: what tests, checks and scripts ask an engine for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from .. import machine
from ..errors import EngineError, ParityError, UsageError
from ..notes import Note
from ..reasons import reason_of
from ..spec import PROFILES, EngineSpec, Sampling
from ..spec.server_settings import SERVER
from ..visible_text import visible_line
from .backend import Backend, ChecksumsWeights, Remarks, RunsOnWorker, sleeper, take_weights

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from ..checkpoint.weight_update import WeightUpdate
    from ..trace import FloatArray, ReplayPath, Trace
    from ..trace.batch_composition import BatchCompositions
    from .backend import ResolvedConfig

_T = TypeVar("_T")


class Keeper(Protocol):
    """Who keeps the engines that handles ask: a `Pool`, which starts them and shuts them down."""

    def engine(self, spec: EngineSpec) -> Engine:
        """The handle of a spec; nothing starts."""
        ...

    def beside(self, spec: EngineSpec) -> Engine:
        """A handle on an engine that takes no other engine's place."""
        ...

    def backend(self, spec: EngineSpec, asker: Engine | None = None) -> Backend:
        """The started engine of a spec. Raises EngineError."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """One thread at a time asks the engines."""
        ...

    def discard(self, spec: EngineSpec) -> None:
        """Shut the engine of a spec down."""
        ...

    def updated(self, engine: Engine) -> None:
        """Record that this engine's weights were changed."""
        ...

    def folders(self, spec: EngineSpec) -> tuple[Path, Path]:
        """The folders of a spec's model and tokenizer."""
        ...

    def absolute(self, folder: str | Path) -> Path:
        """A folder, relative ones below the root first."""
        ...

    def adapter(self, spec: EngineSpec) -> Adapter | None:
        """The adapter of a spec."""
        ...

    def digests(self, spec: EngineSpec) -> Mapping[str, str]:
        """The digests of a spec's model."""
        ...


class Engine:
    """A lazy handle: the engine behind it starts when it is first asked, and may be another start the next time."""

    def __init__(self, spec: EngineSpec, pool: Keeper) -> None:
        self.spec = spec
        self._pool = pool
        self._adapter: Adapter | None = None
        #: How many weight updates this engine has taken.
        self.weight_version = 0

    def __repr__(self) -> str:
        return f"<Engine {visible_line(self.spec)}>"

    @property
    def config(self) -> ResolvedConfig:
        """What the engine really uses; starts it."""
        return self._backend().config

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer; None where its folder has none. Needs no engine."""
        from ..checkpoint.prompts import tokenizer_of

        return tokenizer_of(self._pool.folders(self.spec)[1])

    @property
    def folder(self) -> Path:
        """The model's folder. Raises UsageError where there is none here; needs no engine."""
        return self._pool.folders(self.spec)[0]

    def in_dtype(self, dtype: str) -> Engine:
        """The engine of the same spec in another dtype, in the same pool."""
        return self._pool.engine(self.spec.replace(dtype=dtype))

    def generate(self, prompts: Sequence[Any], sampling: Any = None) -> Trace:
        """Sample completions of prompts (strings, token ids or message lists) under a Sampling, dict or SamplingParams.

        In a message list an assistant message without content is a turn for the engine to write; what follows it is
        the environment's answer. Raises UsageError and EngineError.
        """
        from ..checkpoint.prompts import check_prompts, tokenize
        from .generate import generate

        sampling = Sampling.of(sampling)
        tokenized = tokenize(check_prompts(prompts), self.tokenizer)
        return self._versioned(self._guard(lambda backend: generate(backend, tokenized, sampling, self.tokenizer)))

    def generate_with_drafts(self, prompts: Sequence[Any], sampling: Any = None) -> tuple[Trace, npt.NDArray[np.uint8] | None]:
        """What `generate` does, for single turns; also how each token [N] came about: 0, 1 for an accepted draft, 2 for a token
        drawn in place of a rejected draft; None where the engine does not tell. Raises UsageError for prompts with turns.
        """
        from ..checkpoint.prompts import check_prompts, tokenize
        from .generate import generate_with_drafts

        parameters, tokenized = Sampling.of(sampling), tokenize(check_prompts(prompts), self.tokenizer)
        trace, drafted = self._guard(lambda backend: generate_with_drafts(backend, tokenized, parameters, self.tokenizer))
        return self._versioned(trace), drafted

    def without_speculation(self) -> Engine:
        """Another engine of the same spec without speculative decoding, in a process of its own.

        Raises UsageError where the spec does not say so: a caller built this engine.
        """
        if "speculative_config" not in self.spec.settings:
            raise UsageError(f"{self.spec} does not set speculative_config: give an engine without speculation (plain=)")
        return self._pool.beside(self.spec.without("speculative_config"))

    def update_weights(
        self,
        weights: str | Path | Mapping[str, Any],
        *,
        mode: str = "keep",
        clear_cache: bool = False,
        at_token: int = 0,
        prompts: Sequence[Any] | None = None,
        sampling: Any = None,
    ) -> Trace | None:
        """Put other weights in place of the engine's: a checkpoint folder, tensors by their checkpoint names, or the folder of
        a LoRA adapter, which takes the place of the one that there is.

        With `prompts` these are sampled meanwhile, and the update arrives when a request has written `at_token` tokens: the
        trace that is returned says in `weight_versions` which weights wrote each token. `mode` says what becomes of requests
        that run: `keep` (they go on), `wait` (they end first), `abort` (they end there), or `v0` (what vLLM's V0 engine did:
        go on, invalidate nothing). `clear_cache` throws away keys and values that the old weights computed, those of running
        requests among them. Other users of an equal spec get an engine with the checkpoint's own weights.

        A server takes checkpoint folders that it can see, by vLLM's weight API, and keeps them after the run. It takes steps
        until the pause reaches it, so the update arrives at `at_token` or later; `engine_versions` of the trace are its own
        labels.

        Raises UsageError for weights that are not whole, not finite or not of this architecture, before the engine is touched:
        it goes on with the weights it has. EngineError where the engine cannot do it, or lost an earlier update.
        """
        from ..checkpoint.adapter import is_adapter, read_adapter
        from ..checkpoint.prompts import check_prompts, tokenize
        from ..checkpoint.weight_update import WeightUpdate, check_finite, check_fits
        from .generate import generate_through

        if not isinstance(weights, (str, Path, Mapping)):
            raise UsageError(
                f"update_weights({type(weights).__name__}): a checkpoint folder, an adapter's folder, or tensors by their "
                "checkpoint names are needed"
            )
        given = weights if isinstance(weights, Mapping) else self._pool.absolute(weights)
        update = WeightUpdate(weights=given, mode=mode, clear_cache=clear_cache, at_token=at_token)
        adapter = None
        if self.spec.engine == SERVER:
            self._check_for_server(update)
        elif isinstance(given, Path) and is_adapter(given):
            adapter = read_adapter(given, self.folder)
        else:
            check_fits(update, self.folder)
            check_finite(update)
        if prompts is None:
            self._guard(lambda backend: take_weights(backend, update))
            trace = None
        else:
            parameters, version = Sampling.of(sampling), self.weight_version
            tokenized = tokenize(check_prompts(prompts), self.tokenizer)
            trace = self._guard(
                lambda backend: generate_through(backend, tokenized, parameters, self.tokenizer, update, version)
            )
        self.weight_version += 1
        self._adapter = adapter or self._adapter
        self._pool.updated(self)
        return trace

    def sleep(self, level: int = 1) -> None:
        """Give the engine's memory to a trainer beside it: level 1 keeps the weights on the host, 2 keeps none.

        The engine has to be started with `enable_sleep_mode=True`. Raises UsageError where it cannot sleep: on CPUs none can.
        """
        self._check_here("sleep")
        self._guard(lambda backend: sleeper(backend).sleep(level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """End a sleep: of `weights`, of `kv_cache`, or of all. After level 2 the weights are anybody's until an update."""
        self._check_here("sleep")
        self._guard(lambda backend: sleeper(backend).wake_up(None if tags is None else list(tags)))

    @property
    def took_adapter(self) -> bool:
        """Whether a weight update brought an adapter."""
        return self._adapter is not None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that answers: that of the spec, or that of the last update; None where there is none.

        Raises UsageError for one that cannot be read, and where its folder holds other files than the engine has loaded.
        """
        adapter = self._adapter or self._pool.adapter(self.spec)
        if adapter is not None:
            adapter.check_unchanged()
        return adapter

    def replay(self, trace: Trace, path: ReplayPath = "decode", **options: Any) -> Trace:
        """The engine's logprobs of the tokens of `trace`, by `decode`, `prefill`, `regenerate` or `window`."""
        return self.replay_all(trace, [path], **options)[path]

    def replay_all(self, trace: Trace, paths: Sequence[ReplayPath], **options: Any) -> dict[ReplayPath, Trace]:
        """Several replays of one trace, by path."""
        from .replay import replay_all

        replays = self._guard(lambda backend: replay_all(backend, trace, paths, **options))
        return {path: self._versioned(replayed) for path, replayed in replays.items()}

    def replay_in_batch_compositions(self, trace: Trace, compositions: BatchCompositions, number: int) -> FloatArray:
        """Forced decode of `trace`, every block in a batch composition sampled from `compositions`: logprobs [N]."""
        from .batch_compositions import replay_in_batch_compositions

        return self._guard(lambda backend: replay_in_batch_compositions(backend, trace, compositions, number))

    def on_worker(self, work: Callable[[Any], _T]) -> list[_T]:
        """Run `work` on the worker of a vLLM that lives in this process. Raises UsageError for any other engine."""
        backend = self._backend()
        if not isinstance(backend, RunsOnWorker):
            raise UsageError(f"{self.spec} does not live in this process: nothing can be done to its worker")
        return backend.on_worker(work)

    def weight_checksums(self) -> dict[str, str]:
        """The engine's own checksum of each parameter in memory; empty where it has none. They do not see packed copies."""
        backend = self._backend()
        return backend.weight_checksums() if isinstance(backend, ChecksumsWeights) else {}

    def beside(self, model: str | Path) -> Engine:
        """Another engine of the same spec with another checkpoint, in a process of its own: this one goes on beside it.

        Beside a server it is a vLLM of this machine, with the settings that the server tells.
        """
        tokenizer = self.spec.tokenizer or self.spec.model
        if self.spec.engine != SERVER:
            return self._pool.beside(self.spec.replace(model=str(model), tokenizer=tokenizer))
        pinned = {name: value for name, value in self.config.values.items() if name in PROFILES["rl"]}
        settings = (pinned if self.spec.profile == "own" else {}) | self.spec.claims()
        profile = "rl" if self.spec.profile == "own" else self.spec.profile
        spec = EngineSpec(
            str(model), dtype=self.config.dtype, seed=self.spec.seed, profile=profile, tokenizer=tokenizer, **settings
        )
        return self._pool.beside(spec)

    def fingerprint(self) -> dict[str, Any]:
        """What this engine is: model digests, versions, configuration and hardware as JSON values. Starts it."""
        config = self.config
        return {
            **self.model_fingerprint(),
            "engine": {"kind": config.engine, "version": config.version},
            "dtype": config.dtype,
            "config": {k: v for k, v in sorted(config.values.items()) if v is not None},
            "hardware": dict(config.hardware),
            "libraries": machine.libraries() if config.libraries is None else dict(config.libraries),
        }

    def model_fingerprint(self) -> dict[str, Any]:
        """The part of the fingerprint that needs no engine: name and digests of model, tokenizer, chat template, adapter."""
        digests = self._pool.digests(self.spec)
        name = Path(self.spec.model).name if Path(self.spec.model).is_absolute() else self.spec.model
        adapter = self.adapter
        laid_on = {} if adapter is None else {"adapter": str(adapter)}
        return {"name": name, **digests, **laid_on}

    def remarks(self) -> list[Note]:
        """What a report should say of this engine beside its numbers: pins that nobody could verify, trouble on the way."""
        backend = self._backend()
        unverified = backend.config.unverified
        text = f"could not be verified, for the engine does not tell: {', '.join(unverified)}"
        told = [Note("unverified_pins", text)] if unverified else []
        return told + (backend.remarks() if isinstance(backend, Remarks) else [])

    def _check_for_server(self, update: WeightUpdate) -> None:
        """Refuse here what can be seen here; a folder that only the server sees is looked at there."""
        from ..checkpoint.adapter import is_adapter
        from ..checkpoint.weight_update import check_finite, check_fits

        if not isinstance(update.weights, Path) or not update.weights.is_dir():
            return
        if is_adapter(update.weights):
            raise UsageError(f"{update.weights} is an adapter, which servers do not take; merge it (merge_adapter)")
        try:
            model = self.folder
        except UsageError:
            return
        check_fits(update, model)
        check_finite(update)

    def _check_here(self, what: str) -> None:
        if self.spec.engine == SERVER:
            raise UsageError(f"{what}: not over a server ({self.spec.settings['url']}); take engine='vllm', in this process")

    def _backend(self) -> Backend:
        with self._pool.turn():
            return self._pool.backend(self.spec, self)

    def _versioned(self, trace: Trace) -> Trace:
        """The trace with the version of the weights that are in the engine, once there have been others."""
        if not self.weight_version:
            return trace
        return trace.with_(weight_versions=np.full(trace.num_tokens, self.weight_version, np.int32))

    def _guard(self, work: Callable[[Backend], _T]) -> _T:
        """Run `work` on the engine. One that breaks is shut down; the next use starts it anew."""
        with self._pool.turn():
            backend = self._backend()
            try:
                return work(backend)
            except ParityError as error:
                if isinstance(error, EngineError):
                    self._pool.discard(self.spec)
                raise
            except BaseException as error:
                self._pool.discard(self.spec)
                if not isinstance(error, Exception):
                    raise
                config = backend.config
                raise EngineError(f"{config.engine} {config.version} died at work ({self.spec}): {reason_of(error)}") from error
