"""Several goldens for one check, for several kinds of machine: which one is compared with, and which one is recorded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .. import machine
from ..engines.kinds import KnowsHardware, kind_of
from ..errors import GoldenError
from ..golden import variant_path, variants_at
from ..spec.server_settings import SERVERS
from ..trace import Trace, file_format

if TYPE_CHECKING:
    from ..engines.engine import Engine

_LONGEST: Final = 40
#: Parts of a machine, in the order in which they matter to numbers.
_HARDWARE: Final = ("device", "capability", "cuda", "kernels", "count")


def to_compare(path: Path, engine: Engine | Trace) -> Path:
    """The golden at `path`, or the variant of it that was recorded on what is most like this engine's machine and build."""
    there = variants_at(path)
    if len(there) < 2 or isinstance(engine, Trace):
        return path if path in there or not there else there[0]
    return _nearest(there, _known_of(engine))


def to_record(path: Path, engine: Engine | Trace) -> Path:
    """Where recording writes: the golden of this kind of machine, which is a new variant where all are of other GPUs.

    CPUs of another model are no other kind of machine: their goldens agree within noise, and clouds mix them.
    """
    there = variants_at(path)
    if not there or isinstance(engine, Trace):
        return path
    known = _known_of(engine)
    nearest = _nearest(there, known)
    return variant_path(path, name_of(known)) if of_other_kinds(_about(nearest), known) else nearest


def of_other_kinds(golden: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of machines of other kinds: another GPU, or a GPU and a CPU."""
    kinds = {_kind_of(golden), _kind_of(now)}
    return len(kinds) == 2 and "" not in kinds


def name_of(known: Mapping[str, Any]) -> str:
    """What a variant for the machine of a fingerprint is called: its device, as it can stand in a file's name."""
    device = str(known.get("hardware", {}).get("device", "")).lower()
    return re.sub(r"[^a-z0-9]+", "-", device).strip("-")[:_LONGEST].rstrip("-") or "other"


def _nearest(there: Sequence[Path], known: Mapping[str, Any]) -> Path:
    """The file that agrees in most, what matters most first; the golden without a variant where several do."""

    def agrees(path: Path) -> tuple[bool, ...]:
        about = _about(path)
        hardware, now = _part(about, "hardware"), _part(known, "hardware")
        engine, then = _part(about, "engine"), _part(known, "engine")
        same = [bool(now) and hardware.get(name) == now.get(name) for name in _HARDWARE]
        return (bool(about), *same, *(bool(then) and engine.get(name) == then.get(name) for name in ("kind", "version")))

    return max(there, key=agrees)


def _kind_of(about: Mapping[str, Any]) -> str:
    """The kind of machine: a GPU's name, or a CPU; "" where nobody says."""
    hardware = _part(about, "hardware")
    return "" if not hardware else str(hardware.get("device")) if "cuda" in hardware else "cpu"


def _about(path: Path) -> Mapping[str, Any]:
    """The fingerprint of a golden's file; {} of one that cannot be read."""
    try:
        return _part(_part(file_format.read_metadata(path), "golden"), "fingerprint")
    except GoldenError:
        return {}


def _part(about: Any, name: str) -> Mapping[str, Any]:
    part = about.get(name) if isinstance(about, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def _known_of(engine: Engine) -> Mapping[str, Any]:
    """What tells machines apart in a fingerprint: of an engine in this machine without starting it."""
    if engine.spec.engine in SERVERS or engine.spec.profile == "own":
        return engine.fingerprint()
    kind = kind_of(engine.spec)
    version = machine.installed_version(*kind.distributions)
    hardware = kind.hardware() if isinstance(kind, KnowsHardware) else machine.hardware()
    return {"hardware": hardware, "engine": {"kind": engine.spec.engine, "version": version}}
