"""Trace: what an engine said of tokens, as columns with their meaning. No engine and no pytest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..spec import Sampling
from . import container

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

LOGPROBS_MODES: Final = ("processed_logprobs", "raw_logprobs")
#: What computed logprobs.
TracePath: TypeAlias = Literal["decode", "prefill"]
PATHS: Final[tuple[TracePath, ...]] = get_args(TracePath)
#: How an engine is asked about a trace; see `replay.replay`.
ReplayPath: TypeAlias = Literal["decode", "prefill", "regenerate", "window"]
#: What made it decode along given tokens: its own trace replay, or its sampler, wrapped.
Forcing: TypeAlias = Literal["sampler", "native"]
FORCINGS: Final[tuple[Forcing, ...]] = get_args(Forcing)

#: Why a sequence ended, as coded in the column `finish_reasons`.
FINISH_REASONS: Final = ("unknown", "stop", "length", "abort")

_DTYPE_NAMES: Final = {
    "fp64": "float64", "double": "float64", "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16",
    "half": "float16",
}  # fmt: skip

#: What OpenAI-compatible servers write for a logprob of -inf, for which JSON has no word (vLLM: `max(logprob, -9999.0)`).
MINUS_INFINITY: Final = -9999.0
#: Columns of logprobs, in which the number above is read as -inf.
_LOGPROBS: Final = ("logprobs", "top_logprobs", "untruncated_logprobs", "trainer_logprobs")

#: Columns of token ids, and the least that may stand there: -1 is a place of the top-k that is not used.
_LEAST_IDS: Final = {"prompt_token_ids": 0, "token_ids": 0, "top_token_ids": -1}

#: In the column `seeds`: the sequence cannot be sampled again, for nobody knows its seed.
NO_SEED: Final = -1

#: Column -> (dtype, what its first axis counts, whether every trace has it). The file format, and the order of reading.
COLUMNS: Final[Mapping[str, tuple[str, str, bool]]] = {
    "prompt_token_ids": ("int32", "prompt tokens", True),
    "prompt_offsets": ("int64", "groups + 1", True),
    "token_ids": ("int32", "tokens", True),
    "sequence_offsets": ("int64", "sequences + 1", True),
    "logprobs": ("float32", "tokens", True),
    "ranks": ("int32", "tokens", True),
    "mask": ("bool", "tokens", True),
    "top_token_ids": ("int32", "tokens", True),
    "top_logprobs": ("float32", "tokens", True),
    "finish_reasons": ("uint8", "sequences", True),
    "group": ("int32", "sequences", True),
    "sample": ("int32", "sequences", True),
    "episode": ("int32", "sequences", True),
    "turn": ("int32", "sequences", True),
    "seeds": ("int64", "sequences", True),
    "untruncated_logprobs": ("float32", "tokens", False),
    "weight_versions": ("int32", "tokens", False),
    "trainer_logprobs": ("float32", "tokens", False),
    "trainer_entropies": ("float32", "tokens", False),
}
#: Columns with one entry for each token that not every trace has.
_OPTIONAL: Final = tuple(name for name, (_, axis, needed) in COLUMNS.items() if axis == "tokens" and not needed)


@dataclass(frozen=True)
class Segment:
    """A run of tokens that one request of an engine wrote: `token_ids[start:stop]` of sequence `sequence`.

    A sequence has one segment, or, where masked tokens of the environment stand between, one for each turn.
    """

    sequence: int
    turn: int
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Trace:
    """Completions and what an engine said of their tokens.

    N tokens in S sequences that complete G prompts (groups); K top logprobs a token. Logprobs are natural logarithms
    (nats); `-inf` is a token that truncation excluded, NaN one the engine said nothing of; a top-k place that is not
    used has id -1 and logprob -inf. A logprob of exactly -9999.0 is what OpenAI-compatible servers write for -inf, and
    becomes -inf wherever a trace is made or read.

    - `prompt_token_ids` [prompt tokens], `prompt_offsets` [G + 1]
    - `token_ids` [N], `sequence_offsets` [S + 1]
    - `logprobs` [N]: of the token that stands there; `ranks` [N]: its rank, from 1 (0: unknown)
    - `mask` [N]: False where the environment wrote the token (tool output): never compared
    - `top_token_ids`, `top_logprobs` [N, K], likeliest first
    - `finish_reasons` [S]: index into FINISH_REASONS
    - `group`, `sample`, `episode`, `turn`, `seeds` [S]
    - `untruncated_logprobs` [N]: processed by temperature and penalties alone, where `logprobs` are truncated
    - `weight_versions` [N]: which weights wrote the token; `newest_version` is the one that an update brought meanwhile,
      whether or not it wrote any
    - `trainer_logprobs` [N]: what the trainer computed of the same tokens, where rollouts come from a batch that has both;
      `trainer_entropies` [N]: the entropy of its distribution there (nats), at the rollouts' temperature

    What the numbers mean: `logprobs_mode`, `path`, `sampling` (as the engine ran it: vLLM's least temperature above 0 is
    0.01), `engine`, `engine_version`, `dtype`; `replay` says how another trace's tokens were asked about ("" where these are
    its own), `forcing` what forced them. `token_texts` maps ids to text, for reports on machines without the tokenizer.
    `source` is the digest of the file that a trace was read from, "" for any other.
    """

    prompt_token_ids: IntArray
    prompt_offsets: LongArray
    token_ids: IntArray
    sequence_offsets: LongArray
    logprobs: FloatArray
    ranks: IntArray
    mask: BoolArray
    top_token_ids: IntArray
    top_logprobs: FloatArray
    finish_reasons: npt.NDArray[np.uint8]
    group: IntArray
    sample: IntArray
    episode: IntArray
    turn: IntArray
    seeds: LongArray
    untruncated_logprobs: FloatArray | None = None
    weight_versions: IntArray | None = None
    trainer_logprobs: FloatArray | None = None
    trainer_entropies: FloatArray | None = None

    logprobs_mode: str = "processed_logprobs"
    path: TracePath = "decode"
    sampling: Sampling = field(default_factory=Sampling)
    engine: str = "unknown"
    engine_version: str = "unknown"
    dtype: str = "unknown"
    replay: ReplayPath | Literal["scorer", ""] = ""
    forcing: Forcing | None = None
    token_texts: Mapping[int, str] = field(default_factory=dict)
    newest_version: int | None = None
    source: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "sampling", self.sampling.as_run_by(self.engine))
        for name, value, known in (("logprobs_mode", self.logprobs_mode, LOGPROBS_MODES), ("path", self.path, PATHS)):
            if value not in known:
                raise UsageError(f"Trace({name}={value!r}): known are {', '.join(known)}")
        tokens, sequences, groups = len(self.token_ids), len(self.sequence_offsets) - 1, len(self.prompt_offsets) - 1
        lengths = {
            "prompt tokens": len(self.prompt_token_ids),
            "groups + 1": groups + 1,
            "tokens": tokens,
            "sequences + 1": sequences + 1,
            "sequences": sequences,
        }
        for name, (dtype, axis, needed) in COLUMNS.items():
            column = getattr(self, name)
            if column is None and not needed:
                continue
            if column.ndim != (2 if name.startswith("top_") else 1):
                raise UsageError(f"Trace column {name} has the shape {column.shape}")
            if len(column) != lengths[axis]:
                raise UsageError(f"Trace column {name} has {len(column)} rows, {axis} are {lengths[axis]}")
            if column.dtype != np.dtype(dtype):
                raise UsageError(f"Trace column {name} is {column.dtype}, expected {dtype}")
            if name in _LOGPROBS and (excluded := column == MINUS_INFINITY).any():
                object.__setattr__(self, name, np.where(excluded, np.float32(-np.inf), column))
            least = _LEAST_IDS.get(name)
            if least is not None and column.size and column.min() < least:
                place = int(np.argmax((column if column.ndim == 1 else column.min(axis=1)) < least))
                raise UsageError(
                    f"Trace column {name}, row {place}: token id {column.min()} is no token: a label or a filler among the ids"
                    f"; ids are {least} and above"
                )
        if self.top_token_ids.ndim != 2 or self.top_token_ids.shape != self.top_logprobs.shape:
            raise UsageError("Trace columns top_token_ids and top_logprobs must have one shape, [tokens, k]")
        for name, last in (("prompt_offsets", len(self.prompt_token_ids)), ("sequence_offsets", tokens)):
            offsets = getattr(self, name)
            if not len(offsets) or offsets[0] != 0 or offsets[-1] != last or np.any(np.diff(offsets) < 0):
                raise UsageError(f"Trace column {name} must rise from 0 to {last}")
        if sequences and self.finish_reasons.max() >= len(FINISH_REASONS):
            raise UsageError(f"Trace column finish_reasons must hold 0 to {len(FINISH_REASONS) - 1}")
        if sequences and (self.group.min() < 0 or self.group.max() >= groups):
            raise UsageError(f"Trace column group points outside its {groups} prompts")

    # -- making one ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Mapping[str, Any]],
        *,
        logprobs_mode: str = "processed_logprobs",
        path: str = "decode",
        sampling: Any = None,
        engine: str = "unknown",
        engine_version: str = "unknown",
        dtype: str = "unknown",
        token_texts: Mapping[int, str] | None = None,
    ) -> Trace:
        """A trace of rollouts in hand.

        Each sequence is a mapping with `prompt_token_ids`, `token_ids` and `logprobs` (nats, one a token, None where
        there is none), and optionally `top_logprobs` (one `{token id: logprob}` a token), `ranks`, `mask` (False for
        tokens of the environment), `finish_reason`, `group`, `sample`, `episode`, `turn`, `seed`, `weight_versions`,
        `untruncated_logprobs`, `trainer_logprobs`, `trainer_entropies`. Sequences with equal prompts form a group.

        Raises UsageError naming the sequence and the key that does not fit.
        """
        if not sequences:
            raise _misfit("no sequences")
        known = {
            "prompt_token_ids", "token_ids", "logprobs", "top_logprobs", "ranks", "mask", "finish_reason", "group",
            "sample", "episode", "turn", "seed", *_OPTIONAL,
        }  # fmt: skip
        prompts: dict[Any, int] = {}
        prompt_ids: list[Sequence[int]] = []
        rows: dict[str, list[Any]] = {name: [] for name in ("group", "sample", "episode", "turn", "seeds", "finish")}
        parts: dict[str, list[Any]] = {name: [] for name in ("token_ids", "logprobs", "ranks", "mask", *_OPTIONAL)}
        tops: list[dict[int, float]] = []
        counts: dict[int, int] = {}
        for index, sequence in enumerate(sequences):
            where = f"sequence {index}"
            if not isinstance(sequence, Mapping):
                raise _misfit(f"{where} is no mapping but {type(sequence).__name__}")
            unknown = sorted(set(sequence) - known)
            if unknown:
                raise _misfit(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
            for name in ("prompt_token_ids", "token_ids", "logprobs"):
                if sequence.get(name) is None:
                    raise _misfit(f"{where} lacks {name}")
            for name in ("token_ids", "logprobs", "top_logprobs", "ranks", "mask", *_OPTIONAL):
                if sequence.get(name) is not None and not hasattr(sequence[name], "__len__"):
                    raise _misfit(f"{where}: {name} has one entry for each token, so it is not {sequence[name]!r:.40}")
            length = len(sequence["token_ids"])
            for name in ("logprobs", "top_logprobs", "ranks", "mask", *_OPTIONAL):
                column = sequence.get(name)
                if column is not None and len(column) != length:
                    raise _misfit(f"{where} has {length} token_ids but {len(column)} {name}")
            try:
                prompt = tuple(_column("prompt_token_ids", sequence["prompt_token_ids"]).tolist())
            except UsageError as error:
                raise _misfit(f"{where}: {error}") from None
            key = (sequence["group"], prompt) if "group" in sequence else prompt
            if key not in prompts:
                prompts[key] = len(prompt_ids)
                prompt_ids.append(prompt)
            group = prompts[key]
            reason = sequence.get("finish_reason") or "unknown"
            rows["group"].append(group)
            rows["sample"].append(sequence.get("sample", counts.get(group, 0)))
            counts[group] = counts.get(group, 0) + 1
            rows["episode"].append(sequence.get("episode", index))
            rows["turn"].append(sequence.get("turn", 0))
            rows["seeds"].append(NO_SEED if sequence.get("seed") is None else sequence["seed"])
            rows["finish"].append(FINISH_REASONS.index(reason) if reason in FINISH_REASONS else 0)
            logprobs = [np.nan if v is None else v for v in sequence["logprobs"]]
            mask, ranks = sequence.get("mask"), sequence.get("ranks")
            try:
                parts["token_ids"].append(_column("token_ids", sequence["token_ids"]))
                parts["logprobs"].append(_column("logprobs", logprobs))
                parts["mask"].append(_column("mask", np.ones(length, bool) if mask is None else mask))
                parts["ranks"].append(_column("ranks", np.zeros(length, np.int32) if ranks is None else ranks))
            except UsageError as error:
                raise _misfit(f"{where}: {error}") from None
            for name in _OPTIONAL:
                if sequence.get(name) is not None:
                    parts[name].append(np.asarray(sequence[name]))
            given = sequence.get("top_logprobs")
            try:
                tops.extend([{}] * length if given is None else [_top(top) for top in given])
            except (TypeError, ValueError, AttributeError):
                raise _misfit(f"{where}: top_logprobs has one {{token id: logprob}} for each token, or None") from None
        k = max((len(top) for top in tops), default=0)
        top_ids = np.full((len(tops), k), -1, np.int32)
        top_logprobs = np.full((len(tops), k), -np.inf, np.float32)
        for i, top in enumerate(tops):
            if top:
                order = sorted(top.items(), key=lambda item: -item[1])
                top_ids[i, : len(top)] = [t for t, _ in order]
                top_logprobs[i, : len(top)] = [value for _, value in order]
        for name in _OPTIONAL:
            if parts[name] and len(parts[name]) != len(sequences):
                raise _misfit(f"some sequences have {name} and some have not")
        prompt_rows = [np.asarray(p, np.int32) for p in prompt_ids]
        return cls.from_arrays(
            prompt_token_ids=np.concatenate(prompt_rows),
            prompt_offsets=offsets_of(prompt_rows),
            token_ids=np.concatenate(parts["token_ids"]),
            sequence_offsets=offsets_of(parts["token_ids"]),
            logprobs=np.concatenate(parts["logprobs"]),
            ranks=np.concatenate(parts["ranks"]),
            mask=np.concatenate(parts["mask"]),
            top_token_ids=top_ids,
            top_logprobs=top_logprobs,
            finish_reasons=rows["finish"],
            group=rows["group"],
            sample=rows["sample"],
            episode=rows["episode"],
            turn=rows["turn"],
            seeds=rows["seeds"],
            **{name: np.concatenate(parts[name]) if parts[name] else None for name in _OPTIONAL},
            logprobs_mode=logprobs_mode,
            path=path,
            sampling=Sampling.of(sampling),
            engine=engine,
            engine_version=engine_version,
            dtype=dtype,
            token_texts=token_texts or {},
        )

    @classmethod
    def from_arrays(
        cls,
        *,
        prompt_token_ids: npt.ArrayLike,
        prompt_offsets: npt.ArrayLike,
        token_ids: npt.ArrayLike,
        sequence_offsets: npt.ArrayLike,
        logprobs: npt.ArrayLike,
        group: npt.ArrayLike | None = None,
        top_token_ids: npt.ArrayLike | None = None,
        top_logprobs: npt.ArrayLike | None = None,
        sampling: Any = None,
        **others: Any,
    ) -> Trace:
        """A trace from columns (see the class for names, shapes and units); arrays of the right dtype are not copied.

        Without `group` every sequence has the prompt at its own place. Raises UsageError for columns that do not fit.
        """
        offsets = np.asarray(sequence_offsets, np.int64)
        tokens, sequences = len(np.asarray(token_ids)), len(offsets) - 1
        groups = np.arange(sequences) if group is None else np.asarray(group)
        defaults: dict[str, Any] = {
            "ranks": np.zeros(tokens, np.int32),
            "mask": np.ones(tokens, bool),
            "finish_reasons": np.zeros(sequences, np.uint8),
            "sample": _sample_numbers(groups),
            "episode": np.arange(sequences),
            "turn": np.zeros(sequences, np.int32),
            "seeds": np.full(sequences, NO_SEED),
            **dict.fromkeys(_OPTIONAL),
        }
        columns = {
            "prompt_token_ids": prompt_token_ids,
            "prompt_offsets": prompt_offsets,
            "token_ids": token_ids,
            "sequence_offsets": offsets,
            "logprobs": logprobs,
            "group": groups,
            "top_token_ids": np.empty((tokens, 0), np.int32) if top_token_ids is None else top_token_ids,
            "top_logprobs": np.empty((tokens, 0), np.float32) if top_logprobs is None else top_logprobs,
            **{name: value if others.get(name) is None else others[name] for name, value in defaults.items()},
        }
        meaning = {k: v for k, v in others.items() if k not in defaults}
        unknown = sorted(set(meaning) - {f.name for f in fields(cls)})
        if unknown:
            raise UsageError(f"Trace.from_arrays has no column or label {unknown[0]!r}")
        arrays = {n: None if c is None else _column(n, c) for n, c in columns.items()}
        return cls(**arrays, sampling=Sampling.of(sampling), **meaning)  # type: ignore[arg-type]

    # -- looking at it ------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        """N: all tokens, masked ones too."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """S: completions."""
        return len(self.sequence_offsets) - 1

    @property
    def num_prompts(self) -> int:
        """G: prompts (groups)."""
        return len(self.prompt_offsets) - 1

    @property
    def top_k(self) -> int:
        """K: top logprobs kept for each token."""
        return int(self.top_logprobs.shape[1])

    def bounds(self, sequence: int) -> tuple[int, int]:
        """Where sequence `sequence` begins and ends among the tokens."""
        return int(self.sequence_offsets[sequence]), int(self.sequence_offsets[sequence + 1])

    def prompt(self, sequence: int) -> list[int]:
        """Token ids of the prompt of sequence `sequence`."""
        group = int(self.group[sequence])
        ids: list[int] = self.prompt_token_ids[self.prompt_offsets[group] : self.prompt_offsets[group + 1]].tolist()
        return ids

    def completion(self, sequence: int) -> list[int]:
        """Token ids of sequence `sequence`, masked ones included."""
        start, stop = self.bounds(sequence)
        ids: list[int] = self.token_ids[start:stop].tolist()
        return ids

    def text(self, token_id: int) -> str:
        """The text of a token where it is known, else its id in angle brackets."""
        return self.token_texts.get(int(token_id), f"<{int(token_id)}>")

    def segments(self) -> Iterator[Segment]:
        """The runs of unmasked tokens, sequence by sequence."""
        starts, stops = (np.zeros(self.num_tokens + 1, bool) for _ in range(2))
        starts[self.sequence_offsets] = stops[self.sequence_offsets] = True
        starts[1:-1] |= ~self.mask[:-1]
        stops[1:-1] |= ~self.mask[1:]
        first, last = np.flatnonzero(starts[:-1] & self.mask), np.flatnonzero(stops[1:] & self.mask) + 1
        sequences = np.searchsorted(self.sequence_offsets, first, side="right") - 1
        turns = np.arange(len(first)) - np.searchsorted(sequences, sequences)
        yield from itertools.starmap(Segment, zip(*(x.tolist() for x in (sequences, turns, first, last)), strict=True))

    @property
    def is_raw(self) -> bool:
        """Whether `logprobs` are raw, or would be the same under the trace's sampling."""
        return self.logprobs_mode == "raw_logprobs" or self.sampling.raw_is_processed

    def means_as(self, other: Trace) -> bool:
        """Whether the labels of both traces say that their logprobs are of the same distribution."""
        if self.is_raw or other.is_raw:
            return self.is_raw and other.is_raw
        return self.sampling.steps() == other.sampling.steps()

    def distribution(self) -> str:
        """What `logprobs` are logarithms of, in words: `raw`, or `processed (T=0.7, top-p 0.9)`. Code asks `is_raw`."""
        return "raw" if self.is_raw else f"processed ({self.sampling.processing()})"

    def lag(self, now: int | None = None) -> IntArray:
        """By how many weight updates each token [N] is older than the weights of `now`, by default the newest in the trace.

        0 throughout where nobody kept the versions.
        """
        if self.weight_versions is None:
            return np.zeros(self.num_tokens, np.int32)
        newest = int(self.weight_versions.max(initial=0)) if now is None else now
        return (newest - self.weight_versions).astype(np.int32)

    def with_(self, **changes: Any) -> Trace:
        """A copy with other columns or labels."""
        return replace(self, **changes)

    def with_logprobs(self, logprobs: FloatArray) -> Trace:
        """A copy with other chosen logprobs [N] alone: without ranks and top-k, which were said of the old ones."""
        return self.with_(
            logprobs=logprobs,
            ranks=np.zeros(self.num_tokens, np.int32),
            top_token_ids=np.empty((self.num_tokens, 0), np.int32),
            top_logprobs=np.empty((self.num_tokens, 0), np.float32),
        )

    # -- keeping it ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the trace to a safetensors file, atomically. Raises OSError."""
        container.write(Path(path), self.to_columns(), {"trace": self.to_metadata()})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace from its file, or out of a golden. Raises GoldenError naming what is wrong with the file."""
        columns, metadata = container.read(Path(path))
        if "golden" in metadata:
            columns = {name: column for name, column in columns.items() if name in COLUMNS}
        return cls.from_file_parts(columns, metadata, Path(path))

    def to_columns(self) -> dict[str, npt.NDArray[Any]]:
        """The columns that are there, by name."""
        return {name: column for name in COLUMNS if (column := getattr(self, name)) is not None}

    def to_metadata(self) -> dict[str, Any]:
        """The labels as JSON values."""
        return {
            "logprobs_mode": self.logprobs_mode,
            "path": self.path,
            "sampling": self.sampling.to_json(),
            "engine": self.engine,
            "engine_version": self.engine_version,
            "dtype": self.dtype,
            "replay": self.replay,
            "token_texts": _pack_texts(self.token_texts),
            **({} if self.forcing is None else {"forcing": self.forcing}),
            **({} if self.newest_version is None else {"newest_version": self.newest_version}),
        }

    @classmethod
    def from_file_parts(cls, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any], path: Path) -> Trace:
        """The inverse of `to_columns` and `to_metadata`. Raises GoldenError for a file that is no trace."""
        missing = [name for name, (_, _, needed) in COLUMNS.items() if needed and name not in columns]
        unknown = sorted(set(columns) - set(COLUMNS))
        if missing or unknown or "trace" not in metadata:
            what = (
                f"it lacks the column {missing[0]}"
                if missing
                else f"it has an unknown column {unknown[0]!r:.60}"
                if unknown
                else "it has no labels"
            )
            raise container.damaged(path, f"not a trace: {what}")
        try:
            labels = _with_forcing(metadata["trace"])
            texts = _unpack_texts(**labels.pop("token_texts"))
            told = {**labels, "sampling": Sampling.of(labels["sampling"]), "token_texts": texts, "source": metadata["digest"]}
            return cls(**columns, **told)  # type: ignore[arg-type]
        except (UsageError, TypeError, ValueError, OverflowError, KeyError, AttributeError) as error:
            raise container.damaged(path, f"its parts do not fit together: {error}") from None


def _with_forcing(labels: Mapping[str, Any]) -> dict[str, Any]:
    """The labels of a file; older ones have `decode (sampler)` for what is `replay` and `forcing` now."""
    replay, _, forcing = str(labels.get("replay", "")).removesuffix(")").partition(" (")
    return {**labels, "replay": replay, "forcing": forcing} if forcing in FORCINGS else dict(labels)


def _pack_texts(texts: Mapping[int, str]) -> dict[str, list[Any]]:
    """Texts by token id, in order of the ids, each id as its distance from the one before: small in a small file."""
    ids = sorted(texts)
    return {"steps": [b - a for a, b in itertools.pairwise([0, *ids])], "texts": [texts[i] for i in ids]}


def _unpack_texts(steps: Sequence[int], texts: Sequence[str]) -> dict[int, str]:
    return {int(i): str(text) for i, text in zip(itertools.accumulate(steps), texts, strict=True)}


def _misfit(reason: str) -> UsageError:
    """What `Trace.from_sequences` raises."""
    return UsageError(reason, "Trace.from_sequences")


def _column(name: str, values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Values as the column's dtype. Raises UsageError where they do not fit it, or would have to be rounded."""
    dtype = np.dtype(COLUMNS[name][0])
    try:
        given = np.asarray(values)
        with np.errstate(over="ignore"):  # beyond float32 is -inf
            column = np.asarray(given, dtype)
        exact = dtype.kind == "f" or not given.size or (given.dtype.kind in "iufb" and bool(np.all(column == given)))
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"Trace column {name} is not {dtype}: {error}") from None
    if not exact:
        raise UsageError(f"Trace column {name} is not {dtype}: its values are {given.dtype} and do not fit")
    return column


def dtype_name(name: str) -> str:
    """A dtype's name as we write it: `torch.float32`, `fp32` and `FLOAT32` are `float32`."""
    short = str(name).lower().removeprefix("torch.")
    return _DTYPE_NAMES.get(short, short)


def _top(top: Any) -> dict[int, float]:
    """One position's top logprobs; vLLM's Logprob objects count as numbers."""
    return {int(token): float(getattr(value, "logprob", value)) for token, value in (top or {}).items()}


def offsets_of(rows: Sequence[Sequence[Any] | npt.NDArray[Any]]) -> LongArray:
    """Where each row begins in their concatenation, and where the last one ends: int64 [rows + 1]."""
    return np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)


def _sample_numbers(groups: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Number the sequences within each group, in order: int32 [S]."""
    order = np.argsort(groups, kind="stable")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(groups[order])) + 1]) if len(groups) else np.empty(0, int)
    lengths = np.diff(np.concatenate([starts, [len(groups)]]))
    numbers = np.empty(len(groups), np.int32)
    numbers[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return numbers
