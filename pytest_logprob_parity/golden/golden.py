"""The golden: a trace with its fingerprint, its noise floor, its reference and its check, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..errors import GoldenError, UsageError
from ..grammar import counted
from ..json_shape import COUNT, Closed, Number, OptionalKey, OrNull, check_shape
from ..trace import Trace, file_format
from ..trace.batch_composition import BatchCompositions
from ..trace.labels import logprobs_in_words
from ..visible_text import visible_line
from .noise_floor import NoiseFloor
from .reference import Reference

#: The column of the noise floor: float32 [repeats, tokens].
_FLOOR: Final = "floor_logprobs"
#: The column of the reference: float32 [tokens].
_REFERENCE: Final = "reference_logprobs"
#: The shape of what a golden's file holds beside its columns. Files of older versions lack some keys.
_HEADER: Final = Closed(
    {
        "prompts_digest": str,
        "node_id": str,
        "name": str,
        "fingerprint": {part: OptionalKey(dict) for part in ("engine", "hardware", "config", "libraries")},
        "tolerance": OptionalKey({str: Number(0)}),
        "floor": OptionalKey(
            OrNull(
                {
                    "shapes": Closed(
                        {
                            "batch_sizes": OptionalKey([COUNT]),
                            "weights": OptionalKey([Number(0)]),
                            "alone": OptionalKey(Number(0, 1)),
                            **{name: OptionalKey(COUNT) for name in ("fillers", "blocks", "seed")},
                        }
                    ),
                    "reproduces": bool,
                }
            )
        ),
        "reference": OptionalKey(OrNull({"source": str, "sequences": COUNT})),
    }
)


@dataclass(frozen=True, slots=True)
class Golden:
    """A trace and what it was recorded from.

    - `fingerprint`: Engine.fingerprint() of the recording engine; {} for a trace of the caller's own rollouts
    - `prompts_digest`: the digest of the prompts as the test has them
    - `node_id`, `name`: the check that the golden belongs to
    - `floor`, `reference`: its noise floor and its reference column; None for a trace of the caller's own rollouts, where they
      could not be computed, and in goldens of older versions
    - `tolerance`: the limits that the recording test asked for
    - `digest`: the digest of the file that the golden was read from; "" where it was not read from a file
    """

    trace: Trace
    _: KW_ONLY
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    prompts_digest: str = ""
    node_id: str = ""
    name: str = ""
    floor: NoiseFloor | None = None
    reference: Reference | None = None
    tolerance: Mapping[str, float] = field(default_factory=dict)
    digest: str = ""

    def save(self, path: Path, max_megabytes: float | None = None, also: Mapping[str, Any] | None = None) -> None:
        """Write the golden, whole or not at all; `also` goes into the file's metadata beside it (JSON values).

        Raises GoldenError where it would be larger than `max_megabytes` (saying what to sample instead) or cannot be
        written; an old golden then stays.
        """
        columns = self.trace.to_columns()
        if self.floor is not None:
            columns[_FLOOR] = self.floor.logprobs
        if self.reference is not None:
            columns[_REFERENCE] = self.reference.logprobs
        megabytes = sum(column.nbytes for column in columns.values()) / 1e6
        if max_megabytes is not None and megabytes > max_megabytes:
            raise GoldenError(_too_large(self.trace, megabytes, max_megabytes), path)
        if path.is_dir():
            raise GoldenError("a directory stands where the golden should be; move it away", path)
        metadata = {
            **(also or {}),
            "trace": self.trace.to_metadata(),
            "golden": {
                "fingerprint": self.fingerprint,
                "name": self.name,
                "node_id": self.node_id,
                "prompts_digest": self.prompts_digest,
                "tolerance": dict(self.tolerance),
                "floor": None if self.floor is None else _floor_to_json(self.floor),
                "reference": None if self.reference is None else self.reference.to_json(),
            },
        }
        try:
            file_format.write(path, columns, metadata)
        except OSError as error:
            raise GoldenError(f"not written ({error.strerror or error}); the old golden is as it was", path) from None

    @classmethod
    def load(cls, path: str | Path) -> Golden:
        """Read a golden. Raises GoldenError, in one line, for a file that is missing or cannot be trusted."""
        path = Path(path)
        return cls.parse(file_format.read_bytes(path), path)

    @classmethod
    def parse(cls, data: bytes, path: Path) -> Golden:
        """A golden from the bytes of its file; `path` is for messages. Raises GoldenError as `load` does."""
        columns, metadata = file_format.parse(data, path)
        repeats, column = columns.pop(_FLOOR, None), columns.pop(_REFERENCE, None)
        trace = Trace.from_file_parts(columns, metadata, path)
        if "golden" not in metadata:
            return cls(trace, digest=metadata["digest"])
        try:
            golden = _golden_of(trace, metadata["golden"], repeats, column)
        except UsageError as error:
            raise file_format.damaged(path, f"its golden header does not hold what it should ({error.reason})") from None
        return replace(golden, digest=metadata["digest"])

    @property
    def routed(self) -> bool | None:
        """Whether its model routes tokens to experts; None where the fingerprint does not say."""
        return "experts" in self.fingerprint if self.fingerprint else None


def _golden_of(trace: Trace, header: Any, repeats: Any, column: Any) -> Golden:
    """A golden from the metadata of its file, with the columns of its noise floor and its reference, or None for these.

    Raises UsageError for metadata that is not a golden's.
    """
    check_shape(header, _HEADER, "its golden header")
    floor, reference = header.get("floor"), header.get("reference")
    if (floor is None) != (repeats is None) or (reference is None) != (column is None):
        raise UsageError("parts are missing: its noise floor and its reference have a column and an entry in the header each")
    return Golden(
        trace,
        fingerprint=header["fingerprint"],
        prompts_digest=header["prompts_digest"],
        node_id=header["node_id"],
        name=header["name"],
        floor=None if floor is None else _floor_from_json(floor, repeats, trace),
        reference=None if reference is None else _reference_from_json(reference, column, trace),
        tolerance={name: float(limit) for name, limit in header.get("tolerance", {}).items()},
    )


def _floor_to_json(floor: NoiseFloor) -> dict[str, Any]:
    """Everything of a noise floor but its column, as JSON values."""
    return {"shapes": floor.compositions.to_json(), "reproduces": floor.reproduces}


def _floor_from_json(value: Mapping[str, Any], repeats: npt.NDArray[np.float32], trace: Trace) -> NoiseFloor:
    """The inverse of `_floor_to_json`. Raises UsageError for repeats that are not of the tokens of `trace`."""
    if repeats.shape[1:] != (trace.num_tokens,):
        raise UsageError(f"its noise floor is {list(repeats.shape)}, its tokens are {trace.num_tokens}")
    compared = repeats[:, trace.mask]
    if not (np.isfinite(compared) | np.isneginf(compared)).all():
        raise UsageError("its noise floor contains NaN or +inf")
    return NoiseFloor(repeats, BatchCompositions.from_json(value["shapes"]), value["reproduces"])


def _reference_from_json(value: Mapping[str, Any], column: npt.NDArray[np.float32], trace: Trace) -> Reference:
    """The reference of a golden. Raises UsageError for a column that is not of the tokens of `trace`."""
    if column.shape != (trace.num_tokens,):
        raise UsageError(f"its reference is {list(column.shape)}, its tokens are {trace.num_tokens}")
    return Reference.from_json(column, value)


def _too_large(trace: Trace, megabytes: float, limit: float) -> str:
    sequences = max(int(trace.num_sequences * limit / megabytes), 1)
    prompts = max(sequences * trace.num_prompts // max(trace.num_sequences, 1), 1)
    return (
        f"not recorded: {megabytes:.1f} MB, and parity_max_golden_mb is {limit:g}. It has {trace.num_sequences} "
        f"sequences, {trace.num_tokens:,} tokens, top-{trace.top_k}; about {sequences} sequences ({prompts} prompts) would "
        "fit: sample fewer prompts, a smaller max_tokens, or fewer logprobs"
    )


def _top(count: int) -> str:
    """How many top logprobs each position has, in words."""
    if not count:
        return "no top logprobs"
    return "the top logprob of each position" if count == 1 else f"the top {count} logprobs of each position"


def describe(golden: Golden) -> Sequence[str]:
    """A description of a golden for people, in a few lines."""
    trace, prints = golden.trace, golden.fingerprint
    engine, device = prints.get("engine", {}), prints.get("hardware", {}).get("device")
    version = f"{engine.get('kind', trace.engine)} {engine.get('version', trace.engine_version)}"
    lines = [
        f"{counted(trace.num_sequences, 'sequences')} of {counted(trace.num_prompts, 'prompts')}, "
        f"{counted(trace.num_tokens, 'tokens')}"
        f" ({int(trace.mask.sum()):,} compared), {_top(trace.top_k)}",
        f"{logprobs_in_words(trace.logprobs_mode, trace.path)}; {trace.sampling.processing()}, seed {trace.sampling.seed}",
        ", ".join([version, trace.dtype, *([] if device is None else [str(device)])]),
    ]
    if prints.get("adapter"):
        lines.append(f"adapter {prints['adapter']}")
    lines.append("no noise floor" if golden.floor is None else golden.floor.describe())
    lines.append("no reference" if golden.reference is None else golden.reference.describe(trace.logprobs))
    if golden.node_id:
        lines.append(f"test {golden.node_id}" + (f", check {golden.name!r}" if golden.name else ""))
    return [visible_line(line) for line in lines]
