"""Do both columns mean the same? What the labels claim, what the numbers bear out, and what they say instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ...spec import Sampling
from ...trace import Trace
from ..alignment import Alignment
from ..result import Finding
from . import truncation
from .penalties import Penalty, find_penalties, moves_only_seen
from .positions import Positions, positions_of
from .reporting import Misreport, find_rewritten, find_shift, find_shifted_rows, misreport, no_logprobs
from .scale import ENOUGH, NO_SCALE, Scale, fit_scale

_GOLDEN: Final = "applied to the golden and not to this run"
_NOW: Final = "applied to this run and not to the golden"
_OR_TWICE: Final = ", or twice to this run"
#: Kept sets differ where they do at this share of the positions and more; noise alone moves a few.
_OTHER_SETS: Final = 0.03
_ONE_WAY: Final = 0.9
#: A side that does not truncate excludes nothing: it has less than this share of the other's kept sets.
_NONE: Final = 0.01
#: What moves logprobs by more than this (nats) hides which limit a truncation had.
_BLURRED: Final = 0.05
#: A truncation moves all that it keeps by one constant: this share of the squares may lie between tokens of one position.
_WITHIN: Final = 0.25


@dataclass(frozen=True)
class _Stage:
    """One step of processing that one side has and the other has not. `on_golden` says which, `recorded` whether it is
    what the recorded sampling asks for; `finding` says it in words.
    """

    finding: Finding
    on_golden: bool
    recorded: bool


# -- what the labels say -----------------------------------------------------------------------------------------------


def different_meaning(expected: Trace, actual: Trace) -> str | None:
    """The cause's name where the labels of the two sides say that their numbers mean different things."""
    if expected.distribution() == actual.distribution():
        return None
    if expected.logprobs_mode != actual.logprobs_mode:
        return "raw_vs_processed"
    one, other = expected.sampling, actual.sampling
    if one.temperature != other.temperature:
        return "temperature"
    return "truncation" if (one.top_p, one.top_k, one.min_p) != (other.top_p, other.top_k, other.min_p) else "penalties"


def bears_out(expected: Trace, actual: Trace, rows: Alignment) -> bool:
    """Whether the top-k show that the two sides are apart by the temperatures that their labels name, however small."""
    slope = _applied_temperature(expected) / _applied_temperature(actual)
    if slope == 1:
        return False
    scale = _scale(positions_of(expected, actual, rows))
    return (
        scale.positions >= ENOUGH and abs(scale.slope - 1) > 4 * scale.error and abs(scale.slope - slope) < abs(slope - 1) / 4
    )


def label_findings(cause: str, expected: Trace, actual: Trace, rows: Alignment) -> list[Finding]:
    """The findings for labels that differ: what they claim, and step by step what the numbers say of it."""
    claim = f"{expected.distribution()} against {actual.distribution()}"
    stages = [stage.finding for stage in _stages(positions_of(expected, actual, rows))]
    same = [finding for finding in stages if finding.cause == cause]
    if same:
        claim += f"; {same[0].evidence}"
    return [Finding("semantic", cause, claim), *(finding for finding in stages if finding.cause != cause)]


# -- what the numbers say ----------------------------------------------------------------------------------------------


def semantic_findings(expected: Trace, actual: Trace, rows: Alignment, off: Sequence[int] | None = None) -> list[Finding]:
    """Semantic causes that equal labels hide, from the arithmetic that each leaves behind; nothing where there is none.

    `off` are the sequences that are far off, where those are the smaller part: what cannot be seen over all sequences is
    looked for in these.
    """
    for sequences in (None, off) if off is not None and len(off) else (None,):
        positions = positions_of(expected, actual, rows, sequences)
        reports = _reported(positions)
        found = [Finding("semantic", report.cause, report.text) for report in reports]
        if all(report.minor for report in reports):
            stages = list(_stages(positions))
            found = [*_whole(stages, positions), *(stage.finding for stage in stages), *found]
        if found:
            where = "" if sequences is None else f"in {len(sequences)} of {expected.num_sequences} sequences: "
            return [Finding(f.layer, f.cause, where + f.evidence, f.candidates) for f in found]
    return []


def _reported(positions: Positions) -> list[Misreport]:
    """Numbers that were reported wrongly."""
    for found in (no_logprobs(positions, golden=True), no_logprobs(positions, golden=False), find_rewritten(positions)):
        if found is not None:
            return [found]
    told = [misreport(positions, golden=golden) for golden in (False, True)]
    reports = [report for report in told if report is not None]
    if shifted := find_shifted_rows(positions):
        return [shifted]
    if all(report.minor for report in reports) and (shift := find_shift(positions)):
        return [shift, *reports]
    return reports


def _whole(stages: Sequence[_Stage], positions: Positions) -> Iterator[Finding]:
    """Raw for processed: all that the recorded sampling asks for is on one side only."""
    asked = _recorded(positions.golden.sampling)
    for on_golden, text in ((True, "the golden's logprobs are processed, these are raw"),
                            (False, "these logprobs are processed, the golden's are raw")):  # fmt: skip
        found = {stage.finding.cause for stage in stages if stage.on_golden == on_golden and stage.recorded}
        other = any(s.on_golden != on_golden and s.finding.cause and not s.recorded for s in stages)  # it processes, otherwise
        penalties = sum(s.finding.cause == "penalties" for s in stages if s.on_golden == on_golden and s.recorded)
        if asked == {"penalties"} and penalties < _penalties(positions.golden.sampling):
            continue  # those that are left were applied
        if asked and found == asked and not other:
            steps = ", ".join(s.finding.evidence.partition(":")[0].partition(" (")[0] for s in stages if s.recorded)
            if on_golden or asked not in ({"temperature"}, {"penalties"}):
                yield Finding("semantic", "raw_vs_processed", f"{text}: {steps.replace(_OR_TWICE, '')}")
            else:  # nothing tells it from a step that this run took twice
                yield Finding("semantic", None, f"{text}, or it was applied twice: {steps}", ("raw_vs_processed", *asked))


def _penalties(sampling: Sampling) -> int:
    """How many penalties this sampling has."""
    return (sampling.repetition_penalty != 1) + (sampling.presence_penalty != 0) + (sampling.frequency_penalty != 0)


def _recorded(sampling: Sampling) -> set[str]:
    """The causes that the steps of this sampling can bring about."""
    steps = (
        ("temperature", not sampling.greedy and abs(sampling.temperature - 1) > 1e-6),
        ("truncation", sampling.truncates),
        ("penalties", sampling.penalizes),
    )
    return {name for name, there in steps if there}


def _stages(positions: Positions) -> Iterator[_Stage]:
    """Temperature, then penalties, then truncation: each is looked for in what the ones before leave unexplained."""
    scale = _scale(positions)
    sampling = positions.golden.sampling
    golden_temperature = _applied_temperature(positions.golden)
    slope = (
        golden_temperature / _applied_temperature(positions.now) if scale.positions < ENOUGH else 1.0
    )  # the labels have to do
    temperature = golden_temperature / slope
    if scale.claimed:
        slope = scale.slope
        stage = _temperature_stage(scale, positions)
        yield stage
        alone = 1.0 if stage.on_golden else sampling.temperature
        temperature = alone if stage.recorded else golden_temperature / slope
    penalties = [_penalty_stage(penalty, sampling) for penalty in find_penalties(positions, slope, temperature)]
    if not penalties and moves_only_seen(positions, slope):
        text = "only tokens that stood before are moved, by no penalty that explains them"
        penalties = [_Stage(Finding("semantic", None, text, ("penalties", "weights_differ")), False, False)]
    yield from penalties
    yield from _truncation_stages(positions, slope, alone=slope == 1 and not penalties, penalised=bool(penalties))


def _scale(positions: Positions) -> Scale:
    """The slope of what no penalty moves; where too little of that is left, of tokens that one penalty moves alike."""
    unseen = fit_scale(positions.expected, positions.actual, positions.common & ~positions.seen)
    if unseen.positions >= ENOUGH:
        return unseen
    if positions.ids.shape[1] < 2:
        return NO_SCALE
    alike = np.where(positions.seen, 1 + np.minimum(positions.counts, 3), 0)
    line = fit_scale(positions.expected, positions.actual, positions.common, alike)
    repetition = positions.golden.sampling.repetition_penalty
    temperature = positions.golden.sampling.temperature or 1.0
    for slope in (temperature, 1 / temperature, 1.0):  # a recorded repetition penalty explains the rest of the slope
        if repetition != 1 and any(line.is_(slope * r) for r in (repetition, 1 / repetition)):
            return Scale(slope, line.error, line.positions, line.removed)
    return line


def _temperature_stage(scale: Scale, positions: Positions) -> _Stage:
    sampling = positions.golden.sampling
    golden_temperature, now = _applied_temperature(positions.golden), _applied_temperature(positions.now)
    fitted = f"(fitted {{}} +- {{:.1g}} from {scale.positions:,} positions)"
    labelled = now != golden_temperature and scale.is_(golden_temperature / now)
    if labelled and positions.golden.logprobs_mode == positions.now.logprobs_mode:
        how = fitted.format(f"{golden_temperature / scale.slope:.4f}", golden_temperature * scale.error / scale.slope**2)
        text = f"temperature {now:g} in place of {golden_temperature:g}, as the labels say {how}"
        return _Stage(Finding("semantic", "temperature", text), now > golden_temperature, False)
    recorded = sampling.temperature if not sampling.greedy else 1.0
    if recorded != 1 and scale.is_(recorded):
        how = fitted.format(f"{scale.slope:.4f}", scale.error)
        return _Stage(Finding("semantic", "temperature", f"temperature {recorded:g} was {_GOLDEN} {how}"), True, True)
    if recorded != 1 and scale.is_(1 / recorded):
        how = fitted.format(f"{1 / scale.slope:.4f}", scale.error / scale.slope**2)
        text = f"temperature {recorded:g} was {_NOW}{'' if labelled else _OR_TWICE} {how}"
        return _Stage(Finding("semantic", "temperature", text), False, True)
    other = golden_temperature / scale.slope
    text = (
        f"the logits are {scale.slope:.4f} +- {scale.error:.1g} times the golden's ({scale.positions:,} positions): "
        f"temperature {other:.3f} in place of {golden_temperature:g}, or another scale of the logits (final norm, head); "
        "the logprobs alone do not tell these apart"
    )
    return _Stage(Finding("semantic", None, text, ("temperature", "weights_differ", "head_precision")), scale.slope < 1, False)


def _penalty_stage(penalty: Penalty, sampling: Sampling) -> _Stage:
    """The recorded penalty on one side only, another in place of it, or, where none was recorded, one on either side."""
    asked, neutral = getattr(sampling, penalty.name), penalty.neutral
    words = penalty.name.replace("_", " ")

    def near(value: float, other: float) -> bool:
        return bool(abs(value - other) <= max(0.02 * abs(asked), 5 * penalty.error))

    now = penalty.now(neutral)
    on_golden, fitted = now < neutral, penalty.change if now < neutral else now
    recorded = asked != neutral and (near(penalty.change, asked) or near(now, asked))
    if recorded:
        on_golden = near(penalty.change, asked)
        fitted = penalty.change if on_golden else now
    elif asked != neutral and penalty.alike:  # with two unknown values there is none to tell
        text = f"tokens that stood before are moved: another {words} or {penalty.alike.replace('_', ' ')} would look like this"
        return _Stage(Finding("semantic", "penalties", text), on_golden, False)
    elif asked != neutral:
        fitted = penalty.now(asked)
    text = f"{words} {asked if recorded else round(fitted, 3):g} "
    if recorded or asked == neutral:
        text += f"was {_GOLDEN if on_golden else _NOW}{_OR_TWICE if recorded and not on_golden else ''}"
        if on_golden and not recorded:
            text += f", or {now:.3g} to this run and none to the golden"
    else:
        text += f"in place of the recorded {asked:g}"
    text += f" (fitted {fitted:.3f} +- {penalty.error:.1g} from {penalty.positions:,} positions)"
    if penalty.alike:
        text += f"; a {penalty.alike.replace('_', ' ')} would look the same here"
    return _Stage(Finding("semantic", "penalties", text), on_golden, recorded)


# -- truncation --------------------------------------------------------------------------------------------------------


def _truncation_stages(positions: Positions, slope: float, *, alone: bool, penalised: bool) -> Iterator[_Stage]:
    """`alone` where nothing else is different: else kept sets differ for that reason. `penalised` where a penalty is."""
    golden, now = truncation.kept(positions, golden=True), truncation.kept(positions, golden=False)
    fewest, most = sorted(int(np.count_nonzero(side.complete)) for side in (golden, now))
    if most >= truncation.ENOUGH and fewest > _NONE * most:
        yield from _both_truncate(positions, golden, now, alone=alone)
    elif golden.truncates:
        yield _one_truncates(positions, golden, slope, on_golden=True, penalised=penalised)
    elif now.truncates:
        yield _one_truncates(positions, now, slope, on_golden=False, penalised=penalised)
    else:
        yield from _wider_than_listed(positions, alone=alone)


def _wider_than_listed(positions: Positions, *, alone: bool) -> Iterator[_Stage]:
    """A truncation whose kept sets are wider than the top-k that was recorded: what it excludes among the chosen tokens, and,
    where nothing else is different, by how much it raises what is listed.
    """
    golden, now = np.isneginf(positions.expected[:, 0]), np.isneginf(positions.actual[:, 0])
    excluded = {False: int(np.count_nonzero(now & ~golden)), True: int(np.count_nonzero(golden & ~now))}
    if max(excluded.values()) < _ONE_WAY * sum(excluded.values()):
        return  # no truncation does both
    recorded = positions.golden.sampling.truncates
    both = recorded and positions.now.sampling.truncates  # noise alone moves a few over the edge of a kept set
    least = max(truncation.ENOUGH, _OTHER_SETS * len(now) if both else 0)
    kept = positions.common[:, 0]
    raised = (positions.actual[kept, 0] - positions.expected[kept, 0]) * (-1 if excluded[True] > excluded[False] else 1)
    if both and np.mean(raised < -_BLURRED) > 1 - _ONE_WAY:
        return  # a truncation lowers none of those that it keeps; other logits do, and have other kept sets
    for on_golden, count in excluded.items():
        lift, what = None, []
        if alone and (recorded or not on_golden):
            free, cut = (positions.actual, positions.expected) if on_golden else (positions.expected, positions.actual)
            lift = truncation.lifted(free, cut)
        if lift is not None:
            what.append(
                f"it raises all tokens of a position by one constant ({lift.positions:,} positions, kept mass {lift.mass:.4f} "
                "on average)"
            )
        if count >= least:
            what.append(f"it excludes {count} of {len(now):,} tokens")
        if what:
            k = (positions.golden if on_golden else positions.now).top_k
            text = f"a truncation was {_GOLDEN if on_golden else _NOW}: {' and '.join(what)}"
            text += f"; top-{k} logprobs do not show how wide its kept sets are: record more"
            yield _Stage(Finding("semantic", "truncation", text), on_golden, recorded)


def _one_truncates(
    positions: Positions, kept: truncation.Kept, slope: float, *, on_golden: bool, penalised: bool
) -> _Stage:  # fmt: skip
    truncated, free = (positions.expected, positions.actual) if on_golden else (positions.actual, positions.expected)
    power = 1 / slope if on_golden else slope
    rows = kept.complete & np.isfinite(free).any(axis=1)
    inside = np.isfinite(truncated[rows])
    noise = _noise(positions, slope)
    limits = truncation.fit_limits(inside, *truncation.before_truncation(free[rows], power), noise)
    if penalised:  # masses after a penalty are not known
        limits = dataclasses.replace(limits, top_p=None, min_p=None)
    if np.mean(kept.complete) < _ONE_WAY:  # of the others the sets are larger than what is listed
        limits = dataclasses.replace(limits, top_k=None)
    sampling = positions.golden.sampling
    names = _families(limits)
    recorded = _is_recorded(limits, sampling, masses=not penalised, noise=noise)
    blurred = on_golden and sampling.truncates and noise > _BLURRED  # none is named in place of the one that was recorded
    other = "" if blurred else " or ".join(names)
    name = _asked(sampling) if recorded else other or "a truncation"
    text = (
        f"{name} was {_GOLDEN if on_golden else _NOW}: kept mass {limits.mass:.2f} on average ({limits.positions:,} positions"
    )
    text += f"; they allow {', '.join(names)})" if names else "; no single limit explains them)"
    if not kept.renormalised:
        text += f"; what was kept adds up to {np.mean(kept.total[kept.complete]):.3f}, not to 1"
    return _Stage(Finding("semantic", "truncation", text), on_golden, recorded)


def _both_truncate(
    positions: Positions, golden: truncation.Kept, now: truncation.Kept, *, alone: bool
) -> Iterator[_Stage]:  # fmt: skip
    fewer, more = np.mean(now.counts < golden.counts), np.mean(now.counts > golden.counts)
    enough = (fewer + more) * len(now.counts) >= truncation.ENOUGH
    one_way = max(fewer, more) > _ONE_WAY * (fewer + more)  # noise moves as many tokens in as out
    if alone and enough and one_way and fewer + more > _OTHER_SETS and _one_constant(positions.of(now.counts != golden.counts)):
        less = fewer > more
        counts = golden.counts.mean(), now.counts.mean()
        text = (
            f"{_asked(positions.golden.sampling)} was recorded, and {'fewer' if less else 'more'} tokens are left in this run: "
            f"{counts[1]:.2f} on average in place of {counts[0]:.2f}, other sets at {fewer + more:.0%} of positions"
        )
        common = np.unique(now.counts[now.complete])
        if len(common) == 1:
            text += f"; always {int(common[0])}, as top-k {int(common[0])} would leave"
        yield _Stage(Finding("semantic", "truncation", text), bool(not less), False)
    elif golden.renormalised != now.renormalised and max(side.mean_total for side in (golden, now)) < 1 + truncation.WHOLE:
        side, kept = ("the golden", golden) if now.renormalised else ("this run", now)
        text = (
            f"{_asked(positions.golden.sampling)} was not followed by a normalisation in {side}: what was kept adds up to "
            f"{np.mean(kept.total[kept.complete]):.3f} on average, not to 1 ({int(kept.complete.sum()):,} positions)"
        )
        yield _Stage(Finding("semantic", "truncation", text), False, False)


def _one_constant(positions: Positions) -> bool:
    """Whether the tokens that both sides keep are apart by one constant for each position, the normaliser's, and no more."""
    apart = positions.off_line(1.0)[positions.common.sum(axis=1) >= 2]
    within = apart - np.nanmean(apart, axis=1, keepdims=True)
    return bool(np.nansum(within**2) <= _WITHIN * np.nansum(apart**2))


def _families(limits: truncation.Limits) -> list[str]:
    """The limits that the kept sets allow, in words."""
    names = [] if limits.top_k is None else [f"top-k {limits.top_k}"]
    for name, interval in (("top-p", limits.top_p), ("min-p", limits.min_p)):
        if interval is not None:
            names.append(f"{name} in [{interval[0]:.4g}, {interval[1]:.4g}]")
    return names


def _noise(positions: Positions, slope: float) -> float:
    """What is left of the differences between tokens of one position (nats, RMS without the furthest tenth), after `slope`."""
    two = positions.of(positions.common.sum(axis=1) >= 2)
    if not len(two.rows):
        return 0.0
    off = two.off_line(slope)
    spread = np.nanmean((off - np.nanmean(off, axis=1, keepdims=True)) ** 2, axis=1)
    return float(np.sqrt(np.mean(np.sort(spread)[: max(int(_ONE_WAY * len(spread)), 1)])))


def _is_recorded(limits: truncation.Limits, sampling: Sampling, *, masses: bool, noise: float) -> bool:
    """Whether the recorded truncation is among the limits that the kept sets allow, within 1 % and the noise (nats).

    Without `masses` they say nothing of top-p and min-p; with them, None says that no such limit explains the kept sets.
    """
    if not sampling.truncates:
        return False
    top_k = sampling.top_k == 0 or limits.top_k is None or limits.top_k <= sampling.top_k
    top_p = sampling.top_p == 1 or not masses
    if limits.top_p is not None:
        top_p = top_p or limits.top_p[0] - 0.01 - noise <= sampling.top_p <= limits.top_p[1] + 0.01 + noise
    min_p = sampling.min_p == 0 or not masses
    if limits.min_p is not None:
        room = 1.1 * np.exp(2 * noise)
        min_p = min_p or limits.min_p[0] / room <= sampling.min_p <= limits.min_p[1] * room
    combined = sum((sampling.top_k > 0, sampling.top_p < 1, sampling.min_p > 0)) > 1
    return combined or (top_k and top_p and min_p)


def _asked(sampling: Sampling) -> str:
    """The truncation of a sampling, in words."""
    parts = ((f"top-k {sampling.top_k}", sampling.top_k > 0), (f"top-p {sampling.top_p:g}", sampling.top_p < 1),
             (f"min-p {sampling.min_p:g}", sampling.min_p > 0))  # fmt: skip
    return " and ".join(text for text, there in parts if there) or "no truncation"


def _applied_temperature(trace: Trace) -> float:
    """What the logits of a trace's logprobs were divided by, as its labels say."""
    applies = trace.logprobs_mode == "processed_logprobs" and not trace.sampling.greedy
    return trace.sampling.temperature if applies and trace.sampling.temperature else 1.0


def left_unexplained(expected: Trace, actual: Trace, rows: Alignment, most: float) -> str:
    """What a temperature leaves between tokens of one position, where that is more than `most` (nats): something else differs
    besides. Empty where it is not, where penalties would be part of it, and where no temperature is between the two sides.
    """
    positions = positions_of(expected, actual, rows)
    scale = _scale(positions)
    if not scale.claimed or expected.sampling.penalizes or any(_reported(positions)):
        return ""
    rest = _noise(positions, scale.slope)
    if rest <= most:
        return ""
    return f"left unexplained between tokens of one position: RMS {rest:.2g} nats, beyond noise: weights or path differ, too"


def unsure_of(expected: Trace, actual: Trace, rows: Alignment) -> str:
    """What these two traces cannot tell apart, for want of tokens that both sides name; empty where they can."""
    usable = int(np.count_nonzero(positions_of(expected, actual, rows).common.sum(axis=1) >= 2))
    k = min(expected.top_k, actual.top_k)
    if usable < ENOUGH:
        more = "record logprobs=5" if k < 5 else f"record {ENOUGH - usable} more positions"
        return (
            f"top-{k}: both sides name two tokens at {usable} positions, {ENOUGH} are needed to tell a temperature, a "
            f"truncation, a penalty and other weights apart: {more}"
        )
    asked = expected.sampling.top_k
    return f"top-{k}: a truncation to top-k {asked} cannot be told, record logprobs={asked + 1} or more" if asked >= k else ""
