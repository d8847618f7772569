"""What this project knows of a framework: how it computes logprobs, what it logs, asks of its engine, and gets wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ...comparison.alignment import align
from ...errors import EngineError, UsageError
from ...trace import Trace

if TYPE_CHECKING:
    from ..scoring import Scorer

Doubles = npt.NDArray[np.float64]

#: Log-ratios are cut off here before they are exponentiated: the squares still fit a double.
_MOST: Final = 300.0


@dataclass(frozen=True, eq=False)
class Pairs:
    """The tokens that both sides have, n of them: `rollout` and `trainer` logprobs [n] (nats), the `sequence` of each [n].

    `entropy` [n] (nats) is the rollout's over its listed top-k, where the trace has one. Tokens that a side excludes or does
    not name are left out.
    """

    rollout: Doubles
    trainer: Doubles
    sequence: npt.NDArray[np.int64]
    entropy: Doubles | None = None

    @classmethod
    def of(cls, expected: Trace, actual: Trace) -> Pairs:
        """The aligned tokens of two traces that are finite on both sides."""
        rows = align(expected, actual)
        places = np.arange(expected.num_tokens)[rows.expected]
        rollout = expected.logprobs[places].astype(np.float64)
        trainer = actual.logprobs[np.arange(actual.num_tokens)[rows.actual]].astype(np.float64)
        kept = np.isfinite(rollout) & np.isfinite(trainer)
        owner = np.searchsorted(expected.sequence_offsets, places, side="right") - 1
        top = expected.top_logprobs[places][kept].astype(np.float64)
        entropy = None
        if top.shape[1]:
            p = np.exp(np.where(np.isfinite(top), top, -np.inf))
            entropy = -np.where(p > 0, p * np.where(p > 0, top, 0.0), 0.0).sum(axis=1)
        return cls(rollout[kept], trainer[kept], owner[kept], entropy)

    @property
    def d(self) -> Doubles:
        """trainer - rollout [n], in nats, within +-300."""
        return np.clip(self.trainer - self.rollout, -_MOST, _MOST)

    @property
    def ratio(self) -> Doubles:
        """Policy ratio exp(d) [n]."""
        return np.asarray(np.exp(self.d))

    def by_sequence(self, values: Doubles) -> Doubles:
        """Sums [sequences that have tokens] of values [n]."""
        _, number = np.unique(self.sequence, return_inverse=True)
        return np.bincount(number, values).astype(np.float64)

    def sequence_means(self, values: Doubles) -> Doubles:
        """Means over the tokens of each sequence that has some."""
        return np.asarray(self.by_sequence(values) / self.by_sequence(np.ones_like(values)))


@dataclass(frozen=True)
class Framework:
    """One training framework.

    - `title`: as it writes itself; `package`: its distribution, empty where there is none to install
    - `logprobs(logits [..., L, V], token_ids [..., L], temperature) -> [..., L]`: its documented formula, in torch, on logits
      that are aligned with the tokens they predict
    - `installed()`: the same by the package's own function; raises EngineError with what is missing
    - `divides`: where it divides by the temperature (see Scorer)
    - `metrics(pairs)`: what it logs of rollout against trainer, by its own names
    - `tolerance`: its thresholds, as limits of Tolerance, for `tolerance="..."`; `thresholds` are those in its own metrics
    - `profile`: the name of the profile with the settings that it asks of vLLM; `mistakes`: what that recipe gets wrong
    - `read(...)`: a trace from what it has in hand
    """

    name: str
    title: str
    package: str
    logprobs: Callable[[Any, Any, float], Any]
    metrics: Callable[[Pairs], Mapping[str, float]]
    read: Callable[..., Trace]
    installed: Callable[[], Callable[[Any, Any, float], Any]]
    divides: str = "float32"
    tolerance: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    profile: str = "rl"
    mistakes: tuple[str, ...] = ()

    def report(self, expected: Trace, actual: Trace) -> str:
        """Its metrics of rollouts against a trainer, in a line; those beyond its own thresholds are marked."""
        parts = []
        for name, value in self.metrics(Pairs.of(expected, actual)).items():
            limit = self.thresholds.get(name)
            mark = "" if limit is None or abs(value) <= limit else f" (above {limit:g})"
            parts.append(f"{name} {value:.4g}{mark}")
        return ", ".join(parts)

    def scorer(self, model: Any, *, dtype: str = "float32", head_dtype: str | None = None) -> Scorer:
        """A scorer that makes logits of `model` (see TransformersScorer) and takes the framework's own function from there
        on: the package's where it is installed, else its formula.
        """
        try:
            function, how = self.installed(), f"{self.title}'s own function"
        except EngineError:
            function, how = self.logprobs, f"{self.title}'s formula"
        return FrameworkScorer(self, model, dtype, head_dtype, function, how)


class FrameworkScorer:
    """See Framework.scorer. Whole logits, as the frameworks' functions want them: for sequences of ordinary length."""

    def __init__(
        self, framework: Framework, model: Any, dtype: str, head_dtype: str | None, function: Any, how: str
    ) -> None:  # fmt: skip
        from ..transformers_scorer import TransformersScorer

        self._model = TransformersScorer(model, dtype=dtype, head_dtype=head_dtype, divides=framework.divides)
        self._function = function
        self.dtype, self.head_dtype, self.divides = self._model.dtype, self._model.head_dtype, framework.divides
        self.vocabulary, self.tokenizer = self._model.vocabulary, self._model.tokenizer
        self.name = f"{how} on {self._model.name}"

    def __call__(self, token_ids: Any, attention_mask: Any, temperature: float = 1.0) -> Any:
        """Logprobs [B, L - 1] of the tokens from the second one on."""
        logits, targets = self._model.logits(token_ids, attention_mask)
        return self._function(logits, targets, temperature)


def missing(title: str, package: str, error: BaseException) -> EngineError:
    """The error of `installed` where a package is not there, or does not import."""
    return EngineError(f"{title}'s own function cannot be had: {package} does not import ({type(error).__name__}: {error})")


def check_lengths(name: str, **columns: Any) -> None:
    """Raise UsageError where columns of one batch do not have one shape [B, L]."""
    shapes = {column: tuple(value.shape) for column, value in columns.items() if value is not None}
    if len(set(shapes.values())) > 1:
        raise UsageError(f"{name}: " + ", ".join(f"{c} is {list(s)}" for c, s in shapes.items()) + ": they have one shape")


def renamed(framework: Framework, **changes: Any) -> Framework:
    """A framework like another one."""
    return dataclasses.replace(framework, **changes)
