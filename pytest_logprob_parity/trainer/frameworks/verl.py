"""veRL (0.9): logprobs in the dtype of the logits, which is bfloat16 under its default autocast."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ...comparison.objectives import DEFAULT_OBJECTIVE
from ...comparison.result import Comparison
from ...errors import UsageError
from ...spec import Sampling
from .base import Doubles, Framework, Pairs, field_of, gather_minus_logsumexp, has_field, log_softmax_then_gather, missing
from .batches import Batch
from .callback import Watching
from .verl_batches import in_hand, read

#: algorithm.rollout_correction.rollout_is_threshold: weights are clipped to this (token level).
THRESHOLD: Final = 2.0
#: Log-ratios are clipped to +- this (nats) before they are exponentiated.
_SAFE: Final = 20.0
#: The modes of `actor.loss_agg_mode`.
MODES: Final = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
#: Its masked means add this to the number of tokens.
_EPSILON: Final = 1e-8


def logprobs(logits: Any, token_ids: Any, temperature: float) -> Any:
    """/ T in the dtype of the logits; then in float32 and float64 x_t - log sum exp x, else a log-softmax in that dtype."""
    scaled = _scaled(logits, temperature)
    exact = str(scaled.dtype) in ("torch.float32", "torch.float64")
    return (gather_minus_logsumexp if exact else log_softmax_then_gather)(scaled, token_ids)


def installed() -> Callable[[Any, Any, float], Any]:
    """veRL's `logprobs_from_logits`, after the division that its trainer does. Raises EngineError."""
    try:
        from verl.utils.torch_functional import logprobs_from_logits
    except Exception as error:
        raise missing("veRL", "verl.utils.torch_functional", error) from error
    return lambda logits, token_ids, temperature: logprobs_from_logits(_scaled(logits, temperature), token_ids)


def _scaled(logits: Any, temperature: float) -> Any:
    """The logits divided as its trainer does: by T as a float32 tensor, in the dtype of the logits; not at T = 1."""
    import torch

    if temperature == 1:
        return logits
    return logits / torch.tensor(temperature, dtype=torch.float32).clamp(min=1e-8).to(logits)


def _exp(values: Doubles) -> Doubles:
    """exp of values clipped below overflow."""
    return np.asarray(np.exp(np.minimum(values, 300.0)))


def configured(config: Any) -> dict[str, Any]:
    """Arguments of `metrics` from veRL's configuration: the whole one, its `algorithm`, or its `rollout_correction`."""
    actor = field_of(field_of(config, "actor_rollout_ref"), "actor")
    for name in ("algorithm", "rollout_correction"):
        inner = field_of(config, name)
        config = config if inner is None else inner
    names = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize")
    settings = {name: field_of(config, name) for name in names if has_field(config, name)}
    if not settings:
        raise UsageError("verl: no rollout_correction in this configuration: give it, its algorithm, or the whole one")
    settings |= {name: field_of(actor, name) for name in ("loss_agg_mode", "loss_scale_factor")}
    return {name: value for name, value in settings.items() if value is not None or name == "rollout_is"}


def metrics(
    pairs: Pairs,
    *,
    rollout_is: str | None = "token",
    rollout_is_threshold: float | str = THRESHOLD,
    rollout_is_batch_normalize: bool = False,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
) -> dict[str, float]:
    """`rollout_corr/*` and `training/rollout_*`, with old := trainer; `actor/entropy` where its entropies are given.

    The arguments are those of `algorithm.rollout_correction`: weights by `token` or `sequence` (no weights for None), clipped
    at a threshold (0.5_2.0: 0 outside). Means over tokens divide by n + 1e-8; means over sequences count a sequence without
    tokens as 0. Its rejection (`rollout_rs`) is not included. `loss_agg_mode` and `loss_scale_factor` are the actor's, for the
    entropies. Raises UsageError for an unknown level, threshold or mode.
    """
    if not len(pairs.rollout):
        return {}
    corrections = _differences(pairs)
    if rollout_is is not None:
        corrections |= _weights(pairs, rollout_is, rollout_is_threshold, normalize=rollout_is_batch_normalize)
    entropy = _entropy(pairs, loss_agg_mode, loss_scale_factor)
    return {
        **_of_probabilities(pairs),
        **{f"rollout_corr/{name}": value for name, value in corrections.items()},
        **({} if entropy is None else {"actor/entropy": entropy}),
    }


def _tokens(values: Doubles) -> float:
    """Its masked mean over tokens."""
    return float(values.sum() / (len(values) + _EPSILON))


def _sequences(pairs: Pairs, values: Doubles) -> Doubles:
    """Its masked means over the tokens of each sequence; 0 for a sequence without tokens."""
    return pairs.padded(pairs.by_sequence(values) / (pairs.by_sequence(np.ones(len(values))) + _EPSILON))


def _differences(pairs: Pairs) -> dict[str, float]:
    """`rollout_corr/*` but for its weights: KL estimates, perplexities and chi-squares."""
    d = pairs.trainer - pairs.rollout
    old, rollout = _sequences(pairs, pairs.trainer), _sequences(pairs, pairs.rollout)
    apart = rollout - old
    safe = np.exp(np.clip(d, -_SAFE, _SAFE))
    whole = np.exp(2 * np.clip(pairs.padded(pairs.by_sequence(d)), -_SAFE, _SAFE))
    return {
        "kl": _tokens(-d),
        "k3_kl": _tokens(_exp(d) - d - 1),
        "training_ppl": float(_exp(-old).mean()),
        "training_log_ppl": float(-old.mean()),
        "rollout_ppl": float(_exp(-rollout).mean()),
        "rollout_log_ppl": float(-rollout.mean()),
        "log_ppl_diff": float(apart.mean()),
        "log_ppl_abs_diff": float(np.abs(apart).mean()),
        "log_ppl_diff_max": float(apart.max()),
        "log_ppl_diff_min": float(apart.min()),
        "ppl_ratio": float(_exp(apart).mean()),
        "chi2_token": _tokens(safe**2) - 1,
        "chi2_seq": float(whole.mean()) - 1,
    }


def _of_probabilities(pairs: Pairs) -> dict[str, float]:
    """`training/rollout_*`: the probabilities of the tokens on both sides."""
    n, p, q = len(pairs.rollout), np.exp(pairs.trainer), np.exp(pairs.rollout)
    off = np.abs(p - q)
    varies = n > 1 and p.std() > 0 and q.std() > 0
    return {
        "training/rollout_probs_diff_valid": 1.0,
        "training/rollout_probs_diff_max": float(off.max()),
        "training/rollout_probs_diff_mean": float(off.mean()),
        "training/rollout_probs_diff_std": float(off.std(ddof=1)) if n > 1 else math.nan,
        "training/rollout_actor_probs_pearson_corr": float(np.corrcoef(p, q)[0, 1]) if varies else math.nan,
    }


def _entropy(pairs: Pairs, mode: str, factor: float | None) -> float | None:
    """Its `agg_loss` of the entropies; None without entropies, and for the mode that divides by the width of a padded batch."""
    if mode not in MODES:
        raise UsageError(f"verl: loss_agg_mode={mode!r}: known are {', '.join(MODES)}")
    if pairs.entropies is None or (mode == "seq-mean-token-sum-norm" and factor is None):
        return None
    sums = pairs.by_sequence(pairs.entropies)
    counts = pairs.by_sequence(np.ones_like(pairs.entropies))
    by_mode = {
        "token-mean": sums.sum() / counts.sum(),
        "token-sum": sums.sum(),
        "seq-mean-token-sum": sums.mean(),
        "seq-mean-token-sum-norm": sums.mean() / (factor or 1),
        "seq-mean-token-mean": (sums / (counts + _EPSILON)).mean(),
    }
    return float(by_mode[mode])


def _weights(pairs: Pairs, level: str, threshold: float | str, *, normalize: bool) -> dict[str, float]:
    """Metrics of its importance weights: of each token, or of the token's sequence."""
    if level not in ("token", "sequence"):
        raise UsageError(f"verl: rollout_is={level!r}: known are token, sequence and none")
    least, most = _bounds(threshold)
    d = pairs.trainer - pairs.rollout
    total = pairs.by_sequence(d)
    _, number = np.unique(pairs.sequence, return_inverse=True)
    raw = np.exp(np.clip(total[number] if level == "sequence" else d, -_SAFE, _SAFE))
    kept = (raw >= least) & (raw <= most) if least is not None else np.ones(len(raw), bool)
    weights = np.where(kept, np.minimum(raw, most), 0.0)
    low = 1 / most if least is None else least
    mean, cut = _tokens(weights), np.clip(weights, 0.0, most)
    if level == "sequence":
        sums = pairs.padded(total)
        largest, smallest = float(np.exp(min(sums.max(), _SAFE))), float(np.exp(sums.min()))
        high_share, low_share = float((sums > math.log(most)).mean()), float((sums < math.log(low)).mean())
    else:
        largest, smallest = float(weights.max()), float(weights.min())
        high_share, low_share = _tokens((raw > most).astype(float)), _tokens((raw < low).astype(float))
    by_sequence, raw_by_sequence = _sequences(pairs, weights), _sequences(pairs, raw)
    found = {
        "rollout_is_mean": mean,
        "rollout_is_max": largest,
        "rollout_is_min": smallest,
        "rollout_is_std": math.sqrt(max(_tokens(cut**2) - _tokens(cut) ** 2, 0.0)) if len(raw) > 1 else 0.0,
        "rollout_is_eff_sample_size": 1 / _tokens((cut / (_tokens(cut) + _EPSILON)) ** 2) if cut.any() else math.inf,
        "rollout_is_ratio_fraction_high": high_share,
        "rollout_is_ratio_fraction_low": low_share,
        "rollout_is_seq_mean": float(by_sequence.mean()),
        "rollout_is_seq_std": float(by_sequence.std(ddof=1)) if len(by_sequence) > 1 else 0.0,
        "rollout_is_seq_max": float(by_sequence.max()),
        "rollout_is_seq_min": float(by_sequence.min()),
        "rollout_is_seq_max_deviation": float(np.abs(by_sequence - 1).max()),
        "rollout_is_seq_fraction_high": float((raw_by_sequence > most).mean()),
        "rollout_is_seq_fraction_low": float((raw_by_sequence < low).mean()),
    }
    if least is not None:
        found["rollout_is_oob_ratio"] = _tokens((~kept).astype(float))
    if normalize:
        factor = mean if level == "token" else float(by_sequence[: len(total)].mean())
        found["rollout_is_batch_norm_factor"] = factor if factor > _EPSILON else 1.0
    return found


def _bounds(threshold: float | str) -> tuple[float | None, float]:
    """The lower threshold, if there is one, and the upper one: from 2.0, or "0.5_2.0"."""
    try:
        parts = [float(part) for part in str(threshold).split("_")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 2 or not all(part > 0 for part in parts):
        raise UsageError(f'verl: rollout_is_threshold={threshold!r}: must be a number above 0, or two as "0.5_2.0"')
    return (None, parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def watch(
    trainer: Any = None, *, every: int = 50, dtype: str = "unknown", trainer_dtype: str = "unknown",
    temperature: float = 1.0, objective: str = DEFAULT_OBJECTIVE, tolerance: Any = None,
) -> list[Comparison]:  # fmt: skip
    """Make veRL check its own batches: the first, then every `every`-th. Returns the list to which each comparison is added.

    Call it in the process of the trainer, before `fit()`. It wraps `calculate_debug_metrics`, which veRL calls with the
    logprobs of the rollouts and of the trainer if `calculate_log_probs` is on, in its older trainer and in `use_v1`; `trainer`
    is not needed. Batches of `use_v1` have no prompts: rows with one `uid` have one prompt, and a row without `uid` has its
    own. A failed check raises MismatchError out of `fit()`. An unverified one is a warning, and the next batch is checked.
    Raises UsageError for an `every` below 1, EngineError where veRL is not installed or has no such function.
    """
    import sys

    watching = Watching("verl", every)
    try:
        from verl.utils.debug import metrics as module

        original = module.calculate_debug_metrics
    except (ImportError, AttributeError) as error:
        raise missing("veRL", "verl.utils.debug.metrics.calculate_debug_metrics", error) from error

    def checked(data: Any) -> Any:
        logged = original(data)
        if not watching.due():
            return logged
        mask = Batch("verl", data).get("response_mask")
        if mask is not None and not mask.any():
            watching.leave_out("every response of this batch is masked")
        else:
            rollouts = in_hand(data, sampling=Sampling(temperature=temperature), dtype=dtype)
            watching.check(rollouts, tolerance=tolerance, objective=objective, trainer_dtype=trainer_dtype)
        return logged

    for user in (module, sys.modules.get("verl.trainer.ppo.v1.trainer_base")):
        if user is not None and getattr(user, "calculate_debug_metrics", None) is original:
            setattr(user, "calculate_debug_metrics", checked)  # noqa: B010 - a module has no such attribute to a type checker
    return watching.done


VERL: Final = Framework(
    name="verl",
    title="veRL",
    package="verl",
    logprobs=logprobs,
    metrics=metrics,
    configured=configured,
    watches=watch,
    read=read,
    installed=installed,
    divides="logits",
    thresholds={
        "training/rollout_probs_diff_mean": (0.0, 0.01),  # below 0.005 is normal, above 0.01 an issue of precision
        "rollout_corr/rollout_is_mean": (0.5, 2.0),
        "rollout_corr/rollout_is_eff_sample_size": (0.3, 1.0 + 1e-6),
        "rollout_corr/rollout_is_std": (0.0, 1.0),
        "rollout_corr/kl": (-0.1, 0.1),
    },
    # Its |kl| is |mean d|; the rest is of probabilities and weights, which have no limit in nats.
    tolerance={"mean_diff": 0.1},
    profile="verl",
    mistakes=(
        "top-p and top-k reach the engine only: processed logprobs are then over the truncated support, the trainer's over all "
        "tokens",
        "under bfloat16 autocast the logprobs are rounded to bfloat16: up to 0.14 nats by themselves",
        "without calculate_log_probs there are no rollout_log_probs, and no metric says so",
        "bypass_mode takes the rollout's logprobs for the old ones: every metric of their difference is then 0",
        "the trainer divides by the configured temperature, whatever a request was sampled with",
    ),
)
