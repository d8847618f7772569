"""Does free generation say that the sampler changed? Judged where the logprobs of given tokens agree."""

from __future__ import annotations

from typing import Final

import numpy as np

from ...grammar import counted, is_or_are
from ...trace import Trace
from ..findings import Cause, Finding
from ..headline import Headline
from .argmax import shows_the_argmax
from .result import FreeRun

#: Significance level for "the sampler changed".
_ALPHA: Final = 1e-4
#: Minimum number of non-argmax tokens before a collapse is reported.
_MIN_NON_ARGMAX: Final = 20
#: A flip rate is predicted from differences of the chosen tokens alone; all others move as well.
_FLIP_MARGIN: Final = 2.0


def judge_free_run(
    free_run: FreeRun | None, expected: Trace, *, exact: bool, same_stream: bool, mean_abs_diff: float
) -> tuple[Headline | None, Finding | None]:
    """The headline where free generation decides, and its finding; for logprobs that have been found to agree.

    `exact`: same engine and every logprob bit for bit, so every token has to come back. `same_stream`: nothing that the
    random numbers come from has changed, so tokens may diverge no more often than `mean_abs_diff` (nats, of the logprobs
    of two replays) predicts: about half of it a token. Otherwise the tokens are fresh draws: what follows a divergence is
    judged by what the engine says of its own tokens, and stops where all tokens agree.
    """
    if free_run is None or free_run.same:
        return None, None
    if exact:
        evidence = f"the logprobs of the golden's tokens are bit-identical, but {free_run}"
        text = f"The engine generates other tokens although its logprobs are bit-identical: {free_run}"
        return Headline("generates_other_tokens", text), Finding(layer="sampling", cause="seed_stream", evidence=evidence)
    if free_run.stops_changed > len(free_run.ends):
        candidates: tuple[Cause, ...] = ("engine_build", "seed_stream")
        evidence = f"the tokens agree, but {free_run}"
        text = f"The engine stops at another position although it generates the same tokens: {free_run}"
        finding = Finding(layer="sampling", cause=None, evidence=evidence, candidates=candidates)
        return Headline("stops_elsewhere", text), finding
    if expected.sampling.greedy:
        evidence = _left_the_likeliest(free_run, expected)
        if not evidence:
            return None, None
        headline = Headline("not_the_likeliest", f"Greedy decoding no longer takes the likeliest token: {evidence}")
        return headline, Finding(layer="sampling", cause="seed_stream", evidence=evidence)
    if _sampler_changed(free_run):
        evidence = _of_the_sampler(free_run)
        text = f"The engine does not sample from the distribution that it reports: {evidence}"
        finding = Finding(layer="sampling", cause=None, evidence=evidence, candidates=("seed_stream",))
        return Headline("sampler_changed", text), finding
    predicted = predicted_divergences(expected, mean_abs_diff)
    other = free_run.diverged + len(free_run.ends)
    if same_stream and _poisson_tail(other, _FLIP_MARGIN * predicted) < _ALPHA:
        evidence = (
            f"{other} of {free_run.turns} completions have other tokens; noise of this size explains about {predicted:.2g}"
        )
        headline = Headline("diverges_too_often", f"The engine generates other tokens although its logprobs agree: {evidence}")
        return headline, Finding(layer="sampling", cause="seed_stream", evidence=evidence)
    return None, None


def _sampler_changed(free_run: FreeRun) -> bool:
    """Whether chance explains neither how likely the generated tokens are nor how few of the completions are distinct."""
    (expected_distinct, actual_distinct), (expected_others, actual_others) = free_run.distinct, free_run.not_likeliest
    fewer = expected_distinct >= 8 and actual_distinct < expected_distinct / 2 and free_run.distinct_p < _ALPHA
    collapsed = fewer or (expected_others >= _MIN_NON_ARGMAX and not actual_others)
    return collapsed or free_run.shift_p < _ALPHA


def _of_the_sampler(free_run: FreeRun) -> str:
    """What of the generated tokens shows that the sampler changed."""
    (expected_distinct, actual_distinct), (expected_others, actual_others) = free_run.distinct, free_run.not_likeliest
    return (
        f"the generated tokens are {free_run.likelihood_shift:+.3g} nats per token likelier than the golden's "
        f"(p = {free_run.shift_p:.1g}); {counted(actual_distinct, 'distinct completions')} (golden: {expected_distinct}); "
        f"{counted(actual_others, 'tokens')} {is_or_are(actual_others)} not the likeliest (golden: {expected_others})"
    )


def _left_the_likeliest(free_run: FreeRun, expected: Trace) -> str:
    """Where greedy decoding took a token that noise does not make the likeliest, in words; empty where it did not.

    Raw logprobs do not show what penalties made the likeliest: only more of such tokens than the golden has are told there.
    """
    expected_others, actual_others = free_run.not_likeliest
    shown = shows_the_argmax(expected) and not expected_others
    if actual_others and (shown or _poisson_tail(actual_others, _FLIP_MARGIN * max(expected_others, 1)) < _ALPHA):
        generated = counted(actual_others, "generated tokens")
        return f"{generated} {is_or_are(actual_others)} not the likeliest (golden: {expected_others})"
    far = [d for d in (*free_run.divergences, *free_run.ends) if np.isfinite(d.gap) and not d.near_tie]
    return str(far[0]) if far else ""


def predicted_divergences(expected: Trace, mean_abs_diff: float) -> float:
    """How many turns leave the golden where logprobs differ by this much on average: half of it a token is a flip."""
    rate = min(0.5 * mean_abs_diff, 1.0)
    return float(sum(1 - (1 - rate) ** (s.stop - s.start) for s in expected.segments()))


def _poisson_tail(count: int, mean: float) -> float:
    """How often a Poisson variable of this mean is `count` or more."""
    from scipy.special import pdtrc

    return float(pdtrc(count - 1, mean)) if count and mean > 0 else float(count == 0)
