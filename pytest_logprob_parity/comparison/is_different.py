"""Is it different? Bit for bit on the stored schedule; where the engine is another one, by the permutation test."""

from __future__ import annotations

from ..golden.noise_floor import NoiseFloor
from ..trace import Trace
from .difference import Difference
from .evidence import Evidence
from .permutation_test import ALPHA, block_permutation_test
from .sides import names_of
from .vocabulary import Level


def is_different(expected: Trace, *, exact: bool, decided: bool, level: Level, evidence: Evidence) -> Difference:
    """The answer for logprobs that agree bit for bit (`exact`), or of which something else is wrong already (`decided`)."""
    floor = evidence.floor
    if exact:
        return Difference(different=False, reason="bit-identical", key="bits")
    if level == "bitwise":
        return Difference(different=True, reason="not bit-identical", key="bits")
    if decided:
        return Difference(different=True, reason="the headline says what changed", decided=True, key="headline")
    scheduled = evidence.setup == "same" and evidence.same_schedule
    if scheduled and floor is not None and floor.reproduces and level != "noise":
        return Difference(
            different=True,
            reason="not bit-identical, although it was when recorded: the same engine on the same schedule",
            key="not_reproduced",
        )
    if floor is None:
        expected_side = names_of(evidence.sides).expected
        return Difference(
            different=None,
            reason=f"not bit-identical, and {expected_side} has no noise floor to compare the differences with",
            key="no_floor",
        )
    return _beyond_floor(expected, floor, evidence)


def _beyond_floor(expected: Trace, floor: NoiseFloor, evidence: Evidence) -> Difference:
    """Whether a replay in sampled batch compositions is one of the floor's repeats."""
    if evidence.draw is None and not evidence.same_schedule:
        text = (
            "not bit-identical; the server batches requests in an order of its own, so the noise floor does not cover it: "
            "level 'noise' compares with the noise floor all the same"
        )
        return Difference(different=None, reason=text, key="server_batches")
    if evidence.draw is None:
        return Difference(
            different=None,
            reason="not bit-identical; only an engine can replay the tokens in the batch compositions of the noise floor",
            key="no_engine",
        )
    if floor.changed == 0:
        return Difference(
            different=True,
            reason="beyond the noise of batch composition: every sampled batch composition was bit-identical, and this is not",
            key="still_floor",
        )
    blocks = expected.sequence_of_token % floor.compositions.blocks
    test = block_permutation_test(floor.logprobs, evidence.draw(), blocks)
    if test is None:
        return Difference(
            different=None,
            reason=f"not bit-identical; too few sequences for the {floor.compositions.blocks} blocks of the permutation test",
            key="few_blocks",
        )
    beyond = test.p_value <= ALPHA
    return Difference(
        different=beyond,
        reason=f"{'beyond' if beyond else 'within'} the noise of batch composition, {test}",
        p_value=test.p_value,
        key="permutation_test",
    )
