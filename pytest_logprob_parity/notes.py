"""A note: a sentence beside a result, with the key that code finds it by."""

from __future__ import annotations

from typing import Literal, TypeAlias

#: What a note is about.
NoteKey: TypeAlias = Literal[
    # what was compared, and what was not
    "temperature", "top_k_judged", "contradiction",
    "not_compared", "no_logprob", "excluded", "labels", "one_prompt", "top_k", "left_unexplained", "beyond_dtype", "no_floor",
    "free_generation", "prefill_for_decode", "to_verify", "without_truncation", "min_tokens", "fillers",
    # by which limits
    "declared_gap", "gap_not_there", "recorded_limits", "unknown_dtype", "as_in_its_run",
    # of the engine, the weights and the trainer
    "another_adapter", "unverified_pins", "sent_again", "reference_evaluation", "cache_not_told", "head_precision",
    "copied", "checksums", "entropy", "drawn_otherwise", "expert_routing",
    # of a recording
    "floor", "floor_seconds", "reference", "cannot_tell_raw", "chance", "noise_hides",
]  # fmt: skip


class Note(str):
    """A sentence beside a verdict, with the `key` that code finds it by."""

    __slots__ = ("key",)
    key: NoteKey

    def __new__(cls, key: NoteKey, text: str) -> Note:
        """`text` under `key`."""
        note = super().__new__(cls, text)
        note.key = key
        return note

    def __getnewargs__(self) -> tuple[NoteKey, str]:  # type: ignore[override]
        """For copies, and for other processes."""
        return self.key, str(self)
