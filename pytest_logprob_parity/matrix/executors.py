"""Where jobs run: processes on this machine, or tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ..errors import EngineError, ParityError, UsageError
from .environments import Environment, python_of

_PACKAGE: Final = Path(__file__).resolve().parent.parent
_LOG: Final = "output.txt"


@dataclass(frozen=True)
class Job:
    """One engine start and what it is asked: `files` go into its folder, `job.json` among them."""

    name: str
    environment: Environment
    files: Mapping[str, bytes]
    variables: Mapping[str, str]
    cpus: int
    gpus: int
    minutes: float


class Executor(Protocol):
    """Runs jobs, each in a folder of its own below `out`."""

    def run(self, jobs: Sequence[Job], out: Path, home: Path, notify: Callable[[str], None]) -> Iterator[tuple[Job, str]]:
        """Each job as it ends, with an empty text, or why it has no answers."""
        ...


def run_job(job: Job, folder: Path, home: Path, notify: Callable[[str], None]) -> str:
    """Run one job in its folder. Returns an empty text, or why there are no answers, in one line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in job.files.items():
        (folder / name).write_bytes(data)
    try:
        python = python_of(job.environment, home, notify)
    except ParityError as error:
        return str(error)
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
                status = process.wait(job.minutes * 60)
            except subprocess.TimeoutExpired:
                return f"took longer than {job.minutes:g} minutes and was ended"
            finally:
                _end(process)
    if status == 0 and (folder / "done.json").exists():
        return ""
    return _why(folder, status)


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
        free, changed = [self._cores], threading.Condition()
        ended: queue.Queue[tuple[Job, str]] = queue.Queue()

        def work(job: Job) -> None:
            wanted = min(job.cpus, self._cores)
            with changed:
                changed.wait_for(lambda: free[0] >= wanted)
                free[0] -= wanted
            try:
                why = run_job(job, out / job.name, home, notify)
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
            with changed:
                free[0] += wanted
                changed.notify_all()
            ended.put((job, why))

        with ThreadPoolExecutor(max_workers=max(len(jobs), 1)) as threads:
            for job in jobs:
                threads.submit(work, job)
            for _ in jobs:
                yield ended.get()


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
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            except Exception as error:
                raise EngineError(f"no Ray cluster: {error}") from None

    def run(self, jobs: Sequence[Job], out: Path, home: Path, notify: Callable[[str], None]) -> Iterator[tuple[Job, str]]:
        """See Executor.run."""
        remote = self._ray.remote(max_retries=0)(_run_remotely)
        waiting = {remote.options(num_cpus=job.cpus, num_gpus=job.gpus).remote(job, str(home)): job for job in jobs}
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
            notify(f"{job.name}: {why or 'answered'}")
            yield job, why


def _run_remotely(job: Job, home: str) -> tuple[str, dict[str, bytes]]:
    """On a node: run the job in a folder of its own, and bring what it wrote."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        why = run_job(job, folder, Path(home), lambda _: None)
        return why, {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
