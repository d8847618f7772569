"""Does the trainer agree with the engine? Its logprobs of the rollouts' tokens, held against those that came with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..comparison.objectives import DEFAULT_OBJECTIVE
from ..comparison.precision_gaps import GAPS
from ..comparison.result import Comparison, MismatchError
from ..comparison.tolerance import Tolerance
from ..errors import UsageError
from ..golden import Golden
from ..trace import Trace
from .agreement import agreement, trainer_message
from .frameworks import limits_of, with_metrics
from .scorer import Scorer


def assert_trainer_parity(
    rollouts: Trace | Golden,
    scorer: Scorer | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    objective: str = DEFAULT_OBJECTIVE,
    trainer_dtype: str = "unknown",
    batch_size: int = 16,
    metrics: str | None = None,
    config: Any = None,
) -> Comparison:
    """Assert that a trainer's logprobs of the tokens of `rollouts` are those that came with them; returns the comparison.

    d = trainer - rollout, in nats, so that exp(d) is the policy ratio of an on-policy step. The trainer's logprobs are those
    in hand: the column `trainer_logprobs` that a framework's reader takes from its batch (computed in `trainer_dtype`). No
    model is needed for that. A `scorer` is asked as a trainer asks its model: token ids, attention mask, and the temperature
    of the rollouts. Where there is no column, it stands for the trainer. Where there is one, it is a third opinion: if the
    columns agree it has to agree with them, and if they do not it says which of the two is off.

    `tolerance` changes limits, names a framework whose thresholds they become (`"verl"`), or declares a gap that is there on
    purpose (`"fp8"`); `objective` is the update that they are judged for (`token`, `sequence`, `truncated`, `unclipped`);
    `metrics` names a framework whose metrics are reported with it, by its own names, and `config` is its configuration
    (a GRPOConfig; veRL's, or the `rollout_correction` of it), whose caps and modes they go by.

    Rollouts of a truncated distribution are compared without truncation where the trace has `untruncated_logprobs`, over
    their kept sets where it lists them and the scorer can do that, and are else refused with the reason, as those sampled
    under a penalty are. A column in hand is over all tokens: held against them it fails, for that is what the update sees.

    Raises MismatchError for the verdicts `fail` and `unverified`, UsageError for what cannot be compared.
    """
    __tracebackhide__ = True
    comparison = compare_with_trainer(
        rollouts,
        scorer,
        tolerance,
        objective=objective,
        trainer_dtype=trainer_dtype,
        batch_size=batch_size,
        metrics=metrics,
        config=config,
    )
    if not comparison.passed:
        raise MismatchError(trainer_message(comparison), comparison)
    return comparison


def compare_with_trainer(
    rollouts: Trace | Golden,
    scorer: Scorer | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    objective: str = DEFAULT_OBJECTIVE,
    trainer_dtype: str = "unknown",
    batch_size: int = 16,
    metrics: str | None = None,
    config: Any = None,
) -> Comparison:
    """What `assert_trainer_parity` asserts, whatever its verdict."""
    name = _framework_asked_for(tolerance, metrics, config)
    comparison = agreement(
        rollouts, scorer, limits_of(tolerance), objective=objective, trainer_dtype=trainer_dtype, batch_size=batch_size
    )
    return with_metrics(comparison, name, config) if name else comparison


def _framework_asked_for(tolerance: Any, metrics: str | None, config: Any) -> str:
    """The framework whose metrics are asked for; empty where none is. Raises UsageError for a configuration of none."""
    name = metrics or (tolerance if isinstance(tolerance, str) and tolerance not in GAPS else "")
    if config is not None and not name:
        raise UsageError('config= is what a framework\'s metrics go by: say which, metrics="trl"')
    return name
