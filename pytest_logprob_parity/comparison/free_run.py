"""The free run beside its golden: did the engine write the same tokens again, stop where it stopped, draw as it drew?"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ..trace import FINISH_REASONS, Segment, Trace
from .result import Divergence, Finding, FreeRun

#: A free run that nothing but chance explains less often than this is another way of drawing.
_ALPHA: Final = 1e-4
_DRAWS: Final = 19_999
#: So many tokens that are not the likeliest do not all go away by chance.
_SURPRISES: Final = 20
#: A completion whose last allowed token ends it ended for both reasons; versions of vLLM differ in which one they give.
_AT_THE_LIMIT: Final = {FINISH_REASONS.index("stop"), FINISH_REASONS.index("length")}
#: A flip rate is predicted from differences of the chosen tokens alone; all others move as well.
_FLIP_MARGIN: Final = 2.0


def compare_free_run(golden: Trace, regenerated: Trace, near_tie: float) -> FreeRun:
    """Hold a regenerated trace (one sequence for each turn of the golden, in the golden's order) against its golden.

    `near_tie` (nats): greedy decoding may take either of two tokens whose gap is no larger. Sampled tokens have no near
    ties: what decides there is the gap after the random numbers are added.
    """
    divergences, stops, relabelled = [], 0, 0
    segments = list(golden.segments())
    last_turn = {segment.sequence: segment.turn for segment in segments}
    for index, segment in enumerate(segments):
        expected = golden.token_ids[segment.start : segment.stop]
        start, stop = regenerated.bounds(index)
        actual = regenerated.token_ids[start:stop]
        common = min(len(expected), len(actual))
        differs = np.flatnonzero(expected[:common] != actual[:common])
        if len(differs) == 0:
            reason, reason_now = int(golden.finish_reasons[segment.sequence]), int(regenerated.finish_reasons[index])
            told = segment.turn == last_turn[segment.sequence] and FINISH_REASONS[reason] != "unknown"
            other = len(expected) != len(actual) or (told and reason != reason_now)
            both_hold = len(expected) == len(actual) == golden.sampling.max_tokens and {reason, reason_now} == _AT_THE_LIMIT
            stops += other and not both_hold
            relabelled += other and both_hold
            continue
        place = int(differs[0])
        row = segment.start + place
        top = golden.top_logprobs[row]
        gap = float(top[0] - top[1]) if len(top) > 1 else float("nan")
        if golden.sampling.greedy and len(top) > 1:  # how much less likely what was taken is; at least so much where unlisted
            listed = np.flatnonzero(golden.top_token_ids[row] == actual[place])
            gap = float(top[0] - (top[listed[0]] if len(listed) else top[np.isfinite(top)][-1]))
        start_of_sequence, _ = golden.bounds(segment.sequence)
        divergences.append(
            Divergence(
                sequence=segment.sequence,
                turn=segment.turn,
                position=row - start_of_sequence,
                golden=repr(golden.text(int(expected[place]))),
                now=repr(regenerated.text(int(actual[place]))),
                gap=gap,
                near_tie=golden.sampling.greedy and gap <= near_tie,
            )
        )
    divergences.sort(key=lambda d: (d.position, d.sequence))
    shift, p = _likelihood_shift(golden, segments, regenerated)
    now = [regenerated.bounds(i) for i in range(len(segments))]
    distinct = (
        len({golden.token_ids[s.start : s.stop].tobytes() for s in segments}),
        len({regenerated.token_ids[start:stop].tobytes() for start, stop in now}),
    )
    surprises = (
        sum(int(np.count_nonzero(_not_likeliest(golden)[s.start : s.stop])) for s in segments),
        int(np.count_nonzero(_not_likeliest(regenerated))),
    )
    return FreeRun(
        len(segments), len(divergences), stops, tuple(divergences), shift, p, distinct, surprises, relabelled,
        _fewer_distinct(golden, segments, regenerated),
    )  # fmt: skip


def _not_likeliest(trace: Trace) -> Any:
    """Tokens [N] that are not the likeliest: by their rank, or, where that is not known, by the first of the top k."""
    if not trace.top_k:
        return trace.ranks > 1
    first = trace.top_token_ids[:, 0]
    return (trace.ranks > 1) | ((trace.ranks == 0) & (first >= 0) & (first != trace.token_ids))


def judge_free_run(
    free_run: FreeRun | None, golden: Trace, *, exact: bool, same_stream: bool, mean_abs_diff: float
) -> tuple[str, Finding | None]:
    """The headline where the free run decides, and its finding; for logprobs that have been found to agree.

    `exact`: same engine and every logprob bit for bit, so every token has to come back. `same_stream`: nothing that the
    random numbers come from has changed, so tokens may diverge no more often than `mean_abs_diff` (nats, of the logprobs
    of two replays) predicts: about half of it a token. Otherwise the tokens are fresh draws, and only their distribution
    and the ends of those that came back are judged.
    """
    if free_run is None or free_run.same:
        return "", None
    if exact:
        finding = Finding("sampling", "seed_stream", f"logprobs of the golden's tokens agree bit for bit, and {free_run}")
        return f"The engine writes other tokens although its logprobs agree bit for bit: {free_run}", finding
    if free_run.stops_changed:
        finding = Finding("sampling", None, f"tokens agree, and {free_run}", ("engine_build", "seed_stream"))
        return f"The engine stops elsewhere although it writes the same tokens: {free_run}", finding
    (before, now), (surprises, surprises_now) = free_run.distinct, free_run.not_likeliest
    if golden.sampling.greedy and surprises_now > surprises:
        text = f"{surprises_now} tokens of its own are not the likeliest where the golden has {surprises}"
        return f"Greedy decoding no longer takes the likeliest token: {text}", Finding("sampling", "seed_stream", text)
    far = [d for d in free_run.divergences if np.isfinite(d.gap) and not d.near_tie]
    if golden.sampling.greedy:
        if not far:
            return "", None
        finding = Finding("sampling", "seed_stream", f"greedy decoding left the likeliest token: {far[0]}")
        return f"Greedy decoding no longer takes the likeliest token: {far[0]}", finding
    fewer = before >= 8 and now < before / 2 and free_run.distinct_p < _ALPHA
    collapsed = fewer or (surprises >= _SURPRISES and not surprises_now)
    if collapsed or free_run.shift_p < _ALPHA:
        text = (
            f"its own tokens are {free_run.likelihood_shift:+.3g} nats a token likelier than the golden's (chance does that in "
            f"{free_run.shift_p:.1g} of cases), {now} distinct completions where the golden has {before}, {surprises_now} "
            f"tokens that are not the likeliest where it has {surprises}"
        )
        return f"The engine does not draw as it reports: {text}", Finding("sampling", None, text, ("seed_stream",))
    predicted = predicted_divergences(golden, mean_abs_diff)
    if same_stream and _poisson_tail(free_run.diverged, _FLIP_MARGIN * predicted) < _ALPHA:
        text = f"{free_run.diverged} of {free_run.turns} wrote other tokens, noise of this size explains about {predicted:.2g}"
        return f"The engine writes other tokens although its logprobs agree: {text}", Finding("sampling", "seed_stream", text)
    return "", None


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
    totals = np.zeros(_DRAWS, np.int64)
    for then, now in prompts.values():
        _, names = np.unique(np.array([*then, *now], object), return_inverse=True)
        size = int(names.max()) + 1
        order = rng.random((_DRAWS, len(names))).argsort(axis=1)[:, : len(now)]
        drawn = np.zeros((_DRAWS, size), bool)
        drawn[np.arange(_DRAWS)[:, None], names[order]] = True
        totals += drawn.sum(axis=1)
    return float((1 + np.count_nonzero(totals <= seen)) / (1 + _DRAWS))


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
