"""Steps of processing that one side has and the other has not: temperature, penalties, truncation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from ...spec import Sampling
from ..findings import Cause, Finding
from ..sides import Names
from .logit_scale import ENOUGH, FINEST, NO_SCALE, Scale, fit_scale, may_be_chosen
from .logits_processing_step import ProcessingStep, applied
from .named_tokens import named_token_steps
from .penalties import Penalty, find_penalties, moves_only_seen
from .positions import Positions
from .truncation import truncation_steps

#: A fit with a smaller error knows no noise; kept tokens have edges where this share of the positions excludes something.
_EXACT: Final = 1e-5
_CUT: Final = 0.05


def logits_processing_steps(positions: Positions) -> Iterator[ProcessingStep]:
    """Named tokens, temperature, then penalties, then truncation: each is looked for in what those before leave unexplained."""
    named, positions = named_token_steps(positions)
    yield from named
    bare = positions.ids.shape[1] < 2  # one token a position shows no scale and no penalty
    scale = NO_SCALE if bare else scale_of(positions)
    sampling = positions.expected_trace.sampling
    expected_temperature = positions.expected_trace.applied_temperature
    slope = 1.0
    if scale.positions < ENOUGH:  # the labels have to do
        slope = expected_temperature / positions.actual_trace.applied_temperature
    temperature = expected_temperature / slope
    step = None
    if scale.claimed:
        slope = scale.slope
        step = _temperature_step(scale, positions)
        alone = 1.0 if step.on_expected else sampling.temperature
        temperature = alone if step.recorded else expected_temperature / slope
    differ = [] if bare else find_penalties(positions, slope, temperature)
    found = [penalty for penalty in differ if penalty.possible]
    scaled = False
    if step is not None:
        scaled = not step.finding.cause and bool(found) and all(_is_scaled(p, sampling, slope) for p in found)
        if scaled:
            text = f"{_larger(scale, positions)}, before the penalties, where no temperature is applied"
            finding = Finding(
                layer="weights",
                cause=None,
                evidence=text,
                candidates=("weights_differ", "head_precision"),
                values=step.finding.values,
            )
            step = dataclasses.replace(step, finding=finding)
        elif not step.finding.cause and not found and (sampling.presence_penalty or sampling.frequency_penalty):
            # what both sides have lowered is divided as well
            candidates: tuple[Cause, ...] = ("temperature", *(c for c in step.finding.candidates if c != "temperature"))
            step = dataclasses.replace(step, finding=dataclasses.replace(step.finding, candidates=candidates))
        yield step
    penalties = [] if scaled else [_penalty_step(penalty, sampling, positions.names) for penalty in found]
    if not penalties and not scaled and not bare and moves_only_seen(positions, slope):
        text = "only tokens that occurred before differ, and no penalty explains by how much"
        penalties = [
            ProcessingStep(
                finding=Finding(layer="semantic", cause=None, evidence=text, candidates=("penalties", "weights_differ")),
                on_expected=False,
                recorded=False,
            )
        ]
    yield from penalties
    if any(step.finding.cause == "banned_tokens" for step in named):
        return  # what is excluded for that reason looks like a truncation
    yield from truncation_steps(positions, slope, alone=slope == 1 and not penalties, penalised=bool(penalties))


def _is_scaled(penalty: Penalty, sampling: Sampling, slope: float) -> bool:
    """Whether a penalty is the recorded one on both sides, after logits that are `slope` times as large in this run."""
    expected_value = getattr(sampling, penalty.name)
    near = abs(penalty.actual(expected_value) - expected_value / slope) <= max(0.02 * abs(expected_value), 5 * penalty.error)
    return bool(expected_value and not penalty.neutral and near)


def scale_of(positions: Positions) -> Scale:
    """The slope of what no penalty moves; where too little of that is left, of tokens that one penalty moves alike."""
    unseen = _with_edges(fit_scale(positions.expected, positions.actual, positions.common & ~positions.seen), positions)
    if unseen.positions >= ENOUGH:
        return unseen
    if positions.ids.shape[1] < 2:
        return NO_SCALE
    alike = np.where(positions.seen, 1 + np.minimum(positions.counts, 3), 0)
    line = _with_edges(fit_scale(positions.expected, positions.actual, positions.common, alike), positions)
    repetition = positions.expected_trace.sampling.repetition_penalty
    temperature = positions.expected_trace.sampling.temperature or 1.0
    for slope in (temperature, 1 / temperature, 1.0):  # a recorded repetition penalty explains the rest of the slope
        if repetition != 1 and any(line.is_(slope * r) for r in (repetition, 1 / repetition)):
            return Scale(slope=slope, error=line.error, positions=line.positions, removed=line.removed)
    return line


def _with_edges(line: Scale, positions: Positions) -> Scale:
    """A line through kept tokens with the error that their edges add: noise decides which tokens are in, and bends the fit."""
    cut = np.isneginf(positions.expected).any(axis=1) | np.isneginf(positions.actual).any(axis=1)
    if line.error < _EXACT or np.mean(cut) < _CUT:
        return line
    return dataclasses.replace(line, error=math.hypot(line.error, FINEST * line.slope))


def _temperature_step(scale: Scale, positions: Positions) -> ProcessingStep:
    sampling, names = positions.expected_trace.sampling, positions.names
    expected_temperature, now = positions.expected_trace.applied_temperature, positions.actual_trace.applied_temperature
    values = {"slope": scale.slope, "error": scale.error, "positions": scale.positions}
    fitted = f"(fitted {{}} +- {{:.1g}} from {scale.positions:,} positions)"
    labelled = now != expected_temperature and scale.is_(expected_temperature / now)
    if labelled and positions.expected_trace.logprobs_mode == positions.actual_trace.logprobs_mode:
        how = fitted.format(f"{expected_temperature / scale.slope:.4f}", expected_temperature * scale.error / scale.slope**2)
        text = f"temperature {now:g} instead of {expected_temperature:g}, as the labels say {how}"
        values["temperature"] = expected_temperature / scale.slope
        return ProcessingStep(
            finding=Finding(layer="semantic", cause="temperature", evidence=text, values=values),
            on_expected=now > expected_temperature,
            recorded=False,
        )
    recorded = sampling.applied_temperature
    name = f"temperature {recorded:g}"
    if recorded != 1 and scale.is_(recorded):
        how = fitted.format(f"{scale.slope:.4f}", scale.error)
        text = f"{applied(name, names, on_expected=True)} {how}"
        values["temperature"] = scale.slope
        return ProcessingStep(
            finding=Finding(layer="semantic", cause="temperature", evidence=text, values=values),
            on_expected=True,
            recorded=True,
            name=name,
        )
    if recorded != 1 and scale.is_(1 / recorded):
        how = fitted.format(f"{1 / scale.slope:.4f}", scale.error / scale.slope**2)
        text = f"{applied(name, names, on_expected=False, twice=not labelled)} {how}"
        values["temperature"] = 1 / scale.slope
        return ProcessingStep(
            finding=Finding(layer="semantic", cause="temperature", evidence=text, values=values),
            on_expected=False,
            recorded=True,
            name=name,
            twice=not labelled,
        )
    other = expected_temperature / scale.slope
    text = (
        f"{_larger(scale, positions)}: temperature {other:.3f} instead of {expected_temperature:g}, or another scale of the "
        "logits (final norm, LM head); the logprobs alone cannot distinguish these"
    )
    values["temperature"] = other
    others: tuple[Cause, ...] = ("weights_differ", "head_precision", "engine_build")
    chosen = may_be_chosen(other, expected_temperature * scale.error / scale.slope**2)
    candidates: tuple[Cause, ...] = ("temperature", *others) if chosen else ("engine_build", *others[:2], "temperature")
    return ProcessingStep(
        finding=Finding(layer="semantic", cause=None, evidence=text, candidates=candidates, values=values),
        on_expected=scale.slope < 1,
        recorded=False,
    )


def _larger(scale: Scale, positions: Positions) -> str:
    """How many times as large the logits are."""
    times = f"{scale.slope:.4f} +- {scale.error:.1g} times"
    return f"the logits are {times} {positions.names.expected}'s ({scale.positions:,} positions)"


def _penalty_step(penalty: Penalty, sampling: Sampling, names: Names) -> ProcessingStep:
    """The recorded penalty on one side only, another in place of it, or, where none was recorded, one on either side."""
    expected_value, neutral = getattr(sampling, penalty.name), penalty.neutral
    words = penalty.name.replace("_", " ")

    def near(value: float, other: float) -> bool:
        return bool(abs(value - other) <= max(0.02 * abs(expected_value), 5 * penalty.error))

    now = penalty.actual(neutral)
    on_expected, fitted = now < neutral, penalty.change if now < neutral else now
    recorded = expected_value != neutral and (near(penalty.change, expected_value) or near(now, expected_value))
    if recorded:
        on_expected = near(penalty.change, expected_value)
        fitted = penalty.change if on_expected else now
    elif expected_value != neutral and penalty.alike:  # with two unknown values there is none to tell
        text = f"only tokens that occurred before differ: another {words} or {penalty.alike.replace('_', ' ')} looks like this"
        return ProcessingStep(
            finding=Finding(layer="semantic", cause="penalties", evidence=text), on_expected=on_expected, recorded=False
        )
    elif expected_value != neutral:
        fitted = penalty.actual(expected_value)
    name, twice = f"{words} {expected_value if recorded else round(fitted, 3):g}", recorded and not on_expected
    if recorded or expected_value == neutral:
        text = applied(name, names, on_expected=on_expected, twice=twice)
        if on_expected and not recorded:
            text += f", or {now:.3g} to {names.actual} and none to {names.expected}"
    else:
        text = f"{name} instead of the recorded {expected_value:g}"
    text += f" (fitted {fitted:.3f} +- {penalty.error:.1g} from {penalty.positions:,} positions)"
    if penalty.alike:
        text += f"; a {penalty.alike.replace('_', ' ')} looks the same here"
    values = {penalty.name: fitted, "error": penalty.error, "positions": penalty.positions}
    return ProcessingStep(
        finding=Finding(layer="semantic", cause="penalties", evidence=text, values=values),
        on_expected=on_expected,
        recorded=recorded,
        name=name,
        twice=twice,
    )
