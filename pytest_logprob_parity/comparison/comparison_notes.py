"""The notes of a comparison that its findings do not write: what was not compared, and by which limits."""

from __future__ import annotations

from ..golden.noise_floor import NoiseFloor
from ..grammar import counted, is_or_are
from ..notes import Note
from .contradictions import topk_judged
from .measurement import Measurement
from .sides import SIDES
from .tolerance import DTYPES
from .vocabulary import Level, Verdict


def not_compared(measured: Measurement) -> list[Note]:
    """What was not compared although the expected side has it."""
    rows, numbers, names = measured.rows, measured.numbers, measured.names
    notes = []
    if rows.tokens < rows.wanted and measured.actual.replay != "window":
        text = (
            f"{rows.wanted - rows.tokens:,} of {names.expected}'s {rows.wanted:,} tokens were not compared: "
            f"{counted(rows.missing_sequences, 'sequences')} are missing, {rows.diverged_sequences} continue with other tokens"
        )
        notes.append(Note("not_compared", text))
    if numbers["n_missing"]:
        count = int(numbers["n_missing"])
        verb = "has" if count == 1 else "have"
        notes.append(Note("no_logprob", f"{counted(count, 'tokens')} {verb} no logprob in {names.expected}"))
    if numbers["n_excluded"]:
        count = int(numbers["n_excluded"])
        text = (
            f"{counted(count, 'tokens')} {is_or_are(count)} excluded by truncation on both sides: there is no number to compare"
        )
        notes.append(Note("excluded", text))
    return notes


def without_floor(measured: Measurement, floor: NoiseFloor | None, level: Level) -> list[Note]:
    """By which noise a golden was judged that has neither a noise floor nor a reference."""
    unknown = floor is None and not measured.differences.known.any()
    if level != "rl" or not unknown or measured.exact or not measured.compared or measured.sides != SIDES:
        return []
    dtype = measured.expected.dtype
    known = dtype if dtype in DTYPES else f"bfloat16, because the dtype {dtype!r} is not known"
    return [Note("no_floor", f"the golden has no noise floor: the limits of noise are the defaults of {known}")]


def beside_the_verdict(measured: Measurement, verdict: Verdict, level: Level) -> list[Note]:
    """What is said beside a verdict: was the top-k judged, has something changed all the same, how far does it reach."""
    notes = [topk_judged(measured.expected, measured.actual, measured.names)] if verdict == "pass" else []
    if verdict != "fail" and measured.beyond_dtype:
        rms, dtype = measured.numbers["rms_diff"], measured.setting.expected_dtype
        text = f"RMS difference {rms:.2g} nats is larger than noise in {dtype} explains: something has changed"
        less = f", by less than matters to objective {measured.limits.objective}" if verdict == "pass" else ""
        notes.append(Note("beyond_dtype", text + less))
    if measured.shown is not None and measured.shown.prompts == 1 and level == "rl":
        notes.append(Note("one_prompt", "all sequences have the same prompt: the verdict holds for that prompt only"))
    return notes
