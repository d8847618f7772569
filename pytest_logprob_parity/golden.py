"""The golden: a trace, its fingerprint and where it belongs, in one file. Names, reading, writing, unused ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

from . import container
from .errors import GoldenError
from .trace import SCHEMA, Trace

SUFFIX: Final = ".safetensors"


@dataclass(frozen=True)
class Golden:
    """A trace and what it was recorded from.

    `fingerprint` is Engine.fingerprint() of the recording engine, or {} for a trace of someone's own rollouts;
    `prompts_digest` is of the prompts as the test gave them; `node_id` and `name` say which check it belongs to.
    """

    trace: Trace
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    prompts_digest: str = ""
    node_id: str = ""
    name: str = ""

    def save(self, path: Path, max_megabytes: float | None = None) -> None:
        """Write the golden, whole or not at all.

        Raises GoldenError where it would be larger than `max_megabytes` (saying what to sample instead) or cannot be
        written; what stood there before then stays.
        """
        columns = self.trace.to_columns()
        megabytes = sum(column.nbytes for column in columns.values()) / 1e6
        if max_megabytes is not None and megabytes > max_megabytes:
            raise GoldenError(_too_large(path, self.trace, megabytes, max_megabytes))
        if path.is_dir():
            raise GoldenError(f"{path}: a directory stands where the golden should be; move it away")
        metadata = {
            "schema": SCHEMA,
            "trace": self.trace.to_metadata(),
            "golden": {
                "fingerprint": self.fingerprint,
                "name": self.name,
                "node_id": self.node_id,
                "prompts_digest": self.prompts_digest,
            },
        }
        try:
            container.write(path, columns, metadata)
        except OSError as error:
            raise GoldenError(f"{path}: not written ({error.strerror or error}); the old golden is as it was") from None

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Read a golden. Raises GoldenError, in one line, for a file that is missing or cannot be trusted."""
        columns, metadata = container.read(path)
        trace = Trace.from_file_parts(columns, metadata, path)
        about = metadata.get("golden", {})
        texts = ("prompts_digest", "node_id", "name")
        prints = about.get("fingerprint") if isinstance(about, Mapping) else None
        parts = [prints, *(prints.get(part, {}) for part in ("engine", "hardware"))] if isinstance(prints, Mapping) else [None]
        if about and (
            set(about) != {"fingerprint", *texts}
            or not all(isinstance(part, Mapping) for part in parts)
            or not all(isinstance(about[text], str) for text in texts)
        ):
            raise container.damaged(path, "its golden header does not hold what it should")
        return cls(trace, **about)


def _too_large(path: Path, trace: Trace, megabytes: float, limit: float) -> str:
    sequences = max(int(trace.num_sequences * limit / megabytes), 1)
    prompts = max(sequences * trace.num_prompts // max(trace.num_sequences, 1), 1)
    return (
        f"{path}: not recorded: {megabytes:.1f} MB, and parity_max_golden_mb is {limit:g}. It has {trace.num_sequences} "
        f"sequences, {trace.num_tokens:,} tokens, top-{trace.top_k}; about {sequences} sequences ({prompts} prompts) would "
        "fit: sample fewer prompts, a smaller max_tokens, or fewer logprobs"
    )


def golden_path(root: Path, node_id: str, name: str = "") -> Path:
    """Where the golden of a check lives: `<root>/<test file>/<slug>-<8 hex of its node id and name>.safetensors`."""
    file, _, rest = node_id.partition("::")
    label = "-".join(part for part in (rest.rpartition("::")[2], name) if part)
    slug = re.sub(r"[^A-Za-z0-9_.=]+", "-", label).strip("-.")[:60] or "golden"
    digest = hashlib.sha256(f"{node_id}\0{name}".encode()).hexdigest()[:8]
    parts = [part for part in PurePosixPath(file).with_suffix("").parts if part not in ("..", "/")]
    return root.joinpath(*parts) / f"{slug}-{digest}{SUFFIX}"


def unused_goldens(root: Path, files: Iterable[str], node_ids: Iterable[str]) -> list[Path]:
    """Goldens below `root` of the given test files whose test no longer exists; files that cannot be read are left out."""
    collected = set(node_ids)
    unused: list[Path] = []
    for file in sorted(set(files)):
        folder = golden_path(root, f"{file}::x").parent
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                about = container.read_metadata(path).get("golden", {})
            except GoldenError:
                continue
            node_id = about.get("node_id", "") if isinstance(about, Mapping) else ""
            if node_id and node_id.partition("::")[0] == file and node_id not in collected:
                unused.append(path)
    return unused


def describe(golden: Golden) -> Sequence[str]:
    """A golden in a few lines, for people."""
    trace, prints = golden.trace, golden.fingerprint
    engine = prints.get("engine", {})
    lines = [
        f"{trace.num_sequences} sequences of {trace.num_prompts} prompts, {trace.num_tokens:,} tokens"
        f" ({int(trace.mask.sum()):,} compared), top-{trace.top_k}",
        f"{trace.logprobs_mode.replace('_', ' ')} by {trace.path}; {trace.sampling.processing()}, seed {trace.sampling.seed}",
        f"{engine.get('kind', trace.engine)} {engine.get('version', trace.engine_version)}, {trace.dtype}"
        + (f", {prints['hardware'].get('device')}" if prints.get("hardware") else ""),
    ]
    if golden.node_id:
        lines.append(f"test {golden.node_id}" + (f", check {golden.name!r}" if golden.name else ""))
    return lines
