"""The description of a training framework: its logprobs, its metrics, its batches, its engine settings and its mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ...comparison.alignment import align
from ...comparison.result import Comparison, Logged
from ...errors import EngineError, UsageError
from ...trace import Trace

if TYPE_CHECKING:
    from ..scorer import Scorer
    from ..transformers_scorer import TransformersScorer

Doubles = npt.NDArray[np.float64]

#: Log-ratios are clipped to +- this (nats) before they are exponentiated: their squares still fit into a double.
_MOST: Final = 300.0

#: The width of a line of metrics.
_WIDTH: Final = 108


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Pairs:
    """The n tokens with finite logprobs on both sides: `rollout` and `trainer` [n] (nats), and the `sequence` of each [n].

    `sequences` counts all sequences, also those without such a token; 0 stands for those that have one. `entropies` [n] (nats)
    are those of the trainer's distributions, if the trainer gives them.
    """

    rollout: Doubles
    trainer: Doubles
    sequence: npt.NDArray[np.int64]
    sequences: int = 0
    entropies: Doubles | None = None

    @classmethod
    def of(cls, expected: Trace, actual: Trace) -> Pairs:
        """The aligned tokens of two traces that are finite on both sides."""
        rows = align(expected, actual)
        in_expected = np.arange(expected.num_tokens)[rows.expected]
        rollout = expected.logprobs[in_expected].astype(np.float64)
        in_actual = np.arange(actual.num_tokens)[rows.actual]
        trainer = actual.logprobs[in_actual].astype(np.float64)
        kept = np.isfinite(rollout) & np.isfinite(trainer)
        owner = expected.sequence_of_token[in_expected]
        entropies = None if actual.trainer_entropies is None else actual.trainer_entropies[in_actual][kept].astype(np.float64)
        return cls(
            rollout=rollout[kept],
            trainer=trainer[kept],
            sequence=owner[kept],
            sequences=expected.num_sequences,
            entropies=entropies,
        )

    @property
    def d(self) -> Doubles:
        """trainer - rollout [n] in nats, clipped to +-300."""
        return np.clip(self.trainer - self.rollout, -_MOST, _MOST)

    @property
    def ratio(self) -> Doubles:
        """Policy ratio exp(d) [n]."""
        return np.asarray(np.exp(self.d))

    def by_sequence(self, values: Doubles) -> Doubles:
        """Sums of values [n] over the tokens of each sequence that has some."""
        _, number = np.unique(self.sequence, return_inverse=True)
        return np.bincount(number, values).astype(np.float64)

    def sequence_means(self, values: Doubles) -> Doubles:
        """Means of values [n] over the tokens of each sequence that has some."""
        return np.asarray(self.by_sequence(values) / self.by_sequence(np.ones_like(values)))

    def padded(self, by_sequence: Doubles) -> Doubles:
        """Numbers of the sequences that have tokens, and a 0 for each of the others: the masked mean over no token."""
        return np.concatenate([by_sequence, np.zeros(max(self.sequences - len(by_sequence), 0))])


@dataclass(frozen=True, kw_only=True, slots=True)
class Framework:
    """One training framework.

    - `title`: as it writes its own name; `package`: its distribution, "" where there is none to install
    - `logprobs(logits [..., L, V], token_ids [..., L], temperature) -> [..., L]`: its documented formula, in torch, on logits
      that are aligned with the tokens they predict
    - `installed()`: the same by the package's own function; raises EngineError with what is missing
    - `divides`: where it divides by the temperature (see Scorer); `head_dtype`: the precision of its LM head, if it differs
      from the model's
    - `metrics(pairs, **settings)`: what it logs of rollout and trainer, by its own names; `configured(config)` reads the
      settings (caps and modes) from its configuration, if it has any
    - `thresholds`: what its documents call normal, (least, most) by metric; `tolerance`: the same as limits of Tolerance, for
      `tolerance="..."`, as far as they can be expressed so
    - `profile`: the name of the profile with the settings that it uses for vLLM; `mistakes`: known mistakes of its recipe
    - `read(batch, ...)`: a trace of its batch; `watches`: see `watch`, if its trainer can be watched
    """

    name: str
    title: str
    package: str
    logprobs: Callable[[Any, Any, float], Any]
    metrics: Callable[..., Mapping[str, float]]
    read: Callable[..., Trace]
    installed: Callable[[], Callable[[Any, Any, float], Any]]
    divides: str = "float32"
    head_dtype: str | None = None
    tolerance: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    profile: str = "rl"
    mistakes: tuple[str, ...] = ()
    configured: Callable[[Any], Mapping[str, Any]] | None = None
    watches: Callable[..., list[Comparison]] | None = None

    def log(self, expected: Trace, actual: Trace, config: Any = None) -> Logged:
        """What it logs of rollouts (`expected`) and a trainer (`actual`) under its configuration, by default under its
        defaults. Numbers beyond its thresholds are marked. Raises UsageError for a configuration that is not its own.
        """
        if config is not None and self.configured is None:
            raise UsageError(f"{self.name}: its metrics have no settings; leave config out")
        settings = {} if config is None or self.configured is None else self.configured(config)
        values = dict(self.metrics(Pairs.of(expected, actual), **settings))
        parts = [f"{name} {value:.4g}{self._mark(name, value)}" for name, value in values.items()]
        lines = [f"{self.name}: {', '.join(parts[:1]) or 'logs no metric of its rollouts and its trainer'}"]
        for part in parts[1:]:
            fits = len(lines[-1]) + len(part) + 2 <= _WIDTH
            lines[-1:] = [f"{lines[-1]}, {part}"] if fits else [f"{lines[-1]},", f"  {part}"]
        return Logged(self.name, values, tuple(lines))

    def watch(self, trainer: Any = None, **settings: Any) -> list[Comparison]:
        """Make a trainer check its own batches: the first, then every n-th (`every`). Returns the list to which each comparison
        is added. Raises UsageError where the trainer of this framework cannot be watched.
        """
        if self.watches is None:
            raise UsageError(f"{self.name}: its trainer cannot be watched; read a batch and call assert_trainer_parity")
        return self.watches(trainer, **settings)

    def _mark(self, name: str, value: float) -> str:
        least, most = self.thresholds.get(name, (-np.inf, np.inf))
        return f" (normal: {least:g} to {most:g})" if not least <= value <= most and name in self.thresholds else ""

    def scorer(
        self, model: Any, *, dtype: str | None = None, head_dtype: str | None = None, adapter: str | Path | None = None
    ) -> Scorer:
        """A scorer that computes the logits of `model`, with `adapter` merged into it (see TransformersScorer), and then calls
        the framework's own function: the package's if it is installed, else its formula.
        """
        from ..transformers_scorer import TransformersScorer

        try:
            function, how = self.installed(), f"{self.title}'s own function"
        except EngineError:
            function, how = self.logprobs, f"{self.title}'s formula"
        model_scorer = TransformersScorer(
            model, dtype=dtype, head_dtype=head_dtype or self.head_dtype, divides=self.divides, adapter=adapter
        )
        return FrameworkScorer(model_scorer, function, how)


class FrameworkScorer:
    """See Framework.scorer. It computes whole logits, as the frameworks' functions need them: not for very long sequences."""

    gives_entropies: Final = True

    def __init__(self, model: TransformersScorer, function: Callable[[Any, Any, float], Any], how: str) -> None:
        self._model, self._function, self._how = model, function, how
        self.dtype, self.head_dtype, self.divides = model.dtype, model.head_dtype, model.divides
        self.vocabulary, self.tokenizer, self.adapter = model.vocabulary, model.tokenizer, model.adapter
        self.name = f"{how} on {model.name}"

    def logits(self, token_ids: Any, attention_mask: Any) -> tuple[Any, Any]:
        """See TransformersScorer.logits."""
        return self._model.logits(token_ids, attention_mask)

    @property
    def has_adapters(self) -> bool:
        """See TransformersScorer.has_adapters."""
        return self._model.has_adapters

    def as_trained(self) -> FrameworkScorer | None:
        """See TransformersScorer.as_trained."""
        other = self._model.as_trained()
        return None if other is None else FrameworkScorer(other, self._function, self._how)

    def other_adapters(self) -> Iterator[tuple[str, Callable[[], FrameworkScorer]]]:
        """See TransformersScorer.other_adapters."""
        for words, load in self._model.other_adapters():
            yield words, functools.partial(self._on, load)

    def _on(self, load: Callable[[], TransformersScorer]) -> FrameworkScorer:
        return FrameworkScorer(load(), self._function, self._how)

    def __call__(
        self, token_ids: Any, attention_mask: Any, temperature: float = 1.0, *, entropies: bool = False
    ) -> Any:  # fmt: skip
        """Logprobs [B, L - 1] of the tokens from the second one on; with `entropies` a pair: the logprobs and the entropies."""
        logits, targets = self.logits(token_ids, attention_mask)
        logprobs = self._function(logits, targets, temperature)
        if not entropies:
            return logprobs
        scaled = logits.float() / temperature
        return logprobs, scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)  # as TRL and veRL compute it


def field_of(config: Any, name: str) -> Any:
    """A field of a configuration, which is an object or a mapping; None where it has none of that name."""
    if hasattr(config, "keys"):
        return config[name] if name in config.keys() else None  # noqa: SIM118 (a DictConfig)
    return getattr(config, name, None)


def has_field(config: Any, name: str) -> bool:
    """Whether a configuration has a field of that name."""
    return name in config.keys() if hasattr(config, "keys") else hasattr(config, name)  # noqa: SIM118


def missing(title: str, package: str, error: BaseException) -> EngineError:
    """The error of `installed` where a package is missing or does not import."""
    return EngineError(f"{title}'s own function is not available: {package} does not import ({type(error).__name__}: {error})")


def gather_minus_logsumexp(logits: Any, token_ids: Any) -> Any:
    """Logprobs [..., L] of `token_ids` [..., L] under `logits` [..., L, V], in the dtype of the logits: x_t - log sum exp x."""
    return logits.gather(-1, token_ids[..., None])[..., 0] - logits.logsumexp(-1)


def log_softmax_then_gather(logits: Any, token_ids: Any) -> Any:
    """The same by a log-softmax over the whole vocabulary. In half precision it rounds every logprob to that precision."""
    return logits.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
