"""Does an engine that speculates report and sample what it would without? Its own tokens, replayed without speculation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ..comparison.evidence import Evidence
from ..comparison.free_generation.own_draws import OwnDraws, own_draws
from ..comparison.judge import judge
from ..comparison.message import require
from ..comparison.result import Comparison, Finding
from ..comparison.signatures.speculation import speculation_finding
from ..comparison.tolerance import Tolerance, default_tolerance, make_tolerance
from ..engines.backend import ACCEPTED, REPLACED
from ..engines.engine import Engine
from ..errors import UsageError
from ..notes import Note

#: Draws that chance explains less often than this were drawn otherwise.
_ALPHA: Final = 1e-4


def assert_speculation_parity(
    engine: Engine,
    prompts: Sequence[Any],
    sampling: Any = None,
    *,
    plain: Engine | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
) -> Comparison:
    """Assert that speculative decoding changes neither the logprobs that `engine` reports nor the distribution that it samples
    from; returns the comparison.

    `engine` generates from `prompts` (single turns) under `sampling` with its `speculative_config`. `plain`, by default an
    engine of the same spec without it in a process of its own, replays the same tokens by teacher-forced decode. The logprobs
    are compared: those of accepted drafts, and those of all others. The tokens are held against the distributions of the
    replay: their mean logprob must be what these expect.

    Raises MismatchError for the verdicts `fail` and `unverified`. Where accepted drafts alone are wrong the cause is
    `speculative_decoding`, and its evidence says how they were reported: at 0.0, one token late, or from another distribution.
    Tokens that are drawn in place of rejected drafts are told apart in the same way.
    UsageError where `engine` does not speculate, or where nothing says how to start it without.
    """
    __tracebackhide__ = True
    comparison = check_speculation_parity(engine, prompts, sampling, plain=plain, tolerance=tolerance)
    return require(comparison, "the same engine without speculative decoding")


def check_speculation_parity(
    engine: Engine,
    prompts: Sequence[Any],
    sampling: Any = None,
    *,
    plain: Engine | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
) -> Comparison:
    """The comparison that `assert_speculation_parity` makes, whatever its verdict."""
    method = engine.config.values.get("speculative_decoding")
    if method is None:
        raise UsageError(f"{engine.spec} does not speculate: start it with speculative_config={{'method': ...}}")
    plain = engine.without_speculation() if plain is None else plain
    if plain.config.values.get("speculative_decoding") is not None:
        raise UsageError(f"plain={plain.spec} speculates as well: give an engine without speculative_config")
    reported, drafted = engine.generate_with_drafts(prompts, sampling)
    replayed = plain.replay(reported)
    limits = make_tolerance(default_tolerance(replayed.dtype), tolerance)
    comparison = judge(replayed, reported, limits, "rl", Evidence(sides=("replay", "speculation")))
    comparison = dataclasses.replace(comparison, notes=(*comparison.notes, _accepted_note(str(method), drafted)))
    draws = own_draws(replayed, limits.near_tie)
    otherwise = draws is not None and bool(draws.p_value < _ALPHA or draws.excluded or draws.not_likeliest)
    if draws is not None:
        comparison = dataclasses.replace(comparison, notes=(*comparison.notes, Note("own_draws", str(draws))))
    if drafted is not None and (finding := speculation_finding(replayed, reported, drafted)):
        headline = f"Speculative decoding changes the reported logprobs: {finding.evidence}"
        findings = (finding, *((_drawn_otherwise(draws),) if draws is not None and otherwise else ()))
        return dataclasses.replace(comparison, verdict="fail", headline=headline, findings=findings)
    if draws is not None and otherwise:
        headline = f"Speculative decoding samples from another distribution: {draws}"
        findings = (*(f for f in comparison.findings if f.layer != "noise"), _drawn_otherwise(draws))
        return dataclasses.replace(comparison, verdict="fail", headline=headline, findings=findings)
    if comparison.passed and drafted is not None and not (drafted == ACCEPTED).any():
        headline = "Inconclusive: no draft was accepted, so nothing shows what the engine reports of accepted drafts"
        return dataclasses.replace(comparison, verdict="unverified", headline=headline)
    return comparison


def _accepted_note(method: str, drafted: npt.NDArray[np.uint8] | None) -> Note:
    if drafted is None:
        return Note("accepted_drafts", f"{method}: the engine does not tell which tokens are accepted drafts")
    accepted, replaced = (int(np.count_nonzero(drafted == code)) for code in (ACCEPTED, REPLACED))
    text = (
        f"{method}: {accepted:,} of {len(drafted):,} tokens are accepted drafts, {replaced:,} stand in place of rejected ones"
    )
    return Note("accepted_drafts", text)


def _drawn_otherwise(draws: OwnDraws) -> Finding:
    """The finding on an engine whose tokens are not draws of its own distributions."""
    values = {"shift": draws.shift, "z": draws.z, "excluded": draws.excluded, "not_likeliest": draws.not_likeliest}
    text = f"the tokens are not drawn from the engine's own distributions: {draws}"
    return Finding(layer="path", cause="speculative_decoding", evidence=text, values=values)
