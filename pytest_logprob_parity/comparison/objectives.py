"""Which changes of the logprobs matter to an RL update: by the objective that is trained, the same for every dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..suggest import nearest

Doubles = npt.NDArray[np.float64]
ObjectiveName = Literal["token", "sequence", "truncated", "unclipped"]

#: Log-ratios are cut off here: the fourth powers of their exponentials still fit a double.
_MAX_LOG_RATIO: Final = 150.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The effects that matter to an update of this kind, with the limit of each. d = actual - expected, in nats; r = exp(d).

    - `mean_diff`: limit of |mean d|
    - `k3`: limit of E[r - 1 - d], an estimate of the KL divergence over tokens (Schulman, "Approximating KL Divergence", 2020)
    - `clip`: (lower, upper) of the ratio that the update leaves alone; `clip_share` is the limit of the share outside
    - `cap`: where importance weights are cut off, infinity for nowhere; `weight_variance` is the limit of E[(w - 1)^2], so
      that the effective sample size 1 / (1 + E[(w - 1)^2]) stays above 1 - limit. None: the update has no such weights
    - `by_sequence`: the ratio is that of a sequence, exp(mean d over its tokens)
    """

    name: ObjectiveName
    title: str
    mean_diff: float
    k3: float
    clip: tuple[float, float]
    clip_share: float
    cap: float = np.inf
    weight_variance: float | None = None
    by_sequence: bool = False

    def outside(self, d: Doubles) -> Doubles:
        """1 where the ratio exp(d) is outside the clip, else 0."""
        lower, upper = np.log(self.clip)
        return np.asarray((d < lower) | (d > upper), np.float64)

    def spread_of_weights(self, d: Doubles) -> Doubles:
        """(w - 1)^2 of the weight w = min(exp(d), cap)."""
        weights = np.exp(np.minimum(d, min(_MAX_LOG_RATIO, float(np.log(self.cap)))))
        return np.asarray((weights - 1) ** 2, np.float64)


def k3_of(d: Doubles) -> Doubles:
    """r - 1 - d with r = exp(d): 0 or more, about d^2 / 2 for small d."""
    return np.asarray(np.expm1(np.minimum(d, _MAX_LOG_RATIO)) - d, np.float64)


#: prime-rl's limit for a nightly run is a mismatch KL (k3) of 5e-4; NeMo-RL's for gen_kl is 1e-3 to 2e-3. 1 % of ratios outside
#: the clip is where PPO's clip fraction, 1 to 3 % in healthy runs, starts to be the engine's. A variance of the weights of 1e-3
#: is what a k3 of 5e-4 gives where the noise is small, an effective sample size of 0.999. GSPO clips at 3e-4 (its paper: 3e-4
#: and 4e-4), and a mean of a third of this moves every sequence towards one side of it.
OBJECTIVES: Final[Mapping[str, Objective]] = {
    o.name: o
    for o in (
        Objective(
            name="token", title="one ratio per token, clip 0.2 (PPO, GRPO)", mean_diff=2e-3, k3=5e-4, clip=(0.8, 1.2),
            clip_share=0.01,
        ),
        Objective(
            name="sequence", title="one ratio per sequence, clip 3e-4 (GSPO)", mean_diff=1e-4, k3=5e-4,
            clip=(1 - 3e-4, 1 + 3e-4), clip_share=0.1, by_sequence=True,
        ),
        Objective(
            name="truncated", title="truncated importance weights, cap 2 (TIS, masks)", mean_diff=2e-3, k3=5e-4,
            clip=(0.5, 2.0), clip_share=1e-3, cap=2.0, weight_variance=1e-3,
        ),
        Objective(
            name="unclipped", title="importance weights without a clip (REINFORCE, k3 penalties)", mean_diff=2e-3, k3=5e-4,
            clip=(0.8, 1.2), clip_share=0.01, weight_variance=1e-3,
        ),
    )
}  # fmt: skip
DEFAULT_OBJECTIVE: Final[ObjectiveName] = "token"


def objective_of(name: Any) -> Objective:
    """The objective of this name. Raises UsageError."""
    if name not in OBJECTIVES:
        raise UsageError(f"objective={name!r}: known are {', '.join(OBJECTIVES)}{nearest(str(name), OBJECTIVES)}")
    return OBJECTIVES[name]
