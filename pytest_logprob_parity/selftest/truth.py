"""How much a fault matters to an RL update, computed in float64 from two columns of logprobs.

This file says what is true. The comparison is what is tested against it, so nothing here imports `comparison`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Objective = Literal["token", "sequence", "truncated", "unclipped"]
Size = Literal["material", "between", "immaterial"]

OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)

#: An effect of at least so many times its limit is material: a check has to fail.
MATERIAL: Final = 2.0
#: An effect of at most so much of its limit is immaterial: a check must not fail. What lies between is not scored.
IMMATERIAL: Final = 0.5

#: PPO's clip of token ratios (Schulman et al., "Proximal Policy Optimization Algorithms", 2017); GRPO uses the same.
CLIP: Final = 0.2
#: GSPO's clip of sequence ratios, the smaller of its two sides (Zheng et al., "Group Sequence Policy Optimization", 2025).
SEQUENCE_CLIP: Final = 3e-4
#: Cap of truncated importance sampling (TIS) as veRL and others set it (Yao et al., "Your Efficient RL Framework Secretly
#: Brings You Off-Policy RL Training", 2025).
CAP: Final = 2.0

# -- limits. Each quantity is material at twice its limit. --------------------------------------------------------------

#: k3, nats. prime-rl fails its nightly run where the mismatch KL of trainer and engine exceeds this.
_K3: Final = 5e-4
#: |mean d| over tokens, nats. The mean of -d is Schulman's k1, an estimate of the KL of trainer and engine, and NeMo-RL's limit
#: for that KL (gen_kl_error) is this.
_MEAN: Final = 2e-3
#: Share of tokens whose ratio PPO would clip. Such a token gives no gradient, or one that the clip does not bound, as the sign
#: of its advantage has it, and that before the policy has moved: 1 % of a batch.
_CLIPPED: Final = 0.01
#: Share of sequences whose ratio GSPO would clip. A healthy run of GSPO clips a hundred times as many tokens as one of GRPO
#: (its paper), so it bears ten times the share that is allowed there.
_CLIPPED_SEQUENCES: Final = 0.1
#: |mean d| over sequences, nats: a third of GSPO's clip, which every sequence then carries before the policy has moved.
_SEQUENCE_MEAN: Final = 1e-4
#: 1 - ESS. For small d this is the mean of d^2, and k3 half of it: the same size of error as k3's limit, RMS 0.032 nats.
_ESS_LOSS: Final = 1e-3
#: Share of tokens beyond the cap or below its inverse: the tokens whose gradient TIS cuts or all but drops.
_CAPPED: Final = 1e-3
#: Share of tokens that one side excludes, where no clip bounds what they do. A distribution that loses the mass m has a KL
#: of -ln(1 - m), about m, to the one that keeps it: k3's limit.
_EXCLUDED: Final = _K3
#: |d| of a single token, nats. Material at 2 nats, a ratio of 7: no rounding does that in float64.
_TOKEN: Final = 1.0
#: The same for a mixture of experts. Where two experts tie, a last bit decides which one is used: clean builds were measured
#: to differ by 4.7 nats in such a token.
_TOKEN_EXPERTS: Final = 3.0
#: RMS of d in one sequence without its largest token, nats. Material at 0.3: that sequence's own k3 is 90 times the limit, and
#: a mean over 200 sequences does not show it.
_SEQUENCE: Final = 0.15


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity that an update feels: its value, and the limit in the same unit. A limit of 0 allows none."""

    name: str
    value: float
    limit: float

    @property
    def multiple(self) -> float:
        """The value as a multiple of the limit; infinite where the value is no number, or where none is allowed."""
        if math.isnan(self.value):
            return math.inf
        return self.value / self.limit if self.limit else math.inf if self.value else 0.0


@dataclass(frozen=True, slots=True)
class TrueEffect:
    """What a fault does to an update under one objective: every quantity with its limit."""

    objective: Objective
    quantities: tuple[Quantity, ...]

    @property
    def largest(self) -> Quantity:
        """The quantity that is the largest multiple of its limit."""
        return max(self.quantities, key=lambda q: q.multiple)

    @property
    def multiple(self) -> float:
        """How many times its limit the largest quantity is."""
        return self.largest.multiple

    @property
    def size(self) -> Size:
        """`material`, `immaterial`, or `between` the two."""
        if self.multiple >= MATERIAL:
            return "material"
        return "immaterial" if self.multiple <= IMMATERIAL else "between"


def true_effect(
    clean: Doubles,
    faulty: Doubles,
    offsets: npt.NDArray[np.int64],
    objective: Objective = "token",
    *,
    depth: Doubles | None = None,
    experts: bool = False,
) -> TrueEffect:
    """The effect of a fault on one update over N tokens in S sequences.

    `clean` and `faulty` [N] are float64 logprobs (nats) of the same tokens, -inf where truncation excludes the token;
    `offsets` [S + 1] says where each sequence begins. d = faulty - clean, and r = exp(d) is the ratio of the two.

    Every objective counts
    - `NaN or +inf`: tokens that the fault left without a number. None is allowed.
    - `one token`: the largest |d|. For a token that one side alone excludes, `depth` [N] says by how many nats its logit
      would have to rise to be kept there; without `depth` such a token is infinitely far off. The limit is 1 nat, or 3
      with `experts`, for a mixture of experts, whose ties no arithmetic decides.
    - `one sequence`: the largest RMS of d in a sequence, its largest |d| left out, for single tokens are counted above.

    and besides
    - `token` (PPO, GRPO: ratios of tokens, clip 0.2): `k3` = mean(r - 1 - d), an estimate of KL(clean || faulty) (Schulman,
      "Approximating KL Divergence", 2020); `mean`, |mean d|; `clipped tokens`, the share of r outside 1 +- 0.2.
    - `sequence` (GSPO: exp(mean d) of each sequence, clip 3e-4): `clipped sequences`, the share outside 1 +- 3e-4;
      `mean of sequences`, |mean over sequences of their mean d|.
    - `truncated` (TIS: weights min(r, 2)): `ESS loss`, 1 - (sum w)^2 / (N sum w^2) of the capped weights (Kish's effective
      sample size); `capped tokens`, the share of r above 2 or below 1/2; `k3`; `mean`.
    - `unclipped` (REINFORCE, k3 penalties: nothing is capped): `ESS loss` of r itself; `k3`; `mean`; `excluded tokens`, the
      share that one side alone excludes.

    A token that one side alone excludes has no d. Its ratio is 0 or infinite: it counts as clipped, as capped, and its
    sequence as clipped. Tokens that the clean side has no number for, or that both sides exclude, say nothing.

    Raises ValueError for columns that do not fit together, and for an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: known are {', '.join(OBJECTIVES)}")
    if clean.shape != faulty.shape or clean.ndim != 1 or offsets[-1] != len(clean):
        raise ValueError(f"columns of shapes {clean.shape} and {faulty.shape}, offsets that end at {offsets[-1]}")
    known = ~np.isnan(clean) & ~np.isposinf(clean)
    broken = known & (np.isnan(faulty) | np.isposinf(faulty))
    excluded = known & ~broken & (np.isneginf(clean) != np.isneginf(faulty))
    both = known & ~broken & np.isfinite(clean) & np.isfinite(faulty)
    d = faulty[both].astype(np.float64) - clean[both].astype(np.float64)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))  # here too nothing is shared with what is judged
    far = np.abs(d).max(initial=0.0)
    if excluded.any():
        far = max(far, math.inf if depth is None else float(depth[excluded].max()))
    common = (
        Quantity("NaN or +inf", float(broken.sum()), 0.0),
        Quantity("one token", float(far), _TOKEN_EXPERTS if experts else _TOKEN),
        Quantity("one sequence", _worst_sequence(d, owner[both]), _SEQUENCE),
    )
    if not len(d) and not excluded.any():
        return TrueEffect(objective, common)
    if objective == "sequence":
        return TrueEffect(objective, (*common, *_of_sequences(d, owner[both], np.unique(owner[excluded]))))
    return TrueEffect(objective, (*common, *_of_tokens(d, int(excluded.sum()), objective)))


def _of_tokens(d: Doubles, outside: int, objective: Objective) -> tuple[Quantity, ...]:
    """The quantities of the objectives that weigh tokens, from d [n] and the number of tokens that one side alone excludes."""
    judged = len(d) + outside
    ratio = np.exp(np.minimum(d, 300.0))  # exp(300)^2 is still a double
    k3 = Quantity("k3", _mean(ratio - 1 - d), _K3)
    mean = Quantity("mean", abs(_mean(d)), _MEAN)
    if objective == "token":
        clipped = (int(np.sum(np.abs(ratio - 1) > CLIP)) + outside) / judged
        return k3, Quantity("clipped tokens", clipped, _CLIPPED), mean
    if objective == "truncated":
        capped = (int(np.sum((ratio > CAP) | (ratio < 1 / CAP))) + outside) / judged
        loss = Quantity("ESS loss", _ess_loss(np.minimum(ratio, CAP)), _ESS_LOSS)
        return loss, Quantity("capped tokens", capped, _CAPPED), k3, mean
    return k3, Quantity("ESS loss", _ess_loss(ratio), _ESS_LOSS), mean, Quantity("excluded tokens", outside / judged, _EXCLUDED)


def _of_sequences(d: Doubles, owner: npt.NDArray[np.int64], cut: npt.NDArray[np.int64]) -> tuple[Quantity, Quantity]:
    """GSPO's quantities from d [n], the sequence of each, and the sequences in which a token is excluded."""
    counts = np.bincount(owner)
    means = (np.bincount(owner, d) / np.maximum(counts, 1))[counts > 0]
    sequences = np.union1d(np.flatnonzero(counts), cut)
    clipped = np.zeros(int(max(sequences.max(initial=-1), 0)) + 1, bool)
    clipped[np.flatnonzero(counts)] = np.abs(np.expm1(means)) > SEQUENCE_CLIP
    clipped[cut] = True
    return (
        Quantity("clipped sequences", float(clipped.sum()) / len(sequences), _CLIPPED_SEQUENCES),
        Quantity("mean of sequences", abs(_mean(means)), _SEQUENCE_MEAN),
    )


def _worst_sequence(d: Doubles, owner: npt.NDArray[np.int64]) -> float:
    """The largest RMS of a sequence's d, the largest |d| of each taken for 0."""
    if not len(d):
        return 0.0
    squares = d * d
    counts, largest = np.bincount(owner), np.zeros(int(owner.max()) + 1)
    np.maximum.at(largest, owner, squares)
    rest = np.maximum(np.bincount(owner, squares) - largest, 0.0)
    return float(np.sqrt(rest / np.maximum(counts, 1)).max())


def _ess_loss(weights: Doubles) -> float:
    """1 - ESS, the effective share of samples with these weights; 1 where all weights are 0."""
    if not len(weights):
        return 0.0
    squares = float(np.mean(weights**2))
    return 1 - float(np.mean(weights)) ** 2 / squares if squares else 1.0


def _mean(values: Doubles) -> float:
    return float(values.mean()) if len(values) else 0.0


def growth(
    model: Doubles,
    clean: Doubles,
    faulty: Doubles,
    offsets: npt.NDArray[np.int64],
    objective: Objective = "token",
    *,
    experts: bool = False,
) -> TrueEffect:
    """The effect of a fault in an engine that computes anew, and so makes other rounding errors, fault or no fault.

    `model` [N] are logprobs of the model without rounding, NaN where they are not known. Each quantity is what the fault adds
    to the engine's distance from the model, and no more than what it changes in the engine's own logprobs. Where `model` knows
    no token, the latter alone counts.
    """
    edge = np.zeros(len(clean))
    change = true_effect(clean, faulty, offsets, objective, depth=edge, experts=experts)
    if not np.isfinite(model).any():
        return change
    before, after = (true_effect(model, x, offsets, objective, depth=edge, experts=experts) for x in (clean, faulty))
    added = {b.name: max(a.value - b.value, 0.0) for b, a in zip(before.quantities, after.quantities, strict=True)}
    return TrueEffect(
        objective, tuple(Quantity(q.name, min(q.value, added.get(q.name, q.value)), q.limit) for q in change.quantities)
    )  # fmt: skip
