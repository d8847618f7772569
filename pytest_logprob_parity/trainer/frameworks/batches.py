"""A batch of a framework: its columns by name, with checks of their shapes, masks, padding and logprobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...trace import Trace

Array = npt.NDArray[Any]

#: A sequence of at least this many tokens, all with a logprob of exactly 0.0, has no logprobs: 0.0 stands for missing ones.
_ALL_ZERO: Final = 16
#: A logprob may be this far above 0 by rounding (nats).
_ABOVE: Final = 1e-3


class Batch:
    """A framework's batch: a mapping, a DataProto (whose `.batch` is a mapping) or an object with attributes.

    Every method raises UsageError with one line that begins with the framework's name.
    """

    def __init__(self, framework: str, batch: Any) -> None:
        self._framework = framework
        inner = getattr(batch, "batch", None)
        self._columns = inner if inner is not None and hasattr(inner, "keys") else batch

    def refuse(self, text: str) -> UsageError:
        """The error with this text."""
        return UsageError(f"{self._framework}: {text}")

    def get(self, name: str) -> Any:
        """The column as it is; None where it is missing or None."""
        if hasattr(self._columns, "keys"):
            return self._columns[name] if name in self._columns.keys() else None  # noqa: SIM118 (a TensorDict is no mapping)
        return getattr(self._columns, name, None)

    def column(self, name: str, shape: Mapping[str, tuple[int, ...]] | None = None, why_missing: str = "") -> Array:
        """A column [B, L] or [B] as an array. `shape` has the shape that it must have, by the reason."""
        value = self.get(name)
        if value is None:
            keys = list(self._columns.keys()) if hasattr(self._columns, "keys") else []
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
            raise self.refuse(f"{name} is padded and the responses are jagged: give all columns as the trainer made them")
        return [np.asarray(as_array(row)) for row in value.unbind()]

    def check_row(self, name: str, logprobs: Array, written: npt.NDArray[np.bool_]) -> None:
        """Refuse logprobs [L] of one row that are not logprobs: see check_logprobs."""
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
            raise self.refuse(f"{name} holds {array[~np.isin(array, (0, 1))][0]}: a mask has zeros and ones")
        return array.astype(bool)

    def lengths(self, name: str, mask: npt.NDArray[np.bool_], padded: str) -> list[int]:
        """How many ones each row of a mask [B, L] has. Refuses holes, and padding on the other side than `padded`."""
        for row, values in enumerate(mask):
            places = np.flatnonzero(values)
            if not len(places):
                continue
            if places[-1] - places[0] + 1 != len(places):
                hole = int(places[np.argmax(np.diff(places) > 1)]) + 1
                raise self.refuse(f"{name} of row {row} has a hole at {hole}: expected one run of ones, padding on one side")
            if (places[0] != 0) if padded == "right" else (places[-1] != len(values) - 1):
                other = {"right": "left", "left": "right"}[padded]
                raise self.refuse(f"{name} of row {row} is padded on the {other}; expected padding on the {padded}")
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
        """Refuse logprobs [B, L] that are not logprobs: zeros in place of missing ones, values above 0, and, with `filled`,
        values where the engine wrote no token. `rows` are the names of the rows, if these are not all rows of the batch.

        `written` [B, L] is where the engine wrote the tokens; NaN is allowed there (the engine gave no logprob).
        """
        rows = [f"{name} of row {row}" for row in range(len(logprobs))] if rows is None else rows
        if not written.any():
            raise self.refuse("the masks hide every token: nothing can be compared")
        if np.isnan(logprobs[written]).all():
            raise self.refuse(f"{name} is NaN everywhere: the engine gave no logprobs")
        above = np.argwhere(written & (logprobs > _ABOVE))
        if len(above):
            row, place = map(int, above[0])
            value = logprobs[row, place]
            raise self.refuse(f"{rows[row]} is {value:.4g} at {place}: a logprob is at most 0; are these probabilities?")
        if not np.any(logprobs[written] != 0):
            raise self.refuse(f"{name} is 0.0 everywhere: it stands for missing logprobs")
        for row, (values, is_written) in enumerate(zip(logprobs, written, strict=True)):
            if is_written.sum() >= _ALL_ZERO and not np.any(values[is_written] != 0):
                raise self.refuse(
                    f"{rows[row]} is 0.0 for all of {int(is_written.sum())} tokens: it stands for missing logprobs"
                )
        outside = np.argwhere(~written & np.isfinite(logprobs) & (logprobs != 0))
        if filled and len(outside):
            row, place = map(int, outside[0])
            raise self.refuse(
                f"{rows[row]} is {logprobs[row, place]:.4g} at {place}, where by the mask the engine wrote nothing: the column "
                "is shifted by a token, or the mask was overwritten (by rejection or truncation)"
            )

    def of_trainer(self, name: str, shape: Mapping[str, tuple[int, ...]], written: npt.NDArray[np.bool_]) -> Array | None:
        """The trainer's own logprobs [B, L] of the tokens; None where the batch has none. NaN is kept, and reported later."""
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
        """The trace of these sequences (see Trace.from_sequences): processed logprobs of vLLM, but for `labels`."""
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
        """Refuse a text that its token ids do not decode to: it was tokenised again, or with another tokenizer."""
        if tokenizer is None:
            return
        decoded = tokenizer.decode(list(token_ids))
        if decoded != text:
            at = next((i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b), min(len(decoded), len(text)))
            from_ids, from_text = decoded[at : at + 12], text[at : at + 12]
            raise self.refuse(
                f"{where} is not the text of its token ids from character {at} on ({from_text!r}, the ids give {from_ids!r}): "
                "it was tokenised again, or with another tokenizer"
            )


def as_array(value: Any) -> Array | None:
    """A tensor, array or list as an array, with floats of at least float32; None for a jagged one."""
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
