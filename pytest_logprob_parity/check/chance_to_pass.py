"""The chance that an engine of another version without a fault passes a golden of this size, simulated from its own noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..comparison.gate import Gate
from ..comparison.intervals import MIN_SEQUENCES, Integers, distinct_sequences, prompt_numbers
from ..comparison.measurement import gates_of
from ..comparison.nucleus_flips import SupportFlips
from ..comparison.token_differences import Differences, setting_of
from ..comparison.tolerance import Tolerance
from ..golden import Golden

#: Scale of the lognormal that noise differs by between sequences, and between builds (measured by benchmarks/bench_clean.py).
_BETWEEN_SEQUENCES, _BETWEEN_BUILDS = 0.5, 0.15
DRAWS: Final = 40
#: What a golden should reach, and how many times as many prompts are tried for it.
WANTED: Final = 0.95
_TIMES: Final = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """How often an engine of another version without a fault passes a golden of `prompts` distinct prompts.

    `needed` prompts bring that to WANTED; None where no number tried does. `hidden`: noise alone exceeds what the objective
    bears.
    """

    prompts: int
    share: float
    needed: int | None
    hidden: bool

    @property
    def passes(self) -> int:
        """How many of the DRAWS simulated engines pass."""
        return round(self.share * DRAWS)


def chance_to_pass(golden: Golden, limits: Tolerance, noise: float) -> Chance:
    """Draw the answers of engines of other versions to prompts like the golden's, and have them judged as a check does.

    `noise` is the RMS (nats) between versions without a fault, for a golden that has no reference to know better.
    """
    numbers = prompt_numbers(golden.trace)
    count = int(numbers.max(initial=-1)) + 1
    first, hidden = 0.0, False
    for times in _TIMES:
        prompts = max(round(count * times), count)
        rng = np.random.default_rng(0)
        judged, failed = list[Sequence[Gate]](), 0
        while len(judged) < DRAWS and (times == 1 or (DRAWS - failed) / DRAWS >= WANTED):
            judged.append(_judged(golden, limits, noise, numbers, count, prompts, rng))
            failed += not _passes(judged[-1])
        share = (len(judged) - failed) / DRAWS
        if times == 1:
            first, hidden = share, any(gate.hidden and not gate.sure for gates in judged for gate in gates)
        if share >= WANTED or hidden:
            return Chance(prompts=count, share=first, needed=prompts if share >= WANTED else None, hidden=hidden)
    return Chance(prompts=count, share=first, needed=None, hidden=hidden)


def _passes(gates: Sequence[Gate]) -> bool:
    return bool(gates) and all(gate.sure for gate in gates)


def _judged(
    golden: Golden, limits: Tolerance, noise: float, numbers: Integers, count: int, prompts: int, rng: np.random.Generator
) -> Sequence[Gate]:  # fmt: skip
    """The gates of another version's answer to so many prompts like the golden's; none where they are too few to generalise."""
    trace, reference = golden.trace, golden.reference
    chosen = np.arange(count) if prompts == count else rng.integers(0, count, prompts)
    members = [np.flatnonzero(numbers == prompt) for prompt in chosen]
    tokens = [np.arange(*trace.bounds(s)) for group in members for s in group.tolist()]
    rows = np.concatenate(tokens)
    sequences = np.repeat(np.arange(len(tokens)), [len(part) for part in tokens])
    of_prompt = np.repeat(np.arange(prompts), [len(group) for group in members])[sequences]
    scale = float(rng.lognormal(0, _BETWEEN_BUILDS))
    errors = np.full(len(rows), np.nan) if reference is None else reference.errors(trace.logprobs)[rows]
    if np.isfinite(errors).any():
        error = scale * _shuffled(errors, trace.logprobs[rows], rng)
        d, known, unknown = error - errors, errors[np.isfinite(errors)], ~np.isfinite(errors)
        d[unknown] = scale * rng.choice(known, unknown.sum()) - rng.choice(known, unknown.sum())
    else:
        size = max(noise, golden.floor.rms if golden.floor is not None and np.isfinite(golden.floor.rms) else 0.0)
        by_sequence = rng.lognormal(-(_BETWEEN_SEQUENCES**2) / 2, _BETWEEN_SEQUENCES, len(tokens))[sequences]
        d, error = scale * size * by_sequence * rng.normal(size=len(rows)), errors
    kept = np.isfinite(trace.logprobs[rows]) & trace.mask[rows]
    differences = Differences(
        d=d[kept], sequences=sequences[kept], prompts=of_prompt[kept], expected_error=errors[kept], actual_error=error[kept]
    )
    setting = setting_of(trace, golden.routed, trace.dtype)
    gates = gates_of(differences, 0, SupportFlips(count=0, allowed=0, unexplained=0), limits, setting, len(tokens))
    kinds = distinct_sequences(trace)
    distinct = sum(len(np.unique(kinds[group])) for group in members)  # a prompt drawn again stands for another one
    return gates if distinct >= MIN_SEQUENCES else ()


def _shuffled(errors: np.ndarray, logprobs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The errors of another version: the golden's own, handed around among tokens that are about as likely, with any sign."""
    known = np.flatnonzero(np.isfinite(errors))
    order = known[np.argsort(logprobs[known] + 1e-6 * rng.normal(size=len(known)))]
    drawn = np.full(len(errors), np.nan)
    for part in np.array_split(order, max(len(order) // 16, 1)):
        drawn[part] = errors[rng.permutation(part)] * rng.choice((-1.0, 1.0), len(part))
    return drawn
