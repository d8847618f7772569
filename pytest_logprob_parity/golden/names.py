"""The names of goldens' files: of a check, and of its variants."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Final

SUFFIX: Final = ".safetensors"
#: The mark before a variant in a file's name; no slug has one.
VARIANT: Final = "@"


def golden_path(root: Path, node_id: str, name: str = "") -> Path:
    """The path of a check's golden: `<root>/<test file>/<slug>-<8 hex of its node id and name>.safetensors`."""
    file, _, rest = node_id.partition("::")
    label = "-".join(part for part in (rest.rpartition("::")[2], name) if part)
    slug = re.sub(r"[^A-Za-z0-9_.=]+", "-", label).strip("-.")[:60] or "golden"
    digest = hashlib.sha256(f"{node_id}\0{name}".encode("utf-8", "surrogatepass")).hexdigest()[:8]
    test_file = PurePosixPath(file)
    parts = [part for part in (test_file.parent / test_file.stem).parts if part not in ("..", "/")]
    return root.joinpath(*parts) / f"{slug}-{digest}{SUFFIX}"


def variant_path(path: Path, variant: str) -> Path:
    """The path of a golden's variant, `slug-hash@VARIANT.safetensors`, or of the golden itself for ""."""
    stem = path.name.removesuffix(SUFFIX).partition(VARIANT)[0]
    return path.with_name(f"{stem}{VARIANT}{variant}{SUFFIX}" if variant else f"{stem}{SUFFIX}")


def variant_of(path: Path) -> str:
    """The variant that a golden's file name has, or ""."""
    return path.name.removesuffix(SUFFIX).partition(VARIANT)[2]


def is_place_of(path: Path, node_id: str, name: str) -> bool:
    """Whether a file, of a golden or a variant, is at the place of a check's golden, below any folder."""
    wanted = golden_path(Path(), node_id, name).parts
    return bool(node_id) and variant_path(path, "").parts[-len(wanted) :] == wanted
