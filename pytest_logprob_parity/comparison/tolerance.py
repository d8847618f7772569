"""How much may differ: defaults by dtype and path, each with its reason, and how a call or an ini file changes them."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..errors import UsageError
from ..floor import NoiseFloor
from ..spec import nearest
from .gaps import gap_of
from .intervals import poisson_quantile


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Limits on d = actual - expected, in nats unless said otherwise.

    - `mean_diff`: |mean d|, each d cut off at `winsorize`. A third of GSPO's sequence clip of 3e-4 in float32; NeMo-RL's
      gen_kl limit in bfloat16.
    - `rms_diff`: root mean square of d, each d cut off at `winsorize`. k3 is about its square over 2: in bfloat16 twice
      prime-rl's nightly limit; in float32 60 times what was seen across versions of vLLM.
    - `winsorize`: where each d is cut off for the mean and for the RMS: one wild token is for the outliers to count.
    - `clip_share`: share of tokens (0 to 1) whose policy ratio exp(d) is outside 1 +- 0.2, PPO's clip.
    - `outlier`: a token further off than this is an outlier; one is allowed, and one more for every 5,000 tokens.
    - `sequence_rms`: a sequence with a larger RMS, each d cut off, is an outlier; one is allowed for every 200 sequences.
    - `support_flips`: share of tokens (0 to 1) that truncation may exclude on the other side; none without truncation.
    - `support_depth`: no excluded token may have been further inside the nucleus (probability mass, 0 to 1) than this.
    - `near_tie`: a top-2 gap up to this makes a greedy divergence a near tie; the same for the edges of top-k and min-p.
      In bfloat16 two steps of a logit between 16 and 32: builds that cut mantissas off where others round turn one.
    """

    mean_diff: float
    rms_diff: float
    winsorize: float
    clip_share: float
    outlier: float
    sequence_rms: float
    support_flips: float
    support_depth: float
    near_tie: float

    def outlier_budget(self, tokens: int) -> int:
        """How many outlier tokens are allowed among `tokens`."""
        return 1 + tokens // 5000

    def sequence_budget(self, sequences: int) -> int:
        """How many outlier sequences are allowed among `sequences`."""
        return sequences // 200


_FLOAT32: Final = Tolerance(
    mean_diff=1e-4, rms_diff=1e-3, winsorize=0.01, clip_share=1e-3, outlier=0.01, sequence_rms=5e-3, support_flips=1e-3,
    support_depth=1e-3, near_tie=1e-3,
)  # fmt: skip
_BFLOAT16: Final = Tolerance(
    mean_diff=2e-3, rms_diff=0.045, winsorize=0.25, clip_share=0.02, outlier=0.5, sequence_rms=0.1, support_flips=0.01,
    support_depth=0.1, near_tie=0.25,
)  # fmt: skip
# float16 rounds 8 times finer than bfloat16; half of that gain is kept as room for sums in other orders.
_FLOAT16: Final = Tolerance(
    mean_diff=5e-4, rms_diff=0.012, winsorize=0.07, clip_share=5e-3, outlier=0.13, sequence_rms=0.03, support_flips=3e-3,
    support_depth=0.03, near_tie=0.03,
)  # fmt: skip

DEFAULTS: Final[Mapping[str, Tolerance]] = {
    "float64": _FLOAT32,
    "float32": _FLOAT32,
    "bfloat16": _BFLOAT16,
    "float16": _FLOAT16,
}
#: Other kernels sum in another order: where one side is prefill and the other decode, half precision gets twice the room.
PREFILL_FACTOR: Final = 2.0


def default_tolerance(dtype: str, paths: Iterable[str] = ("decode",)) -> Tolerance:
    """The limits for a golden of this dtype (bfloat16's where it is not known), compared along these paths."""
    tolerance = DEFAULTS.get(dtype, _BFLOAT16)
    if len(set(paths)) > 1 and tolerance is not _FLOAT32:
        fields = {f.name: getattr(tolerance, f.name) * PREFILL_FACTOR for f in dataclasses.fields(tolerance)}
        tolerance = Tolerance(**fields)
    return tolerance


def whose_defaults(limits: Tolerance) -> str:
    """The dtype that limits are the defaults of; empty where they are nobody's. float64's are float32's."""
    named = (dtype for dtype in ("float32", "float16", "bfloat16") for paths in (("decode",), ("decode", "prefill"))
             if limits == default_tolerance(dtype, paths))  # fmt: skip
    return next(named, "")


#: Budgets for outliers grow with the floor: so many times its RMS is an outlier token, an outlier sequence.
_OUTLIER_TOKEN: Final = 30
_OUTLIER_SEQUENCE: Final = 5
#: The mass above a token moves with many logprobs at once, so with their RMS and not with the largest difference of one.
_DEPTH: Final = 10
#: Another build may have this many times the noise that other batch shapes have, and flips in proportion (measured: a
#: head in float32 flipped 14 tokens where shapes flipped 4).
_FLIP_FACTOR: Final = 4


def with_floor(limits: Tolerance, floor: NoiseFloor | None) -> Tolerance:
    """Limits for a golden that knows its own noise; unchanged for one that does not.

    What is an outlier is at least 30 times the floor's RMS for tokens and 5 times for sequences (the clean maximum is
    4.2 times); support flips go by the golden's own rate, the count that 4 times this rate exceeds once in 1,000 times.
    Margins of effects (mean, RMS, clip share) do not move: what matters to an update does not depend on the noise.
    """
    if floor is None or not np.isfinite(floor.rms):
        return limits
    tokens = int(np.count_nonzero(~np.isnan(floor.logprobs).all(axis=0)))  # masked ones are NaN in all
    flips = poisson_quantile(0.999, _FLIP_FACTOR * (floor.flips + 1 / floor.repeats))
    return dataclasses.replace(
        limits,
        outlier=max(limits.outlier, _OUTLIER_TOKEN * floor.rms),
        sequence_rms=max(limits.sequence_rms, _OUTLIER_SEQUENCE * floor.rms),
        support_flips=flips / tokens,
        support_depth=max(limits.support_depth, _DEPTH * floor.rms),
        near_tie=max(limits.near_tie, 2 * floor.max_abs),
    )


def make_tolerance(base: Tolerance, change: Tolerance | Mapping[str, Any] | str | None) -> Tolerance:
    """`base` with the limits that `change` names, or widened to those of the gap that it declares (`"fp8"`, see gaps.py).

    Raises UsageError for an unknown name or a value that is no number.
    """
    if change is None:
        return base
    if isinstance(change, str):
        wider = {name: max(getattr(base, name), limit) for name, limit in gap_of(change).limits.items()}
        return dataclasses.replace(base, **wider)
    if isinstance(change, Tolerance):
        return change
    names = [f.name for f in dataclasses.fields(Tolerance)]
    if not isinstance(change, Mapping):
        raise UsageError(f"tolerance is a Tolerance or a mapping of its limits ({', '.join(names)}), not {change!r}")
    for name, value in change.items():
        if name not in names:
            raise UsageError(f"tolerance has no limit {name!r}{nearest(str(name), names)}; known are {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 0:
            raise UsageError(f"tolerance {name}={value!r}: must be a number, 0 or more")
    return dataclasses.replace(base, **{name: float(value) for name, value in change.items()})


def parse_tolerance(lines: Iterable[str], dtype: str, paths: Iterable[str]) -> dict[str, float]:
    """The limits that ini lines set for this dtype and path.

    A line is `limit = value`, `dtype.limit = value` or `dtype.path.limit = value`; a longer name wins. Raises UsageError.
    """
    found: dict[str, tuple[int, float]] = {}
    places = {*paths}
    for line in lines:
        name, equals, value = line.partition("=")
        *scope, limit = name.strip().split(".")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not equals or len(scope) > 2 or number != number:
            raise UsageError(f"parity_tolerance: {line!r} is not `[dtype.[path.]]limit = number`")
        make_tolerance(_FLOAT32, {limit: number})
        if scope and scope[0] not in DEFAULTS:
            raise UsageError(f"parity_tolerance: {scope[0]!r} is no dtype{nearest(scope[0], DEFAULTS)}")
        fits = (not scope or scope[0] == dtype) and (len(scope) < 2 or scope[1] in places)
        if fits and len(scope) >= found.get(limit, (0, 0.0))[0]:
            found[limit] = (len(scope), number)
    return {limit: number for limit, (_, number) in found.items()}
