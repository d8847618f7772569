"""Two traces, measured over their identical tokens: the differences, numbers of them, and the gates that decide."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..golden.reference import Reference
from ..trace import Trace
from . import metrics as m
from .alignment import Alignment, align
from .effect_gates import effect_gates
from .evidence import Evidence
from .expert_routing import RoutingAgreement, routing_agreement
from .gate import Gate
from .intervals import detectable_share, distinct_sequences, prompt_numbers, share_bound
from .nucleus_flips import SupportFlips, support_flips
from .outliers import outlier_gates, outliers_of
from .shown import Shown
from .sides import Names, names_of
from .token_differences import Differences, Setting, setting_of
from .tolerance import Tolerance

#: In float32 a larger RMS than so many times the noise of builds is no noise.
_BEYOND: Final = 10


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measurement:
    """Two traces over their n aligned tokens, `rows` of each.

    `differences` are those of the tokens that have a finite logprob on both sides, `numbers` the metrics by name, `gates` what
    decides, `shown` what they say of other prompts; `sides` is what the two sides are called, `routing` how far they use the
    same experts, where both tell.
    """

    expected: Trace
    actual: Trace
    rows: Alignment
    limits: Tolerance
    differences: Differences
    setting: Setting
    numbers: Mapping[str, float]
    gates: tuple[Gate, ...]
    shown: Shown | None
    sides: tuple[str, str]
    routing: RoutingAgreement | None = None

    @property
    def names(self) -> Names:
        """What sentences call the two sides."""
        return names_of(self.sides)

    @property
    def compared(self) -> bool:
        """Whether any token has a difference."""
        return len(self.differences.d) > 0

    @property
    def exact(self) -> bool:
        """Whether something was compared, and every bit is the same."""
        return self.compared and not self.numbers["n_changed"]

    @property
    def failed(self) -> tuple[Gate, ...]:
        """The gates that fail."""
        return tuple(gate for gate in self.gates if not gate.ok)

    @property
    def unsure(self) -> bool:
        """Whether a gate does not pass."""
        return not all(gate.sure for gate in self.gates)

    @property
    def beyond_dtype(self) -> bool:
        """Whether the differences are larger than noise in this dtype explains, whatever an update bears."""
        noise = _BEYOND * self.limits.noise_rms * self.setting.enlarged
        return self.setting.fine and self.numbers["rms_diff"] > noise

    @property
    def distinct_sequences(self) -> int:
        """How many distinct sequences have a difference."""
        if not self.compared:
            return 0
        return len(np.unique(distinct_sequences(self.expected)[np.unique(self.differences.sequences)]))

    @property
    def broken_sequences(self) -> int:
        """How many sequences have a logprob that is no number."""
        expected, actual = self.expected.logprobs[self.rows.expected], self.actual.logprobs[self.rows.actual]
        return len(np.unique(m.sequence_numbers(self.expected, self.rows.expected)[_broken(expected, actual)]))

    def without_differences(self) -> Measurement:
        """The same without gates, for columns of two meanings: differences of those mean nothing."""
        numbers = {**self.numbers, **dict.fromkeys(m.DIFFERENCE_METRICS, float("nan"))}
        return dataclasses.replace(self, numbers=numbers, gates=())


def measure(expected: Trace, actual: Trace, limits: Tolerance, evidence: Evidence) -> Measurement:
    """Align two traces and measure them; d = actual - expected."""
    rows = align(expected, actual)
    e, a = expected.logprobs[rows.expected], actual.logprobs[rows.actual]
    finite = np.isfinite(e) & np.isfinite(a)
    flipped = (np.isneginf(e) != np.isneginf(a)) & ~(np.isnan(e) | np.isnan(a))
    differences = _differences(expected, e, a, finite, rows, evidence.reference)
    routing = routing_agreement(expected, actual, rows)
    numbers = _numbers(expected, actual, rows, e, a, differences.d, flipped)
    numbers |= {} if routing is None else routing.numbers
    flips = support_flips(expected, actual, rows, flipped, limits, evidence.reference)
    setting = setting_of(expected, evidence.routed, actual.dtype)
    gates = gates_of(differences, int(numbers["n_nan"]), flips, limits, setting, expected.num_sequences)
    return Measurement(
        expected=expected,
        actual=actual,
        rows=rows,
        limits=limits,
        differences=differences,
        setting=setting,
        numbers=numbers,
        gates=gates,
        shown=_what_it_shows(differences, gates),
        sides=evidence.sides,
        routing=routing,
    )


def policy_metrics(expected: Trace, policy_logprobs: Any, rows: Alignment) -> dict[str, float]:
    """The metrics of the aligned tokens without truncation; empty where one of the sides has none."""
    if policy_logprobs is None or expected.untruncated_logprobs is None:
        return {}
    e, a = expected.untruncated_logprobs[rows.expected], np.asarray(policy_logprobs)[rows.actual]
    finite = np.isfinite(e) & np.isfinite(a)
    return m.difference_metrics(a[finite].astype(np.float64) - e[finite])


def gates_of(
    rows: Differences, nan: int, flips: SupportFlips, limits: Tolerance, setting: Setting, sequences: int
) -> tuple[Gate, ...]:  # fmt: skip
    """All that decides: NaN, nucleus flips, the effects that the objective feels, outlier tokens and sequences.

    `sequences` is how many the golden has.
    """
    gates = [
        Gate(key="nan", value=nan, limit=0, fail_limit=0, low=nan, high=nan, unit="tokens"),
        Gate(
            key="nucleus_flips",
            value=flips.count,
            limit=flips.allowed,
            fail_limit=flips.unexplained,
            low=flips.count,
            high=flips.count,
            unit="tokens",
        ),
    ]
    if not len(rows.d):
        return tuple(gates)
    outliers = outliers_of(rows, limits, setting, flips.deep)
    # what the golden's own errors have too is noise, told by its number: an average of exponentials would hang on one token
    bulk = rows.where(~outliers.noise)
    return (*gates, *effect_gates(bulk, limits, setting), *outlier_gates(outliers, len(rows.d), limits, setting, sequences))


def _differences(
    expected: Trace, e: Any, a: Any, finite: Any, rows: Alignment, reference: Reference | None
) -> Differences:  # fmt: skip
    """The aligned tokens that have a finite logprob on both sides."""
    sequences = m.sequence_numbers(expected, rows.expected)
    if finite.all():
        d = np.subtract(a, e, dtype=np.float64)
    else:
        d, sequences = a[finite].astype(np.float64) - e[finite], sequences[finite]
    expected_error = actual_error = np.full(len(d), np.nan)
    if reference is not None:
        truth = reference.logprobs[rows.expected][finite]
        with np.errstate(invalid="ignore"):
            expected_error, actual_error = (np.subtract(x[finite], truth, dtype=np.float64) for x in (e, a))
        unknown = ~np.isfinite(truth)
        expected_error[unknown] = actual_error[unknown] = np.nan
    return Differences(
        d=d,
        sequences=sequences,
        prompts=prompt_numbers(expected)[sequences],
        expected_error=expected_error,
        actual_error=actual_error,
    )


def _numbers(
    expected: Trace, actual: Trace, rows: Alignment, e: Any, a: Any, d: m.Doubles, flipped: Any
) -> dict[str, float]:  # fmt: skip
    excluded, flips = np.count_nonzero(np.isneginf(e) & np.isneginf(a)), np.count_nonzero(flipped)
    return {
        "n_tokens": float(len(d)),
        "n_sequences": float(expected.num_sequences - rows.missing_sequences),
        "coverage": (len(d) + excluded + flips) / rows.wanted if rows.wanted else 0.0,
        "n_nan": float(np.count_nonzero(_broken(e, a))),
        "n_missing": float(np.count_nonzero(np.isnan(e))),
        "n_excluded": float(excluded),
        "n_changed": float(np.count_nonzero((e != a) & ~np.isnan(e))),
        "support_flips": float(flips),
        "diverged_sequences": float(rows.diverged_sequences),
        "missing_sequences": float(rows.missing_sequences),
        **m.difference_metrics(d),
        **m.top_k_metrics(expected, actual, rows),
        **m.kept_set_metrics(expected, actual, rows),
    }


def _broken(e: Any, a: Any) -> Any:
    """Numbers [n] that are none: NaN of this run, +inf of either side."""
    return np.isnan(a) | np.isposinf(a) | np.isposinf(e)


def _what_it_shows(rows: Differences, gates: tuple[Gate, ...]) -> Shown | None:
    """What a comparison says of other prompts: an exact binomial bound over distinct prompts, whatever their noise."""
    gate = next((g for g in gates if g.key == "outlier_sequences"), None)
    if gate is None:
        return None
    off = np.where(rows.known, rows.actual_error, rows.d)
    names, first, places = np.unique(rows.sequences, return_index=True, return_inverse=True)
    spread = m.sequence_rms(off, places, np.inf)
    prompts = rows.prompts[first]
    bad = len(np.unique(prompts[spread > gate.threshold]))
    count = len(np.unique(prompts))
    return Shown(
        prompts=count,
        sequences=len(names),
        threshold=gate.threshold,
        bad_prompts=bad,
        share=share_bound(bad, count),
        reach=detectable_share(count, int(gate.limit)),
        tokens_allowed=int(next(g.limit for g in gates if g.key == "outlier_tokens")),
        sequences_allowed=int(gate.limit),
    )
