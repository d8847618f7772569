"""Free generation beside its golden: did the engine write the same tokens, stop where it stopped, sample as it reports?"""

from __future__ import annotations

from typing import Final

import numpy as np

from ..trace import FINISH_REASONS, FloatArray, Segment, Trace
from .findings import Finding
from .free_generation.result import Divergence, FreeRun

#: Significance level for "the sampler changed", and the permutations that it is computed from.
_ALPHA: Final = 1e-4
_PERMUTATIONS: Final = 19_999
#: Minimum number of non-argmax tokens before a collapse is reported.
_MIN_NON_ARGMAX: Final = 20
#: vLLM's rank of a token counts all that are as likely or likelier, so the likeliest of an exact tie has this rank.
_RANK_OF_A_TIE: Final = 2
#: The probabilities of a top-k that add up to more than this bound no other token's.
_MOST_MASS: Final = 1 - 1e-6
_STOP: Final = FINISH_REASONS.index("stop")
#: A completion whose last allowed token ends it ended for both reasons; versions of vLLM differ in which one they give.
_AT_THE_LIMIT: Final = {FINISH_REASONS.index("stop"), FINISH_REASONS.index("length")}
#: A flip rate is predicted from differences of the chosen tokens alone; all others move as well.
_FLIP_MARGIN: Final = 2.0


def compare_free_run(golden: Trace, regenerated: Trace, near_tie: float) -> FreeRun:
    """Compare a regenerated trace (one sequence for each turn of the golden, in the golden's order) with its golden.

    `near_tie` (nats) is the largest gap between two tokens that noise may turn: under greedy decoding either may be taken,
    and a token no further below the largest logprob counts as the likeliest. Sampled tokens have no near ties: what decides
    there is the gap after the random numbers are added.

    A turn whose tokens agree as far as both sides go and that ended elsewhere is a stop. So is one that diverged only by the
    end token: one side wrote its end token where the other went on.
    """
    divergences: list[Divergence] = []
    ends: list[Divergence] = []
    stops, relabelled = 0, 0
    segments = list(golden.segments())
    last_turn = {segment.sequence: segment.turn for segment in segments}
    for index, segment in enumerate(segments):
        expected = golden.token_ids[segment.start : segment.stop]
        start, stop = regenerated.bounds(index)
        actual = regenerated.token_ids[start:stop]
        common = min(len(expected), len(actual))
        differs = np.flatnonzero(expected[:common] != actual[:common])
        is_last = segment.turn == last_turn[segment.sequence]
        reason, reason_now = int(golden.finish_reasons[segment.sequence]), int(regenerated.finish_reasons[index])
        if len(differs) == 0:
            known = is_last and FINISH_REASONS[reason] != "unknown"
            other = len(expected) != len(actual) or (known and reason != reason_now)
            both_hold = len(expected) == len(actual) == golden.sampling.max_tokens and {reason, reason_now} == _AT_THE_LIMIT
            stops += other and not both_hold
            relabelled += other and both_hold
            continue
        place = int(differs[0])
        ended = (reason if is_last else _STOP) == _STOP and place == len(expected) - 1
        ended_now = reason_now == _STOP and place == len(actual) - 1
        gap = _gap(golden, segment.start + place, int(actual[place]))
        if not np.isfinite(gap):  # the context is the same on both sides, and so is what the other side says of it
            gap = _gap(regenerated, start + place, int(expected[place]))
        start_of_sequence, _ = golden.bounds(segment.sequence)
        (ends if ended != ended_now else divergences).append(
            Divergence(
                sequence=segment.sequence,
                turn=segment.turn,
                position=segment.start + place - start_of_sequence,
                golden=repr(golden.text(int(expected[place]))),
                now=repr(regenerated.text(int(actual[place]))),
                gap=gap,
                near_tie=golden.sampling.greedy and gap <= near_tie,
            )
        )
    for found in (divergences, ends):
        found.sort(key=lambda d: (d.position, d.sequence))
    shift, p = _likelihood_shift(golden, segments, regenerated)
    now = [regenerated.bounds(i) for i in range(len(segments))]
    distinct = (
        len({golden.token_ids[s.start : s.stop].tobytes() for s in segments}),
        len({regenerated.token_ids[start:stop].tobytes() for start, stop in now}),
    )
    least = near_tie if golden.sampling.greedy else 0.0
    below, below_now = below_the_largest(golden), below_the_largest(regenerated)
    not_likeliest = (
        sum(int(np.count_nonzero(below[s.start : s.stop] > least)) for s in segments),
        int(np.count_nonzero(below_now > least)),
    )
    return FreeRun(
        len(segments), len(divergences), stops + len(ends), tuple(divergences), shift, p, distinct, not_likeliest, relabelled,
        _fewer_distinct(golden, segments, regenerated), tuple(ends),
    )  # fmt: skip


def below_the_largest(trace: Trace) -> FloatArray:
    """How far (nats) each token's logprob [N] is below the largest of its position; 0 for the likeliest, and for exact ties.

    From the top-k. A position without one goes by its rank: rank 2 may be an exact tie and counts as 0, a larger one as inf.
    """
    below = np.where(trace.ranks > _RANK_OF_A_TIE, np.float32(np.inf), np.float32(0))
    if not trace.top_k:
        return below
    largest = np.where(trace.top_token_ids >= 0, trace.top_logprobs, -np.inf).max(axis=1)
    known = np.isfinite(largest) & ~np.isnan(trace.logprobs)
    with np.errstate(invalid="ignore"):
        return np.where(known, np.maximum(largest - trace.logprobs, 0), below).astype(np.float32)


def _gap(trace: Trace, row: int, other: int) -> float:
    """How much (nats) the token of `row` is likelier than token `other`: at least, where the top-k does not list that one.

    Sampled tokens: the gap between the two likeliest. NaN without a top-k, and where raw logprobs hide what was compared.
    """
    listed = trace.top_token_ids[row] >= 0
    top = trace.top_logprobs[row][listed].astype(np.float64)
    if not trace.sampling.greedy:
        return float(top[0] - top[1]) if len(top) > 1 else float("nan")
    if not np.isfinite(top).any() or not _shows_the_argmax(trace):
        return float("nan")
    same = trace.top_token_ids[row][listed] == other
    if same.any():
        return float(top.max() - top[same][0])
    mass = float(np.exp(top).sum())
    rest = np.log1p(-mass) if mass < _MOST_MASS else np.inf  # a distribution that lists all, or none: no bound
    return float(top.max() - min(top[np.isfinite(top)].min(), rest))


def _shows_the_argmax(trace: Trace) -> bool:
    """Whether the largest logprob of a position is that of the token which greedy decoding takes: raw logprobs are of before
    the penalties.
    """
    return trace.logprobs_mode == "processed_logprobs" or trace.sampling.raw_is_processed


def judge_free_run(
    free_run: FreeRun | None, golden: Trace, *, exact: bool, same_stream: bool, mean_abs_diff: float
) -> tuple[str, Finding | None]:
    """The headline where free generation decides, and its finding; for logprobs that have been found to agree.

    `exact`: same engine and every logprob bit for bit, so every token has to come back. `same_stream`: nothing that the
    random numbers come from has changed, so tokens may diverge no more often than `mean_abs_diff` (nats, of the logprobs
    of two replays) predicts: about half of it a token. Otherwise the tokens are fresh draws: what follows a divergence is
    judged by what the engine says of its own tokens, and stops where all tokens agree.
    """
    if free_run is None or free_run.same:
        return "", None
    if exact:
        finding = Finding("sampling", "seed_stream", f"logprobs of the golden's tokens agree bit for bit, and {free_run}")
        return f"The engine writes other tokens although its logprobs agree bit for bit: {free_run}", finding
    if free_run.stops_changed > len(free_run.ends):
        finding = Finding("sampling", None, f"tokens agree, and {free_run}", ("engine_build", "seed_stream"))
        return f"The engine stops elsewhere although it writes the same tokens: {free_run}", finding
    if golden.sampling.greedy:
        text = _left_the_likeliest(free_run, golden)
        if not text:
            return "", None
        return f"Greedy decoding no longer takes the likeliest token: {text}", Finding("sampling", "seed_stream", text)
    (before, now), (others, others_now) = free_run.distinct, free_run.not_likeliest
    fewer = before >= 8 and now < before / 2 and free_run.distinct_p < _ALPHA
    collapsed = fewer or (others >= _MIN_NON_ARGMAX and not others_now)
    if collapsed or free_run.shift_p < _ALPHA:
        text = (
            f"its own tokens are {free_run.likelihood_shift:+.3g} nats a token likelier than the golden's (chance does that in "
            f"{free_run.shift_p:.1g} of cases), {now} distinct completions where the golden has {before}, {others_now} "
            f"tokens that are not the likeliest where it has {others}"
        )
        return f"The engine does not draw as it reports: {text}", Finding("sampling", None, text, ("seed_stream",))
    predicted = predicted_divergences(golden, mean_abs_diff)
    other = free_run.diverged + len(free_run.ends)
    if same_stream and _poisson_tail(other, _FLIP_MARGIN * predicted) < _ALPHA:
        text = f"{other} of {free_run.turns} wrote other tokens, noise of this size explains about {predicted:.2g}"
        return f"The engine writes other tokens although its logprobs agree: {text}", Finding("sampling", "seed_stream", text)
    return "", None


def _left_the_likeliest(free_run: FreeRun, golden: Trace) -> str:
    """Where greedy decoding took a token that noise does not make the likeliest, in words; empty where it did not.

    Raw logprobs do not show what penalties made the likeliest: only more of such tokens than the golden has are told there.
    """
    others, others_now = free_run.not_likeliest
    shown = _shows_the_argmax(golden) and not others
    if others_now and (shown or _poisson_tail(others_now, _FLIP_MARGIN * max(others, 1)) < _ALPHA):
        return f"{others_now} tokens of its own are not the likeliest where the golden has {others}"
    far = [d for d in (*free_run.divergences, *free_run.ends) if np.isfinite(d.gap) and not d.near_tie]
    return str(far[0]) if far else ""


def predicted_divergences(golden: Trace, mean_abs_diff: float) -> float:
    """How many turns leave the golden where logprobs differ by this much on average: half of it a token is a flip."""
    rate = min(0.5 * mean_abs_diff, 1.0)
    return float(sum(1 - (1 - rate) ** (s.stop - s.start) for s in golden.segments()))


def _poisson_tail(count: int, mean: float) -> float:
    """How often a Poisson variable of this mean is `count` or more."""
    from scipy.special import pdtrc

    return float(pdtrc(count - 1, mean)) if count and mean > 0 else float(count == 0)


def _fewer_distinct(golden: Trace, segments: list[Segment], regenerated: Trace) -> float:
    """How often so few different completions come out by chance: one-sided p of a permutation test within prompts.

    Under chance alone golden and free run are two draws of one distribution: labels are permuted within each prompt.
    """
    prompts: dict[tuple[int, int], list[list[bytes]]] = {}
    for i, s in enumerate(segments):
        then, now = prompts.setdefault((int(golden.group[s.sequence]), s.turn), [[], []])
        start, stop = regenerated.bounds(i)
        then.append(golden.token_ids[s.start : s.stop].tobytes())
        now.append(regenerated.token_ids[start:stop].tobytes())
    seen = sum(len(set(now)) for _, now in prompts.values())
    if seen >= sum(len(set(then)) for then, _ in prompts.values()):
        return 1.0
    rng = np.random.default_rng(0)
    totals = np.zeros(_PERMUTATIONS, np.int64)
    for then, now in prompts.values():
        _, names = np.unique(np.array([*then, *now], object), return_inverse=True)
        size = int(names.max()) + 1
        order = rng.random((_PERMUTATIONS, len(names))).argsort(axis=1)[:, : len(now)]
        drawn = np.zeros((_PERMUTATIONS, size), bool)
        drawn[np.arange(_PERMUTATIONS)[:, None], names[order]] = True
        totals += drawn.sum(axis=1)
    return float((1 + np.count_nonzero(totals <= seen)) / (1 + _PERMUTATIONS))


def _likelihood_shift(golden: Trace, segments: list[Segment], regenerated: Trace) -> tuple[float, float]:
    """Mean over turns of the change of the mean logprob a token, and its two-sided p of a paired t-test."""
    if golden.distribution() != regenerated.distribution():
        return 0.0, 1.0
    pairs = [
        (golden.logprobs[s.start : s.stop], regenerated.logprobs[slice(*regenerated.bounds(i))]) for i, s in enumerate(segments)
    ]
    changes = np.array([float(now.mean() - then.mean()) for then, now in pairs if len(now) and len(then)])
    changes = changes[np.isfinite(changes)]
    spread = float(changes.std(ddof=1)) if len(changes) > 1 else 0.0
    if spread == 0:
        return 0.0, 1.0
    from scipy.special import stdtr

    mean = float(changes.mean())
    return mean, 2 * float(stdtr(len(changes) - 1, -abs(mean) / spread * len(changes) ** 0.5))
