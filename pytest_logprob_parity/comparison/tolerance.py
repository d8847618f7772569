"""How much may differ: what the objective bears, what noise explains, and how a call or an ini file changes both."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..errors import UsageError
from ..golden.noise_floor import NoiseFloor
from ..golden.reference import Reference
from ..suggest import nearest
from ..trace import FloatArray, TracePath
from .intervals import poisson_quantile
from .objectives import DEFAULT_OBJECTIVE, objective_of
from .precision_gaps import gap_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Limits on d = actual - expected, in nats unless said otherwise.

    What the objective bears, the same for every dtype (see Objective for their reasons):

    - `mean_diff`: |mean d|
    - `k3`: E[r - 1 - d], about half the mean square of d
    - `clip_share`: share (0 to 1) of policy ratios outside the objective's clip
    - `weight_variance`: E[(w - 1)^2] of its importance weights

    What is noise, by dtype, and by the golden's own noise floor and reference where it has them:

    - `noise_rms`: RMS difference that two clean builds may have where nothing else is known of the model
    - `outlier`: a token further off than this is an outlier
    - `sequence_rms`: a sequence of a larger RMS, its largest token left out, is an outlier
    - `support_flips`: share of tokens (0 to 1) that truncation may exclude on one side only; none without truncation
    - `support_depth`: an excluded token may have been so far inside the nucleus (probability mass, 0 to 1)
    - `near_tie`: a top-2 gap up to this makes a greedy divergence a near tie; the same for the edges of top-k and min-p.
      In bfloat16 two steps of a logit between 16 and 32: builds that cut mantissas off where others round turn one.

    `explicit` names the limits that a caller set: these hold as they are, with nothing added for noise.
    """

    mean_diff: float
    k3: float
    clip_share: float
    weight_variance: float
    noise_rms: float
    outlier: float
    sequence_rms: float
    support_flips: float
    support_depth: float
    near_tie: float
    objective: str = DEFAULT_OBJECTIVE
    explicit: frozenset[str] = frozenset()

    @property
    def fit_rms(self) -> float:
        """RMS (nats) up to which two computations are taken for the same one: the noise, and 1e-3 where that is less."""
        return max(self.noise_rms, 1e-3)

    def limits(self) -> dict[str, float]:
        """The limits by name."""
        return {name: getattr(self, name) for name in LIMITS}

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; a limit that bounds nothing is None."""
        limits = {name: limit if np.isfinite(limit) else None for name, limit in self.limits().items()}
        return limits | {"objective": self.objective, "explicit": sorted(self.explicit)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tolerance:
        """The inverse of `to_json`. Raises KeyError, TypeError, ValueError and UsageError for anything else."""
        limits = {name: np.inf if value[name] is None else float(value[name]) for name in LIMITS}
        return cls(**limits, objective=objective_of(value["objective"]).name, explicit=frozenset(map(str, value["explicit"])))

    def outliers(self, tokens: int) -> int:
        """How many sequences with an outlier token are allowed for among `tokens`, whatever the noise: one, and one more for
        every 5,000.
        """
        return 1 + tokens // 5000


def counts_allowed(few: int, seen: int, *, covered: float = 1.0, exact: bool = False) -> tuple[int, int]:
    """How many tokens or sequences that noise has moved pass, and beyond how many noise explains them no longer.

    `few` are allowed for in any case. `seen` is how many the golden's own errors make expected: another build has as many in
    the mean, and their count strays as the difference of two Poisson counts does, by sqrt(2 seen): twice that passes beside a
    rate half as large again, and four times that may still be noise beside a rate of 2.5. Where a reference covers a
    share of the golden, `covered`, up to twice as many may be noise. `exact`: nothing is between the two.
    """
    stray = (2 * seen) ** 0.5
    allowed = max(few, int(1.5 * seen + 2 * stray))
    return allowed, allowed if exact else int((2 - covered) * max(2 * few, few + int(2.5 * seen + 4 * stray) + 3))


#: The names of all limits.
LIMITS: Final = tuple(f.name for f in dataclasses.fields(Tolerance) if f.name not in ("objective", "explicit"))
#: Names of before, and how their values are read now: k3 is half the square of an RMS.
_RMS: Final = "rms_diff"
_GONE: Final = frozenset({"winsorize"})

#: Noise by dtype. bfloat16's RMS is prime-rl's nightly limit, twice over, as an RMS; between builds of vLLM 0.01 to 0.06 was
#: measured. float16 rounds 8 times finer; half of that gain is kept for sums in other orders. float32's is ten times
#: what was seen across versions. No outlier is less than half a nat, a ratio of 1.6: what is nearer, the effects measure.
_NOISE: Final[Mapping[str, Mapping[str, float]]] = {
    "float32": {"noise_rms": 1e-5, "outlier": 0.25, "sequence_rms": 0.1, "support_flips": 1e-3, "support_depth": 1e-3,
                "near_tie": 1e-3},
    "float16": {"noise_rms": 0.012, "outlier": 0.5, "sequence_rms": 0.1, "support_flips": 3e-3, "support_depth": 0.03,
                "near_tie": 0.03},
    "bfloat16": {"noise_rms": 0.045, "outlier": 0.5, "sequence_rms": 0.15, "support_flips": 0.01, "support_depth": 0.1,
                 "near_tie": 0.25},
}  # fmt: skip
DTYPES: Final = ("float64", *_NOISE)
#: What other kernels, which sum in another order, make larger: where one side is prefill and the other decode.
PREFILL_FACTOR: Final = 2.0
_BY_PATH: Final = ("noise_rms", "outlier", "sequence_rms", "support_flips", "support_depth", "near_tie")


def default_tolerance(dtype: str, paths: Iterable[TracePath] = ("decode",), objective: str = DEFAULT_OBJECTIVE) -> Tolerance:
    """The limits of an objective, and what noise a golden of this dtype (bfloat16 where it is not known) has along these paths.

    Raises UsageError for an objective that does not exist.
    """
    felt = objective_of(objective)
    name = {"float64": "float32"}.get(dtype, dtype)
    noise: dict[str, Any] = dict(_NOISE.get(name, _NOISE["bfloat16"]))
    if len(set(paths)) > 1 and name != "float32":
        noise |= {limit: noise[limit] * PREFILL_FACTOR for limit in _BY_PATH}
    return Tolerance(
        mean_diff=felt.mean_diff,
        k3=felt.k3,
        clip_share=felt.clip_share,
        weight_variance=np.inf if felt.weight_variance is None else felt.weight_variance,
        objective=felt.name,
        **noise,
    )


#: A noise floor's RMS times this is an outlier token, an outlier sequence.
_OUTLIER_TOKEN: Final = 30
_OUTLIER_SEQUENCE: Final = 5
#: The mass above a token moves with many logprobs at once, so with their RMS and not with the largest difference of one.
_DEPTH: Final = 10
#: Another build may have this many times the noise that other batch compositions have, and flips in proportion (measured: a
#: head in float32 flipped 14 tokens where batch compositions flipped 4).
_FLIP_FACTOR: Final = 4


#: A floor's RMS counts up to so many times the noise of its dtype.
_LARGEST_FLOOR: Final = 1.5


def with_floor(limits: Tolerance, floor: NoiseFloor | None) -> Tolerance:
    """Limits for a golden that knows the noise of its batch compositions; unchanged for one that does not.

    What is an outlier is at least 30 times the floor's RMS for tokens and 5 times for sequences (the clean maximum is 4.2
    times); nucleus flips go by the golden's own rate, the count that 4 times this rate exceeds once in 1,000 times. What the
    objective bears does not move: what matters to an update does not depend on the noise. A floor of more than 1.5 times what
    the dtype's noise is says no more than that: it is not what another build may do.
    """
    if floor is None or not np.isfinite(floor.rms):
        return limits
    rms = min(floor.rms, _LARGEST_FLOOR * limits.noise_rms)
    tokens = int(np.count_nonzero(~np.isnan(floor.logprobs).all(axis=0)))  # masked ones are NaN in all
    flips = poisson_quantile(0.999, _FLIP_FACTOR * (floor.flips + 1 / floor.repeats))
    return dataclasses.replace(
        limits,
        noise_rms=max(limits.noise_rms, rms),
        outlier=max(limits.outlier, _OUTLIER_TOKEN * rms),
        sequence_rms=max(limits.sequence_rms, _OUTLIER_SEQUENCE * rms),
        support_flips=flips / tokens,
        support_depth=max(limits.support_depth, _DEPTH * floor.rms),
        near_tie=max(limits.near_tie, 2 * floor.max_abs),
    )


#: A gap moves by the errors of two tokens in two builds.
_GAP_ERRORS: Final = 3.0
#: Where the golden's errors are not known, a near tie may be so many times what it is elsewhere.
_UNKNOWN_TIE: Final = 2.0


def with_reference(limits: Tolerance, expected: FloatArray, reference: Reference | None) -> Tolerance:
    """Limits for a golden, logprobs [N]: what is a near tie goes by its largest distance to its model, where that is known."""
    errors = np.empty(0) if reference is None else np.abs(reference.errors(expected))
    errors = errors[np.isfinite(errors)]
    if not len(errors):
        return dataclasses.replace(limits, near_tie=_UNKNOWN_TIE * limits.near_tie)
    largest = float(errors.max())
    return dataclasses.replace(limits, near_tie=max(limits.near_tie, _GAP_ERRORS * largest))


def make_tolerance(base: Tolerance, change: Tolerance | Mapping[str, Any] | str | None) -> Tolerance:
    """`base` with the limits that `change` names, or widened to those of the gap that it declares (`"fp8"`, see gaps.py).

    `rms_diff` is taken as a limit of k3, half its square. Raises UsageError for an unknown name or a value that is no number.
    """
    if change is None:
        return base
    if isinstance(change, str):
        wider = {name: max(getattr(base, name), limit) for name, limit in gap_of(change).limits.items()}
        return dataclasses.replace(base, **wider)
    if isinstance(change, Tolerance):
        return dataclasses.replace(change, explicit=frozenset(LIMITS))
    if not isinstance(change, Mapping):
        raise UsageError(f"tolerance is a Tolerance or a mapping of its limits ({', '.join(LIMITS)}), not {change!r}")
    found: dict[str, float] = {}
    for name, value in change.items():
        if name not in (*LIMITS, _RMS, *_GONE):
            raise UsageError(
                f"tolerance has no limit {name!r}{nearest(str(name), (*LIMITS, _RMS))}; known are {', '.join(LIMITS)}"
            )
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 0:
            raise UsageError(f"tolerance {name}={value!r}: must be a number, 0 or more")
        if name not in _GONE:
            found["k3" if name == _RMS else name] = float(value) ** 2 / 2 if name == _RMS else float(value)
    return dataclasses.replace(base, **found, explicit=base.explicit | found.keys())  # type: ignore[arg-type]


def parse_tolerance(lines: Iterable[str], dtype: str, paths: Iterable[TracePath]) -> dict[str, float]:
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
        make_tolerance(default_tolerance("float32"), {limit: number})
        if scope and scope[0] not in DTYPES:
            raise UsageError(f"parity_tolerance: {scope[0]!r} is no dtype{nearest(scope[0], DTYPES)}")
        fits = (not scope or scope[0] == dtype) and (len(scope) < 2 or scope[1] in places)
        if fits and len(scope) >= found.get(limit, (0, 0.0))[0]:
            found[limit] = (len(scope), number)
    return {limit: number for limit, (_, number) in found.items()}
