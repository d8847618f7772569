"""Entropy beside logprobs: were the rollouts' tokens sampled from the distributions of their logprobs?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from ..notes import Note
from ..trace import Trace

#: A mean differs where it is more than this many standard errors, and more than this (nats), from the expected one.
_ERRORS, _LEAST = 5.0, 0.01
#: A distribution with less entropy than this (nats) is nearly certain.
_SURE: Final = 0.1
#: Tokens and sequences that a mean needs.
_TOKENS, _SEQUENCES = 200, 8


def entropy_numbers(rollouts: Trace, trainer: Trace) -> dict[str, float]:
    """`trainer_entropy`: mean entropy of the trainer's distributions over the tokens (nats). `surprise`: mean -logprob of the
    rollouts' tokens to the trainer, and `surprise_error`, its standard error. Empty where the trainer gives no entropies.

    For tokens sampled from the trainer's distributions, the mean of -logprob is their entropy, at every position and whatever
    came before. So sums of (-logprob - entropy) are a martingale, whose variance is the sum of the squares. Where a
    distribution is nearly certain, its rare tokens may be missing from these squares: two outcomes with entropy H have the
    variance H log(1/p), p being the probability of the rare one, which is about H (1 + log(1/H)).
    """
    if trainer.trainer_entropies is None:
        return {}
    surprise, entropies = -trainer.logprobs.astype(np.float64), trainer.trainer_entropies.astype(np.float64)
    used = rollouts.mask & np.isfinite(surprise) & np.isfinite(entropies)
    if not (count := int(np.count_nonzero(used))):
        return {}
    squares, sure = np.square(surprise - entropies), used & (entropies < _SURE)
    rare = entropies[sure] * (1 + np.log(1 / np.maximum(entropies[sure], 1e-30)))
    error = float(np.sqrt(squares[used & ~sure].sum() + max(squares[sure].sum(), rare.sum())) / count)
    return {
        "trainer_entropy": float(entropies[used].mean()), "surprise": float(surprise[used].mean()), "surprise_error": error
    }  # fmt: skip


def entropy_note(rollouts: Trace, numbers: Mapping[str, float], *, agree: bool) -> Note | None:
    """A note on how the tokens were sampled, where the logprobs `agree`; None where there are no entropies."""
    if not numbers:
        return None
    entropy, surprise, error = numbers["trainer_entropy"], numbers["surprise"], numbers["surprise_error"]
    text = (
        f"the trainer's mean entropy is {entropy:.3g} nats, the mean -logprob of the tokens is {surprise:.3g} +- {error:.2g} "
        "nats"
    )
    sampling, off = rollouts.sampling, surprise - entropy
    free = not (sampling.greedy or sampling.truncates or sampling.edits_logits or rollouts.replay)
    enough = np.count_nonzero(rollouts.mask) >= _TOKENS and rollouts.num_sequences >= _SEQUENCES
    if not (agree and free and enough):
        return Note("entropy", text)
    if abs(off) <= max(_ERRORS * error, _LEAST):
        return Note("entropy", f"{text}, as for tokens sampled from its distributions")
    how, why = ("more likely", "truncation or a lower temperature") if off < 0 else ("less likely", "higher temperature")
    text += (
        f": they are {how} than tokens sampled from its distributions ({abs(off) / error:.0f} standard errors). The logprobs "
        f"agree, but the sampler used other distributions (a {why} that the label of these rollouts lacks), or the rollouts "
        "were selected by their content"
    )
    return Note("drawn_otherwise", text)
