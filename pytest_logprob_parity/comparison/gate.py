"""A gate: one number that decides, with its interval and its limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from .json_values import finite_or_none
from .vocabulary import Verdict

GateKey: TypeAlias = Literal[
    "nan", "nucleus_flips", "mean_diff", "k3", "clip_share", "weight_variance", "outlier_tokens", "outlier_sequences"
]

OUTLIERS: Final[tuple[GateKey, ...]] = ("outlier_tokens", "outlier_sequences")
#: What a gate's number is, in words.
GATE_NAMES: Final[Mapping[GateKey, str]] = {
    "nan": "NaN or +inf",
    "nucleus_flips": "nucleus flips",
    "mean_diff": "|mean difference|",
    "k3": "k3 (KL)",
    "clip_share": "share of ratios outside the clip",
    "weight_variance": "variance of the weights",
    "outlier_tokens": "with an outlier token (>",
    "outlier_sequences": "with an RMS above",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How far both sides are from the reference, in the unit of a gate, and the interval and the limits of `actual`.

    The limits are what the objective bears beside the golden's own error; `limit` with what a clean build may add
    and pass, `fail_limit` with what noise explains at most.
    """

    expected: float
    actual: float
    limit: float
    fail_limit: float
    low: float
    high: float

    @property
    def outcome(self) -> Verdict:
        """Whether the error has grown by what matters."""
        return _outcome(self.low, self.high, self.limit, self.fail_limit)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        return {
            "golden": finite_or_none(self.expected),
            "actual": finite_or_none(self.actual),
            "limit": finite_or_none(self.limit),
            "fail_limit": finite_or_none(self.fail_limit),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """One number that decides, with its interval and limits, all in `unit`.

    - it passes where `high` is within `limit`, fails where `low` is above `fail_limit`, and is unverified between
    - `errors` is the same of the distances to the reference: an effect that passes there passes, for nothing has got worse;
      one fails only where it fails there and matters itself
    - `hidden`: noise alone exceeds what the objective bears, so a difference that does not pass may be noise
    - `threshold` is what makes an outlier; `worst` the largest one, `unexplained` what no noise explains (nats), and `beyond`
      the outcome where the worst is above that
    """

    key: GateKey
    value: float
    limit: float
    fail_limit: float
    low: float
    high: float
    unit: str = ""
    errors: Errors | None = None
    hidden: bool = False
    threshold: float = math.nan
    worst: float = math.nan
    unexplained: float = math.nan
    beyond: Verdict | None = None

    @property
    def outcome(self) -> Verdict:
        """`pass`, `fail` or `unverified`."""
        if self.beyond is not None:
            return "fail" if self.low > self.fail_limit else self.beyond
        direct = _outcome(self.low, self.high, self.limit, self.fail_limit)
        if direct == "pass" or (self.errors is None and not self.hidden):
            return direct
        if self.errors is not None and self.errors.outcome == "pass" and not self.hidden:
            return "pass"
        if self.hidden or self.errors is None:
            return "unverified"
        return "fail" if self.errors.outcome == "fail" and self.low > self.limit else "unverified"

    @property
    def between(self) -> bool:
        """Whether an effect itself, not its interval alone, lies between what passes and what fails: no prompts decide that."""
        if self.low == self.high:
            return False  # a count
        if self.errors is not None and self.errors.outcome != "pass":
            return self.errors.limit < self.errors.actual <= self.errors.fail_limit
        return self.limit < self.value <= self.fail_limit

    @property
    def ok(self) -> bool:
        """Whether it does not fail."""
        return self.outcome != "fail"

    @property
    def sure(self) -> bool:
        """Whether it passes."""
        return self.outcome == "pass"

    @property
    def excess(self) -> float:
        """How many times the limit of failing the value is; infinite where nothing is allowed."""
        if self.beyond is not None:
            return max(self.value / self.fail_limit if self.fail_limit else math.inf, self.worst / self.unexplained)
        if self.errors is not None:
            return self.errors.actual / self.errors.fail_limit if self.errors.fail_limit else math.inf
        return self.value / self.fail_limit if self.fail_limit else math.inf if self.value else 0.0

    @property
    def name(self) -> str:
        """The number in words; code goes by `key`."""
        if not math.isfinite(self.threshold):
            return GATE_NAMES[self.key]
        return f"{GATE_NAMES[self.key]} {self.threshold:.2g} nats{')' * (self.key == 'outlier_tokens')}"

    def to_json(self) -> dict[str, Any]:
        """As JSON values; what is not a number becomes None."""
        return {
            "key": self.key,
            "name": self.name,
            "value": finite_or_none(self.value),
            "limit": finite_or_none(self.limit),
            "fail_limit": finite_or_none(self.fail_limit),
            "unit": self.unit,
            "outcome": self.outcome,
            "ok": self.ok,
            "low": finite_or_none(self.low),
            "threshold": finite_or_none(self.threshold),
            "bound": finite_or_none(self.high),
            "errors": None if self.errors is None else self.errors.to_json(),
        }


def _outcome(low: float, high: float, limit: float, fail_limit: float) -> Verdict:
    """Where an interval lies: NaN, which is no number to compare, fails."""
    if math.isnan(low) or math.isnan(high) or low > fail_limit:
        return "fail"
    return "pass" if high <= limit else "unverified"
