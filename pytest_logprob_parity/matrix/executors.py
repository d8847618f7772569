"""Run jobs, as processes on this machine or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ..checkpoint.digests import find_model
from ..errors import EngineError, GoldenError, ParityError, UsageError
from .environments import Environment, installed_in, python_of
from .install_failure import FULL
from .installer import DiskFullError
from .worker import load_answers, load_recorded

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_LOG: Final = "output.txt"
#: Increase it when the worker's answers change: answers of older workers are then not used.
_PROTOCOL: Final = 3
#: The files of a model's or a tokenizer's folder that identify it.
_MODEL_FILES: Final = ("*.json", "*.safetensors*", "*.bin", "*.model", "*.jinja", "*.txt")
#: How often a waiting thread looks whether it is to stop, in seconds.
_LOOK: Final = 0.2
#: How long a cluster's address may take to answer, in seconds.
_CONNECT_SECONDS: Final = 5.0
_STOPPED: Final = "stopped: the run was interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One engine start: its environment, the `files` for its folder (`job.json` has the work), and what it needs."""

    name: str
    environment: Environment
    files: Mapping[str, bytes]
    variables: Mapping[str, str]
    cpus: int
    gpus: int
    minutes: float


def today(spec: Mapping[str, Any], root: Path, environment: Environment) -> dict[str, Any]:
    """What answers depend on beside a job's own text, as it is today: with it in the job, outdated answers are recognised.

    Files of the spec's model and tokenizer count by name, size and time: no weights are read. A folder on another machine
    counts for nothing.
    """
    folders = [spec["model"], *([spec["tokenizer"]] if spec.get("tokenizer") else [])]
    return {
        "protocol": _PROTOCOL,
        "model_files": [file for folder in folders for file in _files_of(folder, root)],
        "installed": installed_in(environment),
    }


def _files_of(name: str, root: Path) -> list[list[Any]]:
    try:
        folder = find_model(name, root)
    except UsageError:
        return []
    found = sorted({file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


def answered(job: Job, folder: Path) -> bool:
    """Whether a folder has the answers of this very job, whole and readable."""
    try:
        if any((folder / name).read_bytes() != data for name, data in job.files.items()):
            return False
        json.loads((folder / "done.json").read_text("utf-8"))
        told = json.loads(job.files["job.json"])
        for name in told["record"]:
            load_recorded(folder, name)
        for name in told["check"]:
            load_answers(folder, name)
    except (OSError, ValueError, GoldenError):
        return False
    return True


class Executor(Protocol):
    """Runs jobs, each in a folder of its own below `out`."""

    def run(self, jobs: Sequence[Job], out: Path, home: Path, notify: Callable[[str], None]) -> Iterator[tuple[Job, str]]:
        """Each job when it ends, with the reason why it has no answers, an empty text where it has."""
        ...


def run_job(
    job: Job,
    folder: Path,
    home: Path,
    notify: Callable[[str], None],
    stop: threading.Event | None = None,
    failed: dict[str, str] | None = None,
) -> str:
    """Run one job in its folder. Returns an empty text, or why there are no answers, in one line.

    `stop` ends it from another thread; `failed` is that of `python_of`. Raises DiskFullError where there is no disk left.
    """
    stop = stop or threading.Event()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in job.files.items():
        (folder / name).write_bytes(data)
    try:
        python = python_of(job.environment, home, notify, stop, failed)
    except DiskFullError:
        raise
    except ParityError as error:
        return str(error)
    if stop.is_set():
        return _STOPPED
    with tempfile.TemporaryDirectory() as place:
        package = Path(place) / "package.zip"
        package.write_bytes(_package())
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST")}
        # Cells run beside each other: threads that wait must sleep, and none may be bound to a core that another one has.
        variables |= {"OMP_NUM_THREADS": str(job.cpus), "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
        variables |= {**job.environment.variables, **job.variables, "PYTHONPATH": str(package)}
        command = [str(python), "-m", "pytest_logprob_parity.matrix.worker", str(folder)]
        with (folder / _LOG).open("wb") as log:
            process = subprocess.Popen(
                command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = _wait(process, time.monotonic() + job.minutes * 60, stop)
            except subprocess.TimeoutExpired:
                return _STOPPED if stop.is_set() else f"took longer than {job.minutes:g} minutes and was stopped"
            finally:
                _end(process)
    if status == 0 and (folder / "done.json").exists():
        return ""
    why = _why(folder, status)
    if FULL in why:
        raise DiskFullError(why)
    return why


def _wait(process: subprocess.Popen[bytes], deadline: float, stop: threading.Event) -> int:
    """The exit status. Raises TimeoutExpired at the deadline, and where it is to stop."""
    while True:
        left = deadline - time.monotonic()
        try:
            return process.wait(max(min(left, _LOOK), 0))
        except subprocess.TimeoutExpired:
            if left <= _LOOK or stop.is_set():
                raise


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _why(folder: Path, status: int) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads((folder / "failed.json").read_text("utf-8"))["reason"])
    lines = [line.strip() for line in (folder / _LOG).read_text("utf-8", "replace").splitlines() if line.strip()]
    last = f": {lines[-1][-200:]}" if lines else ""
    if status < 0:
        return f"its worker was killed ({signal.Signals(-status).name}){last}"
    return f"its worker ended with exit status {status}{last}"


def _package() -> bytes:
    """This package as a zip that Python imports from: an environment gets that, and nothing else of the user's."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(_PACKAGE.rglob("*.py")):
            archive.write(file, Path(_PACKAGE.name) / file.relative_to(_PACKAGE))
    return buffer.getvalue()


class LocalExecutor:
    """Processes on this machine, side by side as far as `cores` allow."""

    def __init__(self, cores: int | None = None) -> None:
        self._cores = max(cores or os.cpu_count() or 1, 1)

    def run(self, jobs: Sequence[Job], out: Path, home: Path, notify: Callable[[str], None]) -> Iterator[tuple[Job, str]]:
        """See Executor.run."""
        free, changed, stop = [self._cores], threading.Condition(), threading.Event()
        ended: queue.Queue[tuple[Job, str]] = queue.Queue()
        failed: dict[str, str] = {}

        def work(job: Job) -> None:
            wanted = min(job.cpus, self._cores)
            with changed:
                changed.wait_for(lambda: stop.is_set() or free[0] >= wanted)
                free[0] -= wanted
            try:
                why = _STOPPED if stop.is_set() else run_job(job, out / job.name, home, notify, stop, failed)
            except DiskFullError as error:
                why = str(error)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            with changed:
                free[0] += wanted
                changed.notify_all()
            ended.put((job, why))

        with ThreadPoolExecutor(max_workers=max(len(jobs), 1)) as threads:
            try:
                for job in jobs:
                    threads.submit(work, job)
                for _ in jobs:
                    yield ended.get()
            finally:  # Ctrl-C comes here, and to no thread
                stop.set()
                with changed:
                    changed.notify_all()


class RayExecutor:
    """Tasks of a Ray cluster (`address`, or one of this machine): each with the CPUs and GPUs that its cell needs.

    The answers come back as bytes, so that nodes need no common disk; the model has to be where its path says.

    Raises UsageError where Ray is not installed, EngineError where no cluster can be reached.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--executor ray: Ray is not installed; pip install ray, or use --executor local") from None
        self._ray: Any = ray
        if not ray.is_initialized():
            _check_listens(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            except Exception as error:
                raise EngineError(f"no Ray cluster: {error}") from None

    def run(self, jobs: Sequence[Job], out: Path, home: Path, notify: Callable[[str], None]) -> Iterator[tuple[Job, str]]:
        """See Executor.run."""
        remote = self._ray.remote(max_retries=0)(_run_remotely)
        cpus, gpus = (self._most(resource) for resource in ("CPU", "GPU"))
        waiting = {}
        for job in jobs:
            if job.gpus > gpus:  # Ray would wait for such a node for ever
                yield job, f"needs {job.gpus} GPUs; no node of the cluster has more than {gpus}"
            else:
                waiting[remote.options(num_cpus=min(job.cpus, cpus), num_gpus=job.gpus).remote(job, str(home))] = job
        try:
            yield from self._results(waiting, out)
        finally:
            for task in waiting:
                self._ray.cancel(task)  # the task then ends its worker
            if waiting:
                self._ray.wait(list(waiting), num_returns=len(waiting), timeout=10)

    def _most(self, resource: str) -> int:
        """What the best node of the cluster has of a resource."""
        return max((int(node["Resources"].get(resource, 0)) for node in self._ray.nodes() if node["Alive"]), default=0)

    def _results(self, waiting: dict[Any, Job], out: Path) -> Iterator[tuple[Job, str]]:
        while waiting:
            (ready,), _ = self._ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                why, files = self._ray.get(ready)
            except Exception as error:
                why, files = f"its task died: {str(error).strip().splitlines()[0]}", {}
            (out / job.name).mkdir(parents=True, exist_ok=True)
            for name, data in files.items():
                (out / job.name / name).write_bytes(data)
            yield job, why


def _check_listens(address: str | None) -> None:
    """Raise EngineError where nothing listens at HOST:PORT: Ray would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"no Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error})") from None


def _run_remotely(job: Job, home: str) -> tuple[str, dict[str, bytes]]:
    """On a node: run the job in a temporary folder. Returns the reason why it has no answers, and the files that it wrote."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            why = run_job(job, folder, Path(home), lambda _: None)
        except DiskFullError as error:
            why = str(error)
        return why, {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
