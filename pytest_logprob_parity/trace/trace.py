"""Trace: what an engine reports about tokens, as columns with labels that say what the numbers mean. No engine, no pytest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..spec import Sampling
from . import file_format
from .build import columns_of_sequences, complete_columns
from .columns import COLUMNS, BoolArray, FloatArray, IntArray, LongArray, checked_columns, empty_top_k, rows_of
from .kept import checked_kept
from .labels import (
    LOGPROBS_MODES,
    PATHS,
    Forcing,
    LogprobsMode,
    ReplayPath,
    TracePath,
    dtype_name,
    pack_texts,
    unpack_texts,
    with_forcing,
)
from .routing import Experts, Halves
from .segments import Segment, segments_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Completions, and what an engine reports about their tokens.

    N tokens in S sequences that complete G prompts (groups); K top logprobs for each token. Logprobs are natural logarithms
    (nats). `-inf` is a token that truncation excluded, NaN a token without a report. A place of the top-k that is not used
    has id -1 and logprob -inf. OpenAI-compatible servers write exactly -9999.0 for -inf: it becomes -inf wherever a trace is
    made or read.

    - `prompt_token_ids` [prompt tokens], `prompt_offsets` [G + 1]
    - `token_ids` [N], `sequence_offsets` [S + 1]
    - `logprobs` [N]: of the chosen token; `ranks` [N]: its rank, from 1 (0: unknown)
    - `mask` [N]: False where the environment wrote the token (tool output): never compared
    - `top_token_ids`, `top_logprobs` [N, K], most likely first
    - `finish_reasons` [S]: index into FINISH_REASONS
    - `group`, `sample`, `episode`, `turn`, `seeds` [S]
    - `untruncated_logprobs` [N]: processed by temperature and penalties alone, where `logprobs` are truncated
    - `kept_counts` [N]: how many tokens truncation left at each token; `kept_token_ids` [sum of counts]: which, token by token
    - `routed_experts` [N, layers, k]: the experts that each token was routed to in the forward pass that predicts it (-1: not
      known), where the model is a mixture of experts; `router_margins` [N, layers]: by how much the router's logit of the least
      chosen expert exceeds that of the best other one; `router_inputs` [N, layers]: a number of what the router was given
    - `weight_versions` [N]: which weights wrote the token; `newest_version` is the version of the newest weights, also where
      they wrote no token
    - `trainer_logprobs` [N]: what the trainer computed for the same tokens, where rollouts come from a batch that has both;
      `trainer_entropies` [N]: the entropy of the trainer's distribution (nats), at the rollouts' temperature

    Labels say what the numbers mean: `logprobs_mode`, `path`, `sampling` (as the engine ran it: vLLM's least temperature
    above 0 is 0.01), `engine`, `engine_version`, `dtype`. `replay` is how another trace's tokens were replayed ("" where the
    tokens are the trace's own), and `forcing` what forced them. `token_texts` maps ids to text, for reports on machines
    without the tokenizer. `source` is the digest of the file that the trace was read from, "" for any other trace.
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
    kept_counts: IntArray | None = None
    kept_token_ids: IntArray | None = None
    routed_experts: Experts | None = None
    router_margins: Halves | None = None
    router_inputs: Halves | None = None
    weight_versions: IntArray | None = None
    trainer_logprobs: FloatArray | None = None
    trainer_entropies: FloatArray | None = None

    logprobs_mode: LogprobsMode = "processed_logprobs"
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
        columns = {name: getattr(self, name) for name in COLUMNS}
        for name, column in checked_columns(columns).items():
            object.__setattr__(self, name, column)

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
        """A trace of rollouts that the caller has, one mapping for each sequence.

        Each sequence is a mapping with `prompt_token_ids`, `token_ids` and `logprobs` (nats, one for each
        token, None where there is none), and optionally `top_logprobs` (one `{token id: logprob}` for each token),
        `ranks`, `mask` (False for tokens of the environment), `finish_reason`, `group`, `sample`, `episode`, `turn`, `seed`,
        `weight_versions`, `untruncated_logprobs`, `kept_token_ids`, `trainer_logprobs`, `trainer_entropies`. Sequences with
        equal prompts form a group.

        `kept_token_ids` are the ids that top-p, top-k or min-p kept, the token's own among them: one list for each token (None
        where nothing is known). Flat ids are taken too, with how many each token has in `kept_counts`.

        Raises UsageError naming the sequence and the key that does not fit.
        """
        return cls.from_arrays(
            **columns_of_sequences(sequences),
            logprobs_mode=logprobs_mode,
            path=path,
            sampling=sampling,
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
        labels = {name: value for name, value in others.items() if name not in COLUMNS}
        unknown = sorted(set(labels) - {f.name for f in fields(cls)})
        if unknown:
            raise UsageError(f"Trace.from_arrays has no column or label {unknown[0]!r}")
        given = complete_columns(
            {
                "prompt_token_ids": prompt_token_ids,
                "prompt_offsets": prompt_offsets,
                "token_ids": token_ids,
                "sequence_offsets": sequence_offsets,
                "logprobs": logprobs,
                "group": group,
                "top_token_ids": top_token_ids,
                "top_logprobs": top_logprobs,
                **{name: value for name, value in others.items() if name in COLUMNS},
            }
        )
        columns: Mapping[str, Any] = checked_kept(given)
        return cls(**columns, sampling=Sampling.of(sampling), **labels)

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

    @property
    def sequence_of_token(self) -> LongArray:
        """The number of the sequence that each token belongs to: int64 [N]."""
        return rows_of(self.sequence_offsets)

    @property
    def kept_rows(self) -> LongArray:
        """The number of the token that each of `kept_token_ids` belongs to: int64 [kept tokens]; empty without kept sets."""
        counts = () if self.kept_counts is None else self.kept_counts
        return np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    @property
    def total_lengths(self) -> LongArray:
        """The tokens of each sequence and of its prompt together: int64 [S]."""
        lengths: LongArray = np.diff(self.prompt_offsets)[self.group] + np.diff(self.sequence_offsets)
        return lengths

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
        return segments_of(self.mask, self.sequence_offsets)

    @property
    def is_raw(self) -> bool:
        """Whether `logprobs` are raw, or would be the same under the trace's sampling."""
        return self.logprobs_mode == "raw_logprobs" or self.sampling.raw_is_processed

    @property
    def applied_temperature(self) -> float:
        """The temperature that the logits of `logprobs` were divided by, as the labels say; 1 where they are raw or greedy."""
        return self.sampling.applied_temperature if self.logprobs_mode == "processed_logprobs" else 1.0

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

        0 for all tokens where the trace has no versions.
        """
        if self.weight_versions is None:
            return np.zeros(self.num_tokens, np.int32)
        newest = int(self.weight_versions.max(initial=0)) if now is None else now
        return (newest - self.weight_versions).astype(np.int32)

    def with_(self, **changes: Any) -> Trace:
        """A copy with other columns or labels."""
        return replace(self, **changes)

    def with_logprobs(self, logprobs: FloatArray) -> Trace:
        """A copy with other logprobs [N], without ranks and top-k: these belong to the old logprobs."""
        top_ids, top_logprobs = empty_top_k(self.num_tokens)
        ranks = np.zeros(self.num_tokens, np.int32)
        return self.with_(logprobs=logprobs, ranks=ranks, top_token_ids=top_ids, top_logprobs=top_logprobs)

    # -- keeping it ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the trace to a safetensors file, atomically. Raises OSError."""
        file_format.write(Path(path), self.to_columns(), {"trace": self.to_metadata()})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """The trace of a file, also of a golden's. Raises GoldenError naming what is wrong with the file."""
        columns, metadata = file_format.read(Path(path))
        if "golden" in metadata:
            columns = {name: column for name, column in columns.items() if name in COLUMNS}
        return cls.from_file_parts(columns, metadata, Path(path))

    def to_columns(self) -> dict[str, npt.NDArray[Any]]:
        """The columns that the trace has, by name."""
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
            "token_texts": pack_texts(self.token_texts),
            **({} if self.forcing is None else {"forcing": self.forcing}),
            **({} if self.newest_version is None else {"newest_version": self.newest_version}),
        }

    @classmethod
    def from_file_parts(cls, columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any], path: Path) -> Trace:
        """The inverse of `to_columns` and `to_metadata`. Raises GoldenError for a file that is no trace."""
        missing = [name for name, column in COLUMNS.items() if column.required and name not in columns]
        unknown = sorted(set(columns) - set(COLUMNS))
        if missing or unknown or "trace" not in metadata:
            what = (
                f"it lacks the column {missing[0]}"
                if missing
                else f"it has an unknown column {unknown[0]!r:.60}"
                if unknown
                else "it has no labels"
            )
            raise file_format.damaged(path, f"not a trace: {what}")
        try:
            labels = with_forcing(metadata["trace"])
            texts = unpack_texts(**labels.pop("token_texts"))
            labels |= {"sampling": Sampling.of(labels["sampling"]), "token_texts": texts, "source": metadata["digest"]}
            return cls(**checked_kept(columns), **labels)
        except (UsageError, TypeError, ValueError, OverflowError, KeyError, AttributeError) as error:
            raise file_format.damaged(path, f"its parts do not fit together: {error}") from None
