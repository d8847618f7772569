"""Why the trainer's own column in a batch differs from the rollouts': by the two columns alone, or with a scorer."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from ..comparison.findings import Cause
from ..comparison.result import Comparison, Finding
from ..trace import Trace
from .limits import is_coarser
from .logit_function import explaining_logit_function
from .misplaced_logprobs import few_off, misplaced, off_from_a_token_on
from .scorer import HasTrainingMode, Scorer, TakesAdapters, name_of
from .scoring import rms, score, spread
from .temperature_causes import columns_temperature
from .trainer_faults import explaining_fault
from .truncation_causes import ignored_kept_sets

#: The grid of logits in half precision: that of bfloat16 from 16 to 32.
_STEP: Final = 1 / 8
#: Padded rows differ where their median is this many times the noise and the largest difference of the other rows.
_NEARER: Final = 4.0
#: How many sequences are scored again.
_FEW: Final = 8
#: Two RMS differences are alike within this factor.
_LIKE: Final = 3.0
#: The candidates where nothing tells more.
_CANDIDATES: Final[tuple[Cause, ...]] = (
    "attention_mask", "prompt", "packing", "dropout", "logits", "stale_weights", "weights_differ",
)  # fmt: skip


def causes_in_two_columns(comparison: Comparison, rollouts: Trace, column: Trace, noise: float) -> list[Finding]:
    """Why two columns disagree, as far as they alone tell."""
    if any(finding.cause for finding in comparison.findings):
        return list(comparison.findings)
    columns = comparison.expected, column, noise
    found = (
        misplaced(*columns, whose="the trainer")
        or few_off(*columns, whose="the trainer")
        or ignored_kept_sets(comparison.expected, column)
        or only_padded_rows_differ(rollouts, *columns)
        or off_from_a_token_on(*columns, whose="the trainer")
    )
    text = "the two columns alone do not show which side is wrong: give a scorer for a reference evaluation"
    return [found or Finding(layer="trainer", cause=None, evidence=text, candidates=_CANDIDATES)]


def causes_of_a_wrong_trainer(
    comparison: Comparison, rollouts: Trace, column: Trace, scored: Trace, scorer: Scorer, noise: float
) -> list[Finding]:
    """Why the trainer's column is wrong, where the scorer agrees with the rollouts."""
    off = rms(scored, column)
    which = (
        f"{name_of(scorer)} agrees with the rollouts (RMS {rms(scored, comparison.expected):.2g} nats) and not with the "
        f"trainer ({off:.2g}): the trainer is wrong"
    )
    named = [dataclasses.replace(f, evidence=f"{which}: {f.evidence}") for f in comparison.findings if f.cause]
    if named:
        return named
    found = misplaced(scored, column, noise, whose="the trainer")
    temperature = None if found is not None else columns_temperature(rollouts, scored, column, scorer, noise)
    if temperature is not None and temperature.layer == "semantic":
        found = temperature
    found = (
        found
        or explaining_fault(rollouts, scored, column, scorer, noise, whose="the trainer")
        or dropout(rollouts, scored, scorer, off, noise)
        or few_off(scored, column, noise, whose="the trainer")
        or only_padded_rows_differ(rollouts, scored, column, noise)
        or off_from_a_token_on(scored, column, noise, whose="the trainer")
        or explaining_logit_function(rollouts, scored, column, scorer, noise)
        or _precision(rollouts, scored, column)
        or temperature
    )
    if found is not None:
        return [dataclasses.replace(found, evidence=f"{which}: {found.evidence}")]
    if comparison.verdict == "unverified" and is_coarser(column.dtype, scored.dtype):
        return [
            Finding(
                layer="noise",
                cause=None,
                evidence=f"{which}, by no more than noise explains",
                candidates=("numerical_noise", *_CANDIDATES),
            )
        ]
    return [Finding(layer="trainer", cause=None, evidence=which, candidates=_CANDIDATES)]


def _precision(rollouts: Trace, scored: Trace, column: Trace) -> Finding | None:
    """Candidates, `head_precision` first, where no token differs by more than a half-precision LM head explains."""
    d = (column.logprobs.astype(np.float64) - scored.logprobs)[rollouts.mask]
    largest = float(np.abs(d[np.isfinite(d)]).max(initial=0.0))
    if not np.isfinite(d).all() or largest > (most := 2 * _STEP / rollouts.sampling.applied_temperature):
        return None
    text = (
        f"no token differs by more than {largest:.2g} nats, and an LM head or logits in half precision explain up to {most:.2g}"
    )
    return Finding(layer="head", cause=None, evidence=text, candidates=("head_precision", "logits", "stale_weights"))


def dropout(rollouts: Trace, scored: Trace, scorer: Scorer, off: float, noise: float) -> Finding | None:
    """Candidates, `dropout` first, where the scorer's model in training mode gives other numbers each time: about as far from
    its numbers in evaluation mode as the trainer's are, `off` (RMS, nats).
    """
    as_trained = scorer.as_trained() if isinstance(scorer, HasTrainingMode) else None
    if as_trained is None:
        return None
    few = spread(rollouts, _FEW)
    first, second = (score(rollouts, as_trained, sequences=few) for _ in range(2))
    apart, away = rms(first, second), rms(scored, first)
    if apart <= noise or not 1 / _LIKE < away / off < _LIKE:
        return None
    text = (
        f"in training mode the scorer's model gives other numbers each time (RMS {apart:.2g} nats between two runs, {away:.2g} "
        "to evaluation mode): dropout may be on where the old logprobs are computed"
    )
    adapter: tuple[Cause, ...] = ("adapter",) if isinstance(scorer, TakesAdapters) and scorer.has_adapters else ()
    candidates: tuple[Cause, ...] = ("dropout", *adapter, "weights_differ", "stale_weights")
    return Finding(layer="trainer", cause=None, evidence=text, candidates=candidates, values={"apart": apart, "away": away})


def only_padded_rows_differ(rollouts: Trace, expected: Trace, column: Trace, noise: float) -> Finding | None:
    """Candidates where the rows with the longest prompt, which have no padding, agree up to `noise` (RMS, nats), and the others
    do not; or where only the first row agrees, which has no other row before it in a pack.
    """
    lengths = np.diff(rollouts.prompt_offsets)[rollouts.group]
    if not len(lengths):
        return None
    longest = lengths == lengths.max()
    owner = rollouts.sequence_of_token
    by_row = np.array([rms(expected.with_(mask=expected.mask & (owner == row)), column) for row in range(len(longest))])
    if len(by_row) > _FEW and by_row[0] <= noise and by_row[1:].min() > _NEARER * noise:
        text = "only the first row agrees: the trainer may have packed the rows, and each sees the rows before it"
        return Finding(layer="trainer", cause=None, evidence=text, candidates=("packing", "attention_mask", "prompt"))
    if longest.all():
        return None
    padded, unpadded = float(np.median(by_row[~longest])), float(by_row[longest].max())
    if unpadded > noise or padded < _NEARER * max(unpadded, noise):
        return None
    text = (
        f"the rows with the longest prompt agree (RMS at most {unpadded:.2g} nats), padded rows do not (median {padded:.2g}): "
        "the trainer may see the padding"
    )
    candidates: tuple[Cause, ...] = ("attention_mask", "prompt", "shifted_positions")
    return Finding(
        layer="trainer", cause=None, evidence=text, candidates=candidates, values={"padded": padded, "unpadded": unpadded}
    )
