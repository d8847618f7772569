"""Which engines are alive: one start for each spec, shut down before the next one needs the place."""

from __future__ import annotations

import contextlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import EngineError, ParityError, UsageError
from ..golden import fingerprint
from ..notes import Note
from ..spec import EngineSpec, Sampling
from ..spec.server_settings import SERVER, SERVER_SETTINGS
from ..visible_text import visible_line
from .time_limits import TimeLimits

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from ..checkpoint.weight_update import WeightUpdate
    from ..golden.noise_floor import Shapes
    from ..trace import FloatArray, ReplayPath, Trace
    from .backend import Backend, ResolvedConfig
    from .server.client import Client

_T = TypeVar("_T")


@dataclass(frozen=True)
class Start:
    """One engine start: how long it took, in seconds, and whether it got a process of its own."""

    spec: EngineSpec
    seconds: float
    own_process: bool
    version: str


class Engine:
    """A lazy handle: the engine behind it starts when it is first asked, and may be another start the next time."""

    def __init__(self, spec: EngineSpec, pool: Pool) -> None:
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
        """The model's transformers tokenizer; needs no engine."""
        from ..checkpoint.prompts import load_tokenizer

        return load_tokenizer(self._pool.folders(self.spec)[1])

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
        from .replay import generate

        sampling = Sampling.of(sampling)
        tokenized = tokenize(check_prompts(prompts), self.tokenizer)
        return self._versioned(self._guard(lambda backend: generate(backend, tokenized, sampling, self.tokenizer)))

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

        Raises UsageError for weights that are not whole, not finite or not of this architecture, before the engine is touched:
        it goes on with the weights it has. EngineError where the engine cannot do it, or lost an earlier update.
        """
        from ..checkpoint.adapter import is_adapter, read_adapter
        from ..checkpoint.prompts import check_prompts, tokenize
        from ..checkpoint.weight_update import WeightUpdate, check_finite, check_fits
        from .replay import generate_through

        self._check_here("weight updates")
        if not isinstance(weights, (str, Path, Mapping)):
            raise UsageError(
                f"update_weights({type(weights).__name__}): a checkpoint folder, an adapter's folder, or tensors by their "
                "checkpoint names are needed"
            )
        given = weights if isinstance(weights, Mapping) else self._pool.absolute(weights)
        update = WeightUpdate(given, mode, clear_cache, at_token)
        model, adapter = self._pool.folders(self.spec)[0], None
        if isinstance(given, Path) and is_adapter(given):
            adapter = read_adapter(given, model)
        else:
            check_fits(update, model)
            check_finite(update)
        if prompts is None:
            self._guard(lambda backend: _take(backend, update))
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
        self._guard(lambda backend: _can(backend, "sleep")(level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """End a sleep: of `weights`, of `kv_cache`, or of all. After level 2 the weights are anybody's until an update."""
        self._check_here("sleep")
        self._guard(lambda backend: _can(backend, "wake_up")(None if tags is None else list(tags)))

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

    def replay_in_drawn_shapes(self, trace: Trace, shapes: Shapes, number: int) -> FloatArray:
        """Forced decode of `trace` with every block in a shape drawn from `shapes`: logprobs [N]; see repeats.py."""
        from .batch_compositions import replay_in_drawn_shapes

        return self._guard(lambda backend: replay_in_drawn_shapes(backend, trace, shapes, number))

    def on_worker(self, work: Callable[[Any], _T]) -> list[_T]:
        """Run `work` on the worker of a vLLM that lives in this process. Raises UsageError for any other engine."""
        run = getattr(self._backend(), "on_worker", None)
        if run is None:
            raise UsageError(f"{self.spec} does not live in this process: nothing can be done to its worker")
        results: list[_T] = run(work)
        return results

    def weight_checksums(self) -> dict[str, str]:
        """The engine's own checksum of each parameter in memory; empty where it has none. They do not see packed copies."""
        sums: dict[str, str] = getattr(self._backend(), "weight_checksums", dict)()
        return sums

    def beside(self, model: str | Path) -> Engine:
        """Another engine of the same spec with another checkpoint, in a process of its own: this one goes on beside it."""
        return self._pool.beside(self.spec.replace(model=str(model), tokenizer=self.spec.tokenizer or self.spec.model))

    def fingerprint(self) -> dict[str, Any]:
        """What this engine is: model digests, versions, configuration and hardware as JSON values. Starts it."""
        config = self.config
        return {
            **self.model_fingerprint(),
            "engine": {"kind": config.engine, "version": config.version},
            "dtype": config.dtype,
            "config": {k: v for k, v in sorted(config.values.items()) if v is not None},
            "hardware": dict(config.hardware),
            "libraries": fingerprint.libraries() if config.libraries is None else dict(config.libraries),
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
        return told + (backend.remarks() if hasattr(backend, "remarks") else [])

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
        from .backend import reason_of

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


class Pool:
    """Engines by spec. At most one of each kind lives in this process; a vLLM that comes back after its place was taken,
    or that does not start where others have lived, gets a process of its own. On a GPU each does, one at a time.

    `root` is where relative model folders are looked for, `notify` gets a line for each start. An engine in another process
    may take `start_timeout` seconds to start and `call_timeout` seconds for a call; 0: no limit.
    """

    #: How many engines in processes of their own are kept alive on a CPU.
    processes = 2

    def __init__(
        self,
        root: Path | None = None,
        notify: Callable[[str], None] | None = None,
        start_timeout: float = TimeLimits.start,
        call_timeout: float = TimeLimits.call,
    ) -> None:
        self.root = Path.cwd() if root is None else root
        self.notify = notify
        self.limits = TimeLimits.of(start_timeout, call_timeout)
        self.starts: list[Start] = []
        self._lock = threading.RLock()
        self._alive: dict[EngineSpec, Backend] = {}
        self._apart: set[EngineSpec] = set()
        self._place_is_spoilt = False
        self._adopted: dict[int, tuple[Any, Engine]] = {}
        self._given: dict[tuple[int, EngineSpec | None], Any] = {}
        self._failed: dict[EngineSpec, ParityError] = {}
        self._folders: dict[EngineSpec, tuple[Path, Path]] = {}
        self._adapters: dict[EngineSpec, Adapter] = {}
        self._beside: set[EngineSpec] = set()
        self._updated: dict[EngineSpec, Engine] = {}
        self._clients: dict[str, Client] = {}

    def engine(self, spec: EngineSpec) -> Engine:
        """The handle of a spec; nothing starts yet."""
        if spec.engine != SERVER:
            from .wait_policy import let_threads_sleep

            let_threads_sleep()  # now: before it starts, a tokenizer may import torch
        return Engine(spec, self)

    def adopt(self, llm: Any, asked: EngineSpec | None = None) -> Engine:
        """A handle on a `vllm.LLM` or `AsyncLLM` that the caller built and keeps, or on the server at an address: nothing is
        pinned, its configuration is read back. `asked` is the spec of the test, which names a server's model.

        An AsyncLLM is not asked before it is used: its event loop need not run yet. Raises UsageError for anything else.
        """
        if isinstance(llm, str):
            return self.engine(self._server_spec(llm, asked))
        if id(llm) in self._adopted:
            return self._adopted[id(llm)][1]
        from .vllm.own_engine import is_async

        if inspect.iscoroutine(llm):
            llm.close()
            raise UsageError(
                "parity_engine_factory gave a coroutine: make it an async fixture, or build the AsyncLLM without await "
                "(AsyncLLM.from_engine_args is no coroutine)"
            )
        if not hasattr(llm, "llm_engine") and not is_async(llm):
            given = f"{type(llm).__module__}.{type(llm).__qualname__}"
            raise UsageError(f"parity_engine_factory must give a vllm.LLM, an AsyncLLM or a server's address, not {given}")
        from .backend import json_value

        model = getattr(llm, "llm_engine", llm).vllm_config.model_config
        spec = EngineSpec(str(model.model), dtype=str(json_value(model.dtype)), profile="own")
        if spec in self._alive or spec in self._theirs():  # two of one model; the name tells them apart
            spec = spec.replace(revision=f"own engine {len(self._adopted) + 1}")
        find = fingerprint.find_model
        self._folders[spec] = (find(str(model.model), self.root), find(str(model.tokenizer), self.root))
        self._adopted[id(llm)] = (llm, Engine(spec, self))
        if not is_async(llm):
            self._open_adopted(spec)
        return self._adopted[id(llm)][1]

    def _open_adopted(self, spec: EngineSpec) -> None:
        from .vllm.backend import VllmBackend

        llm = next(llm for llm, engine in self._adopted.values() if engine.spec == spec)
        self._alive[spec] = backend = VllmBackend.adopt(llm, self.limits.call)
        if self.notify is not None:
            self.notify(f"own engine, vllm {backend.config.version}: {_beside_rl(backend.config)}")

    def _server_spec(self, url: str, asked: EngineSpec | None) -> EngineSpec:
        from ..spec.server_settings import check_url
        from .server.readback import served_root

        url = check_url(url, "parity_engine_factory")
        settings: dict[str, Any] = {k: v for k, v in asked.settings.items() if k in SERVER_SETTINGS} if asked else {}
        model = asked.model if asked else served_root(self._client(url))
        tokenizer = asked.tokenizer if asked else None
        return EngineSpec(model, engine=SERVER, tokenizer=tokenizer, profile="own", **{**settings, "url": url})

    def _client(self, url: str) -> Client:
        from .server.client import Client

        if url not in self._clients:
            self._clients[url] = Client(url, self.notify)
        return self._clients[url]

    def digests(self, spec: EngineSpec) -> Mapping[str, str]:
        """The digests of a spec's model: of its folder, or, where only its server has that, as the server tells them.

        Raises UsageError where neither is there.
        """
        try:
            return fingerprint.model_digests(*self.folders(spec))
        except UsageError:
            if spec.engine != SERVER:
                raise
            digests: Mapping[str, str] = getattr(self.backend(spec), "digests", {})
            if not digests:
                raise
            return digests

    def folders(self, spec: EngineSpec) -> tuple[Path, Path]:
        """The folders of a spec's model and tokenizer. Raises UsageError; starts nothing."""
        if spec not in self._folders:
            model = fingerprint.find_model(spec.model, self.root)
            tokenizer = model if spec.tokenizer is None else fingerprint.find_model(spec.tokenizer, self.root)
            self._folders[spec] = (model, fingerprint.find_tokenizer(tokenizer))
        return self._folders[spec]

    def adapter(self, spec: EngineSpec) -> Adapter | None:
        """The adapter of a spec, as its engine loaded it or would. Raises UsageError; starts nothing."""
        if spec.adapter is None:
            return None
        from ..checkpoint.adapter import read_adapter

        if spec not in self._alive or spec not in self._adapters:  # who is alive has what was there when it started
            self._adapters[spec] = read_adapter(self.absolute(spec.adapter), self.folders(spec)[0])
        return self._adapters[spec]

    def backend(self, spec: EngineSpec, asker: Engine | None = None) -> Backend:
        """The started engine of a spec. A failed start is remembered: the same error again, and no second try.

        One whose weights were updated by another than `asker` gets its checkpoint's back first. Raises EngineError where the
        asker's own updates were lost with the engine.
        """
        if spec in self._failed:
            raise self._failed[spec]
        self._check_weights(spec, asker)
        if spec not in self._alive and spec in self._theirs():
            self._open_adopted(spec)
        if spec not in self._alive:
            self.adapter(spec)  # files that are not whole yet are no failed start
            try:
                self._alive[spec] = self._start(spec)
            except ParityError as error:
                self._failed[spec] = error
                raise
        self._alive[spec] = self._alive.pop(spec)  # the last one is the one used last
        return self._alive[spec]

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One thread at a time asks the engines: checks that run beside an event loop are threads of one process.

        Raises UsageError where an event loop would have to stop for that.
        """
        from .event_loop import runs_here

        if not self._lock.acquire(blocking=not runs_here()):
            raise UsageError("another check is under way beside this event loop: await that first, or `await` this one, too")
        try:
            yield
        finally:
            self._lock.release()

    def beside(self, spec: EngineSpec) -> Engine:
        """A handle on the engine of a spec that takes nobody's place in this process."""
        self._beside.add(spec)
        return self.engine(spec)

    def updated(self, engine: Engine) -> None:
        """Told by an engine whose weights are no longer its checkpoint's."""
        self._updated[engine.spec] = engine

    def absolute(self, folder: str | Path) -> Path:
        """A folder, relative ones below `root` first."""
        below = self.root / folder
        return (below if below.is_dir() else Path(folder)).absolute()

    def _check_weights(self, spec: EngineSpec, asker: Engine | None) -> None:
        changed = self._updated.get(spec)
        if changed is asker and changed is not None and spec not in self._alive:
            raise EngineError(
                f"{spec} is down, and its {changed.weight_version} weight updates with it: it would start with its "
                "checkpoint's weights; take a new engine"
            )
        if changed is None or changed is asker or spec in self._theirs():
            return
        del self._updated[spec]
        if spec in self._alive:
            from ..checkpoint.weight_update import WeightUpdate, tied_heads

            try:
                if tied_heads(self.folders(spec)[0]):
                    raise UsageError("vLLM on CPUs keeps a packed copy of a tied head, which such an update does not reach")
                if changed._adapter is not None and spec.adapter is None:
                    raise UsageError("an adapter is on top that the spec does not have")
                self._adapters.pop(spec, None)  # what is loaded now is what its folder holds now
                adapter = self.adapter(spec)
                for weights in (self.folders(spec)[0], *(() if adapter is None else (adapter.folder,))):
                    _take(self._alive[spec], WeightUpdate(weights, "keep", clear_cache=True))
            except Exception:
                self.discard(spec)  # the next use starts it anew

    def discard(self, spec: EngineSpec) -> None:
        """Shut the engine of a spec down, if it is alive and ours."""
        if spec in self._theirs():
            return
        backend = self._alive.pop(spec, None)
        self._apart.discard(spec)
        if backend is not None:
            with contextlib.suppress(Exception):  # it may be broken already; what broke it has been reported
                backend.close()

    def adopt_from(self, factory: Any, spec: EngineSpec | None) -> Engine:
        """A handle on what a `parity_engine_factory` gives: an LLM, or a callable that is asked once for each spec."""
        key = (id(factory), spec)
        if key not in self._given:
            self._given[key] = factory(spec) if callable(factory) else factory
        return self.adopt(self._given[key], spec)

    def close(self) -> None:
        """Shut all engines down."""
        for spec in list(self._alive):
            self.discard(spec)
        for client in self._clients.values():
            client.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, spec: EngineSpec) -> Backend:
        began = time.monotonic()
        backend, own_process = self._start_where_possible(spec)
        start = Start(spec, time.monotonic() - began, own_process, backend.config.version)
        self.starts.append(start)
        if self.notify is not None:
            where = ", in its own process" if own_process else ""
            verb = "connected to" if spec.engine == SERVER else "started"
            self.notify(f"{verb} {spec} ({backend.config.engine} {start.version}) in {start.seconds:.1f} s{where}")
            if spec.profile == "own":
                self.notify(f"own engine, vllm {start.version}: {_beside_rl(backend.config)}")
            if backend.config.unverified:
                self.notify(f"could not be read back: {', '.join(backend.config.unverified)}")
            if spec.engine == SERVER and not backend.config.forces:
                self.notify(backend.config.unforced)
        return backend

    def _start_where_possible(self, spec: EngineSpec) -> tuple[Backend, bool]:
        from .process import start_in_process

        if spec.engine == SERVER:
            return self._connect(spec), False
        model, tokenizer = self.folders(spec)
        gpu = _has_gpu()
        came_back = any(start.spec == spec for start in self.starts)
        beside = spec in self._beside  # another's place would be taken, and its weight updates lost
        if spec.engine == "vllm" and (gpu or came_back or beside or self._adopted or self._place_is_spoilt):
            return self._start_apart(spec, gpu=gpu)
        self._make_room([s for s in self._rivals(spec) if s not in self._apart], keep=0)
        try:
            return start_in_process(spec, model, tokenizer, self._adapters.get(spec)), False
        except EngineError as error:
            settings_are_wrong = error.__cause__ is None or isinstance(error.__cause__, ValueError)
            if settings_are_wrong or spec.engine != "vllm" or not any(start.spec.engine != SERVER for start in self.starts):
                raise
        started = self._start_apart(spec, gpu=gpu)
        self._place_is_spoilt = True  # by what has lived in this process before; the next ones need not try
        return started

    def _connect(self, spec: EngineSpec) -> Backend:
        from .server.backend import ServerBackend

        try:
            digests = fingerprint.model_digests(*self.folders(spec))
        except UsageError:
            digests = None  # the server may be the only one who has the model
        return ServerBackend(spec, self._client(spec.settings["url"]), digests)

    def _start_apart(self, spec: EngineSpec, *, gpu: bool) -> tuple[Backend, bool]:
        """Start an engine in a process of its own. A GPU's memory has room for one; on a CPU a few stay."""
        from .process import ProcessBackend

        rivals = self._rivals(spec)
        self._make_room(rivals if gpu else [s for s in rivals if s in self._apart], keep=0 if gpu else self.processes - 1)
        backend = ProcessBackend.start(spec, *self.folders(spec), self._adapters.get(spec), self.limits)
        self._apart.add(spec)
        return backend, True

    def _rivals(self, spec: EngineSpec) -> list[EngineSpec]:
        """The live engines of the same kind that are ours to close, longest unused first."""
        return [s for s in self._alive if s.engine == spec.engine and s not in self._theirs()]

    def _theirs(self) -> set[EngineSpec]:
        return {engine.spec for _, engine in self._adopted.values()}

    def _make_room(self, candidates: list[EngineSpec], *, keep: int) -> None:
        for spec in candidates[: max(len(candidates) - keep, 0)]:
            self.discard(spec)


def _beside_rl(config: ResolvedConfig) -> str:
    text = ", ".join(f"{k} is {now!r} (rl: {pin!r})" for k, (pin, now) in config.differences_from_rl().items())
    return f"differs from profile rl: {text}" if text else "as profile rl"


def _take(backend: Any, update: WeightUpdate) -> None:
    """Have a backend take an update while nothing runs."""
    if not hasattr(backend, "update_weights"):
        raise UsageError(f"{backend.config.engine} takes no weight updates")
    backend.update_weights(update)


def _can(backend: Any, verb: str) -> Callable[..., Any]:
    """A method that only some engines have. Raises UsageError."""
    method = getattr(backend, verb, None)
    if method is None:
        raise UsageError(f"{backend.config.engine} has no {verb}")
    found: Callable[..., Any] = method
    return found


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


@contextlib.contextmanager
def open_engine(
    spec: EngineSpec,
    *,
    root: Path | None = None,
    notify: Callable[[str], None] | None = None,
    start_timeout: float = TimeLimits.start,
    call_timeout: float = TimeLimits.call,
) -> Iterator[Engine]:
    """An engine without pytest: `with open_engine(EngineSpec("models/tiny-arith")) as engine: ...`.

    See Pool for the time-outs.
    """
    with Pool(root, notify, start_timeout, call_timeout) as pool:
        yield pool.engine(spec)
