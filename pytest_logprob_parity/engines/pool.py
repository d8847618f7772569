"""Which engines are alive: one start for each spec, shut down before the next one needs the place."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.digests import model_digests
from ..errors import EngineError, ParityError, UsageError
from ..spec import EngineSpec
from ..spec.server_settings import SERVER, SERVERS
from .backend import SharesThisProcess, TellsDigests
from .changed_weights import ChangedWeights, give_back
from .engine import Engine
from .model_folders import ModelFolders
from .own_engines import own_llm, own_server
from .time_limits import CALL_SECONDS, START_SECONDS, TimeLimits

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter
    from .backend import Backend, ResolvedConfig
    from .server.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One engine start: how long it took, in seconds, and whether it got a process of its own."""

    spec: EngineSpec
    seconds: float
    own_process: bool
    version: str


class Pool:
    """Engines by spec. At most one of each kind lives in this process; a vLLM that comes back after its place was taken,
    or that does not start where others have lived, gets a process of its own. On a GPU each does, one at a time.

    `root` is where relative model folders are looked for, `notify` gets a line for each start. An engine in another process
    may take `start_timeout` seconds to start and `call_timeout` seconds for a call; 0: no limit.
    """

    #: How many engines in processes of their own are kept alive on a CPU.
    processes = 2
    #: Whether on a CPU the vLLM in this process stays, and each further one gets a process of its own: faster, more memory.
    keeps_place = False

    def __init__(
        self,
        root: Path | None = None,
        notify: Callable[[str], None] | None = None,
        start_timeout: float = START_SECONDS,
        call_timeout: float = CALL_SECONDS,
    ) -> None:
        self.models = ModelFolders(Path.cwd() if root is None else root)
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
        self._beside: set[EngineSpec] = set()
        self._changed = ChangedWeights()
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
            return self.engine(own_server(llm, asked, self._client))
        if id(llm) in self._adopted:
            return self._adopted[id(llm)][1]
        own = own_llm(llm)
        spec = own.spec
        if spec in self._alive or spec in self._theirs():  # two of one model; the name tells them apart
            spec = spec.replace(revision=f"own engine {len(self._adopted) + 1}")
        self.models.know(spec, own.model, own.tokenizer)
        self._adopted[id(llm)] = (llm, Engine(spec, self))
        if not own.is_async:
            self._open_adopted(spec)
        return self._adopted[id(llm)][1]

    def _open_adopted(self, spec: EngineSpec) -> None:
        from .vllm.backend import VllmBackend

        llm = next(llm for llm, engine in self._adopted.values() if engine.spec == spec)
        self._alive[spec] = backend = VllmBackend.adopt(llm, self.limits.call)
        if self.notify is not None:
            self.notify(f"own engine, vllm {backend.config.version}: {_beside_rl(backend.config)}")

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
            return model_digests(*self.folders(spec))
        except UsageError:
            backend = self.backend(spec) if spec.engine == SERVER else None
            if not isinstance(backend, TellsDigests) or not backend.digests:
                raise
            return backend.digests

    def folders(self, spec: EngineSpec) -> tuple[Path, Path]:
        """The folders of a spec's model and tokenizer. Raises UsageError; starts nothing."""
        return self.models.folders(spec)

    def adapter(self, spec: EngineSpec) -> Adapter | None:
        """The adapter of a spec, as its engine loaded it or would. Raises UsageError; starts nothing."""
        return self.models.adapter(spec, keep=spec in self._alive)  # who is alive has what was there when it started

    def backend(self, spec: EngineSpec, asker: Engine | None = None) -> Backend:
        """The started engine of a spec. A failed start is remembered: the same error again, and no second try.

        One whose weights were updated by another than `asker` gets its checkpoint's back first. Raises EngineError where the
        asker's own updates were lost with the engine, and where a server cannot be given its checkpoint's weights back.
        """
        if spec in self._failed:
            raise self._failed[spec]
        self._forget_what_is_broken(spec)
        if asker is not None and spec not in self._alive:
            self._changed.check_not_lost(asker)
        if spec.engine != SERVER:
            self._give_back(spec, asker)  # or shut it down: the next lines start it anew
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
        if spec.engine == SERVER:
            self._give_back(spec, asker)
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
        """Record that this engine's weights were changed: they are no longer its checkpoint's."""
        self._changed.record(engine)

    def absolute(self, folder: str | Path) -> Path:
        """A folder, relative ones below `root` first."""
        return self.models.absolute(folder)

    def _give_back(self, spec: EngineSpec, asker: Engine | None) -> None:
        changed = self._changed.by(spec)
        if changed is None or changed is asker or spec in self._theirs():
            return
        self._changed.forget(changed)
        if spec not in self._alive:
            return
        try:
            give_back(self._alive[spec], changed, spec, self.models)
        except Exception as error:
            if spec.engine != SERVER:
                self.discard(spec)  # the next use starts it anew
                return
            self._changed.record(changed)
            raise EngineError(
                f"{spec} has the weights of an update and cannot be given its checkpoint's back ({error}); start it anew"
            ) from error

    def _forget_what_is_broken(self, spec: EngineSpec) -> None:
        """Shut an engine down that cannot work any more, for another in this process has ended; the next use starts it anew."""
        backend = self._alive.get(spec)
        if isinstance(backend, SharesThisProcess) and not backend.is_whole():
            self.discard(spec)

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
        start = Start(spec=spec, seconds=time.monotonic() - began, own_process=own_process, version=backend.config.version)
        self.starts.append(start)
        if self.notify is not None:
            where = ", in its own process" if own_process else ""
            verb = "connected to" if spec.engine in SERVERS else "started"
            self.notify(f"{verb} {spec} ({backend.config.engine} {start.version}) in {start.seconds:.1f} s{where}")
            if spec.profile == "own":
                self.notify(f"own engine, vllm {start.version}: {_beside_rl(backend.config)}")
            if backend.config.unverified:
                self.notify(f"could not be read back: {', '.join(backend.config.unverified)}")
            if spec.engine in SERVERS and not backend.config.forces:
                self.notify(backend.config.unforced)
        return backend

    def _start_where_possible(self, spec: EngineSpec) -> tuple[Backend, bool]:
        from .kinds import LeavesTraces, kind_of, start_in_process

        if spec.engine == SERVER:
            return self._connect(spec), False
        model, tokenizer = self.folders(spec)
        gpu = _has_gpu()
        came_back = any(start.spec == spec for start in self.starts)
        beside = spec in self._beside  # another's place would be taken, and its weight updates lost
        kind = kind_of(spec)
        may_live_apart = kind.may_live_apart
        is_taken = self.keeps_place and any(s not in self._apart for s in self._rivals(spec))
        if isinstance(kind, LeavesTraces) and kind.must_live_apart(spec):
            return self._start_apart(spec, gpu=gpu)
        if may_live_apart and (gpu or came_back or beside or self._adopted or self._place_is_spoilt or is_taken):
            return self._start_apart(spec, gpu=gpu)
        self._make_room([s for s in self._rivals(spec) if s not in self._apart], keep=0)
        try:
            return start_in_process(spec, model, tokenizer, self.models.loaded_adapter(spec)), False
        except EngineError as error:
            settings_are_wrong = error.__cause__ is None or isinstance(error.__cause__, ValueError)
            if settings_are_wrong or not may_live_apart or not any(start.spec.engine != SERVER for start in self.starts):
                raise
        started = self._start_apart(spec, gpu=gpu)
        self._place_is_spoilt = True  # by what has lived in this process before; the next ones need not try
        return started

    def _connect(self, spec: EngineSpec) -> Backend:
        from .server.backend import ServerBackend

        try:
            known = model_digests(*self.folders(spec))
        except UsageError:
            known = None  # the server may be the only one who has the model
        return ServerBackend(spec, self._client(spec.settings["url"]), known)

    def _start_apart(self, spec: EngineSpec, *, gpu: bool) -> tuple[Backend, bool]:
        """Start an engine in a process of its own. A GPU's memory has room for one; on a CPU a few stay."""
        from .process import ProcessBackend

        rivals = self._rivals(spec)
        self._make_room(rivals if gpu else [s for s in rivals if s in self._apart], keep=0 if gpu else self.processes - 1)
        backend = ProcessBackend.start(spec, *self.folders(spec), self.models.loaded_adapter(spec), self.limits, forked=not gpu)
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
    start_timeout: float = START_SECONDS,
    call_timeout: float = CALL_SECONDS,
) -> Iterator[Engine]:
    """An engine without pytest: `with open_engine(EngineSpec("models/tiny-arith")) as engine: ...`.

    See Pool for the time-outs.
    """
    with Pool(root, notify, start_timeout, call_timeout) as pool:
        yield pool.engine(spec)
