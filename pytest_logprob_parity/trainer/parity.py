"""Does the trainer agree with the engine? Its logprobs of the rollouts' tokens, compared with the rollouts' own."""

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
from .trainer_column import TrainerTokens


def assert_trainer_parity(
    rollouts: Trace | Golden,
    scorer: Scorer | None = None,
    tolerance: Tolerance | Mapping[str, Any] | str | None = None,
    *,
    objective: str = DEFAULT_OBJECTIVE,
    trainer_dtype: str = "unknown",
    trainer_tokens: TrainerTokens = "all",
    batch_size: int = 16,
    metrics: str | None = None,
    config: Any = None,
) -> Comparison:
    """Assert that a trainer's logprobs of the tokens of `rollouts` agree with the rollouts' own; returns the comparison.

    d = trainer - rollout, in nats, so that exp(d) is the policy ratio of an on-policy step. The trainer's logprobs are the
    column `trainer_logprobs`, which a framework's reader takes from its batch; it was computed in `trainer_dtype`. This needs
    no model. A `scorer` is called as a trainer calls its model: with token ids, attention mask, and the temperature of the
    rollouts. Without a column it stands for the trainer. With a column it is a reference evaluation: where the columns agree
    it has to agree with them, and where they differ it shows which of the two is wrong.

    `tolerance` changes limits, names a framework whose thresholds become the limits (`"verl"`), or declares a difference in
    precision (`"fp8"`). `objective` is the update that is judged (`token`, `sequence`, `truncated`, `unclipped`). `metrics`
    names a framework: its metrics are reported under its own names. `config` is the configuration of this framework (a
    GRPOConfig; veRL's, or its `rollout_correction`), from which the metrics take their caps and modes.

    Rollouts of a truncated distribution are compared without truncation if the trace has `untruncated_logprobs`, or over the
    truncated support if the trace has it whole (`kept_token_ids`, or a top-k that lists it) and the scorer accepts it.
    Otherwise they are refused with the reason, and so are rollouts sampled under a penalty. A trainer's column is over all
    tokens: compared with truncated rollouts it fails, because that is what the update uses. `trainer_tokens="kept"` says that
    the trainer computes over the tokens that truncation kept: its column and the scorer are then compared with the truncated
    logprobs.

    Raises MismatchError for the verdicts `fail` and `unverified`, UsageError for what cannot be compared.
    """
    __tracebackhide__ = True
    comparison = compare_with_trainer(
        rollouts,
        scorer,
        tolerance,
        objective=objective,
        trainer_dtype=trainer_dtype,
        trainer_tokens=trainer_tokens,
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
    trainer_tokens: TrainerTokens = "all",
    batch_size: int = 16,
    metrics: str | None = None,
    config: Any = None,
) -> Comparison:
    """The comparison that `assert_trainer_parity` makes, whatever its verdict."""
    name = _framework_asked_for(tolerance, metrics, config)
    comparison = agreement(
        rollouts,
        scorer,
        limits_of(tolerance),
        objective=objective,
        trainer_dtype=trainer_dtype,
        trainer_tokens=trainer_tokens,
        batch_size=batch_size,
    )
    return with_metrics(comparison, name, config) if name else comparison


def _framework_asked_for(tolerance: Any, metrics: str | None, config: Any) -> str:
    """The framework whose metrics are wanted, or "". Raises UsageError for a configuration without a framework."""
    name = metrics or (tolerance if isinstance(tolerance, str) and tolerance not in GAPS else "")
    if config is not None and not name:
        raise UsageError('config= is the configuration of a framework: name the framework too, metrics="trl"')
    return name
