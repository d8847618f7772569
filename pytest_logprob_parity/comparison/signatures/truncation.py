"""A truncation that one side has and the other has not, or another one, read off the kept tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ...spec import Sampling
from ..findings import Finding
from . import truncated_support
from .logits_processing_step import ProcessingStep, applied
from .positions import Positions

#: Kept tokens differ where they do at this share of the positions and more; noise alone moves a few.
_OTHER_SETS: Final = 0.01
_ONE_WAY: Final = 0.9
#: So many excluded tokens are noise's in any case.
_FEW: Final = 2
#: A side that does not truncate excludes nothing: it has less than this share of the other's kept tokens.
_NONE: Final = 0.01
#: What moves logprobs by more than this (nats) hides which limit a truncation had.
_BLURRED: Final = 0.05
#: A truncation moves all that it keeps by one constant: this share of the squares may lie between tokens of one position.
_WITHIN: Final = 0.25


def truncation_steps(positions: Positions, slope: float, *, alone: bool, penalised: bool) -> Iterator[ProcessingStep]:
    """`alone` where nothing else is different: else kept tokens differ for that reason. `penalised` where a penalty is."""
    expected, actual = truncated_support.kept(positions, "expected"), truncated_support.kept(positions, "actual")
    fewest, most = sorted(int(np.count_nonzero(side.complete)) for side in (expected, actual))
    if most >= truncated_support.ENOUGH and fewest > _NONE * most:
        yield from _both_truncate(positions, expected, actual, alone=alone)
    elif expected.truncates:
        yield _one_truncates(positions, expected, slope, on_expected=True, penalised=penalised)
    elif actual.truncates:
        yield _one_truncates(positions, actual, slope, on_expected=False, penalised=penalised)
    else:
        yield from _wider_than_listed(positions, alone=alone)


def _wider_than_listed(positions: Positions, *, alone: bool) -> Iterator[ProcessingStep]:
    """A truncation whose kept tokens are wider than the top-k that was recorded: what it excludes among the chosen tokens, and,
    where nothing else is different, by how much it raises what is listed.
    """
    expected, actual = np.isneginf(positions.expected[:, 0]), np.isneginf(positions.actual[:, 0])
    excluded = {False: int(np.count_nonzero(actual & ~expected)), True: int(np.count_nonzero(expected & ~actual))}
    if max(excluded.values()) < _ONE_WAY * sum(excluded.values()):
        return  # no truncation does both
    recorded = positions.expected_trace.sampling.truncates
    both = recorded and positions.actual_trace.sampling.truncates  # noise alone moves a few over the edge of a kept tokens
    least = max(truncated_support.ENOUGH, _OTHER_SETS * len(actual) if both else 0)
    kept = positions.common[:, 0]
    change = positions.actual[kept, 0] - positions.expected[kept, 0]
    for on_expected, count in excluded.items():
        if both and np.mean((-change if on_expected else change) < -_BLURRED) > 1 - _ONE_WAY:
            continue  # a truncation lowers none of those that it keeps; other logits do, and have other kept tokens
        k = (positions.expected_trace if on_expected else positions.actual_trace).top_k
        lift, what, values = None, [], dict[str, Any](beyond_top_k=k)
        if alone and (recorded or not on_expected):
            free, cut = (positions.actual, positions.expected) if on_expected else (positions.expected, positions.actual)
            lift = truncated_support.lifted(free, cut)
        if lift is not None:
            what.append(
                f"it raises all tokens of a position by one constant ({lift.positions:,} positions; the kept tokens have a "
                f"total probability of {lift.mass:.4f} on average)"
            )
            values |= {"positions": lift.positions, "kept_mass": lift.mass}
        if count >= least:
            what.append(f"it excludes {count} of {len(actual):,} tokens")
            values["excluded"] = count
        if what:
            name = "a truncation"
            text = f"{applied(name, positions.names, on_expected=on_expected)}: {' and '.join(what)}"
            text += f"; top-{k} logprobs do not show the whole truncated support: record more logprobs" if k else ""
            # the recorded one excludes none that was sampled under it, but for a few by noise: what excludes more is another
            whole = recorded and count <= max(_FEW, _NONE * _NONE * len(actual))
            yield ProcessingStep(
                finding=Finding(layer="semantic", cause="truncation", evidence=text, values=values),
                on_expected=on_expected,
                recorded=whole,
                name=name,
            )


def _one_truncates(
    positions: Positions, kept: truncated_support.Kept, slope: float, *, on_expected: bool, penalised: bool
) -> ProcessingStep:  # fmt: skip
    truncated, free = (positions.expected, positions.actual) if on_expected else (positions.actual, positions.expected)
    power = 1 / slope if on_expected else slope
    rows = kept.complete & np.isfinite(free).any(axis=1)
    inside = np.isfinite(truncated[rows])
    noise = positions.noise(slope)
    side, places = (
        (positions.actual_trace, positions.actual_rows) if on_expected else (positions.expected_trace, positions.expected_rows)
    )
    listed = side.top_logprobs[places[rows]].astype(np.float64)
    limits = truncated_support.fit_limits(inside, *truncated_support.before_truncation(free[rows], power, listed), noise)
    if penalised:  # masses after a penalty are not known
        limits = dataclasses.replace(limits, top_p=None, min_p=None)
    if np.mean(kept.complete) < _ONE_WAY:  # of the others the sets are larger than what is listed
        limits = dataclasses.replace(limits, top_k=None)
    sampling = positions.expected_trace.sampling
    allowed = _allowed(limits)
    names = [_limit_in_words(limit, value) for limit, value in allowed.items()]
    recorded = _is_recorded(limits, sampling, masses=not penalised)
    blurred = on_expected and sampling.truncates and noise > _BLURRED  # none is named in place of the one that was recorded
    other = "" if blurred else " or ".join(names)
    name = _truncation_in_words(sampling) if recorded else other or "a truncation"
    text = (
        f"{applied(name, positions.names, on_expected=on_expected)}: "
        f"the tokens that it keeps have {limits.mass:.2%} of the probability on average ({limits.positions:,} positions)"
    )
    fits = any(limit is not None for limit in (limits.top_k, limits.top_p, limits.min_p))
    unnamed = "its limit cannot be narrowed down" if fits else "no single limit explains the kept tokens"
    text += f"; by the kept tokens alone it may be {', or '.join(names)}" if names else f"; {unnamed}"
    if not kept.renormalised:
        text += f"; the reported probabilities of the kept tokens add up to {np.mean(kept.total[kept.complete]):.3f}, not to 1"
    values = {"kept_mass": limits.mass, "positions": limits.positions, **allowed}
    return ProcessingStep(
        finding=Finding(layer="semantic", cause="truncation", evidence=text, values=values),
        on_expected=on_expected,
        recorded=recorded,
        name=name,
    )


def _both_truncate(
    positions: Positions, expected: truncated_support.Kept, actual: truncated_support.Kept, *, alone: bool
) -> Iterator[ProcessingStep]:  # fmt: skip
    less_on_actual, less_on_expected = expected.beyond(actual), actual.beyond(expected)
    fewer, more = np.mean(less_on_actual), np.mean(less_on_expected)
    enough = (fewer + more) * len(actual.counts) >= truncated_support.ENOUGH
    one_way = max(fewer, more) > _ONE_WAY * (fewer + more)  # noise moves as many tokens in as out
    recorded = _truncation_in_words(positions.expected_trace.sampling)
    most = max(side.mean_total for side in (expected, actual))
    other_sets = enough and one_way and fewer + more > _OTHER_SETS
    if alone and other_sets and _one_constant(positions.of(less_on_actual | less_on_expected)):
        less = fewer > more
        counts = expected.counts.mean(), actual.counts.mean()
        text = (
            f"{recorded} was recorded, but {'fewer' if less else 'more'} tokens are kept in {positions.names.actual}: "
            f"{counts[1]:.2f} on average instead of {counts[0]:.2f}, other tokens at {fewer + more:.0%} of positions"
        )
        common = np.unique(actual.counts[actual.complete])
        if len(common) == 1:
            text += f"; always {int(common[0])}, as top-k {int(common[0])} keeps"
        values = {"kept_expected": float(counts[0]), "kept_actual": float(counts[1])}
        yield ProcessingStep(
            finding=Finding(layer="semantic", cause="truncation", evidence=text, values=values),
            on_expected=bool(not less),
            recorded=False,
        )
    elif expected.renormalised != actual.renormalised and most < 1 + truncated_support.WHOLE:
        side, kept = (positions.names.expected, expected) if actual.renormalised else (positions.names.actual, actual)
        text = (
            f"{recorded} was not followed by a renormalisation in {side}: the kept probabilities add up to "
            f"{np.mean(kept.total[kept.complete]):.3f} on average, not to 1 ({int(kept.complete.sum()):,} positions)"
        )
        yield ProcessingStep(
            finding=Finding(layer="semantic", cause="truncation", evidence=text), on_expected=False, recorded=False
        )


def _one_constant(positions: Positions) -> bool:
    """Whether the tokens that both sides keep are apart by one constant for each position, the normaliser's, and no more."""
    apart = positions.off_line(1.0)[positions.common.sum(axis=1) >= 2]
    within = apart - np.nanmean(apart, axis=1, keepdims=True)
    return bool(np.nansum(within**2) <= _WITHIN * np.nansum(apart**2))


def _allowed(limits: truncated_support.Limits) -> dict[str, int | tuple[float, float]]:
    """The limits that the kept tokens allow, by their fields of Sampling; nothing of those that any value fits."""
    top_k = {} if limits.top_k is None else {"top_k": limits.top_k}
    masses = {"top_p": limits.top_p, "min_p": limits.min_p}
    return {**top_k, **{name: of for name, of in masses.items() if of is not None and of[1] - of[0] < 1}}


def _limit_in_words(name: str, value: int | tuple[float, float]) -> str:
    """`top-k 20`, `top-p between 0.89 and 0.91`."""
    words = name.replace("_", "-")
    return f"{words} between {value[0]:.4g} and {value[1]:.4g}" if isinstance(value, tuple) else f"{words} {value}"


def _is_recorded(limits: truncated_support.Limits, sampling: Sampling, *, masses: bool) -> bool:
    """Whether the recorded truncation is among the limits that the kept tokens allow, within 1 %.

    Without `masses` they say nothing of top-p and min-p; with them, None says that no such limit explains the kept tokens.
    """
    if not sampling.truncates:
        return False
    top_k = sampling.top_k == 0 or limits.top_k is None or limits.top_k <= sampling.top_k
    top_p = sampling.top_p == 1 or not masses
    if limits.top_p is not None:
        top_p = top_p or limits.top_p[0] - 0.01 <= sampling.top_p <= limits.top_p[1] + 0.01
    min_p = sampling.min_p == 0 or not masses
    if limits.min_p is not None:
        min_p = min_p or limits.min_p[0] / 1.1 <= sampling.min_p <= limits.min_p[1] * 1.1
    combined = sum((sampling.top_k > 0, sampling.top_p < 1, sampling.min_p > 0)) > 1
    return combined or (top_k and top_p and min_p)


def _truncation_in_words(sampling: Sampling) -> str:
    """The truncation of a sampling, in words."""
    parts = ((f"top-k {sampling.top_k}", sampling.top_k > 0), (f"top-p {sampling.top_p:g}", sampling.top_p < 1),
             (f"min-p {sampling.min_p:g}", sampling.min_p > 0))  # fmt: skip
    return " and ".join(text for text, set_ in parts if set_) or "no truncation"
