"""What readers of frameworks' batches share: columns by name, their shapes, masks and padding, and logprobs that are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...trace import Trace

Array = npt.NDArray[Any]

#: A sequence of so many tokens whose logprobs are all exactly 0.0 has the filler that stands for "none was given".
_FILLER: Final = 16
#: Rounding may leave a logprob this far above 0 (nats).
_ABOVE: Final = 1e-3


class Batch:
    """A framework's batch: a mapping, a DataProto (its `.batch` is one) or an object with attributes.

    Every method raises UsageError with one line that begins with the framework's name.
    """

    def __init__(self, framework: str, given: Any) -> None:
        self._framework = framework
        inner = getattr(given, "batch", None)
        self._given = inner if inner is not None and hasattr(inner, "keys") else given

    def refuse(self, text: str) -> UsageError:
        """The error that says so."""
        return UsageError(f"{self._framework}: {text}")

    def get(self, name: str) -> Any:
        """The column as it is; None where it is not there, or is None."""
        if hasattr(self._given, "keys"):
            return self._given[name] if name in self._given.keys() else None  # noqa: SIM118 (a TensorDict is no mapping)
        return getattr(self._given, name, None)

    def column(self, name: str, shape: Mapping[str, tuple[int, ...]] | None = None, why_missing: str = "") -> Array:
        """A column [B, L] or [B] as an array; `shape` names what its shape has to be that of."""
        value = self.get(name)
        if value is None:
            keys = list(self._given.keys()) if hasattr(self._given, "keys") else []
            has = f"; it has {', '.join(map(str, keys))}" if keys and not why_missing else ""
            raise self.refuse(f"no {name} in this batch{f': {why_missing}' if why_missing else has}")
        array = as_array(value)
        if array is None:
            raise self.refuse(f"{name} is jagged: pad it to one [B, L] tensor first")
        for what, expected in (shape or {}).items():
            if array.shape != expected:
                raise self.refuse(f"{name} is {list(array.shape)}, expected {list(expected)}: {what}")
        return array

    def is_jagged(self, name: str) -> bool:
        """Whether a column is a nested tensor, of rows without padding."""
        return bool(getattr(self.get(name), "is_nested", False))

    def rows(self, name: str, why_missing: str = "") -> list[Array]:
        """A jagged column, row by row."""
        value = self.get(name)
        if value is None:
            raise self.refuse(f"no {name} in this batch{f': {why_missing}' if why_missing else ''}")
        if not self.is_jagged(name):
            raise self.refuse(f"{name} is padded beside jagged responses: give all columns as they were made")
        return [np.asarray(as_array(row)) for row in value.unbind()]

    def check_row(self, name: str, logprobs: Array, written: npt.NDArray[np.bool_]) -> None:
        """Refuse logprobs [L] of one row that are none: see check_logprobs."""
        self.check_logprobs(name, logprobs[None], written[None], filled=False, rows=[name])

    def ids(self, name: str) -> Array:
        """A column of token ids [B, L]."""
        array = self.column(name)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise self.refuse(f"{name} is {array.dtype} {list(array.shape)}: token ids are whole numbers, [B, L]")
        return array

    def mask(self, name: str, shape: Mapping[str, tuple[int, ...]] | None = None) -> npt.NDArray[np.bool_]:
        """A column of zeros and ones as bools."""
        array = self.column(name, shape)
        if not np.isin(array, (0, 1)).all():
            raise self.refuse(f"{name} holds {array[~np.isin(array, (0, 1))][0]}: a mask is of zeros and ones")
        return array.astype(bool)

    def lengths(self, name: str, mask: npt.NDArray[np.bool_], padded: str) -> list[int]:
        """How many ones each row of a mask [B, L] has: one run that ends at the far side of its padding, without holes."""
        for row, values in enumerate(mask):
            places = np.flatnonzero(values)
            if not len(places):
                continue
            if places[-1] - places[0] + 1 != len(places):
                hole = int(places[np.argmax(np.diff(places) > 1)]) + 1
                raise self.refuse(f"{name} of row {row} has a hole at {hole}: it masks padding, which is on one side")
            if (places[0] != 0) if padded == "right" else (places[-1] != len(values) - 1):
                other = {"right": "left", "left": "right"}[padded]
                raise self.refuse(f"{name} of row {row} is padded on the {other}; here it is padded on the {padded}")
        return [int(n) for n in mask.sum(axis=1)]

    def check_logprobs(
        self,
        name: str,
        logprobs: Array,
        written: npt.NDArray[np.bool_],
        *,
        filled: bool = True,
        rows: Sequence[str] | None = None,
    ) -> None:
        """Refuse logprobs [B, L] that are none: fillers, values above 0, and, if `filled`, values where nothing was written.
        `rows` are what to call them, where they are not all rows of the batch.

        `written` [B, L] is where the engine wrote the tokens that they belong to; NaN is allowed there (it said nothing).
        """
        rows = [f"{name} of row {row}" for row in range(len(logprobs))] if rows is None else rows
        if not written.any():
            raise self.refuse("its masks hide every token: nothing can be compared")
        if np.isnan(logprobs[written]).all():
            raise self.refuse(f"{name} is NaN everywhere: the engine gave no logprobs")
        above = np.argwhere(written & (logprobs > _ABOVE))
        if len(above):
            row, place = map(int, above[0])
            value = logprobs[row, place]
            raise self.refuse(f"{rows[row]} is {value:.4g} at {place}: a logprob is at most 0; are these probabilities?")
        if not np.any(logprobs[written] != 0):
            raise self.refuse(f"{name} is 0.0 everywhere: the filler of logprobs that nobody gave")
        for row, (values, here) in enumerate(zip(logprobs, written, strict=True)):
            if here.sum() >= _FILLER and not np.any(values[here] != 0):
                raise self.refuse(f"{rows[row]} is 0.0 for all of {int(here.sum())} tokens: the filler of missing ones")
        outside = np.argwhere(~written & np.isfinite(logprobs) & (logprobs != 0))
        if filled and len(outside):
            row, place = map(int, outside[0])
            raise self.refuse(
                f"{rows[row]} is {logprobs[row, place]:.4g} at {place}, where the mask says that the engine wrote "
                "nothing: it is shifted by a token, or the mask was overwritten (by rejection or truncation)"
            )

    def of_trainer(self, name: str, shape: Mapping[str, tuple[int, ...]], written: npt.NDArray[np.bool_]) -> Array | None:
        """The trainer's own logprobs [B, L] of the tokens; None where the batch has none. NaN is kept: that is its fault."""
        if self.get(name) is None:
            return None
        values = self.column(name, shape)
        if values.dtype.kind != "f":
            raise self.refuse(f"{name} is {values.dtype}: logprobs are floats")
        above = np.argwhere(written & (values > _ABOVE))
        if len(above):
            row, place = map(int, above[0])
            raise self.refuse(
                f"{name} of row {row} is {values[row, place]:.4g} at {place}: a logprob is at most 0; are these probabilities?"
            )
        if written.any() and not np.any(values[written] != 0):
            raise self.refuse(f"{name} is 0.0 everywhere: the trainer has not computed it")
        return values

    def trace(
        self, sequences: Sequence[Mapping[str, Any]], *, sampling: Any, tokenizer: Any, labels: Mapping[str, Any]
    ) -> Trace:
        """The trace of these sequences (see Trace.from_sequences), an engine's of processed logprobs unless labels differ."""
        texts = {}
        if tokenizer is not None:
            used = sorted({int(i) for s in sequences for i in (*s["prompt_token_ids"], *s["token_ids"])})
            texts = dict(zip(used, tokenizer.batch_decode([[i] for i in used]), strict=True))
        about = {"engine": "vllm", **labels}
        try:
            return Trace.from_sequences(sequences, sampling=sampling, token_texts=texts, **about)
        except UsageError as error:
            raise self.refuse(error.reason) from None

    def check_text(self, where: str, text: str, token_ids: Sequence[int], tokenizer: Any) -> None:
        """Refuse a text that is not that of the tokens it goes with: somebody has tokenised it anew."""
        if tokenizer is None:
            return
        decoded = tokenizer.decode(list(token_ids))
        if decoded != text:
            at = next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text)))
            here, there = decoded[at : at + 12], text[at : at + 12]
            raise self.refuse(
                f"{where} is not the text of its token ids from character {at} on ({there!r}, the ids are {here!r}): "
                "retokenised, or another tokenizer"
            )


def as_array(value: Any) -> Array | None:
    """A tensor, array or list as an array, floats as float32 or wider; None for a jagged one."""
    if getattr(value, "is_nested", False):
        return None
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() and value.element_size() < 4 else value
        return np.asarray(value.numpy())
    try:
        return np.array([[np.nan if v is None else v for v in row] for row in value]) if _rows(value) else np.asarray(value)
    except ValueError:
        return None


def _rows(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], (list, tuple))
